"""The card says what the record says, in words and in the Hub's own vocabulary, and nothing about the machine."""

import json
import re
import shutil
import sys

import builders
import markdown_it
import pytest
from huggingface_hub import ModelCard

from spin_hf import CalibrationResult, SpinForSequenceClassification, spin_calibrate
from spin_hf.hub import CardError, layer_profile, write_card
from spin_hf.hub.card import card_text
from spin_hf.hub.folder import Checkpoint

TEST = {
    "rows": 400,
    "truncated": 0,
    "accuracy": 0.84,
    "macro_f1": 0.8125,
    "labels": ["bad", "good"],
    "confusion_matrix": [[161, 39], [25, 175]],
}


def shown(text: str) -> str:
    """The card as HTML, without its YAML head."""
    return markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("---\n", 2)[2])


def cells(html: str) -> set[str]:
    return {part.split(">", 1)[1].split("</t")[0] for part in html.split("<t")[1:] if part[0] in "dh" and ">" in part}


def test_the_hub_reads_its_fields(classifier):
    path = write_card(
        classifier, test=TEST, base_model="someone/tiny-bert", dataset="someone/films", license="mit", language="en"
    )
    data = ModelCard.load(path).data
    assert (data.library_name, data.pipeline_tag) == ("spin_hf", "text-classification")
    assert {"spin_hf", "text-classification", "arxiv:2311.15983"} <= set(data.tags)
    assert (data.base_model, data.datasets, data.license, data.language) == (
        *("someone/tiny-bert", ["someone/films"], "mit", "en"),
    )
    assert data.metrics == ["accuracy", "f1"]
    assert data.model_name == "films"
    found = [(r.metric_type, r.metric_args, r.metric_value, r.dataset_type, r.dataset_split) for r in data.eval_results]
    assert found == [
        ("accuracy", None, 0.84, "someone/films", "test"),
        ("f1", {"average": "macro"}, 0.8125, "someone/films", "test"),
    ]


def test_the_text_holds_the_record(classifier):
    text = write_card(classifier, test=TEST, dataset="Films of a town").read_text(encoding="utf-8")
    result = CalibrationResult.load(classifier / "calibration.json")
    found = cells(shown(text))
    for score in [*result.baselines.values(), TEST["macro_f1"]]:
        assert f"{score:.4f}" in found
    assert f"<strong>{result.chosen.score:.4f}</strong>" in found
    assert "0.8400 ± 0.0183" in found  # sqrt(0.84 * 0.16 / 400)
    assert {"161", "39", "25", "175"} <= found
    train, validation = result.data["train_rows"], result.data["eval_rows"]
    assert f"Films of a town: {train} texts to train on, {validation} to choose by, 400 to test" in found
    for entry in result.kept:
        assert str(entry["count"]) in found
    assert f"{result.chosen.depth} of 3" in found
    assert f"{result.seconds['total']:.1f}" in found
    assert "bad, good" in found
    assert f"{result.confidence.before.expected_calibration_error:.4f}" in text


def test_a_trained_backbone_is_not_called_untouched_and_class_weights_are_told(classifier):
    text = write_card(classifier).read_text(encoding="utf-8")
    assert "without training it" in text
    assert "stays behind a fine-tuned one" in text
    record = classifier / "calibration.json"
    values = json.loads(record.read_text(encoding="utf-8"))
    values["settings"] |= {"recalibrate": True, "class_weight": [0.625, 2.5]}
    record.write_text(json.dumps(values), encoding="utf-8")
    text = write_card(classifier).read_text(encoding="utf-8")
    assert "which was trained or adapted" in text
    assert "bad 0.625, good 2.5, which shift the probabilities" in cells(shown(text))
    assert not [
        claim for claim in ("without training", "No weight", "frozen backbone", "frozen-backbone") if claim in text
    ]


def test_without_a_test_set_the_card_says_so(classifier):
    path = write_card(classifier)
    first = path.read_bytes()
    assert write_card(classifier).read_bytes() == first
    (only,) = ModelCard.load(path).data.eval_results
    assert (only.dataset_split, only.metric_name) == ("validation", "Accuracy on the rows that chose the model")
    assert only.metric_value == round(CalibrationResult.load(classifier / "calibration.json").chosen.score, 4)
    assert "No test set was scored" in path.read_text(encoding="utf-8")


def test_the_licence_is_the_backbones_own(classifier, backbone_folder, tmp_path, caplog):
    assert ModelCard.load(write_card(classifier)).data.license == "mit"
    (classifier / "README.md").unlink()
    bare = tmp_path / "bare"
    bare.mkdir()
    path = write_card(classifier, backbone=bare)
    assert ModelCard.load(path).data.license is None
    assert "unknown" in path.read_text(encoding="utf-8")


