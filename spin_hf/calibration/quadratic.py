"""The second-order model that a Newton step of the solver minimises with the L1 penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import both_halves, lower_gram, summed
from .jump import within_signs
from .losses import Loss

_STEPS_PER_SOLVE = 10


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

    Attributes:
        fits: for each problem, whether the present curvature serves.
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
        self.bound = self.gram.new_zeros(len(self.own))
        self.fits = torch.zeros_like(self.bound, dtype=torch.bool)
        self.curvature = self.row_weights = torch.zeros(0)

    def take_over(self, other: Quadratic, xt: Tensor) -> None:
        """Begin with the curvature of another model of the same problems, for each that shares most of its weights."""
        place = torch.full((self.keys,), -1, device=xt.device)
        for k in other.fits.nonzero()[:, 0].tolist():
            place[other.key[k, : other.sizes[k]]] = torch.arange(other.sizes[k], device=xt.device)
        shared = [(place[self.key[k, :size]] >= 0) for k, size in enumerate(self.sizes)]
        problems = [k for k, size in enumerate(self.sizes) if bool(other.fits[k]) and int(shared[k].sum()) >= size / 2]
        self.curvature, self.row_weights = other.curvature, other.row_weights
        for k in problems:
            there = place[self.key[k, : self.sizes[k]]]
            old, new = shared[k].nonzero()[:, 0], (~shared[k]).nonzero()[:, 0]
            self.gram[k, old[:, None], old] = other.gram[k][there[old][:, None], there[old]]
            block = self._rows(xt, k, new)
            self.gram[k, new, : self.sizes[k]] = block
            self.gram[k, : self.sizes[k], new] = block.T
        self._settle(problems, xt.dtype)

    def bend(self, xt: Tensor, loss: Loss, z: Tensor, s: Tensor, unsettled: Tensor) -> None:
        """Take the curvature at these scores, for the unsettled ``(K,)`` columns whose present one does not serve."""
        problems = [k for k in self._problems(unsettled) if not self.fits[k]]
        if not problems:
            return
        self.row_weights = s.to(xt.dtype)
        curvature = (torch.softmax(z, 1) if self.joint else loss.curvature(z, s)).to(xt.dtype)
        if self.joint or not len(self.curvature):
            self.curvature = curvature
        else:
            self.curvature = self.curvature.clone()  # another model may have it too
            self.curvature[:, problems] = curvature[:, problems]
        for k in problems:
            size = self.sizes[k]
            self.gram[k, :size, :size] = self._rows(xt, k, torch.arange(size, device=xt.device), half=True)
        self._settle(problems, xt.dtype)

    def _problems(self, unsettled: Tensor) -> list[int]:
        return [0] if self.joint else unsettled.nonzero()[:, 0].tolist()

    def _rows(self, xt: Tensor, k: int, which: Tensor, *, half: bool = False) -> Tensor:
        """Rows of a problem's Gram matrix, ``(len(which), size)``; where ``half``, without the right upper one."""
        made = self._joint_rows if self.joint else self._own_rows
        return summed(xt.shape[1], lambda texts: made(xt[:, texts], texts, k, which, half))

    def _own_rows(self, xt: Tensor, texts: slice, k: int, which: Tensor, half: bool) -> Tensor:
        features, curvature = xt[self.column[k, : self.sizes[k]]], self.curvature[texts, k]
        rows = lower_gram(features, curvature) if half else (features[which] * curvature) @ features.T
        return rows.to(self.gram)

    def _joint_rows(self, xt: Tensor, texts: slice, k: int, which: Tensor, half: bool) -> Tensor:
        output = self.output[k, : self.sizes[k]]
        p, features = self.curvature[texts].T.contiguous(), xt[self.column[k, : self.sizes[k]]]
        weighted = features * p[output]
        part = weighted[which] * self.row_weights[texts, 0]
        rows = self.gram.new_zeros(len(which), len(features))
        ends = torch.stack([output.bincount(minlength=len(p)), output[which].bincount(minlength=len(p))]).cumsum(1)
        start = first = 0
        for own, (end, last) in enumerate(ends.T.tolist()):  # the weights of an output lie together
            if last > first:
                ours = part[first:last]
                rows[first:last, :start] = -(ours @ weighted[:start].T)
                rows[first:last, start:end] = (ours * (1 - p[own])) @ features[start:end].T
                if not half:
                    rows[first:last, end:] = -(ours @ weighted[end:].T)
            start, first = end, last
        return rows

    def _settle(self, problems: list[int], dtype: torch.dtype) -> None:
        self.fits[problems] = True
        for k in problems:
            gram = self.gram[k, : self.sizes[k], : self.sizes[k]]
            both_halves(gram)
            self.bound[k] = _largest_eigenvalue(gram)
            # More than rounding, so that it can be factorised; little beside any curvature that matters.
            gram.diagonal().add_(2.5 * torch.finfo(dtype).eps * self.bound[k])
            self._close_rings(gram)
            self._close_rings(gram.T)

    def _close_rings(self, values: Tensor) -> None:
        """Make ``(..., m)`` sum to zero over each ring, but for what rounding and the diagonal put there.

        Else a ring has a best place of its own, far from where the penalty wants it.
        """
        if len(self.rings):
            values[..., self.rings] -= values[..., self.rings].mean(-1, keepdim=True)

    def move(self, slope: Tensor, penalties: Tensor, present: Tensor, accuracy: float, unsettled: Tensor) -> Tensor:
        """The way ``(K, m)`` from ``present`` to where the model plus ``penalties * |weights|`` is least.

        Columns that are not open ``(K,)`` stay.
        """

        def gather(values: Tensor) -> Tensor:
            return values.reshape(len(self.own), -1).gather(1, self.own)[problems]

        problems = self._problems(unsettled)
        grams = Grams(self.gram, problems, self.sizes)
        start, slopes = gather(present) * self.real[problems], gather(slope) * self.real[problems]
        self._close_rings(slopes)
        linear = grams.times(start) + slopes
        bound = self.bound[problems]
        found = _l1_quadratic(grams, linear, gather(penalties), bound, start, accuracy, self.rings)
        move = torch.zeros_like(present).reshape(len(self.own), -1)
        move[problems] = move[problems].scatter(1, self.own[problems], found - start)
        return move.reshape(self.shape)


