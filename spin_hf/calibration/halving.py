"""What does not fit the device's memory at once, texts to read or models to solve, is done in halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .errors import DeviceMemoryError

S = TypeVar("S")
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


def no_room_to_solve(what: str, rows: int, device: torch.device, error: BaseException) -> DeviceMemoryError:
    """The error to raise where one model alone ran out of memory while it was fitted to so many texts."""
    elsewhere = "" if device.type == "cpu" else "solve on the CPU, model.to('cpu'), where large matrices lie in files; "
    return DeviceMemoryError(
        f"{what} on {rows:,} texts does not fit the memory of {device}, not even alone ({str(error).strip()}). Free "
        f"what else holds that memory; {elsewhere}or use fewer texts. With cache_dir the same call goes on from what "
        "is done."
    )


def in_halves(items: Sequence[S], run: Callable[[Sequence[S]], T]) -> list[T]:
    """What ``run`` gives for these items, or for each part of them where it runs out of memory on all.

    A function of the items and the room there is alone: nothing is done otherwise for what happened to one before it.

    Raises:
        RuntimeError, MemoryError: that of ``run`` on a single item.
    """
    try:
        return [run(items)]
    except (RuntimeError, MemoryError) as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
    # Only here, where the error and with it the failed forward's activations are gone.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(items) // 2
    return [*in_halves(items[:middle], run), *in_halves(items[middle:], run)]
