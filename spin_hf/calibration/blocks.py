"""Matrices over all texts, which may be larger than memory: where they lie, and how they are worked through.

A large one lies in a temporary file that is mapped into memory, so that the system can take its pages back; nothing
else of its size is made beside it, as what is made of a matrix is made of some of its rows at a time.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .errors import OutputFolderError

ROWS = 2**16  # texts at a time: enough for a matrix product to be as fast as in one piece
_BLOCK = 256  # rows of a Gram matrix: of as many, half is not made
_LARGE = 2**26  # bytes; several matrices are needed at once


def empty(*shape: int, device: torch.device | None = None) -> Tensor:
    """An uninitialised float32 tensor, on a CPU in a file of the folder for temporary ones (``TMPDIR``) if it is large.

    Raises:
        OutputFolderError: where the disk has no room for it.
    """
    size = 4 * math.prod(shape)
    if size < _LARGE or (device is not None and device.type != "cpu"):
        return torch.empty(shape, dtype=torch.float32, device=device)
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full later would kill the process
            file.truncate(size)
            return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=shape))
    except OSError as error:
        raise OutputFolderError(
            f"There is no room for {size / 1e9:.1f} GB of features in {tempfile.gettempdir()}: {error}. Set TMPDIR to "
            "a folder on a larger disk."
        ) from error


def slices(count: int, width: int = 1) -> Iterator[slice]:
    """All rows in order, some at a time: of matrices of this width at most what would lie in memory, or 1024 rows."""
    rows = min(ROWS, max(1024, _LARGE // (4 * max(1, width))))
    return (slice(first, min(first + rows, count)) for first in range(0, count, rows))


def take_rows(x: Tensor, rows: np.ndarray) -> Tensor:
    """A copy of some rows of ``(n, d)``."""
    return torch.index_select(x, 0, _index(rows, x), out=empty(len(rows), x.shape[1], device=x.device))


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Some columns, ascending, of ``(n, d)``: itself where they are all there are, else a copy."""
    if len(columns) == x.shape[1]:
        return x
    return torch.index_select(x, 1, columns, out=empty(len(x), len(columns), device=x.device))


def summed(count: int, part: Callable[[slice], Tensor], *, width: int = 1) -> Tensor:
    """The sum of what ``part`` makes of the rows, some at a time. With few rows it is ``part`` of them all.

    Args:
        width: of what ``part`` makes a copy of.
    """
    total: Tensor | None = None
    for rows in slices(count, width):
        made = part(rows)
        total = made if total is None else total.add_(made)
    assert total is not None
    return total


def lower_gram(features: Tensor, weights: Tensor) -> Tensor:
    """``features diag(weights) features'``, ``(p, p)``, of ``(p, n)``; zeros right of blocks on the diagonal."""
    found = features.new_zeros(len(features), len(features))
    for first in range(0, len(features), _BLOCK):
        end = first + _BLOCK
        found[first:end, :end] = (features[first:end] * weights) @ features[:end].T
    return found


def both_halves(lower: Tensor) -> Tensor:
    """The symmetric matrix that has this lower triangle, whatever stands above it, in its place."""
    lower.tril_()
    return lower.add_(lower.tril(-1).T)


def _index(rows: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).to(x.device)
