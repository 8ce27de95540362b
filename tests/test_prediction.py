"""Predictions as values: labels, confidence, abstaining, and the metrics of each problem type."""

import numpy as np
import pytest
from builders import make_tokenizer

from spin_hf.calibration.errors import CalibrationError, ConfidenceError
from spin_hf.prediction import Prediction, evaluate, predict

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def prediction(probabilities, problem_type=SINGLE, min_confidence=None):
    p = np.array(probabilities)
    logits = np.log(p) - (np.log1p(-p) if problem_type == MULTI else 0)
    return Prediction(logits, p, ("a", "b", "c")[: p.shape[1]], problem_type, 0, min_confidence)


def test_rows_of_one_label():
    made = prediction([[0.9, 0.1], [0.45, 0.55]], min_confidence=0.6)
    assert made.confidence.tolist() == [0.9, 0.55]
    assert made.abstained.tolist() == [False, True]
    assert made.labels.tolist() == [0, 1]
    assert made.row(0) == {"label": "a", "scores": {"a": 0.9, "b": 0.1}, "abstained": False}
    assert made.row(1) == {"label": None, "scores": {"a": 0.45, "b": 0.55}, "abstained": True}
    assert "abstained" not in prediction([[0.9, 0.1]]).row(0)


def test_several_labels_are_as_sure_as_the_least_sure():
    made = prediction([[0.9, 0.2, 0.7], [0.95, 0.05, 0.9], [0.1, 0.1, 0.1]], MULTI, min_confidence=0.75)
    assert made.confidence == pytest.approx([0.7, 0.9, 0.9])
    assert [made.row(i)["labels"] for i in range(3)] == [None, ["a", "c"], []]
    assert [made.row(i)["abstained"] for i in range(3)] == [True, False, False]
    scores = evaluate(made, np.array([[1, 0, 1], [1, 0, 1], [0, 0, 1]]))
    assert (scores["coverage"], scores["selective_accuracy"]) == (pytest.approx(2 / 3), 0.5)
    assert scores["accuracy"] == pytest.approx(2 / 3)


def test_confidence_at_the_threshold_is_answered():
    assert not prediction([[0.75, 0.25]], min_confidence=0.75).abstained[0]


def test_metrics_with_and_without_abstaining():
    labels, p = np.array([0, 1, 1]), [[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]]
    plain = evaluate(prediction(p), labels)
    assert list(plain) == ["accuracy", "macro_f1", "micro_f1", "matthews", "expected_calibration_error"]
    assert plain["expected_calibration_error"] == pytest.approx((0.1 + 0.4 + 0.7) / 3)
    assert plain["accuracy"] == pytest.approx(2 / 3)
    some = evaluate(prediction(p, min_confidence=0.65), labels)
    assert (some["coverage"], some["selective_accuracy"]) == (pytest.approx(2 / 3), 0.5)
    none = evaluate(prediction(p, min_confidence=1.0), labels)
    assert none["coverage"] == 0
    assert np.isnan(none["selective_accuracy"])


def test_regression_has_no_confidence():
    numbers = np.array([[1.0], [2.5]])
    made = Prediction(numbers, numbers, ("value",), REGRESSION, 0)
    assert not made.abstained.any()
    assert evaluate(made, np.array([1.0, 2.0])) == {"r2": 0.5, "mean_absolute_error": 0.25}
    with pytest.raises(ConfidenceError, match="without a confidence"):
        _ = made.confidence


@pytest.mark.parametrize(
    ("texts", "pairs", "message"),
    [
        ("good", None, "'text' of the input data is a single str"),
        ([], None, "no rows"),
        (["good", None], None, "Row 1 of the input data has no text but None"),
        (["good", "bad"], ["bad"], "2 first texts but 1 second"),
    ],
)
def test_texts_that_are_none(bert_backbone, calibrated, texts, pairs, message):
    with pytest.raises(CalibrationError, match=message):
        predict(calibrated(bert_backbone), make_tokenizer(), texts, pairs)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "0.5"])
def test_a_confidence_is_a_probability(bert_backbone, calibrated, value):
    with pytest.raises(ConfidenceError, match="between 0 and 1"):
        predict(calibrated(bert_backbone), make_tokenizer(), ["good"], min_confidence=value)


def test_abstaining_is_refused_for_regression(bert_backbone, calibrated):
    model = calibrated(bert_backbone, problem_type="regression")
    with pytest.raises(ConfidenceError, match="leave min_confidence out"):
        predict(model, make_tokenizer(), ["good"], min_confidence=0.5)
