"""Newton steps on the supports of penalised problems: where first-order steps have found the signs, the values.

Weak penalties leave the curvature to the features, whose spread makes first-order steps crawl. On the weights that are
not zero, their signs taken as given, the objective is smooth and its Hessian a Gram matrix: cheap on a GPU. A weight
that would change its sign stops at zero, and of some lengths the best is taken, so no jump does harm. Problems jump
side by side: a jump is many small operations, and to tell a GPU of them takes longer than they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .losses import Loss

_LENGTHS = (0.0, 1.0, 0.5, 0.25, 0.1, 0.03)
_IN_A_ROW = 3  # jumps, while they are not of the whole length
_ROUNDS = 15  # of leaving the weights at zero that came there
_SHARES = (0.0, 0.1, 0.3, 0.6)  # of the weights that would change their sign, to stop at
_MOST_HELD = 1 / 16  # of the weights, up to which a factor of them all serves for the rest
_MOST_WEIGHTS = 4096  # of a problem that jump together: more of them do so in turn
_MOST_VALUES = 2**28  # of their features' rows
_BESIDE, _BESIDE_CPU = 2**26, 2**17  # values held for problems side by side; a CPU gains little by it
_FEW = 128  # a problem of fewer weights is filled up to twice as many as this, others to twice their own


@dataclass(frozen=True)
class Elastic:
    """The penalty ``threshold |w| + ridge / 2 w^2`` of the weights ``(P, d, K)`` of some problems.

    Args:
        threshold: ``(P, d, 1)``.
        ridge: ``(P, 1, 1)``.
        members: which features may have a weight, ``(P, d, 1)``; those that have one, where it is ``None``.
    """

    threshold: Tensor
    ridge: Tensor
    members: Tensor | None

    def take(self, which: Tensor) -> Elastic:
        """Of some of the problems."""
        members = None if self.members is None else self.members[which]
        return Elastic(self.threshold[which], self.ridge[which], members)

    def support(self, weight: Tensor) -> Tensor:
        return weight != 0 if self.members is None else (self.members > 0).expand_as(weight)


def jump(
    x: Tensor,
    taps: Sequence[int],
    y: Tensor,
    s: Tensor,
    loss: Loss,
    penalty: Elastic,
    weight: Tensor,
    intercept: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weights and intercepts of no higher objectives than the given ones, of ``P`` problems.

    Args:
        x: features ``(B, n, d)``.
        taps: which of the ``B`` each problem is of.
        y: targets ``(n, K)``, float64.
        s: row weights ``(n, 1)``, or ``(n, K)`` where the columns are separate, float64.
        weight: ``(P, d, K)``.
        intercept: ``(P, K)``.
    """
    problems, d, outputs = weight.shape
    targets, weights = y.expand(problems, -1, -1), s.expand(problems, -1, -1)
    if not loss.coupled:  # each output is a problem of its own
        taps = [tap for tap in taps for _ in range(outputs)]
        penalty = penalty.take(torch.arange(problems, device=x.device).repeat_interleave(outputs))
        weight, intercept = weight.mT.reshape(-1, d, 1), intercept.reshape(-1, 1)
        targets, weights = (part.T.repeat(problems, 1)[..., None] for part in (y, s.expand_as(y)))
    elif penalty.members is None:
        # Raising a feature's weights alike for all classes changes the penalty alone: it is least with one at zero.
        weight = weight - weight.median(2, keepdim=True).values
    weight, intercept = weight.clone(), intercept.clone()
    left = torch.arange(len(taps), device=x.device)
    for _ in range(_IN_A_ROW):
        sizes = penalty.take(left).support(weight[left]).flatten(1).sum(1).tolist()
        going = []
        for group in _groups(sizes, x.shape[1], weight.shape[2], _BESIDE_CPU if x.is_cpu else _BESIDE):
            own = left[torch.tensor(group, device=x.device)]
            features = [x[taps[i]] for i in own.tolist()]
            part = _Jumping(features, targets[own], weights[own], loss, penalty.take(own), weight[own], intercept[own])
            done = part.jump(sizes[group[0]])
            weight[own], intercept[own] = part.weight, part.intercept
            going.append(own[~done])
        left = torch.cat(going)
        if not len(left):
            break
    if not loss.coupled:
        weight, intercept = weight.view(problems, outputs, d).mT, intercept.view(problems, outputs)
    return weight, intercept


