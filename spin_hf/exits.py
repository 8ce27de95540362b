"""Exits: heads for other depths and etas, beside the one that a classifier answers with.

They read one set of features of their own, each a part of it, so that one forward gives what all of them say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import ATTENTION
from .features import FeatureGroup, Kept, Selection, Standardizer, group_by_tap, query_widths


class ExitError(ValueError):
    """A classifier has no exits, or not this one."""


@dataclass(frozen=True)
class Exit:
    """A head for one depth and eta.

    Attributes:
        depth: blocks that its features need.
        eta: share of each tap's salience that they hold.
        score: of the validation.
        temperature: that its logits are divided by.
        columns: its features among the shared ones, ``(num_features,)`` int64, ascending.
        weight, bias: of the head, ``(num_labels, num_features)`` and ``(num_labels,)``.
    """

    depth: int
    eta: float
    score: float
    temperature: float
    columns: Tensor
    weight: Tensor
    bias: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Its entry in ``SpinConfig.exits``."""
        return {
            "depth": self.depth,
            "eta": self.eta,
            "num_features": len(self.columns),
            "score": self.score,
            "temperature": self.temperature,
        }


class ExitHead(nn.Module):
    """The head of one exit. Buffers only: nothing trains them, and no quantiser takes them for a layer."""

    columns: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, num_features: int, num_labels: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("columns", torch.zeros(num_features, dtype=torch.int64))
        self.register_buffer("weight", torch.zeros(num_labels, num_features, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(num_labels, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(batch, num_labels)`` of its own features ``(batch, num_features)``."""
        return F.linear(features, self.weight, self.bias) / self.temperature


class Exits(nn.Module):
    """The exits of a classifier and the features that they share.

    Args:
        features: of all exits together, as in ``SpinConfig.features``.
        exits: the entries of ``SpinConfig.exits``.
        num_labels: of the classifier.
    """

    def __init__(
        self, features: Sequence[Mapping[str, Any]], exits: Sequence[Mapping[str, Any]], num_labels: int
    ) -> None:
        super().__init__()
        self.parts = group_by_tap(features)
        self.standardizer = Standardizer(sum(entry["count"] for entry in features), query_widths(features))
        self.heads = nn.ModuleList(ExitHead(each["num_features"], num_labels, each["temperature"]) for each in exits)

    def fill(self, groups: Sequence[FeatureGroup], mean: Tensor, scale: Tensor, exits: Sequence[Exit]) -> None:
        """Take these features and heads, whose sizes are its own."""
        self.standardizer = Standardizer.of(groups, mean, scale)
        for head, given in zip(self.heads, exits, strict=True):
            for name in ("columns", "weight", "bias"):
                getattr(head, name).copy_(getattr(given, name))

    def __len__(self) -> int:
        return len(self.heads)

    def head(self, number: int) -> ExitHead:
        head: Any = self.heads[number]
        found: ExitHead = head
        return found

    def select(self, number: int | None = None) -> Selection:
        """What is to be read for one exit, or for all of them: then each neuron once."""
        everything = self.standardizer.select(self.parts)
        if number is None:
            return everything
        columns = self.head(number).columns
        ends = list(accumulate(count for part in self.parts for _, count in part.poolings))
        bounds = iter(torch.searchsorted(columns, torch.tensor(ends, device=columns.device)).tolist())
        kept, start = [], 0
        for part, shared in zip(self.parts, everything.kept, strict=True):
            first, poolings = start, []
            for pooling, _ in part.poolings:
                stop = next(bounds)
                if stop > start:
                    poolings.append((pooling, stop - start))
                start = stop
            if poolings:
                query = shared.query if any(pooling == ATTENTION for pooling, _ in poolings) else None
                kept.append(Kept(part.tap, self.standardizer.neurons[columns[first:start]], poolings, query))
        return Selection(kept, everything.mean[columns], everything.scale[columns])

    def forward(self, shared: Tensor) -> Tensor:
        """Logits ``(batch, exits, num_labels)`` of the shared features ``(batch, num_features)``."""
        logits = []
        for head in map(self.head, range(len(self))):
            own = shared.index_select(1, head.columns.to(shared.device))
            logits.append(head(own).to(shared.device))
        return torch.stack(logits, 1)


def demand_exit(exits: Exits | None, number: int | None) -> Exits:
    """The exits of a classifier.

    Raises:
        ExitError: if it has none, or not this one.
    """
    if exits is None:
        raise ExitError(
            "This classifier has no exits, but one head. Exits are made when it is calibrated: "
            "spin_calibrate(model, tokenizer, train, exits=True)."
        )
    whole = hasattr(number, "__index__") and not isinstance(number, bool)
    if number is not None and not (whole and 0 <= number < len(exits)):
        raise ExitError(
            f"exit must be a number from 0 to {len(exits) - 1}; got {number!r}. model.config.exits lists them."
        )
    return exits
