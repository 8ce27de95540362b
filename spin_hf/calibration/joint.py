"""Neurons chosen together: one sparse probe of all taps at once, instead of one for each.

A tap's own probe doesn't know of the others, so that neighbouring taps keep neurons that say the same. A probe of all
of them keeps what each adds to the rest; a dense head is fitted on what it keeps, as for every candidate. It chooses
among the features whose slope at zero is largest (sure independence screening: Fan and Lv 2008), so that its cost is
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..features import FeatureGroup
from .batched import pays
from .heads import HeadFitter, HeadSet
from .paths import solve_paths
from .probes import Place, Probe, ProbeFit
from .selection import Candidate
from .shared_columns import SharedColumns, read_features
from .solver import PathPoint, balance, smallest_useful_C, solve_path

_MOST_READ = 2**14  # features that the probe chooses from
_GROWTH = 2**0.5  # of C from one value to the next
_VALUES = 24  # of C at most
_PATIENCE = 2  # values of C without a lower loss of the head, after which the path ends


@dataclass(frozen=True)
class _Screened:
    """What one fit's probe may choose from, the features of a place side by side."""

    neurons: Mapping[Place, np.ndarray]  # ascending
    mean: Tensor
    scale: Tensor

    def groups(self) -> list[FeatureGroup]:
        return [FeatureGroup(*place, torch.from_numpy(neurons)) for place, neurons in self.neurons.items()]


def select_jointly(
    fitter: HeadFitter, places: Sequence[Place], best: Candidate, *, max_features: int, tol: float
) -> tuple[Candidate, list[Probe]] | None:
    """The head of least held-out loss on a path of joint probes, and the probe, tap by tap; ``None`` if it is empty.

    Args:
        fitter: of the other heads.
        places: the taps and poolings to choose from.
        best: whose kind, pooling and depth this one has.
        max_features: of the head.
        tol: relative duality gap of the probe.
    """
    screened = _screen(fitter, places)
    source = SharedColumns.of(fitter.store, [group for each in screened for group in each.groups()])
    own = replace(fitter, shared=source)
    found: tuple[Candidate, list[Probe]] | None = None
    since_better = 0
    for points in _paths(own, screened, tol):
        if int((points[-1].salience > 0).sum()) > max_features:
            break
        probes = _by_place(screened, points)
        heads, _ = own.fit(HeadSet(best.kind, best.pooling, best.depth, probes), etas=(1.0,), max_features=max_features)
        since_better += 1
        for head in heads:
            if found is None or (head.loss or 0.0) < (found[0].loss or 0.0):
                found, since_better = (replace(head, joint=True), probes), 0
        if since_better >= _PATIENCE:
            break
    return found


def _screen(fitter: HeadFitter, places: Sequence[Place]) -> list[_Screened]:
    """For each fit the features of the largest slopes, with their mean and scale on its rows."""
    data, loss = fitter.data, fitter.data.task.loss
    residuals = []
    for rows in data.fits():
        y, s = data.targets[rows].double(), data.weights[rows].double()
        residuals.append(loss.residual(torch.zeros_like(y) + balance(loss, torch.zeros_like(y), y[0] * 0, y, s), y, s))
    slopes: list[list[Tensor]] = [[] for _ in residuals]
    for place in places:
        values = torch.from_numpy(fitter.store.read(*place))
        for rows, residual, found in zip(data.fits(), residuals, slopes, strict=True):
            x = values[torch.from_numpy(rows)].to(fitter.device)
            mean, scale = x.mean(0), x.std(0, correction=0)
            slope = (x.T @ residual.to(x)).abs().amax(1) / scale
            constant = scale <= 1e-6 * mean.abs().clamp_min(1e-6)
            found.append(torch.stack([torch.where(constant, torch.zeros_like(slope), slope), mean, scale]).cpu())
    return [_largest(places, found) for found in slopes]


def _largest(places: Sequence[Place], found: Sequence[Tensor]) -> _Screened:
    """Of slopes, means and scales of each place ``(3, width)`` those of the largest slopes."""
    every = torch.cat(list(found), 1)
    chosen = every[0].topk(min(_MOST_READ, every.shape[1])).indices
    kept = torch.zeros(every.shape[1], dtype=torch.bool)
    kept[chosen] = every[0, chosen] > 0
    parts = kept.split([part.shape[1] for part in found])
    neurons = {place: part.nonzero()[:, 0].numpy() for place, part in zip(places, parts, strict=True) if part.any()}
    return _Screened(neurons, every[1, kept], every[2, kept])


def _paths(fitter: HeadFitter, screened: Sequence[_Screened], tol: float) -> Iterator[tuple[PathPoint, ...]]:
    """For each value of C the point of every fit."""
    data, loss = fitter.data, fitter.data.task.loss
    paths: list[Iterator[PathPoint]] = []
    grid: list[float] = []
    for each, rows in zip(screened, data.fits(), strict=True):
        (x,) = read_features(fitter.source, each.groups(), each.mean, each.scale, fitter.device, rows)
        y, s = data.targets[rows].to(x.device), data.weights[rows].to(x.device)
        if not grid:
            first = smallest_useful_C(x, y, s, loss)
            grid = [first * _GROWTH**i for i in range(1, _VALUES)]
        if pays(x.device, len(x), x.shape[1], y.shape[1]):
            together = solve_paths(x[None], y, s, loss, [grid], [1], tol=tol)
            paths.append(point for (point,) in together if point is not None)
        else:
            paths.append(solve_path(x, y, s, loss, grid, tol=tol))
        del x
    return zip(*paths, strict=False)


def _by_place(screened: Sequence[_Screened], points: Sequence[PathPoint]) -> list[Probe]:
    """A joint probe as one for each place that it reads."""
    places = dict.fromkeys(place for each in screened for place in each.neurons)
    fits: dict[Place, list[ProbeFit]] = {place: [] for place in places}
    widths = {place: 1 + max(int(e.neurons[place].max()) for e in screened if place in e.neurons) for place in places}
    for each, point in zip(screened, points, strict=True):
        counts = [len(neurons) for neurons in each.neurons.values()]
        parts = zip(*(part.cpu().split(counts, -1) for part in (each.mean, each.scale, point.weight)), strict=True)
        known = dict(zip(each.neurons, parts, strict=True))
        for place in places:
            mean, scale = torch.zeros(widths[place]), torch.ones(widths[place])
            weight = torch.zeros(len(point.weight), widths[place])
            if place in known:
                neurons = torch.from_numpy(each.neurons[place])
                mean[neurons], scale[neurons], weight[:, neurons] = known[place]
            fits[place].append(ProbeFit(mean, scale, weight, point.intercept, weight.square().sum(0)))
    found = []
    for (tap, pooling), own in fits.items():
        if any(fit.salience.any() for fit in own):
            gaps = max(p.gap for p in points), sum(not p.converged for p in points)
            found.append(Probe(tap, pooling, points[-1].C, 0.0, np.zeros(0), (), tuple(own), *gaps))
    return found
