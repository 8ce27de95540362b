"""The penalties of many problems that :mod:`spin_hf.calibration.batched` solves together: of ``B`` taps, ``C`` values
of each, ``K`` outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .jump import Elastic


class Penalty(Protocol):
    """Of the weights ``(B, d, C, K)``; ``B`` is 1 where it is the same for all."""

    def shrink(self, weight: Tensor, step: Tensor) -> Tensor:
        """The proximal operator of ``step`` ``(B, 1, 1, 1)`` times the penalty."""
        ...

    def value(self, weight: Tensor) -> Tensor:
        """``(B, C, K)``, float64."""
        ...

    def scale(self, gradient: Tensor, *, coupled: bool) -> Tensor:
        """What to multiply the residuals by so that they are dual feasible, ``(B, C, K)``, from minus the gradient."""
        ...

    def conjugate(self, gradient: Tensor) -> Tensor:
        """What the penalty takes off the dual objective, ``(B, C, K)``, float64."""
        ...

    def take(self, rows: Tensor, columns: Tensor) -> Penalty:
        """Of some of the ``B`` and of the ``C``."""
        ...

    def of(self, rows: Tensor, columns: Tensor) -> Elastic:
        """Of some problems, whose places among the ``B`` and the ``C`` these are."""
        ...


@dataclass(frozen=True)
class L1:
    """``sum_j threshold_j |w_j|``, thresholds ``(B, d, C, 1)``; infinite where a weight may not enter."""

    thresholds: Tensor

    def shrink(self, weight: Tensor, step: Tensor) -> Tensor:
        threshold = self.thresholds * step
        return weight - weight.clamp(-threshold, threshold)

    def value(self, weight: Tensor) -> Tensor:
        return (self.thresholds * weight.abs()).masked_fill(weight == 0, 0.0).sum(1, dtype=torch.float64)

    def scale(self, gradient: Tensor, *, coupled: bool) -> Tensor:
        peak = (gradient.abs() / self.thresholds).amax(1).double()
        if coupled:
            peak = peak.amax(-1, keepdim=True).expand_as(peak)
        return 1.0 / peak.clamp_min(1.0)

    def conjugate(self, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient[:, 0], dtype=torch.float64)

    def take(self, rows: Tensor, columns: Tensor) -> L1:
        return L1(take(self.thresholds, rows, columns))

    def of(self, rows: Tensor, columns: Tensor) -> Elastic:
        threshold = self.thresholds[rows % len(self.thresholds), :, columns % self.thresholds.shape[2]]
        return Elastic(threshold, threshold.new_zeros(len(threshold), 1, 1), None)


@dataclass(frozen=True)
class L2:
    """``ridge / 2 * sum_j w_j^2`` over the members ``(1, d, C, 1)``, ridge ``(1, 1, C, 1)``; others stay zero."""

    ridge: Tensor
    members: Tensor

    def shrink(self, weight: Tensor, step: Tensor) -> Tensor:
        return weight * (self.members / (1.0 + step * self.ridge))

    def value(self, weight: Tensor) -> Tensor:
        return (self.ridge / 2 * weight.square()).sum(1, dtype=torch.float64)

    def scale(self, gradient: Tensor, *, coupled: bool) -> Tensor:
        return torch.ones_like(gradient[:, 0], dtype=torch.float64)

    def conjugate(self, gradient: Tensor) -> Tensor:
        return (self.members * gradient.square() / (2 * self.ridge)).sum(1, dtype=torch.float64)

    def take(self, rows: Tensor, columns: Tensor) -> L2:
        return L2(take(self.ridge, rows, columns), take(self.members, rows, columns))

    def of(self, rows: Tensor, columns: Tensor) -> Elastic:
        members = self.members[0].movedim(1, 0)[columns]
        return Elastic(torch.zeros_like(members), self.ridge[0, 0, columns, None], members)


def take(part: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Some rows and columns of ``(B, d, C, ...)``, where it has more than one of them."""
    part = part if len(part) == 1 else part[rows]
    return part if part.shape[2] == 1 or len(columns) == part.shape[2] else part[:, :, columns]
