"""A Newton step on the support of one penalised problem: where first-order steps have found the signs, the values.

Weak penalties leave the curvature to the features, whose spread makes first-order steps crawl. On the weights that are
not zero, their signs taken as given, the objective is smooth and its Hessian a Gram matrix: cheap on a GPU. A weight
that would change its sign stops at zero, and of some lengths the best is taken, so no jump does harm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import Loss

_LENGTHS = (0.0, 1.0, 0.5, 0.25, 0.1, 0.03)
_IN_A_ROW = 3  # jumps, while they are not of the whole length
_ROUNDS = 15  # of leaving the weights at zero that came there
_SHARES = (0.0, 0.1, 0.3, 0.6)  # of the weights that would change their sign, to stop at
_MOST_HELD = 1 / 16  # of the weights, up to which a factor of them all serves for the rest
_MOST_WEIGHTS = 4096  # that jump together: more of them do so in turn
_MOST_VALUES = 2**28  # of their features' rows, for which a Hessian is made


@dataclass(frozen=True)
class Elastic:
    """The penalty ``threshold |w| + ridge / 2 w^2`` of the weights ``(d, K)`` of one problem.

    Args:
        threshold: ``(d, 1)``.
        ridge: a scalar.
        members: which features may have a weight, ``(d, 1)``; those that have one, where it is ``None``.
    """

    threshold: Tensor
    ridge: Tensor
    members: Tensor | None

    def support(self, weight: Tensor) -> Tensor:
        return weight != 0 if self.members is None else (self.members > 0).expand_as(weight)

    def slope(self, weight: Tensor) -> Tensor:
        return self.threshold * weight.sign() + self.ridge * weight

    def signs(self, weight: Tensor) -> Tensor:
        """Those that the slope at ``weight`` holds for; 0 for any."""
        return weight.sign() * (self.threshold > 0)

    def cost(self, weight: Tensor) -> Tensor:
        """Of weights ``(..., d, K)``, ``(..., K)``, float64."""
        each = (self.threshold * weight.abs()).masked_fill(weight == 0, 0.0) + self.ridge / 2 * weight.square()
        return each.sum(-2, dtype=torch.float64)


def jump(
    x: Tensor, y: Tensor, s: Tensor, loss: Loss, penalty: Elastic, weight: Tensor, intercept: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights and intercepts of no higher objective than the given ones.

    Args:
        x: features ``(n, d)``.
        y: targets ``(n, K)``, float64.
        s: row weights ``(n, 1)``, or ``(n, K)`` where the columns are separate, float64.
        weight: ``(d, K)``.
        intercept: ``(K,)``.
    """
    if not loss.coupled and y.shape[1] > 1:
        columns = [slice(k, k + 1) for k in range(y.shape[1])]
        parts = [
            jump(x, y[:, k], s[:, k] if s.shape[1] > 1 else s, loss, penalty, weight[:, k], intercept[k])
            for k in columns
        ]
        return torch.cat([part for part, _ in parts], 1), torch.cat([part for _, part in parts])
    if loss.coupled and penalty.members is None:
        # Raising a feature's weights alike for all classes changes the penalty alone: it is least with one at zero.
        weight = weight - weight.median(1, keepdim=True).values
    for _ in range(_IN_A_ROW):
        done = True
        for own in penalty.support(weight).T.nonzero().split(weights_at_once(len(x))):
            weight, intercept, full = _step(x, y, s, loss, penalty, weight, intercept, *own.unbind(1))
            done = done and full
        if done:
            break
    return weight, intercept


