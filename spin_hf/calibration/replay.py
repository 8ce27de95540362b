"""Work of many small kernels that is done over and over: on a GPU it is recorded once and replayed as a whole, since to
launch each of them takes longer than they do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


def can_replay(values: Tensor) -> bool:
    """Whether work on these values can be recorded."""
    return values.is_cuda


class Recording:
    """Work on one GPU, as often as it is called.

    Args:
        work: what to record, which that does not do: kernels that write to tensors which others made. Nothing of it may
            wait for the device. It has run once before, so that what its kernels need is loaded.
        device: that GPU.
        pool: memory that it may share with other recordings, none of which runs at the same time as it, nor leaves
            anything there; see ``torch.cuda.graph_pool_handle``.

    Raises:
        RuntimeError: also where memory that torch keeps would suffice, which a recording can't use.
    """

    def __init__(self, work: Callable[[], object], device: torch.device, pool: Any = None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            aside, now = _aside(device), torch.cuda.current_stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                self._graph.capture_begin(pool, capture_error_mode="thread_local")  # a thread may be writing to disk
                try:
                    work()
                except BaseException:  # such as no memory
                    with suppress(RuntimeError):
                        self._graph.capture_end()
                    raise
                self._graph.capture_end()
            now.wait_stream(aside)

    def __call__(self) -> None:
        self._graph.replay()


class Replay:
    """The same step of some tensors, as often as it is called.

    Args:
        step: the next values of such tensors, new ones, as a :class:`Recording` demands it of work.
        values: tensors on one GPU to begin with; several of them may be the same.

    Raises:
        RuntimeError: as there.
    """

    def __init__(self, step: Callable[[Sequence[Tensor]], Sequence[Tensor]], values: Sequence[Tensor]) -> None:
        self.values = [part.clone() for part in values]

        def work() -> None:
            for part, found in zip(self.values, step(self.values), strict=True):
                part.copy_(found)

        self._step = Recording(work, self.values[0].device)

    def __call__(self, values: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """What so many steps make of these values: :attr:`values`, which the next call overwrites."""
        for part, given in zip(self.values, values, strict=True):
            if part is not given:
                part.copy_(given)
        for _ in range(count):
            self._step()
        return self.values


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """Where steps are recorded: one for all, as libraries keep memory for each that they are used on."""
    return torch.cuda.Stream(device)
