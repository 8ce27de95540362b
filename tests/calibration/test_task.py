import numpy as np
import pytest
import torch

from spin_hf.calibration.errors import CalibrationError, UnknownLabelError
from spin_hf.calibration.losses import Logistic, Multinomial, Squared
from spin_hf.calibration.task import Task

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def make(problem, names=("a", "b", "c"), metric=None, multiclass="multinomial"):
    return Task.make(problem, names, metric, multiclass)


BINARY, THREE, OVR = make(SINGLE, ("a", "b")), make(SINGLE), make(SINGLE, multiclass="ovr")
TAGS, VALUE = make(MULTI), make(REGRESSION, ("value",))


@pytest.mark.parametrize(
    ("task", "loss", "metric", "labels", "targets"),
    [
        (BINARY, Logistic, "accuracy", [1, 0], [[1], [0]]),
        (THREE, Multinomial, "accuracy", [2, 0], [[0, 0, 1], [1, 0, 0]]),
        (OVR, Logistic, "accuracy", [2, 0], [[0, 0, 1], [1, 0, 0]]),
        (TAGS, Logistic, "micro_f1", [[1, 0, 1], [0, 0, 0]], [[1, 0, 1], [0, 0, 0]]),
        (VALUE, Squared, "r2", [1.5, -2.0], [[1.5], [-2.0]]),
    ],
)
def test_a_task_from_labels_to_score(task, loss, metric, labels, targets):
    labels = np.array(labels)
    assert isinstance(task.loss, loss)
    assert task.metric_name == metric
    made = task.targets(labels)
    assert made.dtype == torch.float32
    assert made.tolist() == targets
    scores = made if task is VALUE else made - 0.5
    np.testing.assert_array_equal(task.predict(scores), labels)
    assert task.score(labels, labels) == 1.0


def test_binary_logits_have_the_log_odds_as_their_difference():
    weight, intercept = BINARY.as_logits(torch.tensor([[2.0, -4.0]]), torch.tensor([1.0]))
    assert (weight[1] - weight[0]).tolist() == [2.0, -4.0]
    assert float(intercept[1] - intercept[0]) == 1.0
    same = torch.eye(3), torch.ones(3)
    assert THREE.as_logits(*same) == same


@pytest.mark.parametrize(
    ("metric", "expected"), [("accuracy", 0.75), ("macro_f1", (6 / 7 + 0) / 2), ("micro_f1", 0.75), ("matthews", 0.0)]
)
def test_metrics(metric, expected):
    task = make(SINGLE, ("a", "b"), metric)
    assert task.score(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])) == pytest.approx(expected)


def test_a_metric_of_the_callers_own():
    def hits(labels, predictions):
        return int((labels == predictions).sum())

    task = make(SINGLE, metric=hits)
    assert task.metric_name == "hits"
    assert task.score(np.array([0, 1, 2]), np.array([0, 1, 1])) == 2.0


@pytest.mark.parametrize(
    ("problem", "metric"),
    [(SINGLE, "r2"), (SINGLE, "auc"), (MULTI, "accuracy"), (MULTI, "matthews"), (REGRESSION, "accuracy"), (SINGLE, 3)],
)
def test_a_metric_that_does_not_fit(problem, metric):
    with pytest.raises(CalibrationError, match="Choose from"):
        make(problem, metric=metric)


def test_multiclass_mistake():
    with pytest.raises(CalibrationError, match="'multinomial' or 'ovr'; got 'ova'"):
        make(SINGLE, multiclass="ova")


def test_balanced_weights_are_sklearns():
    labels = np.array([0, 0, 0, 1, 2, 2])
    assert THREE.class_weights(labels, "balanced") == pytest.approx([6 / 9, 2.0, 1.0])
    assert THREE.class_weights(np.array([0, 1]), "balanced") == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    rows = THREE.row_weights(labels, THREE.class_weights(labels, "balanced"), None)
    assert [float(rows[labels == k].sum()) for k in range(3)] == pytest.approx([2.0, 2.0, 2.0])


def test_balanced_multi_label_weights_stay_positive():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]])
    weights = TAGS.class_weights(labels, "balanced")
    assert weights == pytest.approx([3.0, 0.25, 4.0])
    assert TAGS.row_weights(labels, weights, None).tolist() == [[3.0, 0.25, 1.0], *[[1.0, 0.25, 1.0]] * 3]


def test_named_weights():
    assert THREE.class_weights(np.array([0]), None) is None
    assert THREE.class_weights(np.array([0]), {"c": 4, 0: 0.5}) == [0.5, 1.0, 4.0]
    assert THREE.class_weights(np.array([0]), {np.int64(1): 2}) == [1.0, 2.0, 1.0]


def test_sample_weights_multiply_class_weights():
    rows = BINARY.row_weights(np.array([0, 1, 1]), [2.0, 3.0], np.array([1.0, 1.0, 0.5]))
    assert rows.tolist() == [[2.0], [3.0], [1.5]]
    tags = TAGS.row_weights(np.array([[1, 0, 0], [0, 0, 1]]), [2.0, 3.0, 5.0], np.array([1.0, 10.0]))
    assert tags.tolist() == [[2.0, 1.0, 1.0], [10.0, 10.0, 50.0]]
    assert BINARY.row_weights(np.array([0, 1]), None, None).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("task", "spec", "error", "message"),
    [
        (VALUE, "balanced", CalibrationError, "sample_weight"),
        (BINARY, "equal", CalibrationError, "'balanced' or a dict"),
        (BINARY, [1.0, 2.0], CalibrationError, "'balanced' or a dict"),
        (BINARY, {"c": 1.0}, UnknownLabelError, "'c'; the labels are a, b"),
        (BINARY, {2: 1.0}, UnknownLabelError, "2"),
        (BINARY, {"a": 0.0}, CalibrationError, "positive; got 0.0"),
        (BINARY, {"a": float("nan")}, CalibrationError, "positive"),
    ],
)
def test_class_weight_mistakes(task, spec, error, message):
    with pytest.raises(error, match=message):
        task.class_weights(np.array([0, 1]), spec)
