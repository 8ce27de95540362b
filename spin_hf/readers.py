"""What the hooks of one forward hand the activations to: each tap to a function, or the kept neurons of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .attention import TokenWeights
from .features import Selection
from .layout import Tap, TapError
from .pooling import PoolingTogether


class Reader(Protocol):
    """Reads the taps of one forward."""

    def read(self, tap: Tap, values: Tensor) -> None:
        """Take a tap's activations ``(rows, tokens, width)``."""

    def finish(self) -> dict[Tap, list[Tensor]]:
        """``(rows, neurons)`` of each of a tap's poolings, of ``attention`` with one column more."""


class TapByTap:
    """Leaves it to a function to pool a tap, given the mask of the tokens to pool, ``(rows, tokens)``."""

    def __init__(self, pool: Callable[[Tap, Tensor, Tensor], list[Tensor]], mask: Tensor) -> None:
        self._pool, self._mask = pool, mask
        self._found: dict[Tap, list[Tensor]] = {}

    def read(self, tap: Tap, values: Tensor) -> None:
        self._found[tap] = self._pool(tap, values, self._mask)

    def finish(self) -> dict[Tap, list[Tensor]]:
        return self._found


class Gathering:
    """Gathers the kept neurons of each tap, and pools those of many taps together, but each selection's apart.

    So what one selection reads is the same to the bit whether others are read with it or not.

    Args:
        selections: what to read.
        learns: whether a gradient is to come back through the taps.
        mask: of the tokens to pool, ``(rows, tokens)``.
    """

    def __init__(self, selections: Sequence[Selection], learns: bool, mask: Tensor) -> None:
        self._learns = learns
        self._pools = []
        for each in selections:
            weights = TokenWeights(each.queries(), mask)
            self._pools.append(({kept.tap: kept for kept in each.kept}, weights, PoolingTogether(mask, weights)))

    def read(self, tap: Tap, values: Tensor) -> None:
        if self._learns and not torch.is_grad_enabled():
            raise TapError(
                f"Tap {tap} lies in a reentrant checkpoint, where its gradient is lost. Enable checkpointing with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        for wanted, weights, together in self._pools:
            weights.see(tap, values)
            if tap in wanted:
                kept = wanted[tap]
                together.add(tap, _columns(values, kept.neurons.to(values.device)), kept.poolings)

    def finish(self) -> dict[Tap, list[Tensor]]:
        found: dict[Tap, list[Tensor]] = {}
        for _, _, together in self._pools:
            for tap, pooled in together.finish().items():
                found.setdefault(tap, []).extend(pooled)
        return found


def _columns(values: Tensor, neurons: Tensor) -> Tensor:
    """``values[..., neurons]`` of activations ``(rows, tokens, width)``."""
    if values.device.type == "cpu" and values.is_contiguous():  # there this is two to five times as fast
        return values.flatten(0, 1).index_select(1, neurons).view(*values.shape[:2], -1)
    return values.index_select(-1, neurons)
