"""The only masked pooling in the project: calibration, training and serving all come through here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Pooling = Literal["first", "last", "mean", "max"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


class PositionsError(ValueError):
    """The backbone works on another number of positions than there are tokens, and some of the tokens are padding."""


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
    mask = mask.to(device=values.device, dtype=torch.bool)
    if values.shape[1] != mask.shape[1]:
        if not mask.all():
            raise PositionsError(
                f"{mask.shape[1]} tokens became {values.shape[1]} positions, so that padding can't be told apart. "
                "Give texts of one length, or one at a time."
            )
        mask = mask.new_ones(values.shape[:2])
    columns = [_pool_one(values, mask, name) for name in poolings]
    return torch.stack(columns, 1).masked_fill(~mask.any(1)[:, None, None], 0.0)


def align_left(mask: Tensor, *tensors: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """Move each row's real tokens to the front, in order: left padding becomes right padding.

    Returns the mask and the tensors ``(batch, tokens, ...)`` gathered by one stable permutation per row; ``None`` stays
    ``None``. A batch that is already right padded comes back with equal values.
    """
    tokens = mask.shape[1]
    position = torch.arange(tokens, device=mask.device)
    order = torch.where(mask.to(torch.bool), position, position + tokens).argsort(
        dim=1
    )  # no two alike, so it is stable

    def gather(tensor: Tensor) -> Tensor:
        index = order.to(tensor.device)
        index = index.reshape(index.shape + (1,) * (tensor.dim() - 2)).expand_as(tensor)
        return tensor.gather(1, index)

    return gather(mask), [None if tensor is None else gather(tensor) for tensor in tensors]


def _pool_one(values: Tensor, mask: Tensor, pooling: str) -> Tensor:
    if pooling == "mean":  # filled, not multiplied by the mask: padding may hold NaN
        return values.float().masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    if pooling == "max":
        return values.masked_fill(~mask[..., None], -torch.inf).amax(1).float()
    if pooling in ("first", "last"):
        position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        score = torch.where(mask, position if pooling == "last" else position.flip(0), 0)
        return values[torch.arange(values.shape[0], device=values.device), score.argmax(1)].float()
    raise ValueError(f"Unknown pooling {pooling!r}. Choose from: {', '.join(POOLINGS)}.")
