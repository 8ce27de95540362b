"""The kernels of :mod:`spin_hf.calibration.products`. Importing this needs Triton."""
# mypy: ignore-errors
# ruff: noqa: ANN001

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows times vectors, and features, that a program multiplies at once. On an H100 both kernels read 2.7 to 2.8 TB/s of
# large features for two to four vectors, cuBLAS 1.4 to 1.8 (benchmarks/products.py).
_VALUES, _FEATURES, _WARPS, _STAGES = 32, 128, 2, 4
_LEAST_COLUMNS = 4  # one kernel serves up to as many vectors: to compile another takes longer than it would save
_PROGRAMS = 1056  # of a sum over rows, which is split among them; eight for each processor of an H100


def times(x: Tensor, vectors: Tensor) -> Tensor:
    """``x @ vectors``: features ``(taps, rows, width)`` and ``(taps, width, vectors)``, float32, on CUDA. The vectors
    lie one after another in memory, and the features of a row.
    """
    (taps, rows, width), count = x.shape, vectors.shape[2]
    found = x.new_empty(taps, rows, count)
    options = _options(count)
    with torch.cuda.device(x.device):  # Triton starts a kernel on the current device, whatever it is given
        _times[(triton.cdiv(rows, options["ROWS"]), taps)](
            *(x, vectors, found, rows, width, count, x.stride(0), x.stride(1)), **options
        )
    return found


def transposed_times(x: Tensor, vectors: Tensor) -> Tensor:
    """``x.mT @ vectors``: features ``(taps, rows, width)`` and ``(taps, rows, vectors)``, as :func:`times` takes them.

    Each program sums some of the rows, and their sums are added in one order: the same values always.
    """
    (taps, rows, width), count = x.shape, vectors.shape[2]
    options = _options(count)
    blocks = triton.cdiv(width, _FEATURES)
    parts = max(1, min(_PROGRAMS // (taps * blocks), triton.cdiv(rows, 4 * options["ROWS"])))
    found = x.new_empty(parts, taps, width, count)
    with torch.cuda.device(x.device):
        _transposed_times[(blocks, parts, taps)](
            *(x, vectors, found, rows, width, count, x.stride(0), x.stride(1)), **options
        )
    return found.sum(0)


def _options(count: int) -> dict[str, int]:
    columns = max(_LEAST_COLUMNS, triton.next_power_of_2(count))
    rows = _VALUES // columns
    return {"COLUMNS": columns, "ROWS": rows, "FEATURES": _FEATURES, "num_warps": _WARPS, "num_stages": _STAGES}


@triton.jit(do_not_specialize=["rows", "count"])
def _times(
    x,
    vectors,
    found,
    rows,
    width,
    count,
    tap_stride,
    row_stride,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    tap = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS, ROWS, FEATURES], dtype=tl.float32)
    base = x + tap * tap_stride + row.to(tl.int64)[:, None] * row_stride
    for first in range(0, width, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        inside = feature < width
        read = tl.load(base + feature[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        along = vectors + (tap * width + feature)[None, :] * count + column[:, None]
        vector = tl.load(along, mask=(column < count)[:, None] & inside[None, :], other=0.0)
        total += read[None, :, :] * vector[:, None, :]
    place = found + (tap * rows + row)[None, :] * count + column[:, None]
    tl.store(place, tl.sum(total, 2), mask=(column < count)[:, None] & (row < rows)[None, :])


@triton.jit(do_not_specialize=["rows", "count"])
def _transposed_times(
    x,
    vectors,
    found,
    rows,
    width,
    count,
    tap_stride,
    row_stride,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    tap, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    inside = feature < width
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS, ROWS, FEATURES], dtype=tl.float32)
    base = x + tap * tap_stride + feature[None, :]
    for first in range(part * ROWS, rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        real = row < rows
        read = tl.load(base + row.to(tl.int64)[:, None] * row_stride, mask=real[:, None] & inside[None, :], other=0.0)
        along = vectors + (tap * rows + row)[None, :] * count + column[:, None]
        vector = tl.load(along, mask=(column < count)[:, None] & real[None, :], other=0.0)
        total += read[None, :, :] * vector[:, :, None]
    place = found + ((part * tl.num_programs(2) + tap) * width + feature)[None, :] * count + column[:, None]
    tl.store(place, tl.sum(total, 1), mask=(column < count)[:, None] & inside[None, :])
