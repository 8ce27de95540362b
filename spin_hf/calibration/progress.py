"""What a person sees while a calibration runs, and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class Show:
    """Bars with estimates and a line of text, or silence."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars

    def say(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, highlight=False)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        if self._bars is None:
            yield lambda amount: None
            return
        bars, task, done = self._bars, self._bars.add_task(title, total=total), 0

        def advance(amount: int) -> None:
            nonlocal done
            done = min(total, done + amount)  # of several processes the others' share is an estimate
            bars.update(task, completed=done)

        yield advance
        bars.update(task, completed=total)


@contextmanager
def shown(wanted: bool) -> Iterator[Show]:
    """Bars on standard error while the block runs, if wanted."""
    if not wanted:
        yield Show(None)
        return
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield Show(bars)
