"""Work behind the device's back: what it has found is copied and written while it goes on."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_WAITING = 1  # results at work or waiting for it while the next is computed: they take memory


class Arriving(Generic[K]):
    """Values on their way to the host's memory, which the device goes on without waiting for.

    Args:
        parts: ``(rows, width)`` of each of a key's parts, float32.
    """

    def __init__(self, parts: Mapping[K, Sequence[Tensor]]) -> None:
        self._host: dict[K, Tensor] = {}
        self._ends: list[tuple[torch.device, torch.cuda.Event]] = []
        by_device: dict[torch.device, list[K]] = {}
        for key, own in parts.items():
            by_device.setdefault(own[0].device, []).append(key)
        for device, keys in by_device.items():
            if device.type == "cuda":
                self._send(device, {key: parts[key] for key in keys})
            else:  # only CUDA's copies are known to end: elsewhere one that does not block could be read too early
                self._host |= {key: torch.stack(list(parts[key])).cpu() for key in keys}

    def _send(self, device: torch.device, parts: Mapping[K, Sequence[Tensor]]) -> None:
        """All values of a device in one copy, beside its next work."""
        with torch.cuda.device(device):
            joined = torch.cat([part.flatten() for own in parts.values() for part in own])
            aside, end = _aside(device), torch.cuda.Event(blocking=True)  # who waits leaves the core to others
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                host = joined.to("cpu", non_blocking=True)
                end.record(aside)
            joined.record_stream(aside)
        self._ends.append((device, end))
        sizes = [len(own) * own[0].numel() for own in parts.values()]
        for (key, own), values in zip(parts.items(), host.split(sizes), strict=True):
            self._host[key] = values.view(len(own), *own[0].shape)

    def arrays(self) -> dict[K, np.ndarray]:
        """``(parts, rows, width)`` of each key, once they are there."""
        for device, end in self._ends:
            with torch.cuda.device(device):  # a thread's own is the first, whatever the process works on
                end.synchronize()
        return {key: values.numpy() for key, values in self._host.items()}


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
