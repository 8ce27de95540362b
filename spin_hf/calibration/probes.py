"""One path of sparse probes per (tap, pooling): which neurons carry the label, and how well."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..taps import Tap
from .solver import PathPoint, smallest_useful_C, solve_path
from .task import Task

_PATIENCE = 2  # points without a better score, or without a lower loss, after which a path ends


@dataclass(frozen=True)
class Labelled:
    """Labels, solver targets and weights of all rows, and which rows train and which evaluate, fold by fold.

    With an evaluation set there is one fold; with cross-validation the evaluation parts of the folds are disjoint.
    ``refit`` are the rows of the final fit: the one fold's training rows, or all rows.
    """

    task: Task
    labels: np.ndarray
    targets: Tensor
    weights: Tensor
    folds: tuple[tuple[np.ndarray, np.ndarray], ...]
    refit: np.ndarray

    @property
    def eval_rows(self) -> np.ndarray:
        return np.concatenate([held_out for _, held_out in self.folds])

    def fingerprint(self) -> str:
        """Hash of all that probes and heads depend on beside the features."""
        digest = hashlib.sha256(repr((self.task.names, self.task.metric_name, self.task.multiclass)).encode())
        for array in (self.targets.numpy(), self.weights.numpy(), *chain(*self.folds), self.refit):
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def fits(self) -> list[np.ndarray]:
        """Training rows of every fit to make: one per fold, and the final one last where it is another."""
        rows = [train for train, _ in self.folds]
        return rows if len(rows) == 1 else [*rows, self.refit]

    def score(self, scores: Sequence[Tensor]) -> tuple[float, np.ndarray]:
        """Metric and predictions from each fold's scores ``(rows held out, columns)``, taken together."""
        predictions = np.concatenate([self.task.predict(part) for part in scores])
        return self.task.score(self.labels[self.eval_rows], predictions), predictions

    def held_out_loss(self, scores: Sequence[Tensor]) -> float:
        """Mean loss on the evaluation rows: smoother than the metric, for choices between near equals."""
        rows = self.eval_rows
        joined = torch.cat(list(scores)).double().cpu()
        total = self.task.loss.value(joined, self.targets[rows].double(), self.weights[rows].double()).sum()
        return float(total / self.weights[rows].double().mean(1).sum())


@dataclass(frozen=True)
class ProbeFit:
    """A probe fitted on some rows, in standardised coordinates. ``salience`` ranks neurons."""

    mean: Tensor
    scale: Tensor
    weight: Tensor  # (columns, d)
    intercept: Tensor
    salience: Tensor  # (d,)


@dataclass(frozen=True)
class Probe:
    """The chosen probe of one (tap, pooling): its score at every C, and one fit per fold, the final one last."""

    tap: Tap
    pooling: str
    C: float
    score: float
    predictions: np.ndarray
    scores_by_C: tuple[tuple[float, float], ...]
    fits: tuple[ProbeFit, ...]
    worst_gap: float
    unconverged: int

    @property
    def num_features(self) -> int:
        return int((self.fits[-1].salience > 0).sum())


def fit_probe(
    features: Tensor,
    tap: Tap,
    pooling: str,
    data: Labelled,
    *,
    Cs: int | Sequence[float],
    raw: bool = False,
    stop_early: bool = True,
    tol: float = 1e-4,
) -> list[Probe]:
    """Solve the path on every fold in step, and score each C on the rows held out.

    Args:
        features: ``(n, d)`` float32.
        Cs: the grid, ascending; a number asks for that many, each twice the last, from twice the smallest C that
            gives any weight.
        raw: penalise the weights of the raw features instead of the standardised ones.
        stop_early: end the path once the score, or the held-out loss, has not improved for two values of C.
        tol: relative duality gap.

    Returns:
        One probe per C, the best score first, then the strongest penalty.
    """
    loss = data.task.loss
    fits = data.fits()
    standard = [standardise(features, rows) for rows in fits]
    grids = list(Cs) if not isinstance(Cs, int) else None
    problems = []
    for rows, (x, _, scale) in zip(fits, standard, strict=True):
        y, s = data.targets[rows].to(x.device), data.weights[rows].to(x.device)
        if grids is None:
            assert isinstance(Cs, int)
            start = smallest_useful_C(take(x, rows), y, s, loss)
            grids = [start * 2.0 ** (i + 1) for i in range(Cs)] if np.isfinite(start) else []
        factors = 1.0 / scale if raw else None
        problems.append(solve_path(take(x, rows), y, s, loss, grids, factors=factors, tol=tol))
    probes: list[Probe] = []
    best = lowest = (np.inf, 0)  # what was reached, and how many points ago
    for points in zip(*problems, strict=True):
        scores = [
            x[held_out] @ point.weight.T + point.intercept
            for (_, held_out), (x, _, _), point in zip(data.folds, standard, points, strict=False)
        ]
        score, predictions = data.score(scores)
        probes.append(_probe(tap, pooling, score, predictions, points, standard, raw))
        best, lowest = _least(best, -score), _least(lowest, data.held_out_loss(scores))
        if stop_early and max(best[1], lowest[1]) >= _PATIENCE:
            break
    table = tuple((probe.C, probe.score) for probe in probes)
    ranked = sorted(probes, key=lambda probe: (-probe.score, probe.C))
    return [Probe(**{**vars(probe), "scores_by_C": table}) for probe in ranked]


def _least(reached: tuple[float, int], value: float) -> tuple[float, int]:
    return (value, 0) if value < reached[0] else (reached[0], reached[1] + 1)


def _probe(
    tap: Tap,
    pooling: str,
    score: float,
    predictions: np.ndarray,
    points: Sequence[PathPoint],
    standard: Sequence[tuple[Tensor, Tensor, Tensor]],
    raw: bool,
) -> Probe:
    fits = []
    for point, (_, mean, scale) in zip(points, standard, strict=True):
        weight = point.weight / scale if raw else point.weight
        fits.append(ProbeFit(mean, scale, point.weight, point.intercept, weight.square().sum(0)))
    return Probe(
        tap=tap,
        pooling=pooling,
        C=points[0].C,
        score=score,
        predictions=predictions,
        scores_by_C=(),
        fits=tuple(fits),
        worst_gap=max(point.gap for point in points),
        unconverged=sum(not point.converged for point in points),
    )


def probe_bytes(width: int, rows: int, fits: int) -> int:
    """Memory that :func:`fit_probe` needs: the features once, and twice more for each fit (by rows and by columns)."""
    return 4 * width * rows * (1 + 2 * fits)


def take(x: Tensor, rows: np.ndarray) -> Tensor:
    """Some rows, ascending; without a copy where they follow one another."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    return x[start:stop] if stop - start == len(rows) else x[rows]


def standardise(features: Tensor, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """All rows, shifted and scaled by the statistics of some. A constant column stays zero, with scale 1."""
    mean = take(features, rows).mean(0)
    scale = take(features, rows).std(0, correction=0)
    constant = scale <= 1e-6 * mean.abs().clamp_min(1e-6)
    scale = torch.where(constant, torch.ones_like(scale), scale)
    x = (features - mean).div_(scale)
    x[:, constant] = 0.0
    return x, mean, scale
