"""The kernels of :mod:`spin_hf.calibration.one_pass`. Importing this needs Triton."""
# mypy: ignore-errors
# ruff: noqa: ANN001

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import UNREAL

# Read at once by a program: 2.4 TB/s on an H100, five times that of 16 and 4 warps
_TOKENS, _NEURONS, _WARPS = 64, 128, 2


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


def softmax_average(values: Tensor, scores: Tensor, real: Tensor) -> Tensor:
    """Averages over the tokens of ``(batch, tokens, neurons)`` by a softmax of their scores, and in a last column the
    logarithm of its normaliser: ``(batch, neurons + 1)`` in float32, on CUDA.

    Args:
        values: ``(batch, tokens, neurons)``. A token without weight is not read.
        scores: ``(batch, tokens)`` float32.
        real: ``(batch, tokens)`` bool, of the tokens that have weight. The average of a row without any is zero.
    """
    batch, tokens, neurons = values.shape
    found = values.new_empty((batch, neurons + 1), dtype=torch.float32)
    with torch.cuda.device(values.device):
        _softmax_average[(batch, triton.cdiv(neurons, _NEURONS))](
            *(values, scores.contiguous(), real.contiguous().view(torch.uint8), found),
            *(tokens, neurons, values.stride(0), values.stride(1)),
            UNREAL=UNREAL,
            TOKENS=_TOKENS,
            NEURONS=_NEURONS,
            num_warps=_WARPS,
        )
    return found


@triton.jit
def _softmax_average(
    values,
    scores,
    real,
    found,
    tokens,
    neurons,
    row_stride,
    token_stride,
    UNREAL: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    inside = column < neurons
    peaks = tl.full([TOKENS], float("-inf"), dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        pooled = tl.load(real + row * tokens + token, mask=token < tokens, other=0) != 0
        score = tl.load(scores + row * tokens + token, mask=pooled, other=float("-inf"))
        peaks = tl.maximum(peaks, score)
    peak = tl.max(peaks, 0)
    masses = tl.zeros([TOKENS], dtype=tl.float32)
    total = tl.zeros([NEURONS], dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        pooled = tl.load(real + row * tokens + token, mask=token < tokens, other=0) != 0
        score = tl.load(scores + row * tokens + token, mask=pooled, other=float("-inf"))
        weight = tl.where(pooled, tl.exp(score - peak), 0.0)
        place = values + row * row_stride + token.to(tl.int64)[:, None] * token_stride + column[None, :]
        read = tl.load(place, mask=(weight != 0.0)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        masses += weight
        total += tl.sum(read * weight[:, None], 0)
    mass = tl.sum(masses, 0)
    some = mass != 0.0  # NaN is
    base = found + row * (neurons + 1)
    tl.store(base + column, total / tl.where(some, mass, 1.0), mask=inside)
    if tl.program_id(1) == 0:
        normaliser = tl.where(peak == float("inf"), peak, peak + tl.log(mass))  # the mass is NaN then
        tl.store(base + neurons, tl.where(some, normaliser, UNREAL))


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
