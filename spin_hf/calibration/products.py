"""Products of many features with few vectors, which take as long as it takes to read the features: on a GPU by kernels
that read them at the speed of its memory, as its library of matrix products is made for more than a few columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .one_pass import has_triton

_FEW = 8  # vectors up to which the kernels are quicker
ALIGNED = 16  # features of which the width is a multiple: what begins anywhere in memory is read more slowly


def times(x: Tensor, vectors: Tensor) -> Tensor:
    """``x @ vectors``: features ``(taps, rows, width)`` and vectors ``(taps, width, count)``, float32."""
    if not _by_kernel(x, vectors):
        return torch.bmm(x, vectors)
    from .triton_products import times

    return times(x, vectors.contiguous())


def transposed_times(x: Tensor, vectors: Tensor) -> Tensor:
    """``x.mT @ vectors``: features ``(taps, rows, width)`` and vectors ``(taps, rows, count)``, float32."""
    if not _by_kernel(x, vectors):
        return torch.bmm(x.mT, vectors)
    from .triton_products import transposed_times

    return transposed_times(x, vectors.contiguous())


def _by_kernel(x: Tensor, vectors: Tensor) -> bool:
    few, aligned = vectors.shape[2] <= _FEW, x.shape[2] % ALIGNED == 0 and x.is_contiguous()
    return x.is_cuda and few and aligned and has_triton()
