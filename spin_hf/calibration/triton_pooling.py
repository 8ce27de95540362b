"""The kernels of :mod:`spin_hf.calibration.one_pass`. Importing this needs Triton."""
# mypy: ignore-errors
# ruff: noqa: ANN001

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _NEURONS, _WARPS = (
    64,
    128,
    2,
)  # read at once by a program: 2.4 TB/s on an H100, five times that of 16 and 4 warps

_SCORED = 32  # tokens that a program scores


def mean_and_max(values: Tensor, lengths: Tensor) -> Tensor:
    """Mean and maximum ``(batch, 2, neurons)``, float32, of the first tokens of ``(batch, tokens, neurons)`` on CUDA.

    ``lengths`` ``(batch,)`` says how many, int32, at least one. Neurons lie side by side in memory.
    """
    batch, _, neurons = values.shape
    found = values.new_empty((batch, 2, neurons), dtype=torch.float32)
    grid = (batch, triton.cdiv(neurons, _NEURONS))
    with torch.cuda.device(values.device):  # Triton starts a kernel on the current device, whatever it is given
        _mean_and_max[grid](
            values,
            lengths,
            found,
            neurons,
            values.stride(0),
            values.stride(1),
            TOKENS=_TOKENS,
            NEURONS=_NEURONS,
            num_warps=_WARPS,
        )
    return found


def scores(values: Tensor, query: Tensor) -> Tensor:
    """``values @ query`` in float32: ``(batch, tokens)`` of ``(batch, tokens, width)`` and ``(width,)`` on CUDA."""
    batch, tokens, width = values.shape
    found = values.new_empty((batch, tokens), dtype=torch.float32)
    with torch.cuda.device(values.device):
        _scores[(batch, triton.cdiv(tokens, _SCORED))](
            *(values, query, found, tokens, width, values.stride(0), values.stride(1)),
            TOKENS=_SCORED,
            NEURONS=_NEURONS,
            num_warps=_WARPS,
        )
    return found


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sums ``(batch, neurons)`` in float32 over the tokens of ``(batch, tokens, neurons)``, on CUDA.

    ``weights`` ``(batch, tokens)`` are float32, their tokens side by side. A token whose weight is zero is not read.
    """
    batch, tokens, neurons = values.shape
    found = values.new_empty((batch, neurons), dtype=torch.float32)
    with torch.cuda.device(values.device):
        _weighted_sum[(batch, triton.cdiv(neurons, _NEURONS))](
            *(values, weights, found, tokens, neurons, values.stride(0), values.stride(1), weights.stride(0)),
            TOKENS=_TOKENS,
            NEURONS=_NEURONS,
            num_warps=_WARPS,
        )
    return found


@triton.jit
def _scores(
    values, query, found, tokens, width, row_stride, token_stride, TOKENS: tl.constexpr, NEURONS: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    total = tl.zeros([TOKENS], dtype=tl.float32)
    for first in range(0, width, NEURONS):
        column = first + tl.arange(0, NEURONS)
        inside = column < width
        place = values + row * row_stride + token.to(tl.int64)[:, None] * token_stride + column[None, :]
        read = tl.load(place, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(read * tl.load(query + column, mask=inside, other=0.0)[None, :], 1)
    tl.store(found + row * tokens + token, total, mask=there)


@triton.jit
def _weighted_sum(
    values,
    weights,
    found,
    tokens,
    neurons,
    row_stride,
    token_stride,
    weight_stride,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    inside = column < neurons
    total = tl.zeros([NEURONS], dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        weight = tl.load(weights + row * weight_stride + token, mask=token < tokens, other=0.0)
        place = values + row * row_stride + token.to(tl.int64)[:, None] * token_stride + column[None, :]
        read = tl.load(place, mask=(weight != 0.0)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(read * weight[:, None], 0)
    tl.store(found + row * neurons + column, total, mask=inside)


@triton.jit
def _mean_and_max(
    values, lengths, found, neurons, row_stride, token_stride, TOKENS: tl.constexpr, NEURONS: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    inside = column < neurons
    length = tl.load(lengths + row)
    total = tl.zeros([NEURONS], dtype=tl.float32)
    peak = tl.full([NEURONS], float("-inf"), dtype=tl.float32)
    for first in range(0, length, TOKENS):
        token = first + tl.arange(0, TOKENS)
        real = (token < length)[:, None] & inside[None, :]
        place = values + row * row_stride + token.to(tl.int64)[:, None] * token_stride + column[None, :]
        read = tl.load(place, mask=real, other=0.0).to(tl.float32)
        total += tl.sum(read, 0)
        peak = tl.maximum(peak, tl.max(tl.where(real, read, float("-inf")), 0))
    peak = tl.where(total != total, total, peak)  # a maximum may pass over NaN, a sum never
    base = found + row * 2 * neurons + column
    tl.store(base, total / length, mask=inside)
    tl.store(base + neurons, peak, mask=inside)
