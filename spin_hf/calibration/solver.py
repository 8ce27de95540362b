"""Sparse linear models along a path of penalties, solved to a certified duality gap.

Minimises, for each ``C`` in turn, with the intercept ``b`` left free::

    sum_i s_i loss(x_i W + b, y_i)  +  (1 / C) * sum_j f_j ||W_j||_1

which is scikit-learn's objective ``C * sum(loss) + ||W||_1`` divided by ``C``, with a factor ``f_j`` per feature (1 by
default). Factors ``1 / scale_j`` on features standardised by ``scale_j`` give the solution of the raw features in
well-conditioned coordinates. The path runs from the strongest penalty to the weakest, each solution starting from the
last.

Method. A proximal Newton iteration on a working set of weights (those that are not zero, and those whose gradient is
largest), in the spirit of glmnet (Friedman et al. 2010) and of celer's working sets (Massias et al. 2018). Curvature of
the rows gives a small Gram matrix for each output column; coupled columns share their exact joint Hessian, and where
that would be too large they move in turn. That matrix is what costs, so it is kept along the path, grows with the
working set, and is made anew only when a step of it leaves too much of the gap. The L1 quadratic on it is
solved by FISTA with restarts (Beck and Teboulle 2009; O'Donoghue and Candes 2015) and an active set, and a line search
makes every step a descent. Where float32 does not get there, the same goes on in float64. Outside the working set
nothing is touched until the working set is solved; then one pass over all columns yields the gradient, from which come
both the next working set and a dual feasible point, hence the gap. It is a certificate: the objective can't be improved
by more than ``gap`` times itself, whatever the solver did on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import empty
from .losses import Loss
from .quadratic import Quadratic

_LEAST_ADDED = 32  # weights of a column that may enter the working set at once; more once its support is large
_CONTRACTION = 0.5  # a curvature by which a step leaves more of the gap than this no longer serves
_LARGEST_JOINT = 4096  # weights of coupled columns up to which their whole Hessian is made
_IN_A_ROW = 12  # steps on one working set; what takes more is ill-conditioned, and float32 is not enough for it
_ROUGH = 1e-8  # to which residuals sum to zero between steps; a certificate is of exact ones
_WIDENED = 256  # features turned to float64 at once
_PATIENCE = 20  # steps without a better gap after which rounding is taken to be the limit


@dataclass(frozen=True)
class PathPoint:
    """The solution at one ``C``.

    ``weight`` is ``(K, d)`` with exact zeros, ``intercept`` is ``(K,)``, both float32 and on the features' device.
    ``gap`` is the certified relative duality gap, the worst of the ``K`` columns where they are separate problems; its
    dual point is that of the weights before they are rounded to float32, which hardly changes the objective.
    """

    C: float
    weight: Tensor
    intercept: Tensor
    objective: float
    gap: float
    steps: int
    converged: bool

    @property
    def salience(self) -> Tensor:
        """Squared weight of each column summed over classes, shape ``(d,)``."""
        return self.weight.square().sum(0)


def smallest_useful_C(x: Tensor, y: Tensor, s: Tensor, loss: Loss) -> float:
    """The ``C`` up to which every weight is zero (``sklearn.svm.l1_min_c`` for an intercept without penalty)."""
    y, s = y.double().to(x.device), s.double().to(x.device)
    scores = torch.zeros_like(y)
    residual = loss.residual(scores + balance(loss, scores, scores[0], y, s), y, s)
    peak = float((x.T @ residual.to(x.dtype)).abs().max())
    return 1.0 / peak if peak > 0 else float("inf")


def demand_ascending(Cs: Sequence[float]) -> None:
    """Raise a ``ValueError`` for values of C that are no path."""
    if list(Cs) != sorted(Cs):
        raise ValueError(f"Cs must ascend, so that each solution starts the next one; got {list(Cs)}.")


def solve_path(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    loss: Loss,
    Cs: Sequence[float],
    *,
    factors: Tensor | None = None,
    start: Tensor | None = None,
    tol: float = 1e-4,
    max_steps: int = 200,
) -> Iterator[PathPoint]:
    """Yield one :class:`PathPoint` per value of ``Cs`` (ascending: strongest penalty first).

    A generator, so that the caller stops paying as soon as weaker penalties no longer help.

    Args:
        x: features ``(n, d)``, float32, best standardised.
        y: targets ``(n, K)``: 0/1 indicators, or values for the squared loss.
        s: row weights ``(n, 1)``, or one per row and column ``(n, K)`` where the loss has separate columns; positive.
        loss: one of :mod:`spin_hf.calibration.losses`.
        Cs: inverse penalties, ascending.
        factors: penalty of each feature relative to ``1 / C``, shape ``(d,)``, positive; all ones by default.
        start: weights ``(K, d)`` to begin with, such as the solution for fewer columns; zeros by default.
        tol: relative duality gap to reach.
        max_steps: Newton steps allowed per ``C``; a point that needs more is yielded with ``converged=False``.
    """
    demand_ascending(Cs)
    problem = Problem(x, y, s, loss, factors, start)
    del x  # the problem has its own copy, by columns
    for C in Cs:
        yield problem.solve(C, tol, max_steps)


def balance(loss: Loss, scores: Tensor, intercept: Tensor, y: Tensor, s: Tensor, *, accuracy: float = 1e-12) -> Tensor:
    """The best intercepts for these scores. Residuals then sum to zero, as dual feasibility demands.

    Scores ``(..., n, K)``, intercepts ``(..., K)``, for any number of problems at once. Newton's method on the
    intercepts alone, halving the step of a column where the loss would rise, until the residuals' sum is no more than
    ``accuracy`` times that of the targets, were they all as large as the largest.
    """
    unit = s.sum()
    enough = accuracy * unit * y.abs().max()

    def at(intercept: Tensor) -> Tensor:
        return scores + intercept[..., None, :]

    value = loss.value(at(intercept), y, s)
    for _ in range(100):
        residual = loss.residual(at(intercept), y, s)
        total = residual.sum(-2)
        if total.abs().max() <= enough:
            break
        bend = loss.intercept_curvature(residual, y, s)
        if loss.coupled:
            bend = bend + unit / bend.shape[-1]  # raising all classes alike changes nothing: keep the step free of it
        bend.diagonal(dim1=-2, dim2=-1).add_(1e-12 * unit)
        step = torch.linalg.solve(bend, total)
        for _ in range(60):
            trial = loss.value(at(intercept + step), y, s)
            worse = trial > value + 1e-15 * value.abs()
            if not worse.any():
                break
            step = torch.where(worse, step / 2, step)
        stood, intercept, value = intercept, intercept + step, trial
        if torch.equal(intercept, stood):  # separable rows under a weak penalty: rounding is the limit
            break
    return intercept


class Problem:
    """The data and the present point of one path. Scores, residuals and objectives are kept in float64.

    Args:
        x, y, s, loss, factors, start: as :func:`solve_path` takes them.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        s: Tensor,
        loss: Loss,
        factors: Tensor | None = None,
        start: Tensor | None = None,
    ) -> None:
        self.xt, self.loss = empty(*x.T.shape, device=x.device), loss
        self.xt.copy_(x.T)  # a feature is a row: working sets are read row by row
        self.last: list[Quadratic] = []
        self.factors = torch.ones_like(x[0]) if factors is None else factors.to(x)
        self.y, self.s = y.double().to(x.device), s.double().to(x.device)
        self.wide = False  # whether products with the features are summed in float64 too
        self.intercept = self.y.new_zeros(y.shape[1])
        self.start(x.new_zeros(y.shape[1], x.shape[1]) if start is None else start)

    def start(self, weight: Tensor) -> None:
        """Go on from these weights ``(K, d)``."""
        self.weight = weight.T.double()
        self.score()

    def score(self) -> None:
        """Take the scores, without the intercept, and the best intercepts from the weights."""
        if self.wide:
            self.scores = torch.zeros_like(self.y)
            for rows, weight in zip(self.xt.split(_WIDENED), self.weight.split(_WIDENED), strict=True):
                self.scores.addmm_(rows.T.double(), weight)
        else:
            self.scores = (self.xt.T @ self.weight.to(self.xt.dtype)).double()
        self.balance()

    def balance(self, accuracy: float = 1e-12) -> None:
        self.intercept = balance(self.loss, self.scores, self.intercept, self.y, self.s, accuracy=accuracy)

    def residual(self) -> Tensor:
        return self.loss.residual(self.scores + self.intercept, self.y, self.s)

    def gradient(self) -> Tensor:
        """Minus the gradient of the loss with respect to all weights over their factors, ``(d, K)``."""
        residual = self.residual()
        if self.wide:
            slope = torch.cat([rows.double() @ residual for rows in self.xt.split(_WIDENED)])
        else:
            slope = self.xt @ residual.to(self.xt.dtype)
        return slope / self.factors[:, None]

    def relative_gaps(self, gradient: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """Objective and relative duality gap of each column, or of all together in each where they are coupled.

        The dual point is the residual scaled into the feasible box.
        """
        peak = gradient.abs().amax(0).double() if len(gradient) else torch.zeros_like(self.intercept)
        if self.loss.coupled:
            peak = peak.max().expand_as(peak)
        scale = (penalty / peak.clamp_min(1e-300)).clamp(max=1.0)
        z = self.scores + self.intercept
        primal = self.loss.value(z, self.y, self.s) + penalty * (self.factors.double() @ self.weight.abs())
        dual = self.loss.dual(self.residual() * scale, self.y, self.s)
        if self.loss.coupled:
            primal, dual = primal.sum().expand_as(primal), dual.sum()
        return primal, (primal - dual).clamp_min(0) / primal.clamp_min(1e-300)

    def working_set(self, gradient: Tensor, penalty: float, active: Tensor) -> Tensor:
        """``active`` and, in each column, some weights that break the optimality conditions most."""
        score = gradient.abs().masked_fill(active, 0.0)
        support = int((self.weight != 0).sum(0).max())
        best, rows = torch.topk(score, min(len(score), max(_LEAST_ADDED, support // 4)), dim=0)
        return active.scatter(0, rows, active.gather(0, rows) | (best >= penalty))

    def solve(self, C: float, tol: float, max_steps: int = 200) -> PathPoint:
        """The solution at ``C``, from the present point, to a relative gap of ``tol``."""
        penalty, steps, taken = 1.0 / C, 0, 0
        gradient, active, last_gap, last_value = self.gradient(), self.weight != 0, float("inf"), float("inf")
        while True:
            objective, gaps = self.relative_gaps(gradient, penalty)
            gap, value = float(gaps.max()), float(objective[0] if self.loss.coupled else objective.sum())
            grown = self.working_set(gradient, penalty, active)
            if gap <= tol or steps >= max_steps:
                break
            stuck = bool((grown == active).all()) and gap > last_gap / 2 and value > (1 - tol) * last_value
            if stuck and self.wide:
                break
            if not self.wide and (stuck or taken == _IN_A_ROW):
                self.widen()
                gradient, active, last_gap, last_value = self.gradient(), self.weight != 0, float("inf"), float("inf")
                continue
            active, last_gap, last_value = grown, gap, value
            # A set that is not final need not be solved far beyond what is missing outside it.
            most = min(_IN_A_ROW, max_steps - steps)
            taken = self._solve_on(active, penalty, gaps > tol, max(tol / 2, gap / 10), most)
            self.balance()
            steps += taken
            gradient = self.gradient()
        weight, intercept = self.weight.T.to(self.xt.dtype), self.intercept.to(self.xt.dtype)
        return PathPoint(C, weight, intercept, value, gap, steps, gap <= tol)

    def widen(self) -> None:
        """Sum in float64 from now on: the rounding of float32, or what it adds to the curvature, is the limit."""
        self.wide, self.last = True, []
        self.score()

    def _solve_on(self, active: Tensor, penalty: float, unsettled: Tensor, tol: float, max_steps: int) -> int:
        """Proximal Newton on the active weights, intercepts included, to a relative gap of ``tol`` on those weights.

        Only the unsettled ``(K,)`` columns move, until each is settled.
        """
        union = active.any(1).nonzero()[:, 0]
        xt = empty(len(union) + 1, self.xt.shape[1], device=self.xt.device)
        torch.index_select(self.xt, 0, union, out=xt[:-1])
        xt = xt.double() if self.wide else xt
        xt[-1] = 1.0
        factors = self.factors[union, None]
        members = torch.nn.functional.pad(active[union].T, (0, 1), value=True)  # (K, rows of xt)
        penalties = penalty * torch.cat([factors[:, 0], factors.new_zeros(1)]).double().expand(members.shape)
        present = torch.cat([self.weight[union], self.intercept[None]]).T
        parts = self._quadratics(xt, torch.nn.functional.pad(union, (0, 1), value=len(self.xt)), members)
        accuracy, least = 0.1, float(factors.min()) if len(factors) else 1.0
        gaps, lowest = torch.full_like(self.intercept, torch.inf), float("inf")
        since_lowest = 0
        for step in range(1, max_steps + 1):
            stood = True
            for part in parts:
                z = self.scores + self.intercept
                part.bend(xt, self.loss, z, self.s, unsettled)
                slope = (xt @ self.residual().to(xt.dtype)).double().T
                move = part.move(slope, penalties, present, accuracy * penalty * least, unsettled)
                promised = (penalties * ((present + move).abs() - present.abs()) - slope * move).sum(1)
                shift = (move.to(xt.dtype) @ xt).double().T
                length = self._line_search(z, shift, present, move, penalties, promised)
                present = present + length[:, None] * move
                part.fits &= (length == 1.0)[: len(part.fits)]
                stood = stood and bool((length[unsettled] == 0.0).all())
                self.intercept = present[:, -1]
                self.scores = z + length * shift - self.intercept
                self.balance(_ROUGH)
                present[:, -1] = self.intercept
            self.weight[union] = present[:, :-1].T
            gradient = xt[:-1] @ self.residual().to(xt.dtype) / factors
            last, gaps = gaps, self.relative_gaps(gradient * members[:, :-1].T, penalty)[1]
            gap = float(gaps[unsettled].max())
            lowest, since_lowest = (gap, 0) if gap < 0.9 * lowest else (lowest, since_lowest + 1)
            if gap <= tol or stood or since_lowest >= _PATIENCE:
                return step
            unsettled = unsettled & (gaps > tol)
            for part in parts:
                part.fits &= (~unsettled | (gaps <= _CONTRACTION * last))[: len(part.fits)]
            accuracy = max(min(accuracy / 2, 0.1 * gap**0.5), 0.1 * tol)
        return max_steps

    def _quadratics(self, xt: Tensor, features: Tensor, members: Tensor) -> list[Quadratic]:
        """The model of the loss in the members; several that move in turn where a joint Hessian would be too large."""
        part = torch.zeros_like(members[:, 0], dtype=torch.int64)
        if self.loss.coupled:
            part = members.sum(1).cumsum(0).sub(1) // _LARGEST_JOINT
        parts = [
            Quadratic(features, len(self.xt) + 1, members * (part == i)[:, None], joint=self.loss.coupled)
            for i in part.unique()
        ]
        for quadratic, last in zip(parts, self.last, strict=False):
            if bool(last.fits.any()):
                quadratic.take_over(last, xt)
        self.last = parts
        return parts

    def _line_search(
        self, z: Tensor, shift: Tensor, present: Tensor, move: Tensor, penalties: Tensor, promised: Tensor
    ) -> Tensor:
        """For each column the first of 1, 1/2, 1/4 ... that keeps a tenth of the promised decrease, or 0 if none does.

        Coupled columns share one length.
        """

        def objective(length: Tensor) -> Tensor:
            fit = self.loss.value(z + length * shift, self.y, self.s)
            each = fit + (penalties * (present + length[:, None] * move).abs()).sum(1)
            return each.sum().expand_as(each) if self.loss.coupled else each

        if self.loss.coupled:
            promised = promised.sum().expand_as(promised)
        length = torch.ones_like(promised)
        before = objective(torch.zeros_like(length))
        while True:
            short = objective(length) > before + 0.1 * length * promised + 1e-8 * before.abs()
            if not short.any():
                return length
            length = torch.where(short, length / 2, length)
            length = torch.where(length > 1e-6, length, torch.zeros_like(length))
