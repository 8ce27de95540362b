"""Work of many small kernels that is done over and over: on a GPU it is recorded once and replayed as a whole, since to
launch each of them takes longer than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor


class Replay:
    """The same step of some tensors, as often as it is called.

    Args:
        step: the next values of such tensors, by kernels alone: nothing of it may wait for the device. It has run once
            before, so that what its kernels need is loaded.
        values: tensors on one GPU to begin with.
    """

    def __init__(self, step: Callable[[Sequence[Tensor]], Sequence[Tensor]], values: Sequence[Tensor]) -> None:
        self.values = [part.clone() for part in values]  # some may have been one
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.values[0].device):
            aside, now = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                self._graph.capture_begin(capture_error_mode="thread_local")  # others may write what was found
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
        """What so many steps make of these values; they are this object's own, and change with the next call."""
        for part, given in zip(self.values, values, strict=True):
            if part is not given:
                part.copy_(given)
        for _ in range(count):
            self._graph.replay()
        return self.values
