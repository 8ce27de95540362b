"""A trainable gate on every kept feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gates(nn.Module):
    """One factor per feature, never negative, always float32."""

    def __init__(self, num_features: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.weight = nn.Parameter(torch.ones(num_features, dtype=torch.float32))

    def open(self) -> None:
        """Let everything through."""
        nn.init.ones_(self.weight)

    def values(self) -> Tensor:
        return self.weight.clamp(min=0)

    def penalty(self) -> Tensor:
        return self.strength * self.weight.sum()

    def forward(self, features: Tensor) -> Tensor:
        return features * self.values()
