"""Products of many features with few vectors, which take as long as it takes to read the features: on a GPU by kernels
that read them at the speed of its memory, as its library of matrix products is made for one column or for many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..token_scores import runs_triton

_FEW = range(2, 9)  # vectors with which both products of a step are quicker by kernels (benchmarks/products.py)
ALIGNED = 16  # features of which the width is a multiple: what begins anywhere in memory is read more slowly


def times(x: Tensor, vectors: Tensor) -> Tensor:
    """``x @ vectors``: features ``(taps, rows, width)`` and vectors ``(taps, width, count)``, float32."""
    if not _by_kernel(x, vectors):
        return torch.bmm(x, vectors)
    from . import triton_products

    return triton_products.times(x, vectors.contiguous())


def transposed_times(x: Tensor, vectors: Tensor) -> Tensor:
    """``x.mT @ vectors``: features ``(taps, rows, width)`` and vectors ``(taps, rows, count)``, float32."""
    if not _by_kernel(x, vectors):
        return torch.bmm(x.mT, vectors)
    from . import triton_products

    return triton_products.transposed_times(x, vectors.contiguous())


def _by_kernel(x: Tensor, vectors: Tensor) -> bool:
    if not runs_triton(x.device):
        return False
    width, plain = x.shape[2], x.dtype == vectors.dtype == torch.float32 and x.is_contiguous()
    return plain and vectors.shape[2] in _FEW and width > 0 and width % ALIGNED == 0
