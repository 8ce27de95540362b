"""Work of many small kernels that is done over and over: on a GPU it is recorded once and replayed as a whole, since to
launch each of them takes longer than they do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor


def can_replay(values: Tensor) -> bool:
    """Whether work on these values can be recorded."""
    return values.is_cuda


class Replay:
    """The same step of some tensors, as often as it is called.

    Args:
        step: the next values of such tensors, new ones, by kernels alone: nothing of it may wait for the device. It has
            run once before, so that what its kernels need is loaded.
        values: tensors on one GPU to begin with; several of them may be the same.

    Raises:
        RuntimeError: also where memory that torch keeps would suffice, which a recording can't use.
    """

    def __init__(self, step: Callable[[Sequence[Tensor]], Sequence[Tensor]], values: Sequence[Tensor]) -> None:
        self.values = [part.clone() for part in values]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.values[0].device):
            aside, now = _aside(self.values[0].device), torch.cuda.current_stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                self._graph.capture_begin(capture_error_mode="thread_local")  # a thread may be writing to disk
                try:
                    for part, found in zip(self.values, step(self.values), strict=True):
                        part.copy_(found)
                except BaseException:  # such as no memory
                    with suppress(RuntimeError):
                        self._graph.capture_end()
                    raise
                self._graph.capture_end()
            now.wait_stream(aside)

    def __call__(self, values: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """What so many steps make of these values: :attr:`values`, which the next call overwrites."""
        for part, given in zip(self.values, values, strict=True):
            if part is not given:
                part.copy_(given)
        for _ in range(count):
            self._graph.replay()
        return self.values


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """Where steps are recorded: one for all, as libraries keep memory for each that they are used on."""
    return torch.cuda.Stream(device)
