"""Pooling of all neurons in one pass over the activations: on a GPU by kernels that read them as they are, once for
mean and max together; on a CPU without a copy whose padding is filled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import TokenWeights
from ..pooling import pool
from ..taps import Tap
from ..token_scores import runs_triton


def pool_prefix(values: Tensor, mask: Tensor, poolings: Sequence[str]) -> Tensor:
    """:func:`spin_hf.pooling.pool` of right-padded rows.

    Args:
        values: activations ``(batch, tokens, neurons)``.
        mask: ``(batch, tokens)``, each row ones and then zeros, at least one one.
        poolings: names from :data:`spin_hf.pooling.POOLINGS`.

    Returns:
        ``(batch, len(poolings), neurons)`` in float32.
    """
    wanted = [name for name in poolings if name in ("mean", "max")]
    if not wanted or values.shape[1] != mask.shape[1] or not _usable(values):
        return pool(values, mask, poolings)
    if values.is_cpu:
        found = torch.stack([_mean(values, mask) if name == "mean" else _max(values, mask) for name in wanted], 1)
    else:
        from .triton_pooling import mean_and_max

        wanted = ["mean", "max"]  # whether both are or not
        found = mean_and_max(values, mask.to(values.device).sum(1, dtype=torch.int32))
    if list(poolings) == wanted:
        return found
    by_name = dict(zip(wanted, found.unbind(1), strict=True))
    others = [name for name in poolings if name not in by_name]
    if others:
        by_name |= dict(zip(others, pool(values, mask, others).unbind(1), strict=True))
    return torch.stack([by_name[name] for name in poolings], 1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return _weighted_sum(values, mask / mask.sum(1, keepdim=True, dtype=torch.float32))


def _max(values: Tensor, mask: Tensor) -> Tensor:
    real = mask.bool()
    shared = int(real.sum(1).min())  # tokens that all rows have
    found = values[:, :shared].amax(1)
    if shared < values.shape[1]:
        rest = values[:, shared:].masked_fill(~real[:, shared:, None], -torch.inf).amax(1)
        found = torch.maximum(found, rest)
    return found.float()


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sums over the tokens ``(rows, neurons)``, float32, of all whose weight is not zero, on a CPU."""
    found = (weights[:, None] @ values.float())[:, 0]
    if not found.isfinite().all():  # padding may hold NaN
        found = (weights[:, None] @ values.masked_fill(weights[..., None] == 0, 0.0).float())[:, 0]
    return found


class TokenWeightsInOnePass(TokenWeights):
    """:class:`spin_hf.attention.TokenWeights` of all neurons of the taps.

    By kernels each tap is read once for its averages, which weigh the tokens by their scores as they go.
    """

    def pool(self, taps: Sequence[Tap], values: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self._pool(tap, own) for tap, own in zip(taps, values, strict=True)]

    def _pool(self, tap: Tap, values: Tensor) -> Tensor:
        self.check(tap, values)
        if values.is_cpu:
            weights, mass = self.of([tap], values.device)
            return torch.cat([_weighted_sum(values, weights[0]), mass[0][:, None]], 1)
        if not runs_triton(values.device):
            return super().pool([tap], [values])[0]
        from .triton_pooling import softmax_average

        values = values if _usable(values) else values.contiguous()
        return softmax_average(values, self._scores[tap].to(values.device), self._real.to(values.device))


def _usable(values: Tensor) -> bool:
    return values.is_cpu or (values.stride(-1) == 1 and runs_triton(values.device))
