"""The fitted temperature against a general minimiser, and where a plain likelihood has no minimum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from spin_hf.calibration.errors import ConfidenceError
from spin_hf.calibration.temperature import HIGHEST, LOWEST, fit_temperature


def draw(seed, rows=60, columns=3, scale=2.0, truth=1.0):
    """Logits, and labels drawn from their softmax at temperature ``truth``."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=scale, size=(rows, columns))
    labels = [random.choice(columns, p=p) for p in softmax(logits / truth, axis=1)]
    return logits, np.array(labels)


def smoothed_loss(log_t, logits, labels):
    """Negative log-likelihood at targets of 1 - 1 / (n + 2), the rest shared by the other labels."""
    n, columns = logits.shape
    targets = np.full((n, columns), 1 / (n + 2) / (columns - 1))
    targets[np.arange(n), labels] = 1 - 1 / (n + 2)
    return -(targets * log_softmax(logits / np.exp(log_t), axis=1)).sum(1).mean()


def minimiser(logits, labels):
    bounds = (np.log(LOWEST), np.log(HIGHEST))
    found = minimize_scalar(
        smoothed_loss, bounds=bounds, args=(logits, labels), method="bounded", options={"xatol": 1e-9}
    )
    return np.exp(found.x)


@pytest.mark.parametrize("columns", [2, 3, 7])
@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_it_is_the_minimum(columns, truth):
    logits, labels = draw(columns, columns=columns, truth=truth)
    assert fit_temperature(logits, labels) == pytest.approx(minimiser(logits, labels), rel=1e-5)


def test_multi_label_is_a_likelihood_of_independent_decisions():
    logits, _ = draw(0, columns=4)
    indicators = (np.random.default_rng(1).normal(size=logits.shape) + logits > 0).astype(int)
    decisions = np.stack([np.zeros(logits.size), logits.reshape(-1)], 1)
    assert fit_temperature(logits, indicators) == pytest.approx(minimiser(decisions, indicators.reshape(-1)), rel=1e-5)


@pytest.mark.parametrize("truth", [0.3, 1.0, 4.0])
def test_it_finds_the_temperature_that_the_labels_were_drawn_at(truth):
    assert fit_temperature(*draw(5, rows=20_000, truth=truth)) == pytest.approx(truth, rel=0.05)


@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.5, 2.0, 5.0]))
def test_it_scales_with_the_logits(seed, factor):
    logits, labels = draw(seed)
    fitted = fit_temperature(logits, labels)
    expected = np.clip(factor * fitted, LOWEST, HIGHEST)
    if LOWEST < fitted < HIGHEST:
        assert fit_temperature(factor * logits, labels) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("margin", [0.1, 1.0, 20.0])
def test_separated_rows_are_as_sure_as_their_number_allows(margin):
    labels = np.arange(40) % 2
    logits = margin * np.eye(2)[labels]
    fitted = fit_temperature(logits, labels)
    assert LOWEST < fitted < HIGHEST
    assert softmax(logits / fitted, axis=1).max(1) == pytest.approx(1 - 1 / 42)


def test_bounds_and_flat_logits():
    labels = np.arange(40) % 2
    right, wrong = np.eye(2)[labels], np.eye(2)[1 - labels]
    assert fit_temperature(1e-4 * right, labels) == LOWEST
    assert fit_temperature(wrong, labels) == HIGHEST
    assert fit_temperature(1e5 * right, labels) == HIGHEST
    assert fit_temperature(np.zeros((40, 2)), labels) == 1.0
    assert fit_temperature(np.full((40, 3), 7.0), labels) == 1.0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "got"),
        (np.zeros((3, 2)), np.zeros(4, int), r"\(3, 2\) and \(4,\)"),
        (np.zeros(3), np.zeros(3, int), "num_labels"),
        (np.array([[0.0, np.nan]]), np.zeros(1, int), "finite"),
    ],
)
def test_mistakes(logits, labels, message):
    with pytest.raises(ConfidenceError, match=message):
        fit_temperature(logits, labels)
