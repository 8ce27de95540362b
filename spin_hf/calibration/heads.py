"""Heads for all candidates: one dense linear layer on the kept neurons of each, scored on the evaluation rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..features import FeatureGroup
from ..taps import Tap
from .batched import pays, solve_together
from .blocks import empty, take_columns
from .halving import in_halves, is_out_of_memory, no_room_to_solve
from .penalties import L1, L2, Penalty
from .probes import Labelled, Probe, most_together, solver_bytes, standardise
from .ridge import curvature_gram, solve_ridge
from .selection import Candidate, Columns, combinations, members
from .shared_columns import Readable, SharedColumns
from .solver import PathPoint, solve_path
from .store import FeatureStore

T = TypeVar("T")

# Inverse penalties of a head, times its number of features: the prior variance of a logit of uncorrelated features.
_LOGIT_VARIANCES = (0.1, 0.4, 1.6, 6.4, 25.6)


@dataclass(frozen=True)
class HeadSet:
    """The heads of one kind, pooling and depth, on neurons that these probes rank: one for each eta."""

    kind: str
    pooling: str
    depth: int
    probes: list[Probe]

    @property
    def name(self) -> str:
        """Tells it from the others of a calibration; probes that share a C are told apart by it."""
        return f"heads.{self.kind}.{self.pooling}.{self.depth}.{self.probes[0].C!r}"

    @property
    def num_features(self) -> int:
        """Neurons to choose from."""
        return sum(probe.num_features for probe in self.probes if probe.tap.block <= self.depth)


def head_sets(probes: Sequence[Probe], depths: Sequence[int], *, combine: bool) -> list[HeadSet]:
    """Every kind x pooling x depth that has a tap; with ``combine`` also both kinds and all poolings together."""
    return [
        HeadSet(kind, pooling, depth, chosen)
        for kind, pooling, chosen in combinations(probes, combine=combine)
        for depth in depths
        if any(probe.tap.block <= depth for probe in chosen)
    ]


def _feasible(heads: HeadSet, etas: Sequence[float], most: int) -> tuple[list[float], dict[float, int], int]:
    """The etas that keep something new and no more than ``most``, how many each keeps, and how many keep more."""
    final = Columns.of(heads.probes, -1)
    sizes = {eta: int(final.kept(eta, heads.depth).sum()) for eta in etas}
    feasible = [eta for eta in etas if 0 < sizes[eta] <= most]
    feasible = [eta for i, eta in enumerate(feasible) if i == 0 or sizes[eta] > sizes[feasible[i - 1]]]
    return feasible, sizes, len({size for size in sizes.values() if size > most})


def whole_set(sets: Sequence[HeadSet], probes: Sequence[Probe], etas: Sequence[float], most: int) -> HeadSet | None:
    """The set that draws on all of these probes, if a head of no more than ``most`` features can have all it offers."""
    for heads in sets:
        feasible, _, skipped = _feasible(heads, etas, most)
        if len(heads.probes) == len(probes) and feasible and not skipped:
            return heads
    return None


@dataclass(frozen=True)
class HeadFitter:
    """Fits heads on subsets of the stored features.

    ``penalty`` is ``"l2"`` (C chosen on the evaluation rows' loss, from a grid over the number of features) or ``"l1"``
    on raw features (C that of the probes), as the paper has it.
    """

    store: FeatureStore
    data: Labelled
    device: torch.device
    penalty: str = "l2"
    tol: float = 1e-3
    shared: SharedColumns | None = None

    def sharing(self, sets: Sequence[HeadSet], *, etas: Sequence[float], max_features: int) -> HeadFitter:
        """This, with one matrix for all the features that these sets' heads need, read when it is first needed."""
        groups: list[FeatureGroup] = []
        for heads in sets:
            feasible, _, _ = _feasible(heads, etas, max_features)
            for fit in range(len(self.data.fits()) if feasible else 0):
                columns = Columns.of(heads.probes, fit)
                groups += columns.take(columns.kept(feasible[-1], heads.depth)).groups()
        return replace(self, shared=SharedColumns.of(self.store, groups, self.device))

    @property
    def _source(self) -> Readable:
        return self.shared or self.store

    def fit(
        self, heads: HeadSet, *, etas: Sequence[float], max_features: int, widest: bool = False
    ) -> tuple[list[Candidate], int]:
        """A head for every eta that keeps something new and no more than ``max_features``; and how many keep more.

        With ``widest`` only that of the most features.
        """
        probes, depth = heads.probes, heads.depth
        feasible, sizes, skipped = _feasible(heads, etas, max_features)
        if not feasible:
            return [], skipped
        feasible = feasible[-1:] if widest else feasible
        scores: dict[float, list[list[Tensor]]] = {eta: [] for eta in feasible}
        for fold, (rows, held_out) in enumerate(self.data.folds):
            for eta, held in self._fit_fold(Columns.of(probes, fold), feasible, depth, rows, held_out):
                scores[eta].append(held)
        found = []
        for eta in feasible:
            score, loss, predictions, which = self._choose(scores[eta])
            C = probes[0].C if self.penalty == "l1" else _LOGIT_VARIANCES[which] / sizes[eta]
            found.append(
                Candidate(heads.kind, heads.pooling, eta, depth, C, sizes[eta], score, loss, None, predictions)
            )
        return found, skipped

    def fit_tap(self, tap: Tap, pooling: str) -> tuple[float, np.ndarray]:
        """A dense head on all neurons of one tap: its score, and its predictions of the evaluation rows."""
        features = self.store.read(tap, pooling, device=self.device)
        scores = []
        for rows, held_out in self.data.folds:
            x = empty(len(rows), features.shape[1], device=features.device)
            held, _, _ = standardise(features, rows, held_out, out=x, few=self.data.few)
            scores.append([held @ p.weight.T + p.intercept for p in self._ridge(x, rows, None)])
        score, _, predictions, _ = self._choose(scores)
        return score, predictions

    def fit_final(
        self, probes: Sequence[Probe], candidate: Candidate, tol: float, fold: int = -1
    ) -> tuple[Columns, PathPoint, Candidate]:
        """The chosen candidate's columns and head on the final training rows, or a fold's, solved to ``tol``.

        The candidate comes back with the score of that very head where there are rows that it was not fitted on, as
        the tighter tolerance may turn a text that stood on the fence.
        """
        assert candidate.eta is not None
        columns = Columns.of(members(probes, candidate.kind, candidate.pooling), fold)
        columns = columns.take(columns.kept(candidate.eta, candidate.depth))
        rows = self.data.fits()[fold]
        single = len(self.data.folds) == 1
        x, held_out = columns.read(self._source, self.device, rows, self.data.eval_rows if single else rows[:0])
        y, s = self.data.targets[rows], self.data.weights[rows]
        loss = self.data.task.loss
        if self.penalty == "l1":
            points = solve_path(x, y, s, loss, [candidate.C], factors=1.0 / columns.scale.to(x), tol=tol)
        else:
            points = solve_ridge(x, y, s, loss, [candidate.C], tol=tol)
        point = next(iter(points))
        if single:
            scores = held_out @ point.weight.T + point.intercept
            score, predictions = self.data.score([scores])
            candidate = replace(candidate, score=score, predictions=predictions)
        return columns, point, candidate

    def _fit_fold(
        self,
        columns: Columns,
        etas: Sequence[float],
        depth: int,
        rows: np.ndarray,
        held_out: np.ndarray,
    ) -> Iterator[tuple[float, list[Tensor]]]:
        """For each eta, the scores on the held-out rows at each C. All etas share the widest one's matrix and Gram."""
        columns = columns.take(columns.kept(etas[-1], depth))
        x, held = self._with_room(lambda: columns.read(self._source, self.device, rows, held_out))
        y, s, loss = self.data.targets[rows], self.data.weights[rows], self.data.task.loss
        indices = [torch.from_numpy(np.flatnonzero(columns.kept(eta, depth))).to(self.device) for eta in etas]
        if x.shape[1] and pays(x.device, len(x), x.shape[1], y.shape[1]):
            values = 1 if self.penalty == "l1" else len(_LOGIT_VARIANCES)
            each = solver_bytes(len(x), x.shape[1], values, y.shape[1])
            count = most_together(each, shared=2 * 4 * x.numel() + (self.shared.bytes if self.shared else 0))

            def solve(group: Sequence[Tensor]) -> list[list[Tensor]]:
                try:
                    return self._with_room(lambda: list(self._fit_together(x, held, columns, group, rows)))
                except (RuntimeError, MemoryError) as error:
                    if len(group) == 1 and is_out_of_memory(error):
                        raise no_room_to_solve("A head", len(x), x.device, error) from error
                    raise

            groups = [indices[i : i + count] for i in range(0, len(indices), count)]
            parts = chain.from_iterable(in_halves(group, solve) for group in groups)
            yield from zip(etas, chain.from_iterable(parts), strict=True)
            return
        sharing = [index for index in indices if len(index) <= len(x)]  # wider ones are solved in the rows' coordinates
        gram: Tensor | None = None
        weight = x.new_zeros(y.shape[1], x.shape[1])  # of the last eta, where the next one starts
        for eta, index in zip(etas, indices, strict=True):
            part = take_columns(x, index)
            if self.penalty == "l1":
                factors = 1.0 / columns.scale.to(x)[index]
                Cs, start = [columns.probes[0].C], weight[:, index]
                points = list(solve_path(part, y, s, loss, Cs, factors=factors, start=start, tol=self.tol))
                weight[:, index] = points[0].weight
            else:
                shared = None
                if gram is not None and len(index) <= len(x):
                    places = torch.searchsorted(sharing[-1], index)
                    shared = gram[places[:, None], places]
                points = self._ridge(part, rows, shared)
                if gram is None and len(sharing) > 1:
                    middle = points[len(points) // 2]
                    z = (part @ middle.weight.T + middle.intercept).double()
                    gram = curvature_gram(take_columns(x, sharing[-1]), loss.curvature(z, s.double().to(z.device)))
            own = take_columns(held, index)
            yield eta, [own @ p.weight.T + p.intercept for p in points]

    def _with_room(self, work: Callable[[], T]) -> T:
        """What ``work`` gives; once more, without the shared matrix, where the device has no room for both."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) and self.shared and self.shared.leave_device()):
                raise
        return work()

    def _fit_together(
        self, x: Tensor, held_out: Tensor, columns: Columns, indices: Sequence[Tensor], rows: np.ndarray
    ) -> Iterator[list[Tensor]]:
        """What :meth:`_fit_fold` yields for each of some etas, all solved at once."""
        y, s, loss = self.data.targets[rows], self.data.weights[rows], self.data.task.loss
        each = 1 if self.penalty == "l1" else len(_LOGIT_VARIANCES)
        members = x.new_zeros(1, x.shape[1], len(indices) * each, 1)
        for i, index in enumerate(indices):
            members[:, index, i * each : (i + 1) * each] = 1.0
        penalty: Penalty
        if self.penalty == "l1":
            thresholds = 1.0 / (columns.scale.to(x) * columns.probes[0].C)
            penalty = L1((thresholds[None, :, None, None] / members).clamp(max=torch.finfo(x.dtype).max))
        else:
            sizes = [max(len(index), 1) for index in indices]
            ridge = x.new_tensor([size / variance for size in sizes for variance in _LOGIT_VARIANCES])
            penalty = L2(ridge[None, None, :, None], members)
        found = solve_together(x[None], y, s, loss, penalty, members.shape[2], tol=self.tol)
        for i in range(len(indices)):
            yield [held_out @ found.weight[0, c].T + found.intercept[0, c] for c in range(i * each, (i + 1) * each)]

    def _ridge(self, x: Tensor, rows: np.ndarray, gram: Tensor | None) -> list[PathPoint]:
        Cs = [variance / max(x.shape[1], 1) for variance in _LOGIT_VARIANCES]  # the probes of a fold may all be empty
        y, s = self.data.targets[rows], self.data.weights[rows]
        return list(solve_ridge(x, y, s, self.data.task.loss, Cs, gram=gram, tol=self.tol))

    def _choose(self, scores: Sequence[Sequence[Tensor]]) -> tuple[float, float, np.ndarray, int]:
        """From scores by fold and C: the C of least held-out loss, with its metric, loss and predictions."""
        losses = [self.data.held_out_loss(parts) for parts in zip(*scores, strict=True)]
        which = int(np.argmin(losses))
        score, predictions = self.data.score([parts[which] for parts in scores])
        return score, losses[which], predictions, which
