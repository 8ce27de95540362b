"""The features of a model: which neurons are read, in which order, and how each is shifted and scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layout import Tap


class FeatureGroup(NamedTuple):
    """Neurons of one tap under one pooling."""

    tap: Tap
    pooling: str
    neurons: Tensor  # (count,) int64


class Standardizer(nn.Module):
    """Which neurons are read, and the shift and scale of each feature. Buffers only, always float32 (indices int64)."""

    neurons: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("neurons", torch.zeros(num_features, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(num_features, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


def group_by_tap(features: Sequence[Mapping[str, Any]]) -> list[tuple[Tap, list[tuple[str, int, int]]]]:
    """For each tap of ``SpinConfig.features`` its (pooling, start, stop) slices of the feature vector."""
    groups: list[tuple[Tap, list[tuple[str, int, int]]]] = []
    start = 0
    for entry in features:
        tap = Tap.parse(entry["tap"])
        stop = start + entry["count"]
        if not groups or groups[-1][0] != tap:
            groups.append((tap, []))
        groups[-1][1].append((entry["pooling"], start, stop))
        start = stop
    return groups
