"""One path of sparse probes per (tap, pooling): which neurons carry the label, and how well."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from ..taps import Tap
from .batched import pays
from .blocks import empty, take_rows
from .folds import FEW_ROWS
from .losses import Loss
from .paths import AT_ONCE, InTurn, Paths, Together
from .solver import PathPoint, demand_ascending, smallest_useful_C
from .task import Task

Place = tuple[Tap, str]  # and its pooling

_BYTES_TOGETHER = 2**31  # of features that a GPU solves together: more would not be faster
_BYTES_HELD = 2**33  # of all that a GPU holds for what it solves together
_MOST_TOGETHER = 16
_PRIOR_ROWS = 10  # of the median variance, where there are few rows
_JUDGED, _APART = 1e-2, 2.0  # relative gap at which scores of values of C so far apart tell when a path has turned
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
    def few(self) -> bool:
        """Whether so few rows are cross-validated that scores and variances can't be taken as they are found."""
        return len(self.folds) > 1 and len(self.labels) < FEW_ROWS

    @property
    def eval_rows(self) -> np.ndarray:
        return np.concatenate([held_out for _, held_out in self.folds])

    def fingerprint(self, *, choosing: bool = True) -> str:
        """Hash of all that probes and heads depend on beside the features; without ``choosing`` not of the metric."""
        metric = self.task.metric_name if choosing else None
        digest = hashlib.sha256(repr((self.task.names, metric, self.task.multiclass)).encode())
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
        score = self.task.score(self.labels[self.eval_rows], predictions)
        if np.issubdtype(predictions.dtype, np.integer):  # hundreds of candidates keep theirs
            predictions = predictions.astype(np.min_scalar_type(-max(1, len(self.task.names))))
        return score, predictions

    def held_out_loss(self, scores: Sequence[Tensor]) -> float:
        """Mean loss on the evaluation rows: smoother than the metric, for choices between near equals."""
        rows = self.eval_rows
        joined = torch.cat(list(scores)).double()
        y, s = (part[rows].to(joined) for part in (self.targets, self.weights))
        return float(self.task.loss.value(joined, y, s).sum() / s.mean(1).sum())


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
    """The chosen probe of one (tap, pooling): its score at every C, and one fit per fold, the final one last.

    Of values of C that were never ahead, the score may be that of a solution of a gap of up to 1e-2.
    """

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


def fit_probes(
    features: Sequence[Tensor],
    places: Sequence[Place],
    data: Labelled,
    *,
    Cs: int | Sequence[float],
    raw: bool = False,
    stop_early: bool = True,
    tol: float = 1e-4,
) -> list[list[Probe]]:
    """Solve the path of each place on every fold in step, and score each C on the rows held out.

    Args:
        features: ``(n, d)`` float32 for each place, of one width and on one device. They are solved together where that
            :func:`~spin_hf.calibration.batched.pays` for the largest fit.
        places: tap and pooling of each.
        Cs: the grid, ascending; a number asks for that many, each twice the last, from twice the smallest C that
            gives any weight.
        raw: penalise the weights of the raw features instead of the standardised ones.
        stop_early: end a path once the score, or the held-out loss, has not improved for two values of C. Of values at
            least a factor of two apart, solutions of a gap of 1e-2 tell that as well as exact ones, for a part of the
            time; that of the best score is then solved to ``tol``, and if another is ahead thereby, that one too, until
            what is ahead is exact. (Of closer ones the last solution may have such a gap already.)
        tol: relative duality gap: without ``stop_early``, or of closer values, of all.

    Returns:
        For each place one probe per C, the best score first, then the strongest penalty.
    """
    loss = data.task.loss
    apart = isinstance(Cs, int) or all(other >= _APART * C for C, other in pairwise(Cs))
    judged = max(tol, _JUDGED) if stop_early and apart else tol
    searches = [_Search(tap, pooling, data, raw=raw, stop_early=stop_early) for tap, pooling in places]
    grids: list[list[float]] = []
    sure = [search.sure for search in searches]
    paths: list[Paths] = []
    fits, outputs = data.fits(), data.targets.shape[1]
    together = pays(features[0].device, max(map(len, fits)), features[0].shape[1], outputs)
    for number, rows in enumerate(fits):
        x = empty(len(features), len(rows), features[0].shape[1], device=features[0].device)
        held_out = data.folds[number][1] if number < len(data.folds) else rows[:0]
        for search, own, values in zip(searches, x, features, strict=True):
            search.standard.append(standardise(values, rows, held_out, out=own, few=data.few))
        y, s = data.targets[rows].to(x.device), data.weights[rows].to(x.device)
        grids = grids or [_grid(own, y, s, loss, Cs) for own in x]
        factors = torch.stack([1.0 / search.standard[-1][2] for search in searches]) if raw else None
        paths.append((Together if together else InTurn)(x, y, s, loss, factors))
        del x, own
    for points in zip(*(path.along(grids, sure, judged) for path in paths), strict=True):
        for i, search in enumerate(searches):
            if sure[i]:
                of_fits = [point for point in (of_fit[i] for of_fit in points) if point is not None]
                if not of_fits:
                    sure[i] = 0
                    continue
                search.add(of_fits)
                sure[i] = search.sure
    while any(best := [search.unfinished for search in searches] if judged > tol else []):
        solved = [path.finish([own[fit] if own else None for own in best], tol) for fit, path in enumerate(paths)]
        for search, points in zip(searches, zip(*solved, strict=True), strict=True):
            if of_fits := [point for point in points if point is not None]:
                search.finish(of_fits)
    return [search.ranked() for search in searches]


