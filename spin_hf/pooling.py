"""The only masked pooling in the project: calibration, training and serving all come through here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from .attention import ATTENTION, Queries, TokenWeights
from .layout import PositionsError, Tap
from .modes import full_precision, is_exporting

Pooling = Literal["first", "last", "mean", "max"]  # those without learned weights, for which see attention.py
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def pool(values: Tensor, mask: Tensor, poolings: Sequence[str]) -> Tensor:
    """Reduce token values to one number per neuron, once for each pooling.

    Args:
        values: activations ``(batch, tokens, neurons)``, any floating dtype.
        mask: 1 or True for real tokens, ``(batch, tokens)``; padding may stand anywhere.
        poolings: names from :data:`POOLINGS`.

    Returns:
        ``(batch, len(poolings), neurons)`` in float32. A row without any token pools to zero.

    Raises:
        ValueError: for an unknown pooling.
        PositionsError: where the number of positions is not that of tokens, unless all of these are real; then all
            positions are pooled.
    """
    tokens = _Tokens(mask, values)
    return torch.stack([_pool_one(values, tokens, name) for name in poolings], 1)


class PoolingTogether:
    """Pools neurons of many taps in a few large operations instead of many small ones.

    Neurons wait until there are enough of them, which bounds the memory; what is pooled alone equals :func:`pool`.

    Args:
        mask: as :func:`pool` takes it, of the texts of all taps.
        weights: of the tokens, for what is pooled by attention; the source of a tap is seen before the tap is added.
    """

    # Numbers that wait. On a CPU they should stay in its cache; a GPU would spend a large batch on launching kernels.
    _MOST: ClassVar[dict[str, int]] = {"cpu": 2**18}
    _MOST_ELSEWHERE = 2**24  # 64 MB of float32

    def __init__(self, mask: Tensor, weights: TokenWeights | None = None) -> None:
        self._mask, self._weights = mask, weights or TokenWeights(Queries({}), mask)
        self._found: dict[Any, list[Tensor]] = {}
        self._waiting: dict[str, list[tuple[Any, int, Tensor]]] = {}
        self._count = 0
        self._like: tuple[Any, ...] = ()
        self._at_once = is_exporting()  # a graph for any number of texts can't decide by it

    def add(self, key: Tap, values: Tensor, poolings: Sequence[tuple[str, int]]) -> None:
        """Take the neurons of one tap.

        Args:
            key: the tap.
            values: activations ``(batch, tokens, neurons)``.
            poolings: and how many neurons each of them pools, one after another.

        Raises:
            PositionsError, ValueError: as :func:`pool` does, here or later.
        """
        like = (values.shape[1], values.device)
        if like != self._like:
            self._pool()
            self._like = like
        self._found[key] = [values] * len(poolings)
        parts = [values] if len(poolings) == 1 else values.split_with_sizes([count for _, count in poolings], -1)
        for place, ((pooling, _), part) in enumerate(zip(poolings, parts, strict=True)):
            self._waiting.setdefault(pooling, []).append((key, place, part))
        if self._at_once or self._enough(values):
            self._pool()

    def _enough(self, values: Tensor) -> bool:
        self._count += values.numel()
        if self._count >= self._MOST.get(values.device.type, self._MOST_ELSEWHERE):
            return True
        # Under attention each tap's weights meet all neurons that wait: no more than one result for each token.
        return len(self._waiting.get(ATTENTION, ())) >= values.shape[1]

    def finish(self) -> dict[Any, list[Tensor]]:
        """For each tap ``(batch, neurons)`` of each of its poolings, in float32; one column more under attention."""
        self._pool()
        return self._found

    def _pool(self) -> None:
        if not self._waiting:
            return
        tokens = None
        with full_precision(self._mask.device):
            for pooling, waiting in self._waiting.items():
                parts = [part for _, _, part in waiting]
                split: Sequence[Tensor]
                if pooling == ATTENTION:
                    split = self._weights.pool([key for key, _, _ in waiting], parts)
                else:
                    values = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
                    tokens = tokens or _Tokens(self._mask, values)
                    pooled = _pool_one(values, tokens, pooling)
                    sizes = [part.shape[-1] for part in parts]
                    split = [pooled] if len(parts) == 1 else pooled.split_with_sizes(sizes, -1)
                for (key, place, _), own in zip(waiting, split, strict=True):
                    self._found[key][place] = own
        self._waiting, self._count = {}, 0


def align_left(mask: Tensor, *tensors: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """Move each row's real tokens to the front, in order: left padding becomes right padding.

    Returns the mask and the tensors ``(batch, tokens, ...)`` gathered by one stable permutation per row; ``None`` stays
    ``None``. A batch that is already right padded comes back with equal values.
    """
    tokens = mask.shape[1]
    position = torch.arange(tokens, device=mask.device)
    order = position.add(mask.logical_not(), alpha=tokens).argsort(dim=1)  # no two alike, so it is stable

    def gather(tensor: Tensor) -> Tensor:
        index = order.to(tensor.device)
        index = index.reshape(index.shape + (1,) * (tensor.dim() - 2)).expand_as(tensor)
        return tensor.gather(1, index)

    return gather(mask), [None if tensor is None else gather(tensor) for tensor in tensors]


class _Tokens:
    """Which tokens of a batch are pooled: what all poolings ask of the mask, worked out once."""

    def __init__(self, mask: Tensor, values: Tensor) -> None:
        mask = mask.to(device=values.device, dtype=torch.bool)
        if values.shape[1] != mask.shape[1]:
            if not mask.all():
                raise PositionsError(
                    f"{mask.shape[1]} tokens became {values.shape[1]} positions, so that padding can't be told apart. "
                    "Give texts of one length, or one at a time."
                )
            mask = mask.new_ones(values.shape[:2])
        self.mask, self.padding = mask, mask.logical_not()[..., None]
        self.count = mask.sum(1, keepdim=True)
        self.none = self.count == 0


def _pool_one(values: Tensor, tokens: _Tokens, pooling: str) -> Tensor:
    mask = tokens.mask
    if pooling == "mean":  # filled, not multiplied by the mask: padding may hold NaN
        return values.masked_fill(tokens.padding, 0.0).sum(1, dtype=torch.float32) / tokens.count.clamp_min(1)
    if pooling == "max":
        found = values.masked_fill(tokens.padding, -torch.inf).amax(1)
    elif pooling in ("first", "last"):
        position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        score = torch.where(mask, position if pooling == "last" else position.flip(0), 0)
        found = values[torch.arange(values.shape[0], device=values.device), score.argmax(1)]
    else:
        raise ValueError(f"Unknown pooling {pooling!r}. Choose from: {', '.join(POOLINGS)}.")
    return found.float().masked_fill(tokens.none, 0.0)
