"""Learned token weights: the pooling ``attention`` averages a neuron over the tokens by a softmax of scores.

The score of a token is ``state . query``, one query for each tap, which calibration learns. The states are those of the
hidden tap itself; FFN neurons take the input of their block, which is there before them (those of a decoder's first
block, where both stacks are read, the encoder's last states). With a query of zeros it is
the mean. Without the exponential's normaliser the averages of the windows of a long text could not be joined, so it
travels with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .layout import PositionsError, Tap
from .modes import full_precision
from .token_scores import token_scores

ATTENTION = "attention"
UNREAL = torch.finfo(torch.float32).min  # the score of a token that is not pooled


def pooling_title(pooling: str) -> str:
    """A pooling's name for a reader."""
    return "token weights" if pooling == ATTENTION else pooling


def source(tap: Tap) -> Tap:
    """The tap whose states are scored for a tap's tokens."""
    return Tap("hidden", tap.block - 1) if tap.kind == "ffn" else tap


def sources(poolings: Mapping[Tap, Iterable[str]]) -> list[Tap]:
    """Taps to read for the token weights of those that are pooled by :data:`ATTENTION`."""
    return list(dict.fromkeys(source(tap) for tap, names in poolings.items() if ATTENTION in names))


def cannot_weigh(tap: Tap, positions: int, tokens: int) -> PositionsError:
    """The error to raise where there is not one position for each token."""
    return PositionsError(
        f"Tap {tap} has {positions} positions for {tokens} tokens, so that tokens can't be weighted. Leave the pooling "
        "attention out."
    )


class Queries:
    """The queries of taps that are pooled by token weights, those of one source together.

    Args:
        queries: of each tap ``(width of its source,)`` float32.
    """

    def __init__(self, queries: Mapping[Tap, Tensor]) -> None:
        self.served: dict[Tap, list[Tap]] = {}  # taps by their source
        for tap in queries:
            self.served.setdefault(source(tap), []).append(tap)
        self.stacked: dict[Tap, Tensor] = {}  # by source, (taps, its width)
        if queries:
            every = torch.cat([queries[tap] for taps in self.served.values() for tap in taps])
            parts = every.split_with_sizes([sum(len(queries[tap]) for tap in taps) for taps in self.served.values()])
            for (own, taps), part in zip(self.served.items(), parts, strict=True):
                self.stacked[own] = part.view(len(taps), -1)


class TokenWeights:
    """The token weights of one forward, worked out as its taps come by.

    Args:
        queries: of the taps that are pooled by them.
        mask: of the tokens to pool, ``(rows, tokens)``.
    """

    def __init__(self, queries: Queries, mask: Tensor) -> None:
        self._queries = queries
        self._real = mask.bool()
        self._scores: dict[Tap, Tensor] = {}  # of the tokens, (rows, tokens) float32

    def see(self, tap: Tap, values: Tensor) -> None:
        """Score the tokens by a tap's activations ``(rows, tokens, width)``, if it is the source of any.

        Raises:
            PositionsError: where there is not one position for each token.
        """
        served = self._queries.served.get(tap)
        if not served:
            return
        self.check(tap, values)
        with full_precision(values.device):
            found = token_scores(values, self._queries.stacked[tap].to(values.device), self._real)
        self._scores.update(zip(served, found.unbind(0), strict=True))

    def of(self, taps: Sequence[Tap], device: torch.device) -> tuple[Tensor, Tensor]:
        """Weights of the tokens of some taps ``(taps, rows, tokens)``, of sum 1, and the logarithm of their normaliser
        ``(taps, rows)``.
        """
        real = self._real.to(device)
        scores = torch.stack([self._scores[tap].to(device) for tap in taps])
        scores = scores.masked_fill(~real, UNREAL)  # padding may hold NaN
        return scores.softmax(2).masked_fill(~real, 0.0), scores.logsumexp(2)

    def pool(self, taps: Sequence[Tap], values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Averages of some neurons ``(rows, tokens, neurons)`` of each of some taps on one device, with a last column
        for :func:`join`: ``(rows, neurons + 1)`` in float32. A token without weight in any of them does not count,
        whatever it holds.

        Raises:
            PositionsError: where there is not one position for each token.
        """
        for tap, part in zip(taps, values, strict=True):
            self.check(tap, part)
        if len(taps) > 1 and torch.is_grad_enabled() and any(part.requires_grad for part in values):
            # The gradient of a part of what is found together is as large as all of it.
            return [self.pool([tap], [part])[0] for tap, part in zip(taps, values, strict=True)]
        device, sizes = values[0].device, [part.shape[2] for part in values]
        with full_precision(device):
            weights, mass = self.of(taps, device)
            unread = (weights == 0).all(0)  # padding, and what no tap gives weight to
            filled = torch.cat([*values], 2).masked_fill(unread[..., None], 0.0).float()
            # Every tap's weights times all neurons: cheaper than a call for each tap.
            found, ends = weights.transpose(0, 1) @ filled, list(accumulate(sizes))
            each = [found[:, i, end - size : end] for i, (size, end) in enumerate(zip(sizes, ends, strict=True))]
            joined = [part for own, last in zip(each, mass, strict=True) for part in (own, last[:, None])]
            return torch.cat(joined, 1).split_with_sizes([size + 1 for size in sizes], 1)

    def check(self, tap: Tap, values: Tensor) -> None:
        """Raise :class:`PositionsError` where there is not one position for each token."""
        if values.shape[1] != self._real.shape[1]:
            raise cannot_weigh(tap, values.shape[1], self._real.shape[1])


def join(values: Tensor, mask: Tensor) -> Tensor:
    """Averages of whole texts ``(texts, neurons)`` from those of their windows ``(texts, windows, neurons + 1)``.

    Args:
        mask: which windows there are, ``(texts, windows)``.
    """
    share = values[..., -1].masked_fill(~mask, -torch.inf).softmax(1)
    return (values[..., :-1] * share[..., None]).sum(1)


def whole(pooled: dict[Tap, list[Tensor]], poolings: Mapping[Tap, Sequence[str]]) -> dict[Tap, list[Tensor]]:
    """Pooled values of texts that were read in one piece, without the columns for :func:`join`, and without the taps
    that only gave token weights.
    """
    return {
        tap: [part[:, :-1] if name == ATTENTION else part for part, name in zip(pooled[tap], names, strict=True)]
        for tap, names in poolings.items()
        if names
    }
