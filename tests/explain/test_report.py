"""The report holds what the record and the data say, escapes all texts, and works on every sort of task."""

import base64
import dataclasses
import gzip
import html.parser
import json
import re
import sys

import builders
import numpy as np
import plotly.graph_objects
import pytest
from typer.testing import CliRunner

from spin_hf.calibration.errors import CalibrationError
from spin_hf.calibration.resampling import bootstrap_interval
from spin_hf.calibration.task import METRICS
from spin_hf.cli import app
from spin_hf.explain.cards import neuron_cards
from spin_hf.explain.data_charts import confusion_grid, overlap_grid
from spin_hf.explain.evaluation import Evaluated
from spin_hf.explain.page import _plotly, shown
from spin_hf.explain.plotly_json import plotly_json
from spin_hf.explain.report import Report
from spin_hf.prediction import Prediction

HOSTILE = [
    "a good film </script><script>window.hacked = 1</script>",
    "a <b>bad</b> film <img src=x onerror='window.hacked = 2'>",
    "good \x00 \x07 \x1b[31m film",
    "great \u202emlif\u202c فيلم جيد 👩‍👩‍👧",
    "{{ 7 * 7 }} {% raw %} awful &amp; dull \u2028 --> ]]>",
    "bad " * 30_000,
]


class Parsed(html.parser.HTMLParser):
    """Tags, and text by whether it stands in a script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self._open = [], "", [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag == "script"
        if self._open:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._open = False

    def handle_data(self, data):
        if self._open:
            self.scripts[-1] += data
        else:
            self.text += data


def charts_of(parsed):
    return json.loads(parsed.scripts[0])


def loaded(parsed):
    """Whatever a browser would fetch."""
    names = ("src", "srcset", "data", "poster", "action")
    found = [attrs[name] for _, attrs in parsed.tags for name in names if name in attrs]
    return found + [attrs.get("href") for tag, attrs in parsed.tags if tag in ("link", "base", "use", "image")]


@pytest.fixture(scope="session")
def rows():
    return builders.make_sentiment_rows(40, seed=5)


@pytest.fixture(scope="session")
def evaluated(sentiment, rows):
    return Evaluated.of(sentiment.model, sentiment.tokenizer, rows, "held out films")


@pytest.fixture(scope="session")
def page(sentiment, evaluated):
    return Parsed(Report("films", sentiment.result, (evaluated,)).html())


def test_it_holds_the_record_and_the_scores(page, sentiment, evaluated):
    result = sentiment.result
    for score in [*result.baselines.values(), result.chosen.score, evaluated.right.mean()]:
        assert f"{score:.4f}" in page.text
    assert f"always “{('bad', 'good')[np.bincount(evaluated.labels).argmax()]}”" in page.text
    charts = charts_of(page)
    by_block = {t["name"]: t for t in charts["by-block"]["data"]}
    drawn = {(f"{kind}.{x}", y) for kind, name in (("hidden", "hidden state, mean"), ("ffn", "FFN neurons, mean"))
             for x, y in zip(by_block[name]["x"], by_block[name]["y"], strict=True)}  # fmt: skip
    assert drawn == {(probe["tap"], probe["score"]) for probe in result.probes}
    kept = sum(value or 0 for row in charts["kept-neurons"]["data"][0]["z"] for value in row)
    assert kept == sum(entry["count"] for entry in result.kept) == sentiment.model.config.num_features
    counts = np.array([[value or 0 for value in row] for row in charts["confusion"]["data"][0]["z"]])
    assert counts.sum() == len(evaluated.texts)
    assert np.trace(counts) == evaluated.right.sum()
    assert set(charts) == {attrs["data-chart"] for _, attrs in page.tags if "data-chart" in attrs}


def test_every_kind_of_mistake_has_texts(page, evaluated):
    assert not evaluated.right.all()
    for cell in evaluated.cells():
        assert all(example.text in page.text for example in cell.examples)
        assert len(cell.examples) == min(3, cell.count)
    cells = {attrs["id"] for tag, attrs in page.tags if tag == "details" and attrs.get("id", "").startswith("cell-")}
    pairs = zip(evaluated.labels, evaluated.prediction.labels, strict=True)
    assert cells == {f"cell-{true}-{said}" for true, said in pairs}


def test_the_cards_are_those_of_the_heaviest_neurons(page, sentiment, evaluated):
    wanted = neuron_cards(sentiment.model, sentiment.tokenizer, evaluated.texts, count=3)[:12]
    assert sum(tag == "article" for tag, _ in page.tags) == len(wanted) == 12
    for card in wanted:
        assert f"{card.tap}, neuron {card.neuron}" in page.text
    marked = sum(len(card.high_words) + len(card.low_words) * card.low_words_say_something for card in wanted)
    assert sum(tag == "mark" for tag, _ in page.tags) == marked
    for card in wanted:
        for example in (*card.high_texts, *card.low_texts):
            assert evaluated.texts[example.text] in page.text


def test_neurons_that_say_the_same_are_named(sentiment, evaluated):
    everything = neuron_cards(sentiment.model, sentiment.tokenizer, evaluated.texts, threshold=0.3)
    shown = dataclasses.replace(evaluated, cards=everything)
    page = Parsed(Report("films", sentiment.result, (shown,)).html())
    several = [group for group in everything.groups if len(group) > 1]
    assert len(several) > 1
    assert f"The {len(everything)} neurons make {len(everything.groups)} groups" in page.text
    found = shown.groups()
    assert [group.share for group in found] == sorted((group.share for group in found), reverse=True)
    assert {frozenset(everything.cards.index(card) for card in group.cards) for group in found} <= set(
        map(frozenset, several)
    )
    for group in found:
        assert f"{100 * group.share:.1f}%" in page.text
        assert f"{group.cards[1].tap}, neuron {group.cards[1].neuron}" in page.text
    assert "one column of the head tells the two apart" in page.text
    assert "overlap" not in charts_of(page)
    alone = neuron_cards(sentiment.model, sentiment.tokenizer, evaluated.texts, threshold=0.999999)
    page = Parsed(Report("films", sentiment.result, (dataclasses.replace(shown, cards=alone),)).html())
    assert "each says something of its own" in page.text


def test_the_overlap_of_labels_is_a_chart(make):
    source = builders.make_sentiment_rows(90)
    source["label"] = [label if row % 3 else 2 for row, label in enumerate(source["label"])]
    made = make(source, labels=["bad", "good", "<b>odd</b>"], etas=[1.0])
    evaluated = Evaluated.of(made.model, made.tokenizer, source, "films")
    page = Parsed(Report("films", made.result, (evaluated,)).html())
    (trace,) = charts_of(page)["overlap"]["data"]
    overlap = np.array(trace["z"], dtype=float)
    wanted = np.where(np.eye(3), np.nan, evaluated.cards.overlap.round(2))
    np.testing.assert_allclose(overlap, wanted)
    assert trace["texttemplate"] == "%{z:,.2f}"
    many = dataclasses.replace(
        evaluated.cards, names=tuple(f"label {i}" for i in range(60)), overlap=np.random.default_rng(0).random((60, 60))
    )
    grid = overlap_grid(many)
    assert sum(value is not None for row in grid.values for value in row) == 1600
    assert len(list(grid.table()[1])) <= 1600


def test_intervals_of_other_metrics(make):
    """Of validation as the record has them, of a test as a bootstrap of the matrix's rows gives them."""
    made = make(builders.make_sentiment_rows(), metric="macro_f1", labels=["bad", "good"])
    intervals = made.result.intervals
    assert set(intervals) == {*made.result.baselines, "SPIN"}
    for name, score in [*made.result.baselines.items(), ("SPIN", made.result.chosen.score)]:
        low, high = intervals[name]
        assert low <= score <= high
        assert low < high
    test = {"rows": 60, "macro_f1": 0.8, "expected_calibration_error": 0.1, "confusion_matrix": [[25, 5], [7, 23]],
            "labels": ["bad", "good"]}  # fmt: skip
    rows = {(row.on, row.what, row.score.metric): row.score for row in Report("films", made.result, test=test)._rows()}
    assert rows[made.result.data["evaluated"], "SPIN", "Macro F1"].interval == intervals["SPIN"]
    true, given = np.repeat([0, 0, 1, 1], [25, 5, 7, 23]), np.repeat([0, 1, 0, 1], [25, 5, 7, 23])
    assert rows["test", "SPIN", "Macro F1"].interval == bootstrap_interval(METRICS["macro_f1"][0], true, given)
    assert rows["test", "SPIN", "Expected calibration error"].interval is None
    old = dataclasses.replace(made.result, intervals={})
    assert "–" in Parsed(Report("films", old).html()).text


