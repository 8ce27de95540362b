"""A trainable gate on every kept feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPEED = 10.0  # how much faster gates move than weights: they go from 1 to 0 while a weight of the head goes 0.1


class Gates(nn.Module):
    """One factor per feature, from 0 (closed) up, 1 at first; always float32. Stored is a tenth of it, see ``SPEED``.

    The loss gets a price for what is open, ``strength * sum(gates)``, and a gate that a step of the optimizer pushed
    below zero is put back to it before the next. For gates that are never negative this projection of the gradient step
    is the proximal step of the L1 penalty, under any optimizer that scales coordinates one by one, and gives exact
    zeros; a closed gate still has a gradient and may open again. Breiman's non-negative garrote (1995) is the special
    case of a head that does not move.
    """

    def __init__(self, num_features: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.weight = nn.Parameter(torch.full((num_features,), 1 / SPEED, dtype=torch.float32))

    def open(self) -> None:
        """Let everything through."""
        nn.init.constant_(self.weight, 1 / SPEED)

    def values(self) -> Tensor:
        """The factors ``(num_features,)``."""
        return SPEED * self.weight.clamp(min=0)

    def penalty(self) -> Tensor:
        """Scalar: the price of what is open."""
        return self.strength * SPEED * self.weight.sum()

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(batch, num_features)``, each times its gate."""
        if not self.training:
            return features * self.values()
        self.weight.data.clamp_(min=0)  # not through the graph, which would hold a closed gate shut
        return features * (SPEED * self.weight)
