"""The losses a probe or head can minimise, each with its gradient, curvature and convex conjugate.

All of them act on scores ``Z = X W + b`` of shape ``(n, K)`` and targets ``Y`` of the same shape, and all are sums
over the rows, weighted by positive ``s`` of shape ``(n, 1)`` or, for losses whose columns
are separate problems, ``(n, K)``. Values, residuals and duals take any number of such problems at once: shapes
``(..., n, K)``. What the solver needs beyond value and gradient is

- a *curvature* ``d`` of shape ``(n, K)`` with ``hessian of row i <= diag(d_i)`` at the present scores (up to the line
  search), so that every column has a Gram matrix ``X' diag(d_k) X`` of its own and all can move at once, and
- the *dual objective* at ``theta = scale * residual``, which certifies how far a solution is from the optimum.

A row's residual is minus the gradient of its loss. Residuals of all three losses stay dual feasible under scaling by
any factor in [0, 1], which is how a point that violates ``|X' theta| <= lambda`` is brought inside.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Loss(Protocol):
    """What the solver asks of a loss. ``coupled`` says that the columns form one problem, not ``K`` separate ones."""

    coupled: bool
    bound: float  # of a row's curvature in any direction, whatever the scores

    def value(self, z: Tensor, y: Tensor, s: Tensor) -> Tensor:
        """Weighted loss per column, shape ``(K,)``, whose sum is the loss: of a coupled one equal parts."""
        ...

    def residual(self, z: Tensor, y: Tensor, s: Tensor) -> Tensor:
        """Minus the gradient with respect to ``z``, shape ``(n, K)``."""
        ...

    def curvature(self, z: Tensor, s: Tensor) -> Tensor:
        """Second-order weight of each row in each column, shape ``(n, K)``."""
        ...

    def intercept_curvature(self, residual: Tensor, y: Tensor, s: Tensor) -> Tensor:
        """Second derivative with respect to the intercepts at the scores of these residuals, shape ``(K, K)``."""
        ...

    def dual(self, theta: Tensor, y: Tensor, s: Tensor) -> Tensor:
        """Dual objective per column at a feasible ``theta``, shape ``(K,)``."""
        ...


def _entropy(q: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(q.clamp(0.0, 1.0))
    return entropy


class Logistic:
    """``sum_i s_i (log(1 + exp(z_ik)) - y_ik z_ik)`` for each column: binary, one-vs-rest and multi-label."""

    coupled = False
    bound = 0.25

    def value(self, z: Tensor, y: Tensor, s: Tensor) -> Tensor:
        # softplus(z) - y z for indicators, of which a sure and right row would leave nothing but rounding
        return (s * F.softplus(torch.where(y > 0.5, -z, z))).sum(-2)

    def residual(self, z: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return s * (y - torch.sigmoid(z))

    def curvature(self, z: Tensor, s: Tensor) -> Tensor:
        p = torch.sigmoid(z)
        return s * p * (1 - p)

    def intercept_curvature(self, residual: Tensor, y: Tensor, s: Tensor) -> Tensor:
        p = y - residual / s
        return (s * p * (1 - p)).sum(-2).diag_embed()

    def dual(self, theta: Tensor, y: Tensor, s: Tensor) -> Tensor:
        q = y - theta / s
        return (s * (_entropy(q) + _entropy(1 - q))).sum(-2)


class Multinomial:
    """``sum_i s_i (log sum_k exp(z_ik) - sum_k y_ik z_ik)``: one problem over all classes (softmax regression)."""

    coupled = True
    bound = 0.5

    def value(self, z: Tensor, y: Tensor, s: Tensor) -> Tensor:
        total = (s[..., 0] * (torch.logsumexp(z, -1) - (y * z).sum(-1))).sum(-1, keepdim=True)
        return total.expand(*total.shape[:-1], z.shape[-1]) / z.shape[-1]

    def residual(self, z: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return s * (y - torch.softmax(z, -1))

    def curvature(self, z: Tensor, s: Tensor) -> Tensor:
        # v' (diag(p) - p p') v = sum_{k < l} p_k p_l (v_k - v_l)^2 <= 2 sum_k p_k (1 - p_k) v_k^2
        p = torch.softmax(z, -1)
        return s * 2 * p * (1 - p)

    def intercept_curvature(self, residual: Tensor, y: Tensor, s: Tensor) -> Tensor:
        p = y - residual / s
        return (s * p).sum(-2).diag_embed() - p.mT @ (s * p)

    def dual(self, theta: Tensor, y: Tensor, s: Tensor) -> Tensor:
        q = y - theta / s
        total = (s[..., 0] * _entropy(q).sum(-1)).sum(-1, keepdim=True)
        return total.expand(*total.shape[:-1], y.shape[-1]) / y.shape[-1]


class Squared:
    """``sum_i s_i (y_ik - z_ik)^2 / 2`` for each column."""

    coupled = False
    bound = 1.0

    def value(self, z: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return (s * (y - z).square()).sum(-2) / 2

    def residual(self, z: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return s * (y - z)

    def curvature(self, z: Tensor, s: Tensor) -> Tensor:
        return s.expand_as(z)

    def intercept_curvature(self, residual: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return s.expand_as(residual).sum(-2).diag_embed()

    def dual(self, theta: Tensor, y: Tensor, s: Tensor) -> Tensor:
        centred = y - y.mean(-2, keepdim=True)  # theta sums to zero but for rounding, which a large mean would blow up
        return (theta * centred).sum(-2) - (theta.square() / s).sum(-2) / 2