def test_it_is_one_file_that_loads_nothing(page):
    assert loaded(page) == []
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")
    style = (page.text.split("</style>")[0],)
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert "Plotly" in gzip.decompress(base64.b64decode(page.scripts[1])).decode()


def test_texts_and_names_come_out_as_text(make):
    labels = ["<i>bad</i>", "good</script>$x$ %{z}"]
    made = make(builders.make_sentiment_rows(), labels=labels)
    source = {"text": HOSTILE, "label": [1, 0, 1, 1, 0, 0]}
    evaluated = Evaluated.of(made.model, made.tokenizer, source, "<u>data</u>")
    report = Report("<em>name</em>", made.result, (evaluated,))
    text = report.html()
    text.encode("utf-8")
    page = Parsed(text)
    assert not {"b", "i", "u", "em", "img"} & {tag for tag, _ in page.tags}
    assert [attrs.get("type", "code") for tag, attrs in page.tags if tag == "script"] == [
        "application/json",
        "application/octet-stream",
        "code",
    ]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text)
    assert "{{ 7 * 7 }}" in page.text
    assert "␀" in page.text
    assert f"({len(HOSTILE[-1]):,} characters)" in page.text
    for chart in charts_of(page).values():
        assert not re.search(r"<(?!br>|extra>|/extra>)", json.dumps(chart))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_chart_is_valid_plotly_and_a_figure_for_papers(sentiment, evaluated, tmp_path):
    from spin_hf.explain.paper_figures import save_figures

    charts = Report("films", sentiment.result, (evaluated,)).charts()
    for chart in charts:
        made = plotly_json(chart)
        plotly.graph_objects.Figure(json.loads(json.dumps(made)))
        head, rows = chart.table()
        assert {len(row) for row in rows} <= {len(head)}
    hostile = confusion_grid(["$a_b$", "بد", "_c"], [[1, 2, 0], [0, 4, 0], [0, 0, 0]], rows=7, of="$x$")
    written = save_figures([*charts, hostile], tmp_path)
    assert len({path.name for path in written}) == 2 * len({chart.name for chart in charts})
    for path in written:
        start = path.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in path.read_bytes()


