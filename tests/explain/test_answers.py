"""What the page shows of one text is what the classifier and its exits say."""

import re

import builders
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin_hf.explain import explain
from spin_hf.explain.answers import Answerer, Step, step_at
from spin_hf.explain.heat import heat_of
from spin_hf.prediction import predict

TEXT = "a lovely film, but the plot is dull <b>"


@pytest.fixture(scope="session")
def answerer(with_exits):
    return Answerer(with_exits.model, with_exits.tokenizer)


@pytest.fixture(scope="session")
def answer(answerer):
    return answerer.answer(TEXT)


def test_the_answer_is_the_classifiers(answerer, answer):
    row = predict(answerer.model, answerer.tokenizer, [TEXT]).row(0)
    assert answer.row == row
    assert answer.headline == row["label"] == answer.label
    assert answer.values == pytest.approx(tuple(row["scores"].values()), abs=1e-6)
    assert answerer.answer(TEXT, min_confidence=1.0).headline == "not sure enough to say"


def test_a_step_is_what_its_exit_predicts(answerer, answer):
    assert len(answer.steps) == len(answerer.model.config.exits) > 1
    for number, step in enumerate(answer.steps):
        row = predict(answerer.model, answerer.tokenizer, [TEXT], exit=number).row(0)
        assert step.values == pytest.approx(tuple(row["scores"].values()), abs=1e-5)
    shown = re.findall(r'<th scope="row">(\d+)</th>', answer.layers_html(answer.label).split("<h3>")[1])
    assert list(map(int, shown)) == answerer.depths


def test_the_blocks_and_the_words_add_up_to_the_logit(answer):
    for label in ("bad", "good"):
        heat = answer.heat(label)
        numbers = [float(part.told.split()[0]) for part in heat.texts[0] if part.told]
        rounding = 0.0005 * len(numbers) + 1e-4
        assert sum(numbers) + sum(value for _, value in heat.others) == pytest.approx(heat.logit, abs=rounding)
        last = re.findall(r'<td class="n">([+-][\d.]+)</td>', answer.layers_html(label))[-1]
        assert float(last) == pytest.approx(heat.logit, abs=0.006)


def test_the_words_at_a_depth_and_eta_are_those_of_its_exit(answerer, answer):
    for number, step in enumerate(answer.steps):
        heat = answerer.heat_at(answer, step.depth, step.eta, "good")
        (own,) = explain(answerer.model, answerer.tokenizer, [TEXT], exit=number)
        assert heat == heat_of(own, "good")
        logits = predict(answerer.model, answerer.tokenizer, [TEXT], exit=number).logits
        assert heat.logit == pytest.approx(logits[0, 1], abs=1e-5)


def test_the_parts_of_a_text_are_the_text(answerer):
    texts = [TEXT, "  good \n\t film  ", "فيلم good 👩‍👩‍👧 \x00", "x"]
    for text, own in zip(texts, explain(answerer.model, answerer.tokenizer, texts), strict=True):
        (parts,) = heat_of(own, "good").texts
        assert "".join(part.text for part in parts) == text
        assert max(abs(part.share) for part in parts) == pytest.approx(1)
    (own,) = explain(answerer.model, answerer.tokenizer, ["good film " * 20])
    (parts,) = heat_of(own, "good", longest=50).texts
    assert "".join(part.text for part in parts) == "good film " * 5 + "… (200 characters)"


def test_what_the_colours_say_is_written_too(answerer, answer):
    heat = answer.heat("good")
    assert heat.words + sum(value for _, value in heat.others) == pytest.approx(heat.logit)
    (own,) = explain(answerer.model, answerer.tokenizer, [TEXT])
    added = own.by("word").values[:, own.names.index("good")]
    known = [(w.text, v) for w, v in zip(own.words, added, strict=True) if not w.special]
    wanted = sorted(known, key=lambda pair: -pair[1])
    assert heat.speaking[0] == tuple(pair for pair in wanted if pair[1] > 0)[:6]
    assert heat.speaking[1] == tuple(pair for pair in wanted[::-1] if pair[1] < 0)[:6]
    text = re.sub(r"<[^>]*>", "", answer.words_html("good"))
    for title, pairs in zip(("For", "Against"), heat.speaking, strict=True):
        told = ", ".join(f"“{word}” {value:+.2f}" for word, value in pairs) or "no word"
        assert f"{title} good: {told}." in text.replace("&lt;", "<").replace("&gt;", ">")
    assert "cut off" not in text


def test_a_text_that_was_cut_says_so_and_a_page_has_bounds(answerer):
    html = answerer.answer("good film " * 60).words_html("good")
    assert "The end of the text was cut off: the model reads no more tokens." in html
    html = answerer.answer("good film " * 10_000).words_html("good")
    assert "… (100,000 characters)" in html
    assert len(html) < 50_000


def test_html_is_escaped(answer):
    for html in (answer.words_html("good"), answer.layers_html("good"), answer.change_html(3, 1.0, answer.heat("bad"))):
        assert "<b>" not in html
    assert "&lt;" in answer.words_html("good")


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0.2, 0.5, 0.9, 1.0])), min_size=1, unique=True),
    st.floats(0, 7),
    st.floats(0, 1),
)
def test_sliders_stand_for_an_exit_within_them_where_there_is_one(pairs, depth, eta):
    steps = [Step(*pair, 1, 0.0, (1.0,)) for pair in pairs]
    found = step_at(steps, depth, eta)
    assert found in steps
    if any(step.depth <= depth for step in steps):
        assert found.depth <= depth
        assert not any(found.depth < step.depth <= depth for step in steps)
    own = [step.eta for step in steps if step.depth == found.depth]
    assert found.eta == max((e for e in own if e <= eta + 1e-9), default=min(own))
    for step in steps:
        assert step_at(steps, step.depth, step.eta) == step


def test_without_exits_there_are_no_steps(sentiment):
    answerer = Answerer(sentiment.model, sentiment.tokenizer)
    answer = answerer.answer(TEXT)
    assert (answerer.depths, answer.steps) == ([], ())
    assert "What each depth says" not in answer.layers_html("good")


def test_numbers_pairs_and_several_labels(make):
    source = builders.make_sentiment_rows()
    numbers = make({**source, "label": [x + 0.5 for x in source["label"]]}, problem_type="regression", exits=True)
    answer = Answerer(numbers.model, numbers.tokenizer).answer(TEXT)
    assert answer.headline == f"{answer.values[0]:.4g}"
    assert f"{answer.steps[-1].values[0]:.4g}" in answer.layers_html("value")
    assert '<th scope="row">value</th>' in answer.change_html(1, 0.5, answer.heat("value"))

    several = {**source, "label": [["good", "fine"] if x else ["bad"] for x in source["label"]]}
    made = make(several, problem_type="multi_label_classification", labels=["bad", "good", "fine"])
    answer = Answerer(made.model, made.tokenizer).answer("good great lovely film")
    assert answer.headline == ", ".join(answer.row["labels"])

    pairs = make({"text": source["text"], "text_pair": source["text"][::-1], "label": source["label"]})
    answerer = Answerer(pairs.model, pairs.tokenizer)
    assert answerer.pairs
    heat = answerer.answer("good film", "dull plot").heat("LABEL_1")
    assert ["".join(part.text for part in parts) for parts in heat.texts] == ["good film", "dull plot"]
    assert np.isfinite(heat.logit)
