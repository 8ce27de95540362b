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
solved by FISTA with restarts (Beck and Teboulle 2009; O'Donoghue and Candes 2015), and a line search makes every step a
descent. Outside the working set nothing is touched until the working set is solved; then one pass over all columns
yields the gradient, from which come both the next working set and a dual feasible point, hence the gap. It is a
certificate: the objective can't be improved by more than ``gap`` times itself, whatever the solver did on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import Loss

_LEAST_ADDED = 32  # weights of a column that may enter the working set at once; more once its support is large
_CONTRACTION = 0.5  # a curvature by which a step leaves more of the gap than this no longer serves
_STEPS_PER_SOLVE = 20
_LARGEST_JOINT = 4096  # weights of coupled columns up to which their whole Hessian is made
_PATIENCE = 20  # steps without a better gap after which rounding is taken to be the limit


@dataclass(frozen=True)
class PathPoint:
    """The solution at one ``C``.

    ``weight`` is ``(K, d)`` with exact zeros, ``intercept`` is ``(K,)``, both float32 and on the features' device.
    ``gap`` is the certified relative duality gap, the worst of the ``K`` columns where they are separate problems.
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
    if list(Cs) != sorted(Cs):
        raise ValueError(f"Cs must ascend, so that each solution starts the next one; got {list(Cs)}.")
    problem = _Problem(x, y, s, loss, factors, start)
    del x  # the problem has its own copy, by columns
    for C in Cs:
        yield problem.solve(C, tol, max_steps)


def balance(loss: Loss, scores: Tensor, intercept: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The best intercepts for these scores. Residuals then sum to zero, as dual feasibility demands.

    Newton's method on the intercepts alone, halving the step of a column where the loss would rise.
    """
    unit = s.sum()
    enough = 1e-12 * unit * y.abs().max()
    value = loss.value(scores + intercept, y, s)
    for _ in range(100):
        total = loss.residual(scores + intercept, y, s).sum(0)
        if total.abs().max() <= enough:
            break
        bend = loss.intercept_curvature(scores + intercept, s)
        if loss.coupled:
            bend = bend + unit / len(bend)  # raising all classes alike changes nothing: keep the step free of it
        bend.diagonal().add_(1e-12 * unit)
        step = torch.linalg.solve(bend, total)
        for _ in range(60):
            trial = loss.value(scores + intercept + step, y, s)
            worse = trial > value + 1e-15 * value.abs()
            if not worse.any():
                break
            step = torch.where(worse, step / 2, step)
        intercept, value = intercept + step, trial
    return intercept


class _Problem:
    """The data and the present point of one path. Scores, residuals and objectives are kept in float64."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        s: Tensor,
        loss: Loss,
        factors: Tensor | None = None,
        start: Tensor | None = None,
    ) -> None:
        self.xt, self.loss = x.T.contiguous(), loss  # a feature is a row: working sets are read row by row
        self.last: list[_Quadratic] = []
        self.factors = torch.ones_like(x[0]) if factors is None else factors.to(x)
        self.y, self.s = y.double().to(x.device), s.double().to(x.device)
        self.weight = x.new_zeros(x.shape[1], y.shape[1]) if start is None else start.T.clone()
        self.intercept = self.y.new_zeros(y.shape[1])
        self.scores = (x @ self.weight).double()  # without the intercept
        self.balance()

    def balance(self) -> None:
        self.intercept = balance(self.loss, self.scores, self.intercept, self.y, self.s)

    def residual(self) -> Tensor:
        return self.loss.residual(self.scores + self.intercept, self.y, self.s)

    def gradient(self) -> Tensor:
        """Minus the gradient of the loss with respect to all weights over their factors, ``(d, K)``."""
        return self.xt @ self.residual().to(self.xt.dtype) / self.factors[:, None]

    def relative_gaps(self, gradient: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """Objective and relative duality gap of each column, or of all together in each where they are coupled.

        The dual point is the residual scaled into the feasible box.
        """
        peak = gradient.abs().amax(0).double() if len(gradient) else torch.zeros_like(self.intercept)
        if self.loss.coupled:
            peak = peak.max().expand_as(peak)
        scale = (penalty / peak.clamp_min(1e-300)).clamp(max=1.0)
        z = self.scores + self.intercept
        primal = self.loss.value(z, self.y, self.s) + penalty * (self.factors @ self.weight.abs()).double()
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

    def solve(self, C: float, tol: float, max_steps: int) -> PathPoint:
        penalty, steps = 1.0 / C, 0
        gradient = self.gradient()
        active, last_gap = self.weight != 0, float("inf")
        while True:
            objective, gaps = self.relative_gaps(gradient, penalty)
            gap = float(gaps.max())
            grown = self.working_set(gradient, penalty, active)
            stuck = bool((grown == active).all()) and gap > last_gap / 2
            if gap <= tol or steps >= max_steps or stuck:
                break
            active, last_gap = grown, gap
            # A set that is not final need not be solved far beyond what is missing outside it.
            steps += self._solve_on(active, penalty, max(tol / 2, gap / 10), max_steps - steps)
            gradient = self.gradient()
        value = float(objective[0] if self.loss.coupled else objective.sum())
        return PathPoint(C, self.weight.T.clone(), self.intercept.to(self.xt.dtype), value, gap, steps, gap <= tol)

    def _solve_on(self, active: Tensor, penalty: float, tol: float, max_steps: int) -> int:
        """Proximal Newton on the active weights, intercepts included, to a relative gap of ``tol`` on those weights."""
        union = active.any(1).nonzero()[:, 0]
        xt = torch.cat([self.xt[union], self.xt.new_ones(1, self.xt.shape[1])])
        factors = self.factors[union, None]
        members = torch.nn.functional.pad(active[union].T, (0, 1), value=True)  # (K, rows of xt)
        penalties = penalty * torch.cat([factors[:, 0], factors.new_zeros(1)]).double().expand(members.shape)
        present = torch.cat([self.weight[union].double(), self.intercept[None]]).T
        parts = self._quadratics(xt, torch.nn.functional.pad(union, (0, 1), value=len(self.xt)), members)
        accuracy, least = 0.1, float(factors.min()) if len(factors) else 1.0
        gap = lowest = float("inf")
        since_lowest = 0
        for step in range(1, max_steps + 1):
            stood = True
            for part in parts:
                z = self.scores + self.intercept
                part.bend(xt, self.loss, z, self.s)
                slope = (xt @ self.residual().to(xt.dtype)).double().T
                move = part.move(slope, penalties, present, accuracy * penalty * least)
                promised = (penalties * ((present + move).abs() - present.abs()) - slope * move).sum(1)
                shift = (move.to(xt.dtype) @ xt).double().T
                length = self._line_search(z, shift, present, move, penalties, promised)
                present = present + length[:, None] * move
                part.fits = bool((length == 1.0).all())
                stood = stood and bool((length == 0.0).all())
                self.intercept = present[:, -1]
                self.scores = z + length * shift - self.intercept
                self.balance()
                present[:, -1] = self.intercept
            self.weight[union] = present[:, :-1].T.to(xt.dtype)
            gradient = xt[:-1] @ self.residual().to(xt.dtype) / factors
            last, gap = gap, float(self.relative_gaps(gradient * members[:, :-1].T, penalty)[1].max())
            lowest, since_lowest = (gap, 0) if gap < 0.9 * lowest else (lowest, since_lowest + 1)
            if gap <= tol or stood or since_lowest >= _PATIENCE:
                return step
            for part in parts:
                part.fits = part.fits and gap <= _CONTRACTION * last
            accuracy = max(min(accuracy / 2, 0.1 * gap**0.5), 0.1 * tol)
        return max_steps

    def _quadratics(self, xt: Tensor, features: Tensor, members: Tensor) -> list[_Quadratic]:
        """The model of the loss in the members; several that move in turn where a joint Hessian would be too large."""
        part = torch.zeros_like(members[:, 0], dtype=torch.int64)
        if self.loss.coupled:
            part = members.sum(1).cumsum(0).sub(1) // _LARGEST_JOINT
        parts = [
            _Quadratic(features, len(self.xt) + 1, members * (part == i)[:, None], joint=self.loss.coupled)
            for i in part.unique()
        ]
        for quadratic, last in zip(parts, self.last, strict=False):
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


class _Quadratic:
    """The second-order model of the loss in the working set's weights: one problem for each output column, or, where
    they are coupled, a joint one with the exact Hessian.

    The curvature is taken where the model is first needed, and anew only when it no longer serves: the Gram matrix is
    what costs. A larger working set takes over what it shares with the last.

    Args:
        features: number of each of the ``m`` features in the whole problem, the intercept last.
        total: features of the whole problem, the intercept included.
        members: which of the ``(K, m)`` weights may move.
        joint: whether the columns form one problem.
    """

    def __init__(self, features: Tensor, total: int, members: Tensor, *, joint: bool) -> None:
        self.joint, self.shape = joint, members.shape
        flat = members.reshape(1 if joint else len(members), -1)
        self.sizes = flat.sum(1).tolist()
        # For each problem its weights' places in a row of `flat`; rows of fewer weights are padded.
        self.own = flat.int().argsort(dim=1, descending=True, stable=True)[:, : max(self.sizes)]
        self.real = flat.gather(1, self.own)
        outputs = self.own // len(features) if joint else torch.arange(len(flat), device=self.own.device)[:, None]
        self.column = self.own % len(features)
        self.output = outputs.expand_as(self.own)
        self.key = self.output * total + features[self.column]  # a weight's number in the whole problem
        self.keys = total * len(members)
        self.gram = torch.zeros(len(self.own), *self.own.shape[1:] * 2, dtype=torch.float64, device=features.device)
        self.rings = self.own.new_zeros(0, len(members))
        if joint:
            places = (flat[0].cumsum(0) - 1).reshape(members.shape)[:, :-1]
            self.rings = places[:, members[:, :-1].all(0)].T
        self.curvature = self.row_weights = torch.zeros(0)
        self.fits = False

    def take_over(self, other: _Quadratic, xt: Tensor) -> None:
        """Begin with the curvature of another model of the same problem, where most of this one's weights are in it."""
        if not other.fits:
            return
        place = torch.full((self.keys,), -1, device=xt.device)
        for k, size in enumerate(self.sizes):
            place[other.key[k, : other.sizes[k]]] = torch.arange(other.sizes[k], device=xt.device)
            if int((place[self.key[k, :size]] >= 0).sum()) < size / 2:
                return
        self.curvature, self.row_weights, self.fits = other.curvature, other.row_weights, True
        for k, size in enumerate(self.sizes):
            there = place[self.key[k, :size]]
            old, new = (there >= 0).nonzero()[:, 0], (there < 0).nonzero()[:, 0]
            self.gram[k, old[:, None], old] = other.gram[k][there[old][:, None], there[old]]
            block = self._rows(xt, k, new)
            self.gram[k, new, :size] = block
            self.gram[k, :size, new] = block.T
        self._settle()

    def bend(self, xt: Tensor, loss: Loss, z: Tensor, s: Tensor) -> None:
        """Take the curvature at these scores, if the present one does not serve."""
        if self.fits:
            return
        self.fits = True
        self.row_weights = s.to(xt.dtype)
        self.curvature = (torch.softmax(z, 1) if self.joint else loss.curvature(z, s)).to(xt.dtype)
        for k, size in enumerate(self.sizes):
            self.gram[k, :size, :size] = self._rows(xt, k, torch.arange(size, device=xt.device))
        self._settle()

    def _rows(self, xt: Tensor, k: int, which: Tensor) -> Tensor:
        """Rows of a problem's Gram matrix, ``(len(which), size)``."""
        column, output = self.column[k, : self.sizes[k]], self.output[k, : self.sizes[k]]
        if not self.joint:
            return ((xt[column[which]] * self.curvature[:, k]) @ xt[column].T).double()
        p = self.curvature.T.contiguous()
        weighted = xt[column] * p[output]
        part = weighted[which] * self.row_weights[:, 0]
        rows = -(part @ weighted.T).double()
        for own in range(self.shape[0]):
            mine, ours = (output == own).nonzero()[:, 0], (output[which] == own).nonzero()[:, 0]
            rows[ours[:, None], mine] += (part[ours] @ xt[column[mine]].T).double()
        return rows

    def _settle(self) -> None:
        self.gram = (self.gram + self.gram.mT) / 2  # rounded to float32, the two halves differ
        self.bound = _largest_eigenvalues(self.gram)
        # More than the rounding of float32, so that it can be factorised; little beside any curvature that matters.
        self.gram.diagonal(dim1=1, dim2=2).add_(3e-7 * self.bound[:, None])

    def move(self, slope: Tensor, penalties: Tensor, present: Tensor, accuracy: float) -> Tensor:
        """The way ``(K, m)`` from ``present`` to where the model plus ``penalties * |weights|`` is least."""

        def gather(values: Tensor) -> Tensor:
            return values.reshape(len(self.own), -1).gather(1, self.own)

        start = gather(present) * self.real
        linear = _times(self.gram, start) + gather(slope) * self.real
        found = _l1_quadratic(self.gram, linear, gather(penalties), self.bound, start, accuracy, self.rings)
        move = torch.zeros_like(present).reshape(len(self.own), -1).scatter(1, self.own, found - start)
        return move.reshape(self.shape)


def _times(gram: Tensor, v: Tensor) -> Tensor:
    if gram.is_cuda:
        return torch.bmm(gram, v[..., None])[..., 0]
    return torch.stack([g @ row for g, row in zip(gram, v, strict=True)])  # several times faster than bmm on a CPU


def _largest_eigenvalues(gram: Tensor, rounds: int = 20) -> Tensor:
    heaviest = gram.square().sum(2).argmax(1)
    v = gram[torch.arange(len(gram), device=gram.device), heaviest]
    for _ in range(rounds):
        v = _times(gram, v / v.norm(dim=1, keepdim=True).clamp_min(1e-30))
    largest: Tensor = 1.05 * v.norm(dim=1)
    return largest


def _l1_quadratic(
    gram: Tensor,
    linear: Tensor,
    penalties: Tensor,
    bound: Tensor,
    start: Tensor,
    accuracy: float,
    rings: Tensor,
    limit: int = 500,
) -> Tensor:
    """Minimise ``<v, gram v> / 2 - <linear, v> + sum penalties |v|`` until no coordinate's slope is off by more.

    A batch of them, one in each row. FISTA finds the signs, an exact solve on the support finds the values: each is
    slow where the other is quick. ``rings`` ``(r, K)`` are coordinates of a joint problem that change nothing but the
    penalty when they move together: such a direction has no exact solution until one of them is at zero, where the
    penalty wants their median.
    """

    def objective(v: Tensor) -> Tensor:
        return (v * (_times(gram, v) / 2 - linear) + penalties * v.abs()).sum(1, keepdim=True)

    bound = bound[:, None].clamp_min(1e-30)
    threshold = penalties / bound
    v, u, momentum = start, start, torch.ones_like(bound)
    lowest = torch.full_like(bound, torch.inf)
    for i in range(1, limit + 1):
        w = u + (linear - _times(gram, u)) / bound
        w = w.sign() * (w.abs() - threshold).clamp_min(0)
        if i % 10 == 0 and float(((w - u).abs() * bound).max()) <= accuracy:
            return w
        if i % _STEPS_PER_SOLVE == 0:
            w[:, rings] -= w[:, rings].median(2, keepdim=True).values
            toward, value = _minimise_on_support(gram, linear, penalties, w) - w, objective(w)
            v = w
            for length in (1.0, 0.3, 0.1):
                trial = w + length * toward
                trial = torch.where((trial * w > 0) | (penalties == 0), trial, torch.zeros_like(trial))
                tried = objective(trial)
                v, value = torch.where(tried < value, trial, v), torch.minimum(tried, value)
            if bool((value >= lowest - 1e-12 * lowest.abs()).all()):
                return v  # as good as float64 can tell
            u, lowest, momentum = v, value, torch.ones_like(bound)
        else:
            if i % 10 == 0:
                momentum = torch.where(((u - w) * (w - v)).sum(1, keepdim=True) > 0, 1.0, momentum)
            following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            u = w + (momentum - 1) / following * (w - v)
            v, momentum = w, following
    return v


def _minimise_on_support(gram: Tensor, linear: Tensor, penalties: Tensor, v: Tensor) -> Tensor:
    """For each row, the minimiser among vectors with the support of ``v``, its signs taken as given."""
    exact = v.clone()
    for k, row in enumerate(v):
        support = row.nonzero()[:, 0]
        factor, failed = torch.linalg.cholesky_ex(gram[k][support[:, None], support])
        if failed == 0:
            right = linear[k, support] - penalties[k, support] * row[support].sign()
            exact[k, support] = torch.cholesky_solve(right[:, None], factor)[:, 0]
    return exact
