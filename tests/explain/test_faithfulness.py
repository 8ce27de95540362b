"""Erasing words reads exactly what is left of a text, and integrated gradients are those of the definition."""

import numpy as np
import pytest
from builders import calibrated, make_backbone

from spin_hf.calibration.errors import CalibrationError
from spin_hf.explain import erasure, explain, integrated_gradients, word_scores
from spin_hf.prediction import predict
from spin_hf.windows import Windows

TEXTS = ["good film", "a dull plot and an end", "the witty actor was bad in this town", "night"]


@pytest.mark.parametrize("windows", [None, Windows(8, 2, 1, 1)])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_an_erased_text_is_answered_as_the_text_of_its_other_words(name, windows, tokenizer):
    model = calibrated(make_backbone(name), labels=["a", "b", "c"])
    model.config.windows = windows and windows.to_dict()
    found = explain(model, tokenizer, TEXTS)
    shares = (0.3, 0.8)
    erased = erasure(model, tokenizer, found, word_scores(found), shares=shares, batch_tokens=64)
    for row, explanation in enumerate(found):
        label = int(explanation.logits.argmax())
        scores = word_scores(found)[row]
        words = [i for i, word in enumerate(explanation.words) if not word.special]
        order = sorted(words, key=lambda i: -scores[i])
        texts = ["", explanation.text]
        for share in shares:
            best = set(order[: int(np.ceil(share * len(words)))])
            texts.append(" ".join(explanation.words[i].text for i in words if i not in best))
            texts.append(" ".join(explanation.words[i].text for i in words if i in best))
        wanted = predict(model, tokenizer, texts).probabilities[:, label]
        got = [erased.empty[row], erased.whole[row]]
        for column in range(len(shares)):
            got += [erased.without[row, column], erased.alone[row, column]]
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(erased.comprehensiveness, erased.whole - erased.without.mean(1))
    np.testing.assert_allclose(erased.sufficiency, erased.whole - erased.alone.mean(1))
    flat = np.ones_like(erased.deletion)
    np.testing.assert_allclose(erased.area(flat), 1)
    np.testing.assert_allclose(erased.deletion[:, [0, -1]], erased.insertion[:, [-1, 0]])


def test_pairs_and_several_labels(tokenizer):
    model = calibrated(make_backbone("bert"), problem_type="multi_label_classification", labels=["a", "b", "c"])
    model.config.text_pairs = True
    found = explain(model, tokenizer, TEXTS[:2], TEXTS[2:])
    erased = erasure(model, tokenizer, found, word_scores(found))
    known = predict(model, tokenizer, TEXTS[:2], TEXTS[2:])
    np.testing.assert_allclose(erased.whole, known.probabilities.max(1), atol=1e-5)
    for row, scores in zip(found, word_scores(found), strict=True):
        np.testing.assert_allclose(scores, row.by("word").values[:, row.logits.argmax()])


def test_a_head_on_the_embeddings_has_gradients_that_are_its_exact_parts(tokenizer):
    """Where features are linear in the embeddings, both agree up to what a pad token adds in a word's place."""
    model = calibrated(make_backbone("t5"), taps=["hidden.0"], poolings=["mean"], count=16)
    found = explain(model, tokenizer, TEXTS)
    exact, gradients = word_scores(found), integrated_gradients(model, tokenizer, found, steps=2)
    for row, (mine, theirs) in enumerate(zip(exact, gradients.scores, strict=True)):
        words = [i for i, word in enumerate(found[row].words) if not word.special]
        between = mine[words] - theirs[words]
        np.testing.assert_allclose(between, between[0], atol=1e-5)
        assert not np.delete(theirs, words).any()
    assert gradients.gaps.max() < 1e-4


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_integrated_gradients_add_up_the_better_the_more_steps(name, tokenizer):
    model = calibrated(make_backbone(name), poolings=["mean"])
    found = explain(model, tokenizer, TEXTS)
    few, many = (integrated_gradients(model, tokenizer, found, steps=steps, batch_tokens=64) for steps in (2, 400))
    assert many.gaps.max() < 0.02
    assert many.gaps.mean() < few.gaps.mean()
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_what_is_refused(tokenizer):
    model = calibrated(make_backbone("bert"))
    found = explain(model, tokenizer, TEXTS)
    scores = word_scores(found)
    for options, message in (
        ({"shares": (0.5, 0.1)}, "ascending"),
        ({"shares": ()}, "ascending"),
        ({"shares": (0.1, 1.5)}, "shares must"),
        ({"batch_tokens": 0}, "batch_tokens must"),
    ):
        with pytest.raises(CalibrationError, match=message):
            erasure(model, tokenizer, found, scores, **options)
    with pytest.raises(CalibrationError, match="one number for each of its words"):
        erasure(model, tokenizer, found, scores[1:])
    with pytest.raises(CalibrationError, match="steps must"):
        integrated_gradients(model, tokenizer, found, steps=0)
    model = calibrated(make_backbone("bert"), problem_type="regression")
    with pytest.raises(CalibrationError, match="no probability"):
        erasure(model, tokenizer, explain(model, tokenizer, TEXTS), scores)
