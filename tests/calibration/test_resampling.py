"""The bootstrap of named metrics, all resamples at once, against scikit-learn on each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.calibration.resampling import paired_error
from spin_hf.calibration.task import METRICS

SHAPES = [(name, problem) for name, (_, problems) in METRICS.items() for problem in problems]


def make(problem, seed, rows=40, classes=4):
    random = np.random.default_rng(seed)
    if problem == "regression":
        truth = random.normal(size=rows)
        return truth, truth + random.normal(size=rows), truth + 0.5 * random.normal(size=rows)
    if problem == "multi_label_classification":
        return tuple(random.integers(0, 2, (rows, classes)) for _ in range(3))
    truth = random.integers(0, classes, rows)
    return truth, *(np.where(random.random(rows) < 0.7, truth, random.integers(0, classes, rows)) for _ in range(2))


@pytest.mark.parametrize(("name", "problem"), SHAPES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_all_at_once_equals_one_by_one(name, problem, seed):
    metric = METRICS[name][0]
    labels, first, second = make(problem, seed, rows=12)  # few rows: some resamples miss a class

    def slow(truth, predictions):
        return metric(truth, predictions)

    expected = paired_error(slow, labels, first, second, rounds=30, seed=seed)
    assert paired_error(metric, labels, first, second, rounds=30, seed=seed) == pytest.approx(expected, rel=1e-9)


def test_equal_predictions_have_no_error_and_the_error_shrinks_with_the_rows():
    accuracy = METRICS["accuracy"][0]
    labels, first, second = make("single_label_classification", 0, rows=100)
    assert paired_error(accuracy, labels, first, first) == 0
    small = paired_error(accuracy, labels, first, second)
    wide = [np.tile(part, 16) for part in (labels, first, second)]
    assert paired_error(accuracy, *wide) == pytest.approx(small / 4, rel=0.2)
    # The closed form: the spread of the rows' differences over the root of their number.
    difference = (first == labels).astype(float) - (second == labels)
    assert small == pytest.approx(difference.std() / 10, rel=0.2)


def test_a_metric_that_fails_on_a_resample_is_left_out():
    def picky(truth, predictions):
        if len(set(truth)) < 2:
            raise ValueError("one class")
        return float(np.mean(truth == predictions))

    labels, first, second = np.array([0, 1, 0]), np.array([0, 1, 1]), np.array([0, 0, 0])
    assert np.isfinite(paired_error(picky, labels, first, second))
    assert np.isnan(paired_error(picky, labels[:1], first[:1], second[:1]))
