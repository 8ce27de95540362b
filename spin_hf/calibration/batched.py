"""Many penalised linear models at once: one pass over the features serves all taps and all penalties.

The problems are those of :mod:`spin_hf.calibration.solver` and :mod:`spin_hf.calibration.ridge`, certified by the same
duality gap. What is quick on a CPU, small factorisations on a working set, leaves a GPU idle; and small problems cost
a CPU too more calls than arithmetic. Here all ``B`` taps of one width and all ``C`` penalties step together by FISTA
with restarts (Beck and Teboulle 2009; O'Donoghue and Candes 2015): two products with the features a step, whatever the
number of problems. Columns that are certified leave the batch; those that stay long are ill-conditioned, and get a
:func:`~spin_hf.calibration.jump.jump` between the steps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .halving import is_out_of_memory
from .jump import jump, weights_at_once
from .losses import Loss
from .penalties import L1, Penalty, take
from .products import ALIGNED, times, transposed_times
from .replay import Replay, can_replay
from .solver import balance

_CHECK_EVERY = 25  # steps between two looks at the gaps
_PLAIN_STEPS = 100  # after which what is not solved is ill-conditioned: jumps may pay, and a GPU looks half as often
_FOR_JUMPS = 4.0  # times the seconds of steps, what jumps may take
# Seconds on an H100 of a step and each byte that it reads; of a jump, each problem in it and its operations, which are
# those of some jumps in a row. What counts is how they compare.
_STEP, _BYTE, _JUMP, _JUMPING, _OPERATION = 1e-4, 4e-13, 1e-2, 1e-3, 2e-13
_PATIENCE = 500  # steps without a better gap anywhere after which rounding is taken to be the limit
_LANCZOS_ROUNDS = 12
_LEAST_WORKING = 512
_MOST_WORKING = 0.75  # of the features: in place of more of them all are read
_NARROW = 2 * _LEAST_WORKING  # features up to which all are read in every step
_WIDE, _MOST_READ = 2048, 2**25  # and up to this where a tap's rows times features are no more: little to read anyway
_MOST_ROUNDS = 20
# Features and rows times features (benchmarks/together.py), and that times outputs, of what a CPU too solves together.
_SMALL_WIDTH, _SMALL, _SMALL_IN_ALL = 512, 2**17, 2**20


def pays(device: torch.device, rows: int, width: int, outputs: int) -> bool:
    """Whether to solve problems of this size together there: on a CPU small ones only."""
    if device.type != "cpu":
        return True
    return width <= _SMALL_WIDTH and rows * width <= _SMALL and rows * width * outputs <= _SMALL_IN_ALL


@dataclass(frozen=True)
class Solutions:
    """``weight`` ``(B, C, K, d)``, ``intercept`` ``(B, C, K)``, objective and relative gap ``(B, C)``; steps taken."""

    weight: Tensor
    intercept: Tensor
    objective: Tensor
    gap: Tensor
    steps: int


def solve_together(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    loss: Loss,
    penalty: Penalty,
    columns: int,
    *,
    start: Tensor | None = None,
    start_intercept: Tensor | None = None,
    tol: float = 1e-4,
    max_steps: int = 5000,
) -> Solutions:
    """Minimise ``sum_i s_i loss(x_i W + b, y_i)`` plus the penalty for each of ``B`` taps and ``columns`` penalties.

    Args:
        x: features ``(B, n, d)``, float32, standardised.
        y: targets ``(n, K)``.
        s: weights ``(n, 1)`` or ``(n, K)``.
        penalty: of each weight.
        columns: ``C``.
        start, start_intercept: weights ``(B, C, K, d)`` and intercepts ``(B, C, K)`` to begin with.
        tol: relative duality gap.
        max_steps: after which what is not solved is returned with the gap that it has.
    """
    batch = _Batch(x, y, s, loss)
    shape = (x.shape[0], x.shape[2], columns, y.shape[1])
    weight = x.new_zeros(shape) if start is None else start.permute(0, 3, 1, 2).to(x).expand(shape).clone()
    if start_intercept is None:
        start_intercept = balance(loss, torch.zeros_like(batch.y), torch.zeros_like(batch.y[0]), batch.y, batch.s)
    intercept = start_intercept.to(x).expand(shape[0], *shape[2:])[:, None].clone()
    found = Solutions(
        x.new_zeros(shape[0], shape[2], shape[3], shape[1]),
        x.new_zeros(shape[0], *shape[2:]),
        torch.zeros(shape[0], shape[2], dtype=torch.float64, device=x.device),
        torch.full((shape[0], shape[2]), torch.inf, dtype=torch.float64, device=x.device),
        0,
    )
    rows, kept = torch.arange(shape[0], device=x.device), torch.arange(columns, device=x.device)
    state = _State.begin(weight, intercept)
    steps = since_better = count = 0
    # Seconds that jumps may take: whichever of steps and jumps serves, the other does not take long. Of the small
    # problems that a CPU solves together a jump takes no longer than some steps.
    credit = float("inf") if x.is_cpu else 0.0
    while True:
        objective, gap, balanced = batch.certify(state.weight, state.intercept, penalty)
        last = found.gap[rows[:, None], kept]
        better = gap < last
        gained = bool(((gap < 0.9 * last) & (last > tol)).any())
        since_better = 0 if gained else since_better + count
        spots = torch.where(better)
        at = rows[spots[0]], kept[spots[1]]
        found.weight[at] = state.weight.permute(0, 2, 3, 1)[spots]
        found.intercept[at] = balanced[spots].to(x.dtype)
        found.objective[at], found.gap[at] = objective[spots], gap[spots]
        left = found.gap[rows[:, None], kept] > tol
        if steps >= max_steps or since_better >= _PATIENCE or not bool(left.any()):
            return Solutions(found.weight, found.intercept, found.objective, found.gap, steps)
        some_rows, some = left.any(1), left.any(0)
        if 4 * int(some_rows.sum()) <= 3 * len(rows) or not bool(some.all()):
            some_rows = some_rows if 4 * int(some_rows.sum()) <= 3 * len(rows) else torch.ones_like(some_rows)
            mine, ours = some_rows.nonzero()[:, 0], some.nonzero()[:, 0]
            rows, kept = rows[mine], kept[ours]
            batch, state, penalty = batch.take(mine), state.take(mine, ours), penalty.take(mine, ours)
            left, balanced = left[mine][:, ours], balanced[mine][:, ours]
        if steps >= _PLAIN_STEPS:
            gaps = found.gap[rows[:, None], kept].masked_fill(~left, 0.0)
            credit -= batch.jump_worst(state, penalty, balanced, gaps, credit)
        count = _CHECK_EVERY if x.is_cpu or steps < _PLAIN_STEPS else 2 * _CHECK_EVERY
        state = batch.advance(state, penalty, count)
        steps += count
        credit += _FOR_JUMPS * count * batch.step_seconds(state)


def solve_sparse(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    loss: Loss,
    thresholds: Tensor,
    start: Tensor,
    start_intercept: Tensor | None,
    tol: float,
) -> Solutions:
    """:func:`solve_together` with an :class:`L1` penalty; wide features by working sets, one for a tap's columns.

    Args:
        x, y, s, loss, start, start_intercept, tol: as there.
        thresholds: ``(B, d, C, 1)``.
    """
    columns, width = thresholds.shape[2], x.shape[2]

    def on_all(weight: Tensor, intercept: Tensor | None) -> Solutions:
        penalty = L1(thresholds)
        return solve_together(x, y, s, loss, penalty, columns, start=weight, start_intercept=intercept, tol=tol)

    if width <= _NARROW or (width <= _WIDE and x[0].numel() <= _MOST_READ):
        return on_all(start, start_intercept)
    whole = _Batch(x, y, s, loss)
    found = whole.solutions(start, start_intercept, L1(thresholds))
    for _ in range(_MOST_ROUNDS):
        gap = float(found.gap.max())
        if gap <= tol:
            break
        score = whole.violations(found, thresholds)  # (B, d)
        alive = (found.weight != 0).any(2).any(1)
        size = max(_LEAST_WORKING, -(-2 * int(alive.sum(1).max()) // ALIGNED) * ALIGNED)
        if size > _MOST_WORKING * width:
            solved = on_all(found.weight, found.intercept)
            return replace(solved, steps=found.steps + solved.steps)
        working = (score + 10 * alive).topk(size, dim=1).indices
        spread = working[:, None, None].expand(-1, *found.weight.shape[1:3], -1)
        part = torch.stack([own[:, index] for own, index in zip(x, working, strict=True)])
        solved = solve_together(
            part,
            y,
            s,
            loss,
            L1(thresholds.expand(len(x), -1, -1, -1).gather(1, working[..., None, None].expand(-1, -1, columns, 1))),
            columns,
            start=found.weight.gather(3, spread),
            start_intercept=found.intercept,
            tol=max(tol / 2, gap / 10),
        )
        weight = torch.zeros_like(found.weight).scatter(3, spread, solved.weight)
        steps = found.steps + solved.steps
        found = replace(whole.solutions(weight, solved.intercept, L1(thresholds)), steps=steps)
        if float(solved.gap.max()) > max(tol / 2, gap / 10):
            break  # rounding is the limit
    return found


@dataclass
class _State:
    """Weights ``(B, d, C, K)`` and intercepts ``(B, 1, C, K)``, the points ahead of them, and the momentum."""

    weight: Tensor
    intercept: Tensor
    ahead: Tensor
    ahead_intercept: Tensor
    momentum: Tensor  # (B, 1, C, K)

    @classmethod
    def begin(cls, weight: Tensor, intercept: Tensor) -> _State:
        return cls(weight, intercept, weight, intercept, torch.ones_like(intercept))

    def parts(self) -> list[Tensor]:
        return list(vars(self).values())

    def take(self, rows: Tensor, columns: Tensor) -> _State:
        return _State(*(take(part, rows, columns) for part in self.parts()))


class _Batch:
    def __init__(self, x: Tensor, y: Tensor, s: Tensor, loss: Loss) -> None:
        self.x, self.loss = x, loss
        self.y, self.s = y.double().to(x.device), s.double().to(x.device)
        self.targets, self.row_weights = self.y.to(x.dtype)[:, None], self.s.to(x.dtype)[:, None]  # (n, 1, K)
        self._recorded: tuple[Penalty, Replay | None] | None = None

    def take(self, rows: Tensor) -> _Batch:
        if len(rows) == len(self.x):
            return self
        part = _Batch(self.x[rows], self.y, self.s, self.loss)
        part.bound = self.bound[rows]
        return part

    @functools.cached_property
    def bound(self) -> Tensor:
        """Of the Hessian, ``(B, 1, 1, 1)``: the largest curvature of a row times the largest eigenvalue of the Gram
        matrix of features and intercept, by Lanczos' method: what it found, and its residual. A start without any part
        in the leading direction would miss it; steps that are too long for once restart, and no gap depends on it.
        """
        s = self.row_weights.amax(-1)[None]  # (1, n, 1)
        vector = torch.cat([self.x[:, :1].mT + 1e-3, self.x.new_ones(len(self.x), 1, 1)], 1)
        vector = vector / vector.norm(dim=1, keepdim=True)
        last, side, peak = torch.zeros_like(vector), vector.new_zeros(()), vector.new_zeros(())
        levels, sides = [], []
        for _ in range(_LANCZOS_ROUNDS):
            rows = s * (times(self.x, vector[:, :-1]) + vector[:, -1:])
            found = torch.cat([transposed_times(self.x, rows), rows.sum(1, keepdim=True)], 1) - side * last
            level = (found * vector).sum(1, keepdim=True)
            found = found - level * vector
            side, peak = found.norm(dim=1, keepdim=True), torch.maximum(peak, level)
            side = torch.where(side > 1e-5 * peak, side, 0.0)  # rounding: nothing is left to be found
            last, vector = vector, torch.where(side > 0, found / side, 0.0)
            levels.append(level[:, 0, 0])
            sides.append(side[:, 0, 0])
        between = torch.stack(sides[:-1], 1).diag_embed(1)
        tridiagonal = torch.stack(levels, 1).diag_embed() + between + between.mT
        values, vectors = torch.linalg.eigh(tridiagonal.cpu().double())
        largest = values[:, -1] + (sides[-1].cpu().double() * vectors[:, -1, -1]).abs()
        bound: Tensor = 1.01 * self.loss.bound * largest.to(self.x)[:, None, None, None]
        return bound.clamp_min(1e-30)

    def scores(self, weight: Tensor) -> Tensor:
        """``(B, n, C, K)``, without intercept."""
        scores: Tensor = times(self.x, weight.flatten(2)).unflatten(2, weight.shape[2:])
        return scores

    def pull(self, residual: Tensor) -> Tensor:
        """Minus the gradient ``(B, d, C, K)`` of residuals ``(B, n, C, K)``."""
        gradient: Tensor = transposed_times(self.x, residual.flatten(2)).unflatten(2, residual.shape[2:])
        return gradient

    def advance(self, state: _State, penalty: Penalty, count: int) -> _State:
        """The state after so many steps. On a GPU the next call overwrites its tensors."""
        if can_replay(self.x) and (self._recorded is None or self._recorded[0] is not penalty):
            state, count = self.step(state, penalty), count - 1
            self._recorded = penalty, self._record(state, penalty)
        if self._recorded is not None and self._recorded[1] is not None:
            return _State(*self._recorded[1](state.parts(), count))
        for _ in range(count):
            state = self.step(state, penalty)
        return state

    def _record(self, state: _State, penalty: Penalty) -> Replay | None:
        """The step to replay, or nothing where there is no memory for another one."""
        self._recorded = None
        try:
            return Replay(lambda values: self.step(_State(*values), penalty).parts(), state.parts())
        except RuntimeError as error:
            if is_out_of_memory(error):
                return None
            raise

    def step(self, state: _State, penalty: Penalty) -> _State:
        step = 1.0 / self.bound
        residual = self.loss.residual(self.scores(state.ahead) + state.ahead_intercept, self.targets, self.row_weights)
        weight = penalty.shrink(state.ahead + step * self.pull(residual), step)
        intercept = state.ahead_intercept + step * residual.sum(1, keepdim=True)
        moved, back = weight - state.weight, intercept - state.intercept
        uphill = ((state.ahead - weight) * moved).sum(1, keepdim=True)
        uphill = uphill + (state.ahead_intercept - intercept) * back
        if self.loss.coupled:
            uphill = uphill.sum(-1, keepdim=True)
        momentum = torch.where(uphill > 0, 1.0, state.momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        speed = (momentum - 1) / following
        return _State(weight, intercept, weight + speed * moved, intercept + speed * back, following)

    def step_seconds(self, state: _State) -> float:
        """About what a step takes: the features are read twice, the scores read or written ten times."""
        scores = self.x.shape[0] * self.x.shape[1] * state.weight[0, 0].numel()
        return _STEP + 4 * (2 * self.x.numel() + 10 * scores) * _BYTE

    def jump_seconds(self, state: _State) -> Tensor:
        """About what a jump of each problem takes ``(B, C)`` beside others, most of it for the Hessians of the weights
        not zero.
        """
        rows, weights = self.x.shape[1], (state.weight != 0).sum(1).double()  # (B, C, K)
        together = weights.sum(-1, keepdim=True) if self.loss.coupled else weights
        operations = 2 * rows * together * together.clamp(max=weights_at_once(rows))
        seconds: Tensor = _JUMPING + _OPERATION * operations
        return seconds.sum(-1)

    def jump_worst(self, state: _State, penalty: Penalty, intercepts: Tensor, gaps: Tensor, seconds: float) -> float:
        """:meth:`jump` with the problems of the largest gaps ``(B, C)``, as many as this time serves; what it took."""
        taken, chosen, costs = _JUMP, [], self.jump_seconds(state).flatten().tolist()
        for place in gaps.flatten().argsort(descending=True, stable=True)[: int((gaps > 0).sum())].tolist():
            if taken + costs[place] > seconds:
                break
            taken += costs[place]
            chosen.append(place)
        if not chosen:
            return 0.0
        places = torch.tensor(chosen, device=gaps.device)
        self.jump(state, penalty, intercepts, places // gaps.shape[1], places % gaps.shape[1])
        return taken

    def jump(self, state: _State, penalty: Penalty, intercepts: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Move some problems of the state by second-order steps, from these intercepts ``(B, C, K)``."""
        spots, starts = (rows, slice(None), columns), intercepts[rows, columns].to(self.x.dtype)
        given = self.y, self.s, self.loss, penalty.of(rows, columns), state.weight[spots], starts
        weight, intercept = jump(self.x, rows.tolist(), *given)
        state.weight[spots] = state.ahead[spots] = weight
        state.intercept[rows, 0, columns] = state.ahead_intercept[rows, 0, columns] = intercept
        state.momentum[rows, 0, columns] = 1.0

    def certify(self, weight: Tensor, intercept: Tensor, penalty: Penalty) -> tuple[Tensor, Tensor, Tensor]:
        """Objective ``(B, C)``, relative gap ``(B, C)`` and the best intercepts ``(B, C, K)``."""
        z = self.scores(weight).permute(0, 2, 1, 3).double()  # (B, C, n, K)
        best = balance(self.loss, z, intercept[:, 0].double(), self.y, self.s)
        z = z + best[..., None, :]
        residual = self.loss.residual(z, self.y, self.s)
        gradient = self.pull(residual.permute(0, 2, 1, 3).to(weight.dtype))
        scale = penalty.scale(gradient, coupled=self.loss.coupled)
        primal = self.loss.value(z, self.y, self.s) + penalty.value(weight)
        dual = self.loss.dual(residual * scale[..., None, :], self.y, self.s) - penalty.conjugate(gradient)
        if self.loss.coupled:
            primal, dual = primal.sum(-1, keepdim=True), dual.sum(-1, keepdim=True)
        gap = (primal - dual).clamp_min(0) / primal.clamp_min(1e-300)
        return primal.sum(-1), gap.amax(-1), best

    def solutions(self, weight: Tensor, intercept: Tensor | None, penalty: Penalty) -> Solutions:
        """These weights ``(B, C, K, d)`` as they are, certified."""
        by_feature = weight.permute(0, 3, 1, 2).contiguous()
        if intercept is None:
            intercept = weight.new_zeros(weight.shape[:3])
        objective, gap, balanced = self.certify(by_feature, intercept[:, None], penalty)
        return Solutions(weight, balanced.to(weight.dtype), objective, gap, 0)

    def violations(self, found: Solutions, thresholds: Tensor) -> Tensor:
        """How far each feature's gradient comes to its threshold, ``(B, d)``: 1 is where it may enter."""
        scores = self.scores(found.weight.permute(0, 3, 1, 2)) + found.intercept[:, None]
        residual = self.loss.residual(scores, self.targets, self.row_weights)
        return (self.pull(residual).abs() / thresholds).amax((2, 3))