class Grams:
    """Some of a padded batch ``(b, m, m)`` of Gram matrices, each to be multiplied with a vector of its own."""

    def __init__(self, padded: Tensor, which: list[int], sizes: list[int]) -> None:
        self.padded, self.which, self.sizes = padded, which, sizes
        self.stacked = padded[which] if padded.is_cuda else padded

    def __getitem__(self, i: int) -> Tensor:
        return self.padded[self.which[i]]

    def only(self, rows: list[int]) -> Grams:
        return Grams(self.padded, [self.which[i] for i in rows], self.sizes)

    def times(self, v: Tensor) -> Tensor:
        if v.is_cuda:
            return torch.bmm(self.stacked, v[..., None])[..., 0]
        product = torch.zeros_like(v)  # one by one, without the padding: several times faster than bmm on a CPU
        for row, k in enumerate(self.which):
            size = self.sizes[k]
            torch.mv(self.padded[k, :size, :size], v[row, :size], out=product[row, :size])
        return product


def _largest_eigenvalue(gram: Tensor, rounds: int = 20) -> Tensor:
    v = gram[gram.square().sum(1).argmax()]
    for i in range(rounds):
        if i % 5 == 0 or i == rounds - 1:  # between, no power can leave float64
            v = v / v.norm().clamp_min(1e-30)
        v = gram @ v
    largest: Tensor = 1.05 * v.norm()
    return largest


def _l1_quadratic(
    grams: Grams,
    linear: Tensor,
    penalties: Tensor,
    bound: Tensor,
    start: Tensor,
    accuracy: float,
    rings: Tensor,
    limit: int = 500,
) -> Tensor:
    """Minimise ``<v, gram v> / 2 - <linear, v> + sum penalties |v|`` until no coordinate's slope is off by more.

    A batch of them, one in each row; one that is done leaves the batch. FISTA finds the signs, exact solves on the
    support find the values and what of it must go: each is slow where the other is quick. ``rings`` ``(r, K)`` are
    coordinates of a joint problem that change nothing but the penalty when they move together: such a direction has no
    exact solution until one of them is at zero, where the penalty wants their median.
    """

    def objective(v: Tensor) -> Tensor:
        return (v * (grams.times(v) / 2 - linear) + penalties * v.abs()).sum(1, keepdim=True)

    found, left = start.clone(), torch.arange(len(start), device=start.device)
    bound = bound[:, None].clamp_min(1e-30)
    threshold = penalties / bound
    v, u, momentum = start, start, torch.ones_like(bound)
    lowest = torch.full_like(bound, torch.inf)
    for i in range(1, limit + 1):
        w = u + (linear - grams.times(u)) / bound
        w = w.sign() * (w.abs() - threshold).clamp_min(0)
        done = left.new_zeros(len(left), dtype=torch.bool)
        if i % 10 == 0:
            done = ((w - u).abs() * bound).amax(1) <= accuracy
        if i % _STEPS_PER_SOLVE == 0:
            w[:, rings] -= w[:, rings].median(2, keepdim=True).values
            v = _minimise_on_support(grams, linear, penalties, w)
            value = objective(v)
            done = done | (value >= lowest - 1e-12 * lowest.abs())[:, 0]  # as good as float64 can tell
            u, lowest, momentum = v, value, torch.ones_like(bound)
        else:
            if i % 10 == 0:
                momentum = torch.where(((u - w) * (w - v)).sum(1, keepdim=True) > 0, 1.0, momentum)
            following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            u = w + (momentum - 1) / following * (w - v)
            v, momentum = w, following
        if i % 10 == 0 and bool(done.any()):
            found[left[done]] = v[done]
            rest = ~done
            if not rest.any():
                return found
            left, grams = left[rest], grams.only(rest.nonzero()[:, 0].tolist())
            linear, penalties, bound, threshold = linear[rest], penalties[rest], bound[rest], threshold[rest]
            v, u, momentum, lowest = v[rest], u[rest], momentum[rest], lowest[rest]
    found[left] = v
    return found


def _minimise_on_support(grams: Grams, linear: Tensor, penalties: Tensor, v: Tensor) -> Tensor:
    """For each row, lower by what its support and its signs, or zeros in their place, allow."""
    lower = v.clone()
    for k, row in enumerate(v):
        support = row.nonzero()[:, 0]
        gram, present = grams[k][support[:, None], support], row[support]
        signs = present.sign() * (penalties[k, support] > 0)
        down = linear[k, support] - gram @ present - penalties[k, support] * signs
        (lower[k, support],) = within_signs(gram[None], down[None], present[None], signs[None])
    return lower
