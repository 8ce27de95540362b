"""Work behind the device's back: what it has found is copied and written while it goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_WAITING = 1  # results at work or waiting for it while the next is computed: they take memory


class Arriving(Generic[K]):
    """Tensors on their way to the host's memory, which the device goes on without waiting for."""

    def __init__(self, tensors: Mapping[K, Tensor]) -> None:
        # Only CUDA's copies are known to end: elsewhere one that does not block could be read too early.
        self._host = {key: tensor.to("cpu", non_blocking=tensor.is_cuda) for key, tensor in tensors.items()}
        self._ends: list[tuple[torch.device, torch.cuda.Event]] = []
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            end = torch.cuda.Event(blocking=True)  # who waits leaves the core to others
            end.record(torch.cuda.current_stream(device))
            self._ends.append((device, end))

    def arrays(self) -> dict[K, np.ndarray]:
        """The values, once they are there."""
        for device, end in self._ends:
            with torch.cuda.device(device):  # a thread's own is the first, whatever the process works on
                end.synchronize()
        return {key: tensor.numpy() for key, tensor in self._host.items()}


class Behind(Generic[T]):
    """Runs a function in a thread of its own, one call after another, while the caller goes on.

    Leaving waits until all that was asked for is done, also after an error, so that nothing that was computed is lost.
    What the function raises is raised here, by one of the next calls or on leaving, unless the caller's own error is
    what leaves; calls that were asked for meanwhile are still run.

    Args:
        run: the function.
        done: called in the caller's thread with what each call gave, in their order.
    """

    def __init__(self, run: Callable[..., T], done: Callable[[T], Any]) -> None:
        self._run, self._done = run, done
        self._calls: deque[Future[T]] = deque()
        self._thread = ThreadPoolExecutor(1)

    def __call__(self, *arguments: Any) -> None:
        self._calls.append(self._thread.submit(self._run, *arguments))
        while len(self._calls) > _WAITING:
            self._done(self._calls.popleft().result())

    def __enter__(self) -> Behind[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._calls:
                self._done(self._calls.popleft().result())
        finally:
            self._thread.shutdown()