class _Search:
    """The path of one (tap, pooling), point by point, and when to end it."""

    def __init__(self, tap: Tap, pooling: str, data: Labelled, *, raw: bool, stop_early: bool) -> None:
        self.tap, self.pooling, self.data, self.raw, self.stop_early = tap, pooling, data, raw, stop_early
        self.standard: list[tuple[Tensor, Tensor, Tensor]] = []  # for each fit: rows held out, mean, scale
        self.points: list[Sequence[PathPoint]] = []  # of each C the solutions, one for each fit
        self.probes: list[Probe] = []
        self._finished: set[int] = set()
        self.best = self.lowest = (np.inf, 0)  # what was reached, and how many points ago

    @property
    def sure(self) -> int:
        """How many more values of C are to be tried, whatever comes of them."""
        return max(0, _PATIENCE - max(self.best[1], self.lowest[1])) if self.stop_early else sys.maxsize

    @property
    def unfinished(self) -> Sequence[PathPoint]:
        """The solutions that are ahead, if :meth:`finish` has not been called with those of their C."""
        if not self.probes or self._ahead in self._finished:
            return ()
        return self.points[self._ahead]

    @property
    def _ahead(self) -> int:
        """Of the best score, and of equal ones the strongest penalty."""
        return min(range(len(self.probes)), key=lambda i: (-self.probes[i].score, self.probes[i].C))

    def add(self, points: Sequence[PathPoint]) -> None:
        """Score a C's solutions, one for each fit."""
        self.points.append(points)
        scores = self._scores(points)
        self.probes.append(self._probe(points, scores))
        self.best = _least(self.best, -self.probes[-1].score)
        self.lowest = _least(self.lowest, self.data.held_out_loss(scores))

    def finish(self, points: Sequence[PathPoint]) -> None:
        """Put in place of the solutions that are ahead those of their C that have a smaller gap."""
        place = self._ahead
        best = [min(pair, key=lambda point: point.gap) for pair in zip(points, self.points[place], strict=True)]
        self.points[place], self.probes[place] = best, self._probe(best, self._scores(best))
        self._finished.add(place)

    def ranked(self) -> list[Probe]:
        table = tuple((probe.C, probe.score) for probe in self.probes)
        ranked = sorted(self.probes, key=lambda probe: (-probe.score, probe.C))
        return [replace(probe, scores_by_C=table) for probe in ranked]

    def _scores(self, points: Sequence[PathPoint]) -> list[Tensor]:
        return [
            held_out @ point.weight.T + point.intercept
            for _, (held_out, _, _), point in zip(self.data.folds, self.standard, points, strict=False)
        ]

    def _probe(self, points: Sequence[PathPoint], scores: Sequence[Tensor]) -> Probe:
        score, predictions = self.data.score(scores)
        fits = []
        for point, (_, mean, scale) in zip(points, self.standard, strict=True):
            weight = point.weight / scale if self.raw else point.weight
            fits.append(ProbeFit(mean, scale, point.weight, point.intercept, weight.square().sum(0)))
        return Probe(
            tap=self.tap,
            pooling=self.pooling,
            C=points[0].C,
            score=score,
            predictions=predictions,
            scores_by_C=(),
            fits=tuple(fits),
            worst_gap=max(point.gap for point in points),
            unconverged=sum(not point.converged for point in points),
        )