def weights_at_once(rows: int) -> int:
    """How many weights of a problem jump together, with so many rows."""
    return min(_MOST_WEIGHTS, max(1, _MOST_VALUES // rows))


def _groups(sizes: Sequence[int], rows: int, outputs: int, room: int) -> Iterator[list[int]]:
    """Problems of about as many weights, the most first, as far as there is room for so many values: of the features,
    of the scores at all lengths, some of them at once and in float64, and of the Hessian.
    """
    group: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        most = sizes[group[0]] if group else 0
        each = max(rows * (most + 12 * len(_LENGTHS) * outputs), most * most)
        if group and (most > 2 * max(sizes[i], _FEW) or (len(group) + 1) * each > room):
            yield group
            group = []
        group.append(i)
    yield group


class _Jumping:
    """Some problems, and where they are; with one output where outputs are separate.

    Args:
        x: features ``(n, d)`` of each.
        y, s: ``(P, n, K)`` and ``(P, n, 1)``.
        loss, penalty, weight, intercept: as :func:`jump` takes them.
    """

    def __init__(
        self, x: Sequence[Tensor], y: Tensor, s: Tensor, loss: Loss, penalty: Elastic, weight: Tensor, intercept: Tensor
    ) -> None:
        self.x, self.y, self.s, self.loss, self.penalty = x, y, s, loss, penalty
        self.weight, self.intercept = weight, intercept

    def jump(self, most: int) -> Tensor:
        """One jump, of ``most`` weights of a problem; for which the whole length, or none, was best."""
        support = self.penalty.support(self.weight).mT.flatten(1)  # (P, K * d)
        places, real = _first(support, most)
        at_once = weights_at_once(len(self.x[0]))
        done = torch.ones_like(support[:, 0])
        for part, is_real in zip(places.split(at_once, 1), real.split(at_once, 1), strict=True):
            done &= self._step(part, is_real)
        return done

    def _step(self, places: Tensor, real: Tensor) -> Tensor:
        """:meth:`jump` of the weights of these places ``output * d + feature`` ``(P, m)``, as far as they are real."""
        (_, d, outputs), m = self.weight.shape, places.shape[1]
        feature = places % d
        output = torch.cat([places // d, torch.arange(outputs, device=places.device).expand(len(places), -1)], 1)
        ones = self.x[0].new_ones(len(self.x[0]), outputs)  # behind the weights come the intercepts
        parts = [torch.cat([x.index_select(1, own), ones], 1) for x, own in zip(self.x, feature, strict=True)]
        rows = torch.stack(parts) if len(parts) > 1 else parts[0][None]  # (P, n, m + K)
        del parts
        scores = torch.stack([x @ own for x, own in zip(self.x, self.weight, strict=True)])
        z = (scores + self.intercept[:, None]).double()
        every = self.weight.mT.flatten(1)
        threshold = self.penalty.threshold[..., 0].gather(1, feature).masked_fill(~real, 0.0)
        ridge = self.penalty.ridge[:, 0].masked_fill(~real, 0.0)
        present, threshold, ridge = (F.pad(part, (0, outputs)) for part in (every.gather(1, places), threshold, ridge))
        residual = self.loss.residual(z, self.y, self.s).to(rows.dtype)
        pull = (rows.mT @ residual).gather(2, output[..., None])[..., 0]
        real = F.pad(real, (0, outputs), value=True)
        hessian = self._hessian(rows, output, real, z)
        # More than the rounding of float32, so that it can be factorised; little beside any curvature that matters.
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        diagonal.add_(1e-6 * diagonal.masked_fill(~real, 0.0).amax(1, keepdim=True) + ridge)
        signs = present.sign() * (threshold > 0)  # those that the slope there holds for; 0 for any
        down = pull - threshold * present.sign() - ridge * present
        move = within_signs(hessian, down, present, signs, real) - present
        failed = ~move.isfinite().all(1)
        move = move.masked_fill(failed[:, None], 0.0)
        lengths = torch.tensor(_LENGTHS, dtype=rows.dtype, device=rows.device)[:, None]
        ends = torch.where(lengths == 1.0, (present + move)[:, None], present[:, None] + lengths * move[:, None])
        by_output = rows.new_zeros(*move.shape, outputs).scatter(2, output[..., None], move[..., None])
        trials = z[:, None] + lengths[..., None] * (rows @ by_output)[:, None]  # (P, lengths, n, K)
        fit = self.loss.value(trials, self.y[:, None], self.s[:, None]).sum(-1)
        cost = (threshold[:, None] * ends.abs() + ridge[:, None] / 2 * ends.square()).sum(-1, dtype=torch.float64)
        best = (fit + cost).nan_to_num(torch.inf).argmin(1)
        end = ends[torch.arange(len(ends), device=best.device), best]
        self.weight = every.scatter(1, places, end[:, :m]).view(-1, outputs, d).mT
        self.intercept = self.intercept + end[:, m:]
        return failed | (best <= 1)

    def _hessian(self, rows: Tensor, output: Tensor, real: Tensor, z: Tensor) -> Tensor:
        """``(P, m, m)`` of features ``(P, n, m)`` whose weights belong to these outputs ``(P, m)``, as far as they are
        real.
        """
        if not self.loss.coupled:
            return (rows * self.loss.curvature(z, self.s).to(rows.dtype)).mT @ rows
        p, s = torch.softmax(z, -1).to(rows.dtype), self.s.to(rows.dtype)
        likely = rows * p.gather(2, output[:, None].expand(-1, rows.shape[1], -1))
        hessian = ((likely * s).mT @ likely).neg_()
        of_output = F.one_hot(output, p.shape[2]).bool() & real[..., None]
        for k, most in enumerate(of_output.sum(1).amax(0).tolist()):  # of one output, more than that
            mine, known = _first(of_output[..., k], most)
            own = rows.gather(2, mine[:, None].expand(-1, rows.shape[1], -1)).masked_fill_(~known[:, None], 0.0)
            more, spots = (own * (s * p[..., k : k + 1])).mT @ own, mine[..., None] * len(hessian[0]) + mine[:, None]
            hessian.view(len(mine), -1).scatter_add_(1, spots.flatten(1), more.flatten(1))
        return hessian


def within_signs(hessian: Tensor, down: Tensor, present: Tensor, signs: Tensor, real: Tensor | None = None) -> Tensor:
    """Where ``<v - present, hessian (v - present)> / 2 - <down, v - present>`` is low among the ``v`` of these signs.

    An active set method: to the least value of all, unless some weights would change their signs on the way. Then only
    so far that a part of them, at least the first, is at zero, where they stay; and on from there.

    Args:
        hessian: of ``P`` problems, ``(P, m, m)``.
        down, present: ``(P, m)``.
        signs: ``(P, m)``; 0 where a weight may have any.
        real: ``(P, m)``; others stay where they are. All are by default.
    """
    if not present.shape[1]:
        return present
    free = real = torch.ones_like(present, dtype=torch.bool) if real is None else real
    v, factor = present, _Factor.of(hessian, free)
    done = factor.failed
    shares = torch.tensor(_SHARES, dtype=v.dtype, device=v.device)
    problems = torch.arange(len(v), device=v.device)
    for _ in range(_ROUNDS):
        held = factor.own & ~free.gather(1, factor.places) & ~done[:, None]
        counts = held.sum(1)
        too_many = (counts > factor.own.sum(1) * _MOST_HELD).any()
        most, renew = torch.stack([counts.max(), too_many.long()]).tolist()
        if renew:
            factor, most = _Factor.of(hessian, free), 0
            held, done = torch.zeros_like(factor.own), done | factor.failed
        slope = down - (hessian @ (v - present)[..., None])[..., 0]
        toward = factor.solve(slope, held, most).masked_fill(done[:, None], 0.0)
        leaving = free & (signs * (v + toward) <= 0) & (signs != 0) & ~done[:, None]
        reached = (-v / toward).masked_fill(~leaving, torch.inf)
        last = (leaving.sum(1, keepdim=True) - 1).clamp_min(0)
        stops = reached.sort(1).values.gather(1, (shares * last).long())  # infinite where none is leaving
        stops = torch.cat([stops.clamp(max=1.0), torch.ones_like(stops[:, :1])], 1)[..., None]
        trials = torch.where(reached[:, None] <= stops, 0.0, v[:, None] + stops * toward[:, None])
        moves = trials - present[:, None]  # (P, stops, m)
        value = ((moves @ hessian) * moves).sum(2) / 2 - (moves * down[:, None]).sum(2)
        v = trials[problems, value.nan_to_num(torch.inf).argmin(1)]
        free = real & ((v != 0) | (signs == 0))
        done = done | ~leaving.any(1)
        if bool(done.all()):
            break
    return v


@dataclass(frozen=True)
class _Factor:
    """Cholesky factors ``(P, q, q)`` of parts of some matrices.

    Attributes:
        places: of these parts, ``(P, q)``, the smaller ones filled up.
        own: what is no filling.
        failed: which matrices are not positive definite.
    """

    places: Tensor
    own: Tensor
    factor: Tensor
    failed: Tensor

    @classmethod
    def of(cls, matrices: Tensor, which: Tensor) -> _Factor:
        """Of the parts of ``(P, m, m)`` that are true in ``(P, m)``."""
        counts = which.sum(1)
        least, most = torch.stack([counts.min(), counts.max()]).tolist()
        places, own = _first(which, most)
        if least < len(which[0]):
            matrices = matrices.gather(1, places[..., None].expand(-1, -1, matrices.shape[2]))
            matrices = matrices.gather(2, places[:, None].expand(-1, most, -1))
            matrices = matrices.masked_fill_(~(own[..., None] & own[:, None]), 0.0)
            matrices.diagonal(dim1=1, dim2=2).add_(~own)
        factor, info = torch.linalg.cholesky_ex(matrices)
        return cls(places, own, factor, info > 0)

    def solve(self, slope: Tensor, held: Tensor, most: int) -> Tensor:
        """The solutions ``(P, m)`` in the parts, but for what of these ``(P, q)`` is held, at most so many: zero there,
        and outside of the parts.
        """
        right = slope.gather(1, self.places).masked_fill(~self.own, 0.0)[..., None]
        if most:
            places, own = _first(held, most)
            units = torch.zeros_like(right).repeat(1, 1, most).scatter_(1, places[:, None], own[:, None].to(right))
            solved = torch.cholesky_solve(torch.cat([right, units], 2), self.factor)
            found, pulls = solved[..., :1], solved[..., 1:]
            between = pulls.gather(1, places[..., None].expand(-1, -1, most))
            between = between.masked_fill_(~(own[..., None] & own[:, None]), 0.0)
            between.diagonal(dim1=1, dim2=2).add_(~own)
            pulled = found.gather(1, places[..., None]).masked_fill(~own[..., None], 0.0)
            found = found - pulls @ torch.linalg.solve_ex(between, pulled)[0]
        else:
            found = torch.cholesky_solve(right, self.factor)
        return torch.zeros_like(slope).scatter(1, self.places, found[..., 0].masked_fill(held | ~self.own, 0.0))


def _first(which: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places ``(P, count)`` of what is true in ``which`` ``(P, m)``, then of others; and which of both they are."""
    places = which.byte().argsort(stable=True, dim=1, descending=True)[:, :count]
    return places, which.gather(1, places)