def test_without_data_it_says_what_is_missing(sentiment, tmp_path):
    text = sentiment.result.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    page = Parsed(text)
    assert page.text.count('result.to_html("report.html", model=model, tokenizer=tokenizer, data=test)') == 4
    assert "confusion" not in charts_of(page)
    assert "by-block" in charts_of(page)


def test_to_html_with_data(sentiment, rows, tmp_path):
    path = sentiment.result.to_html(
        tmp_path / "new" / "report.html", model=sentiment.model, tokenizer=sentiment.tokenizer, data=rows
    )
    assert "confusion" in charts_of(Parsed(path.read_text(encoding="utf-8")))
    with pytest.raises(CalibrationError, match="model=, tokenizer="):
        sentiment.result.to_html(path, data=rows)


def test_150_classes(sentiment):
    rng = np.random.default_rng(0)
    names = tuple(f"class number {i} of many, with a long name" for i in range(150))
    logits = rng.normal(size=(900, 150))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    prediction = Prediction(logits, probabilities, names, "single_label_classification", 0)
    texts = [f"text {i} " + " ".join(rng.choice(builders.NEUTRAL, 60)) for i in range(900)]
    evaluated = Evaluated("many", texts, None, rng.integers(0, 150, 900), prediction)
    page = Parsed(Report("many", sentiment.result, (evaluated,)).html())
    (trace,) = charts_of(page)["confusion"]["data"]
    assert len(trace["z"]) == len(set(trace["x"])) == len(set(trace["y"])) == 150
    cells = len({*zip(evaluated.labels.tolist(), prediction.labels.tolist(), strict=True)})
    with_texts = sum(attrs.get("id", "").startswith("cell-") for tag, attrs in page.tags if tag == "details")
    assert with_texts == 400
    assert f"{cells - 400} rarer cells have no texts here" in page.text
    assert len(page.scripts[0]) + len(page.text) < 1_000_000


