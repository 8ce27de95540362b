"""The kernel of :mod:`spin_hf.calibration.one_pass`. Importing this needs Triton."""
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


def token_weights(values: Tensor, queries: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the real tokens of ``values . query``, and the logarithm of its normaliser, on CUDA.

    Args:
        values: ``(batch, tokens, width)``, neurons side by side in memory.
        queries: ``(queries, width)`` float32, contiguous.
        real: ``(batch, tokens)`` bool: the others have weight 0.

    Returns:
        ``(queries, batch, tokens)`` and ``(queries, batch)`` float32.
    """
    batch, tokens, width = values.shape
    count, real = len(queries), real.contiguous()
    weights = values.new_empty((count, batch, tokens), dtype=torch.float32)
    mass = values.new_empty((count, batch), dtype=torch.float32)
    with torch.cuda.device(values.device):
        _scores[(batch, triton.cdiv(tokens, _SCORED))](
            *(values, queries, weights, tokens, width, values.stride(0), values.stride(1), batch * tokens),
            COUNT=count,
            QUERIES=triton.next_power_of_2(count),
            TOKENS=_SCORED,
            NEURONS=_NEURONS // 2,
            num_warps=_WARPS,
        )
        _softmax[(batch, count)](weights, mass, real, tokens, batch, TOKENS=triton.next_power_of_2(tokens))
    return weights, mass


def weighted_sum(values: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """Sums over the tokens of ``(batch, tokens, neurons)`` on CUDA, and a last column.

    Returns:
        ``(batch, neurons + 1)`` float32.

    Args:
        weights: ``(batch, tokens)`` float32, contiguous; a token whose weight is zero is not read.
        mass: the last column, ``(batch,)`` float32.
    """
    batch, tokens, neurons = values.shape
    found = values.new_empty((batch, neurons + 1), dtype=torch.float32)
    with torch.cuda.device(values.device):
        _weighted_sum[(batch, triton.cdiv(neurons + 1, _NEURONS))](
            *(values, weights, mass, found, tokens, neurons, values.stride(0), values.stride(1)),
            TOKENS=_TOKENS,
            NEURONS=_NEURONS,
            num_warps=_WARPS,
        )
    return found


@triton.jit
def _scores(
    values,
    queries,
    found,
    tokens,
    width,
    row_stride,
    token_stride,
    query_stride,
    COUNT: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    query = tl.arange(0, QUERIES)
    there = token < tokens
    total = tl.zeros([TOKENS, QUERIES], dtype=tl.float32)
    for first in range(0, width, NEURONS):
        column = first + tl.arange(0, NEURONS)
        inside = column < width
        place = values + row * row_stride + token.to(tl.int64)[:, None] * token_stride + column[None, :]
        read = tl.load(place, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        wanted = (query < COUNT)[:, None] & inside[None, :]
        given = tl.load(queries + query[:, None] * width + column[None, :], mask=wanted, other=0.0)
        total += tl.sum(read[:, None, :] * given[None, :, :], 2)
    place = found + query.to(tl.int64)[None, :] * query_stride + (row * tokens + token)[:, None]
    tl.store(place, total, mask=there[:, None] & (query < COUNT)[None, :])


@triton.jit
def _softmax(weights, mass, real, tokens, batch, TOKENS: tl.constexpr) -> None:
    row, query = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = tl.arange(0, TOKENS)
    there = token < tokens
    wanted = tl.load(real + row * tokens + token, mask=there, other=0) != 0
    place = weights + (query * batch + row) * tokens + token
    scores = tl.load(place, mask=there, other=0.0)
    scores = tl.where(wanted, scores, -3.4028234663852886e38)  # as the plain way has it: a row may be all padding
    most = tl.max(scores, 0)
    shares = tl.where(there, tl.exp(scores - most), 0.0)
    total = tl.sum(shares, 0)
    tl.store(place, tl.where(wanted, shares / total, 0.0), mask=there)
    tl.store(mass + query * batch + row, most + tl.log(total))


@triton.jit
def _weighted_sum(
    values,
    weights,
    mass,
    found,
    tokens,
    neurons,
    row_stride,
    token_stride,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    inside = column < neurons
    total = tl.zeros([NEURONS], dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        weight = tl.load(weights + row * tokens + token, mask=token < tokens, other=0.0)
        place = values + row * row_stride + token.to(tl.int64)[:, None] * token_stride + column[None, :]
        read = tl.load(place, mask=(weight != 0.0)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(read * weight[:, None], 0)
    total = tl.where(column == neurons, tl.load(mass + row), total)
    tl.store(found + row * (neurons + 1) + column, total, mask=column <= neurons)


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
