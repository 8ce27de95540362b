"""Pooling on a GPU in one pass over the activations: what must be read is read once, for mean and max together, and as
it is, not made float32 first.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import TokenWeights
from ..pooling import pool


def pool_prefix(values: Tensor, mask: Tensor, poolings: Sequence[str]) -> Tensor:
    """:func:`spin_hf.pooling.pool` of right-padded rows; on CUDA by a Triton kernel.

    Args:
        values: activations ``(batch, tokens, neurons)``.
        mask: ``(batch, tokens)``, each row ones and then zeros, at least one one.
        poolings: names from :data:`spin_hf.pooling.POOLINGS`.

    Returns:
        ``(batch, len(poolings), neurons)`` in float32.
    """
    fused = [name for name in poolings if name in ("mean", "max")]
    if not fused or not _usable(values) or values.shape[1] != mask.shape[1]:
        return pool(values, mask, poolings)
    from .triton_pooling import mean_and_max

    found = mean_and_max(values, mask.to(values.device).sum(1, dtype=torch.int32))
    by_name = {"mean": found[:, 0], "max": found[:, 1]}
    others = [name for name in poolings if name not in by_name]
    if others:
        by_name |= dict(zip(others, pool(values, mask, others).unbind(1), strict=True))
    return found if list(poolings) == ["mean", "max"] else torch.stack([by_name[name] for name in poolings], 1)


class TokenWeightsInOnePass(TokenWeights):
    """:class:`spin_hf.attention.TokenWeights`; on CUDA by Triton kernels."""

    def weigh(self, values: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        if not _usable(values):
            return super().weigh(values, queries)
        from .triton_pooling import token_weights

        return token_weights(values, queries, self._real)

    def average(self, values: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
        if not _usable(values):
            return super().average(values, weights, mass)
        from .triton_pooling import weighted_sum

        return weighted_sum(values, weights, mass)


def _usable(values: Tensor) -> bool:
    return values.is_cuda and values.stride(-1) == 1 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