def test_what_its_words_say_is_written_below_each_example(page, evaluated):
    for _, examples in evaluated.examples():
        for example in examples:
            heat = evaluated.heat[example.row]
            told = ", ".join(f"“{word}” {value:+.2f}" for word, value in heat.speaking[0]) or "no word"
            assert f"For {heat.label}: {told}." in page.text


def test_cross_validation_is_called_so(make):
    made = make(builders.make_sentiment_rows(40), validation_fraction=None, cv=3, prefer="score")
    page = Parsed(Report("folds", made.result).html())
    assert "by 3-fold cross-validation, so its score there flatters" in page.text
    assert "validation texts" not in page.text.replace("3-fold cross-validation", "")
    assert "(3-fold cross-validation)" in page.text


def test_the_head_of_a_few_texts_is_not_called_chosen(make):
    made = make(builders.make_sentiment_rows(40), validation_fraction=None, cv=3)
    page = Parsed(Report("folds", made.result).html())
    assert "whatever it scores, so its score hardly flatters" in page.text
    assert "was chosen from" not in page.text
    assert "How much of the salience is needed" not in page.text  # one eta


def test_surrogates_are_no_text_of_a_file():
    assert shown("a\ud800b\x00\ufffe") == "a�b␀�"


def test_one_feature(make):
    made = make(builders.make_sentiment_rows(), kinds=["ffn"], max_features=1, etas=[0.1])
    evaluated = Evaluated.of(made.model, made.tokenizer, builders.make_sentiment_rows(10), "few")
    assert made.model.config.num_features == 1
    page = Parsed(Report("one", made.result, (evaluated,)).html())
    assert "reads 1 neuron," in page.text
    assert "The neuron that moves the answers most" in page.text
    for chart in charts_of(page).values():
        assert all(trace["x"][0] < trace["x"][1] for trace in chart["data"] if trace.get("mode") == "lines")


def test_an_exit_that_was_kept(with_exits, rows, tmp_path):
    """Its record has no confidences; with data they are measured."""
    folder, kept = tmp_path / "several", tmp_path / "one"
    with_exits.model.save_pretrained(folder)
    with_exits.tokenizer.save_pretrained(folder)
    with_exits.result.save(folder / "calibration.json")
    wanted = with_exits.result.exits[0]
    several = Report("several", with_exits.result).html()
    assert "Heads that the classifier keeps" in several
    least = with_exits.result.chosen.depth
    assert (f"the classifier needs {least}, its exits all" in several) == (with_exits.result.blocks > least)
    assert CliRunner().invoke(app, ["keep-exit", str(folder), "--exit", "0", "--out", str(kept)]).exit_code == 0
    assert CliRunner().invoke(app, ["report", str(kept)]).exit_code == 0
    page = Parsed((kept / "report.html").read_text(encoding="utf-8"))
    assert f"It knows 2 labels, reads {wanted.num_features:,} neuron" in page.text
    assert f"runs {wanted.depth} of the backbone's blocks" in page.text
    assert "The record has no confidences of this head." in page.text
    assert "Heads that the classifier keeps" not in page.text
    assert not {"reliability", "coverage"} & set(charts_of(page))
    (kept / "test.json").write_text(json.dumps([{"text": t, "label": n} for t, n in zip(*rows.values(), strict=True)]))
    result = CliRunner().invoke(app, ["report", str(kept), "--data", str(kept / "test.json")])
    assert result.exit_code == 0, result.output
    assert "reliability-data" in charts_of(Parsed((kept / "report.html").read_text(encoding="utf-8")))


