"""The kernel of :mod:`spin_hf.token_scores`. Importing this needs Triton."""
# mypy: ignore-errors
# ruff: noqa: ANN001

from __future__ import annotations

import torch
from torch import Tensor

try:  # transformers' check_imports, which asks for what the code of a folder imports, passes over what is tried
    import triton
    import triton.language as tl
except ImportError:
    raise

# Tokens that a program scores, and neurons at once: 1.7 TB/s on an H100, of 32 and 128 1.1
_SCORED, _SCORED_FROM, _WARPS = 16, 256, 2


def try_out(device: torch.device) -> None:
    """Compile the kernel and run it there, or raise what keeps Triton from that."""
    values = torch.zeros(1, 1, 16, dtype=torch.bfloat16, device=device)
    scores(values, torch.zeros(2, 16, device=device), torch.ones(1, 1, dtype=torch.bool, device=device))


def scores(values: Tensor, queries: Tensor, real: Tensor) -> Tensor:
    """``values @ query`` for each query, in float32: ``(queries, batch, tokens)``, on CUDA.

    Args:
        values: ``(batch, tokens, width)``.
        queries: ``(queries, width)`` float32, one after another in memory.
        real: ``(batch, tokens)`` bool; other tokens are not read, and have 0.
    """
    (batch, tokens, width), count = values.shape, len(queries)
    found = values.new_empty((count, batch, tokens), dtype=torch.float32)
    with torch.cuda.device(values.device):  # Triton starts a kernel on the current device, whatever it is given
        _scores[(batch, triton.cdiv(tokens, _SCORED))](
            *(values, queries, real.contiguous().view(torch.uint8), found),
            *(batch, tokens, width, values.stride(0), values.stride(1)),
            COUNT=count,
            QUERIES=triton.next_power_of_2(count),
            TOKENS=_SCORED,
            NEURONS=_SCORED_FROM,
            num_warps=_WARPS,
        )
    return found


@triton.jit(do_not_specialize=["batch", "tokens"])  # or a server would compile it for many lengths
def _scores(
    values,
    queries,
    real,
    found,
    batch,
    tokens,
    width,
    row_stride,
    token_stride,
    COUNT: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    query = tl.arange(0, QUERIES)
    there = token < tokens
    pooled = tl.load(real + row * tokens + token, mask=there, other=0) != 0
    total = tl.zeros([QUERIES, TOKENS], dtype=tl.float32)
    for first in range(0, width, NEURONS):
        column = first + tl.arange(0, NEURONS)
        inside = column < width
        place = values + row * row_stride + token.to(tl.int64)[:, None] * token_stride + column[None, :]
        read = tl.load(place, mask=pooled[:, None] & inside[None, :], other=0.0).to(tl.float32)
        along = queries + query[:, None] * width + column[None, :]
        weight = tl.load(along, mask=(query < COUNT)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(read[None, :, :] * weight[:, None, :], 2)
    place = found + (query.to(tl.int64)[:, None] * batch + row) * tokens + token[None, :]
    tl.store(place, total, mask=(query < COUNT)[:, None] & there[None, :])