def weights_at_once(rows: int) -> int:
    """How many weights jump together, with so many rows."""
    return min(_MOST_WEIGHTS, max(1, _MOST_VALUES // rows))


def _step(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    loss: Loss,
    penalty: Elastic,
    weight: Tensor,
    intercept: Tensor,
    output: Tensor,
    feature: Tensor,
) -> tuple[Tensor, Tensor, bool]:
    """One jump of the weights ``(feature, output)``, both ``(m,)``; whether its whole length, or none, was best."""
    z = (x @ weight + intercept).double()
    residual = loss.residual(z, y, s).to(x.dtype)
    down = torch.cat([(x.T @ residual - penalty.slope(weight))[feature, output], residual.sum(0)])
    outputs = torch.cat([output, torch.arange(len(intercept), device=x.device)])
    rows = torch.cat([x[:, feature], x.new_ones(len(x), len(intercept))], 1)
    hessian = _hessian(rows, outputs, loss, z, s)
    # More than the rounding of float32, so that it can be factorised; little beside any curvature that matters.
    hessian.diagonal().add_(1e-6 * hessian.diagonal().amax())
    hessian.diagonal()[: len(feature)].add_(penalty.ridge)
    present, signs = weight[feature, output], penalty.signs(weight)[feature, output]
    present, signs = (torch.cat([part, x.new_zeros(len(intercept))]) for part in (present, signs))
    move = within_signs(hessian, down, present, signs) - present
    if not move.isfinite().all():
        return weight, intercept, True
    lengths = torch.tensor(_LENGTHS, dtype=x.dtype, device=x.device)
    trials = weight.repeat(len(lengths), 1, 1)
    ends = torch.where(lengths[:, None] == 1.0, present + move, present + lengths[:, None] * move)
    trials[:, feature, output] = ends[:, : len(feature)]
    intercepts = intercept + lengths[:, None] * move[len(feature) :]
    scores = (x @ trials.permute(1, 0, 2).flatten(1)).unflatten(1, trials.shape[::2]).transpose(0, 1)
    fit = loss.value((scores + intercepts[:, None]).double(), y, s)
    best = int((fit + penalty.cost(trials)).sum(-1).nan_to_num(torch.inf).argmin())
    return trials[best], intercepts[best], _LENGTHS[best] in (0.0, 1.0)


def within_signs(hessian: Tensor, down: Tensor, present: Tensor, signs: Tensor) -> Tensor:
    """Where ``<v - present, hessian (v - present)> / 2 - <down, v - present>`` is low among the ``v`` of these signs.

    An active set method: to the least value of all, unless some weights would change their signs on the way. Then only
    so far that a part of them, at least the first, is at zero, where they stay; and on from there.

    Args:
        hessian: ``(m, m)``.
        down, present: ``(m,)``.
        signs: ``(m,)``; 0 where a weight may have any.
    """
    v, free = present, torch.ones_like(present, dtype=torch.bool)
    part = free.nonzero()[:, 0]
    factor: Tensor | None = None
    for _ in range(_ROUNDS):
        held = (~free[part]).nonzero()[:, 0]
        if factor is None or len(held) > len(part) * _MOST_HELD:
            part, held = free.nonzero()[:, 0], held[:0]
            factor, failed = torch.linalg.cholesky_ex(hessian[part[:, None], part])
            if failed:
                return v
        slope = down - hessian @ (v - present)
        toward = torch.zeros_like(v)
        toward[part] = _solve_holding(factor, slope[part], held)
        leaving = free & (signs * (v + toward) <= 0) & (signs != 0)
        if not leaving.any():
            return v + toward
        reached = (-v / toward).masked_fill(~leaving, torch.inf)
        stops = reached[leaving].quantile(torch.tensor(_SHARES, device=v.device, dtype=v.dtype))
        stops = torch.cat([stops, torch.ones_like(stops[:1])])[:, None]
        trials = torch.where(reached <= stops, torch.zeros_like(v), v + stops * toward)
        moves = trials - present
        v = trials[((moves @ hessian) * moves).sum(1).div(2).sub(moves @ down).argmin()]
        free = (v != 0) | (signs == 0)
    return v


def _solve_holding(factor: Tensor, slope: Tensor, held: Tensor) -> Tensor:
    """The solution ``(m,)`` in the weights that are not held, which stay, by the Cholesky factor ``(m, m)`` of all."""
    units = torch.zeros(len(slope), len(held), dtype=slope.dtype, device=slope.device)
    units[held, torch.arange(len(held), device=held.device)] = 1.0
    solved = torch.cholesky_solve(torch.cat([slope[:, None], units], 1), factor)
    free, pulls = solved[:, 0], solved[:, 1:]
    if len(held):
        free = free - pulls @ torch.linalg.solve(pulls[held], free[held])
        free[held] = 0.0
    return free


def _hessian(rows: Tensor, outputs: Tensor, loss: Loss, z: Tensor, s: Tensor) -> Tensor:
    """``(m, m)``, of features ``rows`` ``(n, m)`` whose weights belong to ``outputs`` ``(m,)``."""
    if not loss.coupled:
        return (rows * loss.curvature(z, s).to(rows.dtype)).T @ rows
    p, weights = torch.softmax(z, -1).to(rows.dtype), s.to(rows.dtype)
    weighted = rows * p[:, outputs]
    hessian = (weighted * weights).T @ weighted
    hessian.neg_()
    for k in range(z.shape[1]):
        mine = (outputs == k).nonzero()[:, 0]
        own = rows[:, mine]
        hessian[mine[:, None], mine] += (own * (weights * p[:, k : k + 1])).T @ own
    return hessian