def test_regression(make):
    source = builders.make_sentiment_rows()
    source["label"] = [label + 0.1 * (row % 3) for row, label in enumerate(source["label"])]
    made = make(source, problem_type="regression")
    evaluated = Evaluated.of(made.model, made.tokenizer, source, "numbers")
    page = Parsed(Report("numbers", made.result, (evaluated,)).html())
    charts = charts_of(page)
    assert {"numbers", "by-block"} <= set(charts)
    assert not {"reliability", "coverage", "confusion"} & set(charts)
    assert charts["numbers"]["data"][0]["x"] == evaluated.labels.tolist()
    assert "Farthest off" in page.text


def test_several_labels(make):
    source = builders.make_sentiment_rows()
    source["label"] = [["good"] if label else ["bad", "dull"] for label in source["label"]]
    made = make(source, problem_type="multi_label_classification", labels=["bad", "dull", "good", "never"])
    evaluated = Evaluated.of(made.model, made.tokenizer, source, "films")
    page = Parsed(Report("films", made.result, (evaluated,)).html())
    (bars,) = charts_of(page)["by-label"]["data"]
    assert set(bars["y"]) == {"bad", "dull", "good"}
    found = {row.name: row for row in evaluated.label_rows()}
    assert found["bad"].support == 40
    assert found["never"].recall is None


def test_intervals_hold_the_score_and_shrink_with_rows(sentiment, evaluated):
    scores = {s.metric: s for s in evaluated.scores("accuracy", neurons=1, blocks=1)[:4]}
    for score in scores.values():
        low, high = score.interval
        assert low <= score.value <= high
    again = dataclasses.replace(
        evaluated, texts=evaluated.texts * 9, labels=np.tile(evaluated.labels, 9),
        prediction=dataclasses.replace(
            evaluated.prediction, logits=np.tile(evaluated.prediction.logits, (9, 1)),
            probabilities=np.tile(evaluated.prediction.probabilities, (9, 1)),
        ),
    )  # fmt: skip
    for score in again.scores("accuracy", neurons=1, blocks=1)[:4]:
        low, high = scores[score.metric].interval
        assert score.interval[1] - score.interval[0] < 0.5 * (high - low)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result


def test_the_command(folder, tmp_path):
    data = tmp_path / "test.jsonl"
    source = builders.make_sentiment_rows(20, seed=3)
    names = ["bad", "good"]
    with data.open("w") as file:
        for text, label in zip(source["text"], source["label"], strict=True):
            file.write(json.dumps({"text": text, "label": names[label]}) + "\n")
    run(folder, "--data", data, "--figures", tmp_path / "figures")
    page = Parsed((folder / "report.html").read_text(encoding="utf-8"))
    assert "test.jsonl" in page.text
    assert {"confusion.png", "confusion.svg", "by-block.svg"} <= {p.name for p in (tmp_path / "figures").iterdir()}
    run(folder, "--out", tmp_path / "bare.html")
    assert f"spin-hf report {folder} --data FILE" in Parsed((tmp_path / "bare.html").read_text()).text


def test_the_command_says_what_is_wrong(folder, tmp_path, monkeypatch):
    assert "cards and reports are made from it" in run(tmp_path, code=2).stderr
    assert "there is none" in run(folder, "--text-column", "body", code=2).stderr
    assert "There is no folder" in run(tmp_path / "nowhere", code=2).stderr
    assert f"--out {tmp_path} is a folder" in " ".join(run(folder, "--out", tmp_path, code=2).stderr.split())
    assert "./nothing.csv is not a file" in run(folder, "--data", "./nothing.csv", code=2).stderr
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    _plotly.cache_clear()
    assert "pip install 'spin_hf[report]'" in run(folder, code=2).stderr
