"""Paths of sparse probes of some taps: all taps and some values of C at once, or one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .batched import solve_sparse
from .losses import Loss
from .solver import PathPoint, Problem, solve_path

AT_ONCE = 4  # values of C that are solved at once, at most; in the first group, whose penalties are strong, always
_SPAN = 10.0  # values at once lie within this factor: farther ones are better started from the last solution

Points = list[PathPoint | None]  # of each tap, where it has one


class Paths(Protocol):
    """The paths of some taps on the same rows."""

    def along(self, grids: Sequence[Sequence[float]], sure: Sequence[int], tol: float) -> Iterator[Points]:
        """What :func:`solve_paths` yields."""
        ...

    def finish(self, points: Points, tol: float) -> Points:
        """The solutions at the values of C of these points, from there on to a gap of ``tol``."""
        ...


class Together:
    """Paths that are solved at once.

    Args:
        x, y, s, loss, factors: as :func:`solve_paths` takes them.
    """

    def __init__(self, x: Tensor, y: Tensor, s: Tensor, loss: Loss, factors: Tensor | None = None) -> None:
        self._x, self._rows, self._factors = x, (y, s, loss), factors

    def along(self, grids: Sequence[Sequence[float]], sure: Sequence[int], tol: float) -> Iterator[Points]:
        return solve_paths(self._x, *self._rows, grids, sure, factors=self._factors, tol=tol)

    def finish(self, points: Points, tol: float) -> Points:
        which = [i for i, point in enumerate(points) if point is not None]
        starts = [point for point in points if point is not None]
        x = self._x if len(which) == len(self._x) else self._x[which]
        factors = None if self._factors is None else self._factors[which]
        weight = torch.stack([point.weight for point in starts])
        intercept = torch.stack([point.intercept for point in starts])
        Cs = [[point.C] for point in starts]
        found = _solve_group(x, *self._rows, Cs, factors, weight, intercept, tol)
        solved = dict(zip(which, found, strict=True))
        return [solved[i][0] if i in solved else None for i in range(len(points))]


class InTurn:
    """Paths that are solved one after the other, each by a solver of its own.

    Args:
        x, y, s, loss, factors: as :func:`solve_paths` takes them.
    """

    def __init__(self, x: Tensor, y: Tensor, s: Tensor, loss: Loss, factors: Tensor | None = None) -> None:
        self._problems = [Problem(own, y, s, loss, None if factors is None else factors[i]) for i, own in enumerate(x)]

    def along(self, grids: Sequence[Sequence[float]], sure: Sequence[int], tol: float) -> Iterator[Points]:
        for step in range(max(map(len, grids))):
            wanted = [bool(sure[i]) and step < len(grid) for i, grid in enumerate(grids)]
            if not any(wanted):
                return
            yield [
                problem.solve(grid[step], tol) if own else None
                for problem, grid, own in zip(self._problems, grids, wanted, strict=True)
            ]

    def finish(self, points: Points, tol: float) -> Points:
        found: Points = []
        for problem, point in zip(self._problems, points, strict=True):
            if point is not None:
                problem.start(point.weight)
                point = problem.solve(point.C, tol)
            found.append(point)
        return found


def solve_paths(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    loss: Loss,
    grids: Sequence[Sequence[float]],
    sure: Sequence[int],
    *,
    factors: Tensor | None = None,
    tol: float = 1e-4,
) -> Iterator[Points]:
    """Yield for each value of C one :class:`PathPoint` per tap, as :func:`~spin_hf.calibration.solver.solve_path` does.

    Args:
        x: features ``(B, n, d)``, float32, standardised.
        y, s, loss, tol: as there.
        grids: values of C of each tap, ascending; an empty one for a tap that has no path.
        sure: how many of its next values each tap is sure to need, looked at before each group. Weaker penalties take
            ever longer, so that a group after the first is no larger than the largest of these. A tap that needs none
            has ended, and yields ``None`` from then on.
        factors: penalty of each feature relative to ``1 / C``, ``(B, d)``.
    """
    weight = x.new_zeros(len(x), y.shape[1], x.shape[2])  # of the last C
    intercept: Tensor | None = None
    first = 0
    while which := [i for i, grid in enumerate(grids) if sure[i] and len(grid) > first]:
        most = min(AT_ONCE, max(sure[i] for i in which)) if first else AT_ONCE
        Cs = [grids[i][first : first + most] for i in which]
        count = max(sum(_SPAN * values[0] > C for C in values) for values in Cs)
        Cs, first = [values[:count] for values in Cs], first + count
        part = x if len(which) == len(x) else x[which]
        scaled = None if factors is None else factors[which]
        known = None if intercept is None else intercept[which]
        points = _solve_group(part, y, s, loss, Cs, scaled, weight[which], known, tol)
        del part  # a generator would hold it until it is resumed
        intercept = x.new_zeros(weight.shape[:2]) if intercept is None else intercept
        for i, path in zip(which, points, strict=True):
            weight[i], intercept[i] = path[-1].weight, path[-1].intercept
        for step in range(max(map(len, Cs))):
            found: Points = [None] * len(x)
            for i, path in zip(which, points, strict=True):
                found[i] = path[step] if step < len(path) else None
            yield found


def _solve_group(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    loss: Loss,
    Cs: Sequence[Sequence[float]],
    factors: Tensor | None,
    start: Tensor,
    start_intercept: Tensor | None,
    tol: float,
) -> list[list[PathPoint]]:
    """The points of some values of C for each of ``B`` taps."""
    penalties = 1.0 / torch.tensor(Cs, dtype=torch.float32, device=x.device)  # (B, C)
    scale = x.new_ones(1, x.shape[2]) if factors is None else factors
    thresholds = scale[:, :, None, None] * penalties[:, None, :, None]
    weight = start[:, None].expand(-1, len(Cs[0]), -1, -1)
    intercept = None if start_intercept is None else start_intercept[:, None].expand(-1, len(Cs[0]), -1)
    found = solve_sparse(x, y, s, loss, thresholds, weight, intercept, tol)
    points = []
    for i, values in enumerate(Cs):
        path = []
        for c, C in enumerate(values):
            gap = float(found.gap[i, c])
            point = PathPoint(
                C,
                found.weight[i, c].clone(),
                found.intercept[i, c].clone(),
                float(found.objective[i, c]),
                gap,
                found.steps,
                gap <= tol,
            )
            if gap > tol:  # ill-conditioned: exact steps get there
                own = None if factors is None else factors[i]
                other = next(solve_path(x[i], y, s, loss, [C], factors=own, start=point.weight, tol=tol))
                point = min(point, other, key=lambda each: each.gap)
            path.append(point)
        points.append(path)
    return points
