"""Temperature scaling: the one number by which logits are divided, so that probabilities match how often they hold."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .errors import ConfidenceError

LOWEST, HIGHEST = 0.01, 100.0  # bounds of a temperature
_FLAT = 1e-12  # variance of logits below which no temperature changes anything
_STEPS = 100


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimises the negative log-likelihood of ``softmax(logits / T)``, or of the sigmoid.

    Guo et al. 2017, section 4.2. The likelihood of a temperature is unbounded where every row is classified right, so
    the targets are smoothed as Platt (1999) does: with n decisions a label counts as certain to 1 - 1 / (n + 2). The
    loss is convex in 1 / T and is solved in float64 by Newton steps inside a shrinking bracket.

    Every row counts once: a head fitted with class or sample weights has shifted probabilities, and only their spread
    is mended here, not the shift.

    Args:
        logits: ``(n, num_labels)`` of rows that the classifier was not fitted on. From a model that has a temperature
            already, they are divided by it, and the result is a factor to multiply it by.
        labels: class ids ``(n,)``, or indicators ``(n, num_labels)`` for multi-label, whose logits are independent.

    Returns:
        T, between 0.01 and 100; 1 where all logits of each row are equal.

    Raises:
        ConfidenceError: for shapes that don't match, no rows, or logits that are not finite.
    """
    z = torch.from_numpy(np.asarray(logits, dtype=np.float64))
    labels = np.asarray(labels)
    if z.ndim != 2 or not len(z) or labels.shape not in (z.shape[:1], z.shape):
        raise ConfidenceError(
            f"logits should be (n, num_labels) and labels (n,) or (n, num_labels); got {tuple(z.shape)} and "
            f"{labels.shape}."
        )
    if not torch.isfinite(z).all():
        raise ConfidenceError("logits must be finite.")
    given = torch.from_numpy(labels.astype(np.int64))
    if labels.ndim == 2:  # each label as two classes of its own, whose logits are z and 0
        z = torch.stack([torch.zeros_like(z), z], 2).reshape(-1, 2)
        given = given.reshape(-1)
    return 1.0 / _inverse_temperature(z, given)


def _inverse_temperature(z: Tensor, labels: Tensor) -> float:
    smoothing = 1.0 / (len(z) + 2)
    others = (z.sum(1) - z.gather(1, labels[:, None])[:, 0]) / max(z.shape[1] - 1, 1)
    wanted = float(((1 - smoothing) * z.gather(1, labels[:, None])[:, 0] + smoothing * others).mean())

    def derivatives(a: float) -> tuple[float, float]:
        """Slope and curvature of the mean loss in a = 1 / T: mean minus target, and variance, of the logits."""
        p = torch.softmax(a * z, 1)
        mean = (p * z).sum(1)
        return float(mean.mean()) - wanted, float((p * (z - mean[:, None]).square()).sum(1).mean())

    low, high = 1 / HIGHEST, 1 / LOWEST
    if float(z.var(1, correction=0).mean()) < _FLAT:
        return 1.0
    if derivatives(low)[0] >= 0:
        return low
    if derivatives(high)[0] <= 0:
        return high
    a = 1.0
    for _ in range(_STEPS):
        slope, curvature = derivatives(a)
        low, high = (low, a) if slope > 0 else (a, high)
        step = a - slope / curvature if curvature > 0 else high
        step = step if low < step < high else math.sqrt(low * high)
        if abs(step - a) <= 1e-12 * a:
            break
        a = step
    return a
