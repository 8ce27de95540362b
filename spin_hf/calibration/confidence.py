"""How far a classifier's probabilities can be trusted, and what is gained where it may abstain.

The confidence of a prediction is the probability of its class. For multi-label every label is a decision of its own,
made with the probability of what was decided; a text is as sure as its least sure decision, and right where all are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import KFold

from .errors import ConfidenceError
from .temperature import fit_temperature

BINS = 15
_FOLDS = 5
_POINTS = 100


class Bin(NamedTuple):
    """Decisions with a confidence above ``lower`` and up to ``upper``: their mean confidence, accuracy, and number."""

    lower: float
    upper: float
    confidence: float
    accuracy: float
    size: int


class OperatingPoint(NamedTuple):
    """Where only texts of at least this confidence are answered: the share answered, and the share of those right."""

    min_confidence: float
    coverage: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """How well probabilities match what happened; all three numbers are best at 0.

    Attributes:
        expected_calibration_error: see :func:`expected_calibration_error`.
        negative_log_likelihood: see :func:`negative_log_likelihood`.
        brier_score: see :func:`brier_score`.
        bins: the reliability diagram; bins that nothing fell into are left out.
    """

    expected_calibration_error: float
    negative_log_likelihood: float
    brier_score: float
    bins: tuple[Bin, ...]

    @classmethod
    def of(cls, labels: np.ndarray, probabilities: np.ndarray) -> Reliability:
        """Measure probabilities ``(n, num_labels)``; labels are class ids ``(n,)`` or indicators like them."""
        scores = {name: score(labels, probabilities) for name, score in PROBABILITY_METRICS.items()}
        return cls(**scores, bins=reliability_bins(*_decisions(labels, probabilities)))


@dataclass(frozen=True)
class Confidence:
    """The confidence of a calibrated classifier, measured on rows that its head was not fitted on.

    Those rows chose the classifier among many, so expect a little less on others.

    Attributes:
        temperature: what the model divides its logits by; 1 where scaling did not lower the cross-fitted likelihood
            loss: on few rows, or for a head whose penalty was chosen so well that nothing is left to mend.
        before: without the temperature.
        after: with one, cross-fitted: the rows are split into five parts, and each part is scaled by the temperature of
            the other four. The same as ``before`` where the temperature is 1.
        curve: accuracy by coverage, at most 100 points, least coverage first; the last one answers every text.
        area: mean error over all coverages (area under the risk-coverage curve, Geifman et al. 2019); the lower the
            better, and below the error at full coverage where confidence tells right from wrong.
    """

    temperature: float
    before: Reliability
    after: Reliability
    curve: tuple[OperatingPoint, ...]
    area: float

    @classmethod
    def measure(cls, logits: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> Confidence:
        """Fit the temperature and measure everything.

        Args:
            logits: ``(n, num_labels)`` of rows that the classifier was not fitted on.
            labels: class ids ``(n,)``, or indicators ``(n, num_labels)`` for multi-label.
            seed: of the parts for ``after``.

        Raises:
            ConfidenceError: as :func:`fit_temperature`.
        """
        multi_label = np.ndim(labels) == 2
        crossed = np.array(logits, dtype=np.float64)
        for rest, part in _parts(len(crossed), seed):
            crossed[part] /= fit_temperature(logits[rest], labels[rest])
        before, after = (
            Reliability.of(labels, to_probabilities(z, multi_label=multi_label)) for z in (logits, crossed)
        )
        temperature = fit_temperature(logits, labels)
        if after.negative_log_likelihood >= before.negative_log_likelihood:
            temperature, after = 1.0, before
        served = to_probabilities(logits / temperature, multi_label=multi_label)
        curve, area = risk_coverage(text_confidence(served, multi_label=multi_label), _texts_right(labels, served))
        return cls(
            temperature=temperature,
            before=before,
            after=after,
            curve=curve,
            area=area,
        )

    def threshold_for(self, accuracy: float) -> OperatingPoint:
        """The point that answers most texts with at least this accuracy; give its ``min_confidence`` to ``predict``.

        It holds for the rows that were measured; on others the accuracy varies around it, the more the fewer they were.

        Raises:
            ConfidenceError: if no point reaches it.
        """
        reaching = [point for point in self.curve if point.accuracy >= accuracy]
        if not reaching:
            best = max(self.curve, key=lambda point: (point.accuracy, point.coverage))
            raise ConfidenceError(
                f"No confidence reaches an accuracy of {accuracy}; the best is {best.accuracy:.4f}, on "
                f"{best.coverage:.1%} of the texts. Ask for threshold_for(accuracy={int(best.accuracy * 1000) / 1000})."
            )
        return max(reaching, key=lambda point: point.coverage)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Confidence:
        """Read what :meth:`to_dict` wrote, before or after JSON."""
        before, after = (
            Reliability(**{**values[name], "bins": tuple(Bin(*item) for item in values[name]["bins"])})
            for name in ("before", "after")
        )
        curve = tuple(OperatingPoint(*point) for point in values["curve"])
        return cls(**{**values, "before": before, "after": after, "curve": curve})


def to_probabilities(logits: np.ndarray, *, multi_label: bool) -> np.ndarray:
    """Softmax over the labels, or for multi-label the sigmoid of each; float64."""
    z = torch.from_numpy(np.asarray(logits, dtype=np.float64))
    return np.asarray((z.sigmoid() if multi_label else z.softmax(-1)).numpy())


def text_confidence(probabilities: np.ndarray, *, multi_label: bool) -> np.ndarray:
    """Confidence of each text ``(n,)``, from probabilities ``(n, num_labels)``."""
    if multi_label:
        return np.asarray(np.maximum(probabilities, 1 - probabilities).min(1))
    return np.asarray(probabilities.max(1))


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean distance of confidence from accuracy over 15 bins of equal width, by their counts (Guo et al. 2017, eq. 3).

    Between 0 and 1. Over the predicted classes, or for multi-label over all decisions about labels.
    """
    bins = reliability_bins(*_decisions(labels, probabilities))
    return sum(b.size * abs(b.accuracy - b.confidence) for b in bins) / sum(b.size for b in bins)


