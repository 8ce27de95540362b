"""How far apart two candidates' scores are beyond chance: a paired bootstrap over the evaluation rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import binomtest

from .task import METRICS, Metric

_DRAWS_AT_ONCE = 2**21  # of rows

# A metric of many resamples at once: counts (rounds, n) of each row, labels (n, K), predictions (n, K) -> (rounds,).
Resampled = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def paired_error(
    score: Metric, labels: np.ndarray, first: np.ndarray, second: np.ndarray, *, rounds: int = 200, seed: int = 0
) -> float:
    """Standard error of the difference in score between two sets of predictions.

    Both are scored on the same resamples, so that texts which both get wrong don't count (Efron and Tibshirani 1993,
    chapter 6). A resample that the metric can't score, for want of a class, is left out; without any the error is NaN.

    Args:
        score: one of the named metrics, of which all resamples are scored at once, or any function of (labels,
            predictions), called once for each.
        labels: of the evaluation rows, ``(n,)`` or ``(n, num_labels)``.
        first, second: predictions of the same shape.
    """
    first, second = (part.astype(labels.dtype, copy=False) for part in (first, second))
    differences = np.concatenate(
        [
            _scores(score, labels, first, draws) - _scores(score, labels, second, draws)
            for draws in _draws(len(labels), rounds, seed)
        ]
    )
    known = differences[np.isfinite(differences)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else float("nan")


def bootstrap_interval(
    score: Metric, labels: np.ndarray, predictions: np.ndarray, *, rounds: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of 95% of a score (Efron and Tibshirani 1993, chapter 13); arguments as above.

    ``None`` where fewer than two resamples can be scored.
    """
    found = np.concatenate([_scores(score, labels, predictions, draws) for draws in _draws(len(labels), rounds, seed)])
    known = found[np.isfinite(found)]
    if len(known) < 2:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def share_interval(share: float, rows: int) -> tuple[float, float]:
    """Wilson's 95% interval (1927) of a share of so many rows, such as an accuracy."""
    found = binomtest(round(share * rows), rows).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _draws(count: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of all resamples, ``(rounds, count)`` in all, some rounds at a time."""
    generator, at_once = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // count)
    for first in range(0, rounds, at_once):
        yield generator.integers(0, count, (min(at_once, rounds - first), count))


def _scores(score: Metric, labels: np.ndarray, predictions: np.ndarray, draws: np.ndarray) -> np.ndarray:
    together = _RESAMPLED.get(score)
    if together is None:
        return np.array([_one(score, labels[rows], predictions[rows]) for rows in draws])
    counts = np.stack([np.bincount(rows, minlength=len(labels)) for rows in draws]).astype(np.float64)
    if np.issubdtype(labels.dtype, np.floating):
        return together(counts, labels[:, None], predictions[:, None])
    if labels.ndim == 1:
        classes = np.unique([labels, predictions])
        labels, predictions = labels[:, None] == classes, predictions[:, None] == classes
    return together(counts, labels.astype(np.float64), predictions.astype(np.float64))


def _one(score: Metric, labels: np.ndarray, predictions: np.ndarray) -> float:
    try:
        return score(labels, predictions)
    except (ArithmeticError, ValueError):
        return float("nan")


def _quotient(above: np.ndarray, below: np.ndarray, otherwise: float) -> np.ndarray:
    return np.asarray(np.divide(above, below, out=np.full(above.shape, otherwise), where=below > 0))


def _accuracy(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return np.asarray(counts @ (labels * predictions).sum(1) / counts.sum(1))


def _f1_counts(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twice the true positives, and those plus the false ones of both kinds, ``(rounds, K)``."""
    return np.asarray(2 * counts @ (labels * predictions)), np.asarray(counts @ (labels + predictions))


def _macro_f1(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    hits, total = _f1_counts(counts, labels, predictions)
    single = bool((labels.sum(1) == 1).all() and (predictions.sum(1) == 1).all())
    # Of single labels scikit-learn counts the classes that a resample has; of several, all labels.
    share = _quotient(hits, total, np.nan if single else 0.0)
    return np.asarray(np.nanmean(share, axis=1))


def _micro_f1(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    hits, total = _f1_counts(counts, labels, predictions)
    return _quotient(hits.sum(1), total.sum(1), 0.0)


def _matthews(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Gorodkin's coefficient (2004) for K classes."""
    n, right = counts.sum(1), counts @ (labels * predictions).sum(1)
    true, guessed = counts @ labels, counts @ predictions
    spread = np.sqrt((n**2 - (true**2).sum(1)) * (n**2 - (guessed**2).sum(1)))
    return _quotient(right * n - (true * guessed).sum(1), spread, 0.0)


def _r2(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    n = counts.sum(1)
    mean = counts @ labels[:, 0] / n
    spread = counts @ labels[:, 0] ** 2 - n * mean**2
    return 1 - _quotient(counts @ (labels[:, 0] - predictions[:, 0]) ** 2, spread, np.nan)


_RESAMPLED: dict[Metric, Resampled] = {
    METRICS[name][0]: together
    for name, together in (
        ("accuracy", _accuracy),
        ("macro_f1", _macro_f1),
        ("micro_f1", _micro_f1),
        ("matthews", _matthews),
        ("r2", _r2),
    )
}