def test_a_relative_folder_is_not_taken_for_a_hub_id(made, backbone_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(backbone_folder.parent.parent)
    relative = backbone_folder.relative_to(backbone_folder.parent.parent)
    assert len(relative.parts) == 2  # it reads like owner/name
    folder = made(tmp_path / "films", backbone=str(relative))
    monkeypatch.chdir(tmp_path)
    assert ModelCard.load(write_card(folder)).data.base_model is None


def test_a_backbone_from_a_folder_leaves_no_path(classifier, backbone_folder):
    text = write_card(classifier).read_text(encoding="utf-8")
    assert str(backbone_folder.parent) not in text
    assert str(classifier.parent) not in text
    assert ModelCard(text).data.base_model is None
    assert "a bert model" in text
    with pytest.raises(CardError, match="no Hub id"):
        write_card(classifier, base_model=str(backbone_folder))


NASTY = [
    "a|b",
    "<script>alert(1)</script>",
    "[x](http://y) *z* _w_ `q` $1$",
    "two\nlines --- # end",
    "back\\slash & ~~co~~",
]


def test_labels_show_as_they_are(classifier):
    record = classifier / "calibration.json"
    values = json.loads(record.read_text(encoding="utf-8"))
    values["data"]["labels"] = NASTY
    record.write_text(json.dumps(values), encoding="utf-8")
    count = len(NASTY)
    test = {**TEST, "labels": NASTY, "confusion_matrix": [[0] * count] * count}
    text = write_card(classifier, test=test, dataset="x: {y}\n- 'z'").read_text(encoding="utf-8")
    html = shown(text)
    assert "<script" not in html
    assert '<a href="http://y"' not in html
    found = {cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for cell in cells(html)}
    assert {" ".join(name.split()) for name in NASTY} <= found
    assert ModelCard(text).data.eval_results[0].dataset_name == "x: {y} - 'z'"


def test_what_a_person_added_stays(classifier):
    path = write_card(classifier, test=TEST, dataset="films", language="en", license="mit")
    card = ModelCard.load(path)
    card.data.tags.append("cinema")
    card.data["thumbnail"] = "poster.png"
    card.data.license = "apache-2.0"
    card.save(path)
    again = ModelCard.load(write_card(classifier)).data
    assert again.tags[-1] == "cinema"
    assert (again["thumbnail"], again.license, again.language) == ("poster.png", "apache-2.0", "en")
    assert again.eval_results[0].dataset_name == "films"
    assert again.eval_results[0].metric_value == 0.84
    before = path.read_bytes()
    write_card(classifier)
    assert path.read_bytes() == before


def test_a_model_that_was_pruned_since_is_told(classifier):
    assert "were changed after" not in write_card(classifier).read_text(encoding="utf-8")
    path = classifier / "calibration.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    now = values["chosen"]["num_features"]
    values["kept"][-1]["count"] += 3  # as if the model had lost three since
    values["chosen"]["num_features"] += 3
    path.write_text(json.dumps(values), encoding="utf-8")
    text = write_card(classifier).read_text(encoding="utf-8")
    assert f"it had {now + 3} then and has {now} now" in text
    assert f"kept the {now} neurons" in text


def test_a_trained_backbone_is_no_frozen_one(classifier):
    frozen = ("without training it", "No weight of the backbone", "A frozen backbone")
    text = write_card(classifier).read_text(encoding="utf-8")
    assert all(words in text for words in frozen)
    model = SpinForSequenceClassification.from_pretrained(classifier)
    options = {"kinds": ["hidden"], "poolings": ["mean"], "Cs": [0.05, 0.2], "etas": [0.5], "progress": False}
    result = spin_calibrate(
        model, builders.make_tokenizer(), builders.make_sentiment_rows(), recalibrate=True, **options
    )
    model.save_pretrained(classifier)
    text = write_card(classifier, result=result).read_text(encoding="utf-8")
    assert not any(words in text for words in frozen)
    assert "which was trained or adapted" in text


def test_the_card_can_name_another_place(classifier):
    write_card(classifier)
    text = card_text(Checkpoint.read(classifier), model_id="someone/else")
    assert 'pipeline("text-classification", "someone/else")' in text
    assert ModelCard(text).data.model_name == "else"


def test_the_picture_shows_every_probe(classifier):
    write_card(classifier)
    assert (classifier / "layer_profile.png").read_bytes().startswith(b"\x89PNG")
    result = CalibrationResult.load(classifier / "calibration.json")
    (axes,) = layer_profile(result).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    drawn = {
        (f"{kind}.{int(block)}", float(score))
        for kind, name in (("hidden", "hidden state, mean"), ("ffn", "FFN neurons, mean"))
        for block, score in zip(*lines[name].get_data(), strict=True)
    }
    assert drawn == {(probe["tap"], probe["score"]) for probe in result.probes}
    heights = {name: set(line.get_ydata()) for name, line in lines.items()}
    assert heights[f"SPIN, {result.chosen.score:.3f}"] == {result.chosen.score}
    last = result.baselines["last layer (mean)"]
    assert heights[f"last layer (mean), {last:.3f}"] == {last}


def test_without_matplotlib_the_card_has_no_picture(classifier, monkeypatch):
    write_card(classifier)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write_card(classifier).read_text(encoding="utf-8")
    assert "layer_profile.png" not in text
    assert not (classifier / "layer_profile.png").exists()


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_tasks_have_their_own_words(made, tmp_path, problem):
    rows = builders.make_sentiment_rows()
    if problem == "regression":
        rows["label"] = [label + 0.25 * (row % 3) for row, label in enumerate(rows["label"])]
    else:
        rows["label"] = [["good"] if label else ["bad", "dull"] for label in rows["label"]]
    labels = None if problem == "regression" else ["bad", "dull", "good"]
    text = write_card(made(tmp_path / "m", rows=rows, problem_type=problem, labels=labels)).read_text(encoding="utf-8")
    multi = problem == "multi_label_classification"
    assert ("top_k=None" in text) == multi
    assert ("A text classifier made" in text) == multi
    if multi:
        test = {"rows": 40, "accuracy": 0.25, "macro_f1": 0.5, "micro_f1": 0.75}
        tested = write_card(tmp_path / "m", test=test).read_text(encoding="utf-8")
        assert "| Test | Micro F1 0.7500, Exact match 0.2500" in tested
    assert ('function_to_apply="none"' in text) != multi
    assert ModelCard(text).data.metrics == (["f1"] if multi else ["r_squared"])


@pytest.mark.parametrize("prefer", ["widest", "score"])
def test_a_score_that_chose_nothing_is_not_said_to_flatter(made, tmp_path, prefer):
    folder = made(tmp_path / "m", calibrate={"validation_fraction": None, "cv": 3, "prefer": prefer})
    text = " ".join(write_card(folder).read_text(encoding="utf-8").split())
    assert ("is the head of the most neurons, whatever it scores" in text) == (prefer == "widest")
    assert ("that it was scored on (3-fold cross-validation)" in text) == (prefer == "widest")
    assert ("candidates on these very texts, so it flatters" in text) == (prefer == "score")


def test_exits_are_listed(made, tmp_path):
    folder = made(tmp_path / "films", labels=["bad", "good"], exits=True)
    result = CalibrationResult.load(folder / "calibration.json")
    assert result.chosen.depth < result.blocks == 3
    text = write_card(folder).read_text(encoding="utf-8")
    assert "| Blocks that run | 3 of 3 |" in text
    assert f"It holds {len(result.exits)} more heads" in text
    last = result.exits[-1]
    row = f"| {len(result.exits) - 1} | 3 | 0.5 | {last.num_features} | {last.score:.4f} |"
    assert row in text
    model = SpinForSequenceClassification.from_pretrained(folder)
    model.keep_exit(None)
    model.save_pretrained(folder)
    text = write_card(folder).read_text(encoding="utf-8")
    assert f"| Blocks that run | {result.chosen.depth} of 3 |" in text
    assert "more heads" not in text


@pytest.mark.parametrize("pairs", [False, True])
def test_its_code_runs_as_it_stands(made, tmp_path, monkeypatch, capsys, pairs):
    rows = builders.make_sentiment_rows()
    if pairs:
        rows["text_pair"] = rows["text"][1:] + rows["text"][:1]
    text = write_card(made(tmp_path / "films", rows=rows, labels=["bad", "good"])).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    space: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    assert "'label': " in capsys.readouterr().out
    assert (tmp_path / "self-contained" / "modeling_spin.py").is_file()
    assert ("one label per pair" in text) == pairs


def test_missing_facts_are_errors(classifier):
    with pytest.raises(CardError, match="rows"):
        write_card(classifier, test={"accuracy": 0.9})
    assert not (classifier / "README.md").exists()
    (classifier / "README.md").write_text("---\n: [\n---\n", encoding="utf-8")
    with pytest.raises(CardError, match="YAML head"):
        write_card(classifier)
    shutil.move(classifier / "calibration.json", classifier / "elsewhere.json")
    with pytest.raises(CardError, match="result.save"):
        write_card(classifier)
    result = CalibrationResult.load(classifier / "elsewhere.json")
    (classifier / "README.md").unlink()
    write_card(classifier, result=result)
    assert CalibrationResult.load(classifier / "calibration.json") == result
