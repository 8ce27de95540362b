"""Dense linear heads: the losses of :mod:`spin_hf.calibration.losses` with an L2 penalty, certified by a duality gap.

Minimises ``C * sum_i s_i loss(x_i W + b, y_i) + ||W||^2 / 2`` (scikit-learn's objective) divided by ``C``, with the
intercept left free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .blocks import both_halves, lower_gram, summed
from .losses import Loss
from .solver import PathPoint, balance


def curvature_gram(x: Tensor, curvature: Tensor) -> Tensor:
    """``X' diag(max_k curvature_k) X``, ``(p, p)``: a metric for :func:`solve_ridge` on any subset of the columns.

    One for all ``K`` outputs, from the largest curvature ``(n, K)`` of each row.
    """
    largest = curvature.amax(1).to(x.dtype)
    return both_halves(summed(len(x), lambda rows: lower_gram(x[rows].T, largest[rows]), width=x.shape[1]))


def solve_ridge(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    loss: Loss,
    Cs: Sequence[float],
    *,
    gram: Tensor | None = None,
    tol: float = 1e-3,
    max_steps: int = 100,
) -> Iterator[PathPoint]:
    """Yield a solution for each C (ascending), each started from the last.

    Newton's method with the Hessian's curvature taken once, from ``gram``: a factorisation for each C and a few passes
    over ``x``. The line search may also lengthen a step, since the curvature falls as the fit improves. Where ``gram``
    is not given it is made from the present curvature, which also serves the next C, and made anew where that takes
    many steps.

    Args:
        x: standardised features ``(n, p)``, float32.
        y: targets ``(n, K)``.
        s: weights ``(n, 1)`` or ``(n, K)``.
        gram: from :func:`curvature_gram`, at scores like those of the solution.
        tol: relative duality gap.
    """
    y, s = y.double().to(x.device), s.double().to(x.device)
    if x.shape[1] > x.shape[0]:
        yield from _solve_by_rows(x, y, s, loss, Cs, tol, max_steps)
        return
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    scores = torch.zeros_like(y)
    intercept = balance(loss, scores, torch.zeros_like(y[0]), y, s)
    metric = gram
    for C in Cs:
        ridge, factor, objective, gap, steps = 1.0 / C, None, 0.0, float("inf"), 0
        for steps in range(max_steps + 1):
            residual = loss.residual(scores + intercept, y, s)
            pull = (x.T @ residual.to(x.dtype)).double()
            objective, gap = _relative_gap(loss, scores + intercept, residual, y, s, weight, pull, ridge)
            if gap <= tol or steps == max_steps:
                break
            if metric is None or (gram is None and steps % 3 == 2):
                metric, factor = curvature_gram(x, loss.curvature(scores + intercept, s)), None
            if factor is None:
                factor = torch.linalg.cholesky(metric + ridge * torch.eye(len(metric), device=x.device, dtype=x.dtype))
            move = torch.cholesky_solve((pull - ridge * weight).to(x.dtype), factor).double()
            shift = (x @ move.to(x.dtype)).double()
            length = _step_length(loss, scores + intercept, shift, y, s, weight, move, ridge, objective)
            weight = weight + length * move
            scores = scores + length * shift
            intercept = balance(loss, scores, intercept, y, s)
        yield PathPoint(C, weight.T.to(x.dtype), intercept.to(x.dtype), objective, gap, steps, converged=gap <= tol)


def _solve_by_rows(
    x: Tensor, y: Tensor, s: Tensor, loss: Loss, Cs: Sequence[float], tol: float, max_steps: int
) -> Iterator[PathPoint]:
    """More features than rows: the same problem in the rows' own coordinates.

    With ``X X' = L L'`` the solution is ``W = X' L^-T V``, where ``V`` solves the problem on ``L``, with equal norm.
    """
    kernel = x.double() @ x.T.double()  # singular, since columns are centred: a trace of noise keeps the factor real
    kernel.diagonal().add_(1e-9 * kernel.diagonal().mean().clamp_min(1e-30))
    lower = torch.linalg.cholesky(kernel)
    for point in solve_ridge(lower.to(x.dtype), y, s, loss, Cs, tol=tol, max_steps=max_steps):
        dual = torch.linalg.solve_triangular(lower.T, point.weight.T.double(), upper=True)
        yield replace(point, weight=(x.T @ dual.to(x.dtype)).T)


def _relative_gap(
    loss: Loss, z: Tensor, residual: Tensor, y: Tensor, s: Tensor, weight: Tensor, pull: Tensor, ridge: float
) -> tuple[float, float]:
    primal = loss.value(z, y, s).sum() + ridge / 2 * weight.square().sum()
    dual = loss.dual(residual, y, s).sum() - pull.square().sum() / (2 * ridge)
    return float(primal), float((primal - dual).clamp_min(0) / primal.clamp_min(1e-300))


def _step_length(
    loss: Loss, z: Tensor, shift: Tensor, y: Tensor, s: Tensor, weight: Tensor, move: Tensor, ridge: float, start: float
) -> float:
    """The best of 1, 2, 4 ... while it improves on the objective ``start``, or the first of 1/2, 1/4 ... that does."""

    def objective(length: float) -> float:
        fit = loss.value(z + length * shift, y, s).sum()
        return float(fit + ridge / 2 * (weight + length * move).square().sum())

    length, value = 1.0, objective(1.0)
    if value < start:
        while length < 16 and (longer := objective(2 * length)) < value:
            length, value = 2 * length, longer
        return length
    while value >= start and length > 1e-4:
        length /= 2
        value = objective(length)
    return length