def _grid(x: Tensor, y: Tensor, s: Tensor, loss: Loss, Cs: int | Sequence[float]) -> list[float]:
    if not isinstance(Cs, int):
        demand_ascending(Cs)
        return list(Cs)
    start = smallest_useful_C(x, y, s, loss)
    return [start * 2.0 ** (i + 1) for i in range(Cs)] if np.isfinite(start) else []


def _least(reached: tuple[float, int], value: float) -> tuple[float, int]:
    return (value, 0) if value < reached[0] else (reached[0], reached[1] + 1)


def probe_bytes(width: int, rows: int, fits: int) -> int:
    """What :func:`fit_probes` needs for a place, in memory or, if large, in temporary files: its features, and about
    twice more for each fit (by rows and by columns).
    """
    return 4 * width * rows * (1 + 2 * fits)


def solver_bytes(rows: int, width: int, values: int, outputs: int) -> int:
    """What :func:`~spin_hf.calibration.batched.solve_together` holds of a tap beside the features, for so many
    penalties and columns of targets: of the scores about four float32 in a step, whose memory a recording keeps, and
    ten float64 while it looks at the gaps; of the weights sixteen float32.
    """
    return values * outputs * (96 * rows + 64 * width)


def most_together(each: int, shared: int = 0) -> int:
    """How many problems of so many bytes a GPU is given at once, beside what they share; at least one."""
    return max(1, (_BYTES_HELD - shared) // max(1, each))


def in_groups(
    places: Sequence[Place], widths: Mapping[Tap, int], rows: int, device: torch.device, *, fits: int, outputs: int
) -> list[list[Place]]:
    """Places to be solved together, of one width each: some where it pays, others alone.

    A function of its arguments alone, whatever the number of processes and what else is in memory: the grouping may
    show, within the gap.

    Args:
        fits: how many times each is solved, on other rows.
        outputs: columns of targets.
    """
    groups: list[list[Place]] = []
    for width in dict.fromkeys(widths[tap] for tap, _ in places):
        alike = [place for place in places if widths[place[0]] == width]
        if not pays(device, rows, width, outputs):
            groups += [[place] for place in alike]
            continue
        features = 4 * width * rows
        # as they are read, standardised for each fit, and once more of those whose paths have not ended
        held = features * (2 + fits) + solver_bytes(rows, width, AT_ONCE, outputs)
        count = max(1, min(_MOST_TOGETHER, _BYTES_TOGETHER // features, most_together(held)))
        groups += [alike[i : i + count] for i in range(0, len(alike), count)]
    return groups


def standardise(
    features: Tensor, rows: np.ndarray, held_out: np.ndarray, *, out: Tensor, few: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Shift and scale by the statistics of some rows, whose values are written to ``out``.

    A constant column becomes zero, with scale 1. With ``few`` a column's variance is that of its rows and of ten more
    of the median variance: a neuron that hardly moves in a few texts may be a hundred times as high in the next.

    Returns:
        The values of the rows held out, mean and scale.
    """
    torch.index_select(features, 0, torch.from_numpy(rows).to(features.device), out=out)
    mean, scale = out.mean(0), out.std(0, correction=0)
    constant = scale <= 1e-6 * mean.abs().clamp_min(1e-6)
    if few and not constant.all():
        median = scale[~constant].square().median()
        scale = ((len(rows) * scale.square() + _PRIOR_ROWS * median) / (len(rows) + _PRIOR_ROWS)).sqrt()
    scale = torch.where(constant, torch.ones_like(scale), scale)
    others = take_rows(features, held_out)
    for x in (out, others):
        x.sub_(mean).div_(scale)
        x[:, constant] = 0.0
    return others, mean, scale
