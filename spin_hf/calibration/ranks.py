"""The processes of an ``accelerate launch`` that share one calibration. With one process nothing of this is felt.

What keeps the result equal to one process's, to the bit: a piece of work (a batch, a probe, a set of heads) is never
split, and what the pieces gave is put together in the order of the pieces, whoever made them.
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .errors import CalibrationError, RankError

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

_LOOK_SECONDS = 5.0
_PATIENCE = timedelta(days=7)  # to wait for another's long piece of work; one that died is noticed by the launcher


class Ranks:
    """This process among those that work on the same calibration, each of which makes the same calls.

    Attributes:
        index: number of this process; 0 is the main one, which alone shows, chooses and saves.
        count: number of processes.
        device: the one that the launcher gives to this process; ``None`` where there is but one.
    """

    def __init__(self, index: int = 0, count: int = 1, device: torch.device | None = None, group: Any = None) -> None:
        self.index, self.count, self.device, self._group = index, count, device, group
        self._flag: Path | None = None
        self._looked = 0.0

    @classmethod
    def here(cls) -> Ranks:
        """The processes of this launch, or this one alone where nothing was launched."""
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not joined and int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # accelerate joins processes on CPUs only if told to: without the flag each would think that it is alone
        without = not torch.accelerator.is_available() or torch.backends.mps.is_available()
        options = {} if joined else {"timeout": _PATIENCE}
        state = PartialState(cpu=without or parse_flag_from_env("ACCELERATE_USE_CPU"), **options)
        distributed = torch.distributed
        if not joined and distributed.is_initialized() and distributed.get_backend() == "gloo":
            atexit.register(_leave, distributed.group.WORLD)
        group = None if state.num_processes == 1 else _patient_group(waits=not joined)
        return cls(state.process_index, state.num_processes, state.device, group)

    @property
    def main(self) -> bool:
        return self.index == 0

    # -- failing together ---------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work at whose end all wait for each other.

        Raises:
            RankError: if another process failed; in that one its own error is raised. May be nested.
        """
        try:
            yield
        except Exception as error:
            self._tell(error)
            raise
        self._tell(None)

    @contextmanager
    def watching(self, flag: Path) -> Iterator[None]:
        """Meanwhile an error is also told by this file, to be seen by those who are still at work."""
        self._flag = flag if self.count > 1 else None
        try:
            yield
        finally:
            self._flag = None
            if self.main:
                flag.unlink(missing_ok=True)

    def counted(self, advance: Callable[[int], Any]) -> Callable[[int], None]:
        """``advance`` for the work of all, taking the others to be as far as this process is; ends when one failed."""
        if self.count == 1:
            return advance

        def counted(amount: int) -> None:
            advance(amount * self.count)
            if self._flag is not None and time.monotonic() - self._looked > _LOOK_SECONDS:
                self._looked = time.monotonic()
                if self._flag.exists():
                    raise RankError("Another process failed.")

        return counted

    def check_place(self, devices: set[torch.device]) -> None:
        """Raise :class:`CalibrationError` where several processes don't use the devices that they are given.

        Args:
            devices: those that this process's backbone lies on. Of one that is spread over several nothing is asked.
        """
        if self.count == 1:
            return
        own = next(iter(devices)) if len(devices) == 1 else None
        idle = own is not None and own.type == "cpu" and self._place.type != "cpu"
        gpu = (socket.gethostname(), _hardware(own)) if own is not None and own.type == "cuda" else None
        every = self.gather((idle, gpu))  # all must come to the same error
        advice = "Put it on the process's own device before: model.to(accelerate.PartialState().device)."
        if wrong := [i for i, (idle, _) in enumerate(every) if idle]:
            raise CalibrationError(
                f"Processes {wrong} of {self.count} have the backbone on the CPU, and their GPUs are idle. {advice} To "
                "work on CPUs set ACCELERATE_USE_CPU=true."
            )
        for gpu in dict.fromkeys(gpu for _, gpu in every if gpu is not None):
            sharing = [i for i, (_, other) in enumerate(every) if other == gpu]
            if len(sharing) > 1:
                raise CalibrationError(f"Processes {sharing} have their backbones on one GPU of {gpu[0]}. {advice}")

    def agree(self, value: Any, message: str) -> None:
        """Raise :class:`CalibrationError` with this message unless all hold an equal value."""
        if any(other != value for other in self.gather(value)):
            raise CalibrationError(message)

    def _tell(self, error: Exception | None) -> None:
        if self.count == 1 or getattr(error, "_all_ranks_know", False):
            return
        first_hand = error is not None and not isinstance(error, RankError)
        if first_hand and self._flag is not None:
            with suppress(OSError):
                self._flag.touch()
        status = None if error is None else (not first_hand, self.index, f"{type(error).__name__}: {error}")
        found = self._exchange(_Message(status))
        if error is not None:
            error._all_ranks_know = True  # type: ignore[attr-defined]
        if not first_hand:
            self._end_with(found)

    def _end_with(self, found: Sequence[_Message]) -> None:
        """Raise :class:`RankError` if one of these tells of a failure; all have them, and so all know."""
        failures = sorted(message.failure for message in found if message.failure is not None)
        if failures:
            _, index, text = failures[0]
            told = RankError(f"Process {index} of {self.count} failed with {text}")
            told._all_ranks_know = True  # type: ignore[attr-defined]
            raise told from None

    # -- sharing work -------------------------------------------------------------------------------------------------

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of pieces of about equal cost."""
        return items[self.index :: self.count]

    def gather(self, value: T) -> list[T]:
        """The value of each process, in their order, on all.

        Raises:
            RankError: if another process failed meanwhile.
        """
        if self.count == 1:
            return [value]
        found = self._exchange(_Message(None, _packed(value)))
        self._end_with(found)
        return [_unpacked(message.value, self._place) for message in found]

    def map(
        self,
        items: Sequence[T],
        work: Callable[[T], R],
        *,
        cost: Callable[[T], float],
        advance: Callable[[int], Any] = lambda amount: None,
    ) -> list[R]:
        """``work(item)`` for all items, spread over the processes; all get all results, in the order of the items.

        Args:
            cost: by which the items are spread evenly.
            advance: called with 1 after each item.
        """
        counted, found = self.counted(advance), {}
        with self.together():
            for i in _balanced([cost(item) for item in items], self.count)[self.index]:
                found[i] = work(items[i])
                counted(1)
        merged = {i: result for part in self.gather(found) for i, result in part.items()}
        return [merged[i] for i in range(len(items))]

    def on_main(self, work: Callable[[], R]) -> R:
        """What ``work`` returns on the main process, which alone does it; all get it."""
        if self.count == 1:
            return work()
        made: Any = None
        with self.together():
            if self.main:
                made = work()
        received = self._broadcast(_packed(made))
        found: R = made if self.main else _unpacked(received, self._place)
        return found

    @property
    def _place(self) -> torch.device:
        return self.device or torch.device("cpu")

    def _exchange(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def _broadcast(self, value: T) -> T:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def ending_together(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function fail in all processes of the launch where it fails in one; see :meth:`Ranks.together`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with Ranks.here().together():
            return function(*args, **kwargs)

    return wrapped


_patient: tuple[Any, Any] = (None, None)


def _patient_group(*, waits: bool) -> Any:
    """A group of all processes that may wait for each other as long as work takes; ``None`` is the one they joined.

    Args:
        waits: whether that one, just joined, may; one that was joined before may for minutes only.
    """
    global _patient
    world = torch.distributed.group.WORLD
    if _patient[0] is not world:
        _patient = world, None if waits else torch.distributed.new_group(timeout=_PATIENCE)
    return _patient[1]


def _hardware(device: torch.device) -> str:
    """What tells this GPU from others of the host, whatever its number among those that a process sees."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _leave(group: Any) -> None:
    """End what this process has joined itself: left to the end of the interpreter, gloo's threads at times abort it.

    NCCL's groups end by themselves; ending one here waits for others, which may be stuck.
    """
    global _patient
    if torch.distributed.is_initialized() and torch.distributed.group.WORLD is group:
        torch.distributed.destroy_process_group()
        _patient = None, None  # which would keep it to the end


def _balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices for each part: the dearest first, each to the part that has least; in ascending order within a part."""
    chosen: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        part = min(range(parts), key=lambda part: (loads[part], part))
        chosen[part].append(i)
        loads[part] += costs[i]
    return [sorted(part) for part in chosen]


class _Message(NamedTuple):
    """What a process tells all: that it failed (at second hand, its number, the error), or a value, or that it is done.

    One that failed may meet others that hand on a value.
    """

    failure: tuple[bool, int, str] | None
    value: Any = None


class _Away(NamedTuple):
    """A tensor of a device that another process may not have, on its way through the CPU."""

    tensor: Tensor


def _packed(value: Any) -> Any:
    return _mapped(value, lambda leaf: _Away(leaf.cpu()) if isinstance(leaf, Tensor) and not leaf.is_cpu else leaf)


def _unpacked(value: Any, device: torch.device) -> Any:
    return _mapped(value, lambda leaf: leaf.tensor.to(device) if isinstance(leaf, _Away) else leaf)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy with all leaves of lists, tuples, dicts and dataclasses changed."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = {f.name: _mapped(getattr(value, f.name), change) for f in fields(value) if f.init}
        return replace(value, **inner)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, _Away):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return change(value)