def negative_log_likelihood(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean of minus the natural logarithm of the probability of what was true, per text or decision about a label."""
    p = np.asarray(probabilities, dtype=np.float64)
    true = np.where(labels == 1, p, 1 - p) if np.ndim(labels) == 2 else p[np.arange(len(p)), labels]
    return float(-np.log(np.clip(true, np.finfo(np.float64).tiny, None)).mean())


def brier_score(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean squared distance of the probabilities from the truth (Brier 1950).

    Summed over the classes of a text, between 0 and 2; for multi-label the mean over decisions, between 0 and 1.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if np.ndim(labels) == 2:
        return float(np.square(p - labels).mean())
    return float(np.square(p - np.eye(p.shape[1])[labels]).sum(1).mean())


PROBABILITY_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "expected_calibration_error": expected_calibration_error,
    "negative_log_likelihood": negative_log_likelihood,
    "brier_score": brier_score,
}


def reliability_bins(confidence: np.ndarray, right: np.ndarray) -> tuple[Bin, ...]:
    """The bins that hold anything, of 15 of equal width over (0, 1], each closed above."""
    which = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    sizes = np.bincount(which, minlength=BINS)
    means = [np.bincount(which, values, BINS) / np.maximum(sizes, 1) for values in (confidence, right)]
    return tuple(
        Bin(i / BINS, (i + 1) / BINS, float(means[0][i]), float(means[1][i]), int(sizes[i]))
        for i in map(int, np.flatnonzero(sizes))
    )


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> tuple[tuple[OperatingPoint, ...], float]:
    """The curve and the area under its error.

    Texts of equal confidence can only be answered together. A threshold lies halfway between two confidences, so that
    rounding in another dtype or batch does not move a text across it.
    """
    order = np.argsort(-confidence, kind="stable")
    ordered, n = confidence[order], len(order)
    last = np.append(ordered[1:] < ordered[:-1], True)  # of a run of equal confidences
    thresholds = np.append((ordered[:-1] + ordered[1:]) / 2, 0.0)[last]
    counts = np.flatnonzero(last) + 1
    accuracies = np.cumsum(right[order])[last] / counts
    area = float(np.diff(counts, prepend=0) @ (1 - accuracies) / n)
    shown = np.unique(np.searchsorted(counts * _POINTS, np.arange(1, _POINTS + 1) * n))  # first to cover each percent
    points = (OperatingPoint(float(thresholds[i]), float(counts[i] / n), float(accuracies[i])) for i in shown)
    return tuple(points), area


def _decisions(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of every decision, and whether it was right, both ``(decisions,)``."""
    if np.ndim(labels) == 2:
        confidence = np.maximum(probabilities, 1 - probabilities)
        return confidence.reshape(-1), ((probabilities > 0.5) == (labels == 1)).reshape(-1)
    return probabilities.max(1), probabilities.argmax(1) == labels


def _texts_right(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    _, right = _decisions(labels, probabilities)
    return np.asarray(right.reshape(len(labels), -1).all(1))


def _parts(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rest, part) rows for cross-fitting; a single row has no rest to learn from and stays as it is."""
    return [] if count < 2 else list(KFold(min(_FOLDS, count), shuffle=True, random_state=seed).split(np.zeros(count)))
