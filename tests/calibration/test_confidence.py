"""Laws of the confidence measures, and each against a slow computation of its definition."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import confidence as module
from spin_hf.calibration.confidence import (
    Confidence,
    Reliability,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    risk_coverage,
    text_confidence,
    to_probabilities,
)
from spin_hf.calibration.errors import ConfidenceError
from spin_hf.demo import load_split
from spin_hf.prediction import predict

seeds = st.integers(0, 100_000)


def draw(seed, multi_label=False, scale=2.0):
    random = np.random.default_rng(seed)
    rows, columns = int(random.integers(2, 80)), int(random.integers(2, 6))
    logits = random.normal(scale=scale, size=(rows, columns))
    noisy = logits + random.normal(size=logits.shape)
    return logits, (noisy > 0).astype(int) if multi_label else noisy.argmax(1)


@given(seeds, st.booleans())
def test_expected_calibration_error_by_its_definition(seed, multi_label):
    logits, labels = draw(seed, multi_label)
    p = to_probabilities(logits, multi_label=multi_label)
    if multi_label:
        pairs = [(max(q, 1 - q), (q > 0.5) == bool(y)) for q, y in zip(p.ravel(), labels.ravel(), strict=True)]
    else:
        pairs = [(row.max(), row.argmax() == y) for row, y in zip(p, labels, strict=True)]
    error = 0.0
    for i in range(15):
        inside = [(c, right) for c, right in pairs if i / 15 < c <= (i + 1) / 15]
        error += abs(sum(c for c, _ in inside) - sum(right for _, right in inside)) / len(pairs)
    found = expected_calibration_error(labels, p)
    assert found == pytest.approx(error, abs=1e-12)
    assert 0 <= found <= 1


def test_expected_calibration_error_by_hand():
    labels = np.array([0, 0, 1, 1])
    assert expected_calibration_error(labels, np.eye(2)[labels]) == 0
    assert expected_calibration_error(labels, np.eye(2)[1 - labels]) == 1
    assert expected_calibration_error(labels, np.full((4, 2), 0.5)) == 0
    assert expected_calibration_error(np.zeros(4, int), np.full((4, 2), 0.5)) == 0.5


@given(seeds)
def test_likelihood_and_brier_are_sklearns(seed):
    logits, labels = draw(seed)
    p, names = to_probabilities(logits, multi_label=False), range(logits.shape[1])
    assert negative_log_likelihood(labels, p) == pytest.approx(log_loss(labels, p, labels=list(names)))
    expected = sum(brier_score_loss(labels == k, p[:, k], pos_label=True) for k in names)
    assert brier_score(labels, p) == pytest.approx(expected)


@given(seeds)
def test_multi_label_likelihood_and_brier_are_those_of_its_decisions(seed):
    logits, labels = draw(seed, multi_label=True)
    p = to_probabilities(logits, multi_label=True)
    flat = labels.ravel(), p.ravel()
    assert negative_log_likelihood(labels, p) == pytest.approx(log_loss(*flat, labels=[0, 1]))
    assert brier_score(labels, p) == pytest.approx(np.square(flat[1] - flat[0]).mean())


def test_a_certain_mistake_has_a_finite_loss():
    assert 600 < negative_log_likelihood(np.array([0]), np.array([[0.0, 1.0]])) < 800


@given(seeds, st.booleans())
def test_the_curve_is_what_its_thresholds_give(seed, round_off):
    logits, labels = draw(seed)
    p = to_probabilities(logits, multi_label=False)
    confidence, right = text_confidence(p, multi_label=False), p.argmax(1) == labels
    if round_off:
        confidence = np.round(confidence, 1)  # many ties
    points, area = risk_coverage(confidence, right)
    assert points[-1].coverage == 1
    assert points[-1].accuracy == pytest.approx(right.mean())
    assert points[-1].min_confidence == 0
    for point in points:
        kept = confidence >= point.min_confidence
        assert kept.mean() == pytest.approx(point.coverage)
        assert right[kept].mean() == pytest.approx(point.accuracy)
    assert list(points) == sorted(points, key=lambda point: point.coverage)
    assert area == pytest.approx(np.mean([1 - right[confidence >= c].mean() for c in confidence]))
    shuffled = np.random.default_rng(seed).permutation(len(right))
    assert risk_coverage(confidence[shuffled], right[shuffled])[1] == pytest.approx(area)


def test_the_curve_stays_short():
    random = np.random.default_rng(0)
    confidence = random.uniform(size=2345)
    points, _ = risk_coverage(confidence, random.uniform(size=2345) < confidence)
    assert len(points) == 100
    for i, point in enumerate(points):
        assert (i + 1) / 100 <= point.coverage < (i + 1) / 100 + 1 / 2345


def test_cross_fitting_never_scales_a_row_by_what_it_taught(monkeypatch):
    count, seen = 23, []

    def spy(logits, labels):
        seen.append(logits[:, 0].astype(int).tolist())
        return 1.0

    monkeypatch.setattr(module, "fit_temperature", spy)
    logits = np.stack([np.arange(count), np.zeros(count)], 1)
    Confidence.measure(logits, np.zeros(count, int))
    learnt_from = [rows for rows in seen if len(rows) < count]
    left_out = [row for rows in learnt_from for row in set(range(count)) - set(rows)]
    assert len(learnt_from) == 5
    assert sorted(left_out) == list(range(count))


@given(seeds, st.booleans())
def test_a_record(seed, multi_label):
    logits, labels = draw(seed, multi_label)
    made = Confidence.measure(logits, labels, seed=seed)
    assert made.before == Reliability.of(labels, to_probabilities(logits, multi_label=multi_label))
    assert made.after.negative_log_likelihood <= made.before.negative_log_likelihood
    assert (made.temperature == 1) == (made.after == made.before)
    z = logits / made.temperature
    np.testing.assert_array_equal(
        z > 0 if multi_label else z.argmax(1), logits > 0 if multi_label else logits.argmax(1)
    )
    decided = labels.size if multi_label else len(labels)
    assert sum(b.size for b in made.after.bins) == decided
    assert Confidence.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    predicted = z > 0 if multi_label else z.argmax(1)
    whole = (predicted == labels).reshape(len(labels), -1).all(1)
    assert made.curve[-1].accuracy == pytest.approx(whole.mean())
    assert 0 <= made.area <= 1


def test_overconfident_logits_are_mended():
    random = np.random.default_rng(3)
    logits = random.normal(size=(600, 3))
    labels = (logits + random.gumbel(size=logits.shape)).argmax(1)  # a draw from the softmax
    made = Confidence.measure(5 * logits, labels)
    assert made.temperature == pytest.approx(5, rel=0.3)
    assert made.after.expected_calibration_error < made.before.expected_calibration_error / 3
    assert made.after.brier_score < made.before.brier_score


def test_one_row():
    made = Confidence.measure(np.array([[2.0, 1.0]]), np.array([0]))
    assert made.temperature == 1
    assert made.curve == ((0.0, 1.0, 1.0),)


def test_a_threshold_for_an_accuracy():
    confidence, right = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([True, False, True, True, False])
    curve, area = risk_coverage(confidence, right)
    nothing = Reliability(0, 0, 0, ())
    record = Confidence(1.0, nothing, nothing, curve, area)
    point = record.threshold_for(accuracy=0.7)
    assert point == (pytest.approx(0.55), 0.8, 0.75)
    assert record.threshold_for(accuracy=0.6).coverage == 1
    assert record.threshold_for(accuracy=1.0) == (pytest.approx(0.85), 0.2, 1.0)
    unsure = Confidence(1.0, nothing, nothing, *risk_coverage(confidence, ~right))
    with pytest.raises(ConfidenceError, match=r"0.99; the best is 0.5000, on 40.0% .*threshold_for\(accuracy=0.5\)"):
        unsure.threshold_for(accuracy=0.99)


def test_a_real_overconfident_head_is_mended_on_texts_it_never_saw(minilm_path):
    """A weak penalty on few texts makes a head far too sure; half of the texts kept from it mend the other half."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    model = SpinForSequenceClassification.from_backbone(minilm_path)
    train, half, other = load_split("train")[:120], load_split("validation"), load_split("test")
    options = {"kinds": ["hidden"], "poolings": ["mean"], "max_depth": 2, "etas": [], "Cs": [3.0], "tol": 1e-2}
    record = spin_calibrate(model, tokenizer, train, half, progress=False, **options).confidence
    assert record.after.expected_calibration_error < record.before.expected_calibration_error
    scaled = predict(model, tokenizer, [row["text"] for row in other])
    labels = np.array([model.config.label2id[row["label"]] for row in other])
    unscaled = to_probabilities(scaled.logits * model.config.logit_temperature, multi_label=False)
    for measure in (expected_calibration_error, negative_log_likelihood, brier_score):
        assert measure(labels, scaled.probabilities) < measure(labels, unscaled)
