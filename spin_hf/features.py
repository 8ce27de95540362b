"""The features of a model: which neurons are read, in which order, and how each is shifted and scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import ATTENTION, Queries
from .layout import Tap


class FeatureGroup(NamedTuple):
    """Neurons of one tap under one pooling."""

    tap: Tap
    pooling: str
    neurons: Tensor  # (count,) int64
    query: Tensor | None = None  # of its token weights, (width,) float32; under the pooling "attention"


class TapPart(NamedTuple):
    """What a tap gives to the features."""

    tap: Tap
    poolings: list[tuple[str, int]]  # and how many neurons each of them has, one after another
    size: int  # of all of them
    weighted: bool  # whether one of the poolings is "attention"


class Kept(NamedTuple):
    """The neurons of one tap that are read."""

    tap: Tap
    neurons: Tensor  # (count,) int64, those of one pooling after another
    poolings: list[tuple[str, int]]  # and how many neurons each of them has
    query: Tensor | None = None  # of its token weights, where one of them is "attention"


class Selection(NamedTuple):
    """What one forward is to read, and the shift and scale of each feature."""

    kept: list[Kept]
    mean: Tensor
    scale: Tensor

    def groups(self) -> list[FeatureGroup]:
        """The neurons, group by group, in the order of the features."""
        return [
            FeatureGroup(tap, pooling, own, query if pooling == ATTENTION else None)
            for tap, neurons, poolings, query in self.kept
            for (pooling, _), own in zip(poolings, neurons.split([count for _, count in poolings]), strict=True)
        ]

    def queries(self) -> Queries:
        """Of the taps that are pooled by token weights."""
        return Queries({each.tap: each.query for each in self.kept if each.query is not None})

    def standardise(self, pooled: Sequence[Tensor]) -> Tensor:
        """Features ``(batch, num_features)`` from the pooled neurons ``(batch, neurons)`` of each tap and pooling."""
        return (torch.cat([part.to(self.mean.device) for part in pooled], 1) - self.mean) / self.scale


class Standardizer(nn.Module):
    """Which neurons are read, and the shift and scale of each feature. Buffers only, always float32 (indices int64)."""

    neurons: Tensor
    mean: Tensor
    scale: Tensor
    queries: Tensor | None  # one after another, in the order of the taps

    def __init__(self, num_features: int, widths: Sequence[int] = ()) -> None:
        """``widths``: of the queries of the taps with token weights, in the order of the features."""
        super().__init__()
        self.widths = list(widths)
        self.register_buffer("neurons", torch.zeros(num_features, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(num_features, dtype=torch.float32))
        self.register_buffer("queries", torch.zeros(sum(widths), dtype=torch.float32) if widths else None)

    @classmethod
    def of(cls, groups: Sequence[FeatureGroup], mean: Tensor, scale: Tensor) -> Standardizer:
        """With the neurons of these groups, and the shift and scale of each, ``(num_features,)``."""
        queries = [group.query for group in groups if group.query is not None]
        made = cls(len(mean), list(map(len, queries)))
        if made.queries is not None:
            made.queries.copy_(torch.cat(queries))
        made.neurons.copy_(torch.cat([group.neurons for group in groups]))
        made.mean.copy_(mean)
        made.scale.copy_(scale)
        return made

    def select(self, parts: Sequence[TapPart]) -> Selection:
        """All its neurons, which these parts divide by tap and pooling."""
        neurons = self.neurons.split_with_sizes([part.size for part in parts])
        queries = iter(() if self.queries is None else self.queries.split_with_sizes(self.widths))
        kept = [
            Kept(part.tap, own, part.poolings, next(queries) if part.weighted else None)
            for part, own in zip(parts, neurons, strict=True)
        ]
        return Selection(kept, self.mean, self.scale)

    def forward(self, pooled: Tensor) -> Tensor:
        """Features ``(batch, num_features)`` from pooled neurons in their order."""
        return Selection([], self.mean, self.scale).standardise([pooled])


def described(groups: Sequence[FeatureGroup]) -> list[dict[str, Any]]:
    """The groups as ``SpinConfig.features`` holds them.

    Raises:
        ValueError: unless they are sorted by block, kind and pooling.
    """
    order = [(group.tap.block, group.tap.kind, group.pooling) for group in groups]
    if order != sorted(order):
        raise ValueError("Feature groups must be sorted by block, kind and pooling.")
    return [
        {"tap": str(group.tap), "pooling": group.pooling, "count": len(group.neurons)}
        | ({} if group.query is None else {"query": len(group.query)})
        for group in groups
    ]


def query_widths(features: Sequence[Mapping[str, Any]]) -> list[int]:
    """Of the queries that entries of ``SpinConfig.features`` need."""
    return [entry["query"] for entry in features if "query" in entry]


def group_by_tap(features: Sequence[Mapping[str, Any]]) -> list[TapPart]:
    """The parts of the feature vector that ``SpinConfig.features`` tells of."""
    poolings: dict[Tap, list[tuple[str, int]]] = {}
    for entry in features:
        poolings.setdefault(Tap.parse(entry["tap"]), []).append((entry["pooling"], entry["count"]))
    return [
        TapPart(tap, own, sum(count for _, count in own), any(pooling == ATTENTION for pooling, _ in own))
        for tap, own in poolings.items()
    ]
