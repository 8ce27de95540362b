"""A batch that does not fit the device's memory is read in halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .errors import DeviceMemoryError

T = TypeVar("T")

# What torch's allocators say where they have no error type of their own, and what CUDA's libraries say.
_WORDS = ("out of memory", "DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device, or of the host, did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def no_room(tokens: int, device: torch.device, error: BaseException) -> DeviceMemoryError:
    """The error to raise where a text of so many tokens ran out of memory alone."""
    return DeviceMemoryError(
        f"A text of {tokens:,} tokens does not fit the memory of {device}, not even alone ({str(error).strip()}). Load "
        "the backbone in a smaller type, from_backbone(..., dtype=torch.bfloat16), or read less of each text at a "
        "time, spin_calibrate(..., max_length=256), with windows=True to lose nothing of it. If something else holds "
        "that memory, free it first. With cache_dir the same call goes on from what is done."
    )


def in_halves(rows: Sequence[int], run: Callable[[Sequence[int]], T]) -> list[T]:
    """What ``run`` gives for these rows, or for each part of them where it runs out of memory on all.

    A function of the rows and the room there is alone: no batch is read otherwise for what happened to one before it.

    Raises:
        RuntimeError, MemoryError: that of ``run`` on a single row.
    """
    try:
        return [run(rows)]
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    # Only here, where the error and with it the failed forward's activations are gone.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(rows) // 2
    return [*in_halves(rows[:middle], run), *in_halves(rows[middle:], run)]
