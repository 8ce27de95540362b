"""The second-order model that a Newton step of the solver minimises with the L1 penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import Loss

_STEPS_PER_SOLVE = 20


class Quadratic:
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

    def take_over(self, other: Quadratic, xt: Tensor) -> None:
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
