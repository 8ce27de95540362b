"""Pooled features on disk: one file per tap, filled batch by batch by any number of processes, and resumable."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import torch
from torch import Tensor

from ..taps import Tap
from .blocks import empty
from .errors import NonFiniteFeaturesError, OutputFolderError

FORMAT = 2
ABOUT = "store.json"
_PAGE = 1024  # float32 values in a page of memory: batches share no page, so that processes never write the same one
_MUCH = 2**26  # bytes from which several threads read or write: one takes in 2 GB/s of what is in memory already
_AT_ONCE = 2**23  # bytes that a thread reads and sends in one go: small ones keep threads waiting for each other
# Threads that read or write.
_THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_RECORD = re.compile(r"(\d+)(?:/(\d+))? ([0-9a-f]{8})")  # batch, its parts if several, checksum


class FeatureStore:
    """Features of the texts of a batch plan, float32.

    The file of a tap holds the batches in the plan's order, each ``(poolings, rows, width)`` and filled up to a whole
    page. A batch is recorded with a checksum once it is written, in a file of the process that wrote it, so that
    nothing needs to be flushed: after a crash a batch is either whole or found not to be. Of one that was read in parts
    it is recorded in how many.

    Args:
        folder: made by :meth:`create`.
        widths: neurons of each tap.
        poolings: of each neuron.
        batches: the plan, rows of each batch.
        process: number of this process among those that fill the store together.

    Attributes:
        split: by batch, of those that this process checked or wrote, in how many parts it was read, if not as a whole.
    """

    def __init__(
        self,
        folder: Path,
        *,
        widths: Mapping[Tap, int],
        poolings: Sequence[str],
        batches: Sequence[Sequence[int] | np.ndarray],
        process: int = 0,
    ) -> None:
        self.folder, self.widths, self.poolings = folder, dict(widths), tuple(poolings)
        self.batches = [np.asarray(rows) for rows in batches]
        self.rows = sum(map(len, self.batches))
        self.split: dict[int, int] = {}
        self._starts = {tap: _starts(len(self.poolings) * width, self.batches) for tap, width in self.widths.items()}
        self._journal = folder / f"done.{process}"
        self._record: TextIO | None = None
        self._files: dict[Tap, BinaryIO] = {}
        self._arrays: dict[Tap, np.ndarray] = {}
        self._writing: ThreadPoolExecutor | None = None

    @property
    def bytes(self) -> int:
        """Size of all files of features."""
        return 4 * sum(int(starts[-1]) for starts in self._starts.values())

    def create(self, about: Mapping[str, Any]) -> None:
        """Make folder and files as far as they are not there, and keep what they hold.

        Raises:
            OutputFolderError: without rights or room.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            missing = self.bytes - sum(_allocated(self._path(tap)) for tap in self.widths)
            free = shutil.disk_usage(self.folder).free
            if free < missing:
                raise OSError(
                    f"{self.folder} has {free / 1e9:.1f} GB free, the features need {missing / 1e9:.1f} GB; "
                    "use fewer poolings, kinds or texts, or another disk"
                )
            for tap, starts in self._starts.items():
                with self._path(tap).open("ab") as file:
                    file.truncate(4 * int(starts[-1]))
            write_whole(self.folder / ABOUT, json.dumps({"batches": len(self.batches), **about}))
        except OSError as error:
            raise _cannot_write(error) from error

    def whole(self, numbers: Iterable[int], records: Mapping[int, Mapping[int, int]]) -> list[int]:
        """Those of the recorded batches whose features are on disk as they were written."""
        arrays = {tap: self._open(tap) for tap in self.widths}
        found = []
        for number in numbers:
            sums = [_sum(arrays[tap][starts[number] : starts[number + 1]]) for tap, starts in self._starts.items()]
            if read_in := records[number].get(_checksum(sums)):
                found.append(number)
                self._note(number, read_in)
        return found

    def write(self, number: int, pooled: Mapping[Tap, np.ndarray], *, parts: int = 1) -> None:
        """Store a batch, ``(poolings, rows, width)`` for each tap, and record it, read in so many parts.

        Raises:
            NonFiniteFeaturesError: naming the tap of values that are no numbers.
            OutputFolderError: where the disk is full or fails. What was recorded stays.
        """
        if self._writing is None:
            self._writing = ThreadPoolExecutor(_THREADS)
        # No more at work than it takes: each holds up the thread that tells the device what to compute next.
        taps, threads = list(self.widths), min(_THREADS, 1 + sum(own.nbytes for own in pooled.values()) // _MUCH)
        puts = [self._writing.submit(self._put_all, number, pooled, taps[i::threads]) for i in range(threads)]
        wait(puts)
        try:
            by_tap = {tap: one for put in puts for tap, one in put.result().items()}
            sums = [by_tap[tap] for tap in taps]
            if self._record is None:
                self._record = self._journal.open("a")
                self._record.write("\n")  # ends what a kill left of a line
            self._record.write(f"{number}{f'/{parts}' if parts > 1 else ''} {_checksum(sums):08x}\n")
            self._record.flush()
        except OSError as error:
            raise _cannot_write(error) from error
        self._note(number, parts)

    def _put_all(self, number: int, pooled: Mapping[Tap, np.ndarray], taps: Sequence[Tap]) -> dict[Tap, int]:
        return {tap: self._put(number, tap, pooled[tap]) for tap in taps}

    def _put(self, number: int, tap: Tap, pooled: np.ndarray) -> int:
        """Write a tap's values of a batch; their :func:`_sum`."""
        values = np.ascontiguousarray(pooled, dtype=np.float32).reshape(-1)
        if not np.isfinite(values).all():
            raise NonFiniteFeaturesError.of(tap, f"batch {number}")
        first, end = self._starts[tap][number : number + 2].tolist()
        rest = np.zeros(end - first - len(values), dtype=np.float32)
        if tap not in self._files:
            self._files[tap] = self._path(tap).open("r+b", buffering=0)
        self._files[tap].seek(4 * first)
        if sum(self._files[tap].write(part.data) for part in (values, rest)) != 4 * (end - first):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        return _sum(values)

    def close(self) -> None:
        """End writing; on a network's file system this is what shows it to other machines."""
        if self._writing is not None:
            self._writing.shutdown()
        self._arrays.clear()
        for file in (*self._files.values(), self._record):
            if file is not None:
                file.close()
        self._files.clear()
        self._record = self._writing = None

    def read(
        self, tap: Tap, pooling: str, columns: np.ndarray | None = None, *, device: torch.device | None = None
    ) -> Tensor:
        """A copy of the features ``(n, width)`` of a tap and pooling, or of some columns, on this device or the CPU."""
        width, place = self.widths[tap], self.poolings.index(pooling)
        sizes = np.array([len(rows) for rows in self.batches])
        starts = self._starts[tap][:-1] + place * width * sizes
        found = empty(self.rows, width if columns is None else len(columns), device=_gpu(device))
        groups = _groups(4 * width * sizes)
        most = max((int(sizes[group.start : group.stop].sum()) for group in groups), default=0)
        given = tap, starts, found, columns
        copy = self._to_gpu(*given, most) if found.is_cuda else self._to_host(*given)
        if 4 * self.rows * width < _MUCH:  # whatever the columns, their pages are read
            for group in groups:
                copy(group)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(copy, groups))
        return found if device is None else found.to(device)

    def _to_host(
        self, tap: Tap, starts: np.ndarray, found: Tensor, columns: np.ndarray | None
    ) -> Callable[[range], None]:
        """What copies batches, which begin at these values of a tap's file, to their rows of ``found``; in any thread.

        Those of a group one after another.
        """
        if tap not in self._arrays:
            self._arrays[tap] = self._open(tap)
        values, width = self._arrays[tap], self.widths[tap]

        def copy(group: range) -> None:
            for number in group:
                rows = self.batches[number]
                part = values[starts[number] : starts[number] + len(rows) * width].reshape(len(rows), width)
                found.numpy()[rows] = part if columns is None else part[:, columns]

        return copy

    def _to_gpu(
        self, tap: Tap, starts: np.ndarray, found: Tensor, columns: np.ndarray | None, most: int
    ) -> Callable[[range], None]:
        """:meth:`_to_host` for a GPU, of ``most`` rows in one go, whose columns are taken once they are there. They are
        read from the file itself: to map memory is what takes most of the time otherwise.
        """
        device, stream, width = found.device, torch.cuda.current_stream(found.device), self.widths[tap]
        ends = np.cumsum([0, *map(len, self.batches)]).tolist()
        places = torch.from_numpy(np.concatenate(self.batches)).to(device, torch.int64)
        chosen = None if columns is None else torch.from_numpy(columns).to(device)
        own = threading.local()  # of a thread: where it reads to, and the end of what is sent from there

        def copy(group: range) -> None:
            first, last = ends[group.start], ends[group.stop]
            # A thread begins on the first GPU, and a stream alone would lead it back there.
            with torch.cuda.device(device), torch.cuda.stream(stream), self._path(tap).open("rb") as file:
                if not hasattr(own, "values"):
                    own.values, own.sent = _pinned(most, width), torch.cuda.Event()
                own.sent.synchronize()
                for number in group:
                    part = own.values[ends[number] - first : ends[number + 1] - first].numpy()
                    file.seek(4 * int(starts[number]))
                    if file.readinto(part.data) != part.nbytes:
                        raise OSError(
                            f"{self._path(tap)} is shorter than when it was opened. The same call with another "
                            "cache_dir reads the texts anew."
                        )
                sent = own.values[: last - first].to(device, non_blocking=True)
                own.sent.record()
                found.index_copy_(0, places[first:last], sent if chosen is None else sent.index_select(1, chosen))

        return copy

    def _note(self, number: int, parts: int) -> None:
        if parts > 1:
            self.split[number] = parts

    def _path(self, tap: Tap) -> Path:
        return self.folder / f"{tap}.f32"

    def _open(self, tap: Tap) -> np.ndarray:
        return np.memmap(self._path(tap), dtype=np.float32, mode="r")


def recorded(folder: Path, batches: int) -> dict[int, dict[int, int]]:
    """By batch of a plan of so many, each checksum that a process recorded in a store's folder, and the parts of that
    reading.
    """
    found: dict[int, dict[int, int]] = {}
    for path in folder.glob("done.*"):
        for line in path.read_text(errors="replace").splitlines():
            record = _RECORD.fullmatch(line)  # the last line of a killed process may be torn
            if record and int(record[1]) < batches:
                found.setdefault(int(record[1]), {})[int(record[3], 16)] = int(record[2] or 1)
    return found


def required_bytes(widths: Mapping[Tap, int], poolings: Sequence[str], rows: int) -> int:
    """Disk needed for the features of ``rows`` texts, but for what fills up the pages."""
    return 4 * rows * len(poolings) * sum(widths.values())


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that nobody ever reads half of it."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def demand_writable(folder: str | Path) -> Path:
    """Make a folder and prove that it can be written to, before long work that ends there.

    Raises:
        OutputFolderError: if not.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputFolderError(f"{folder} can't be written to: {error}. Choose another output folder.") from error
    return folder


def _groups(sizes: np.ndarray) -> list[range]:
    """Batches of these bytes in a row, as many as are read in one go."""
    which = ((np.cumsum(sizes) - sizes) // _AT_ONCE).astype(np.int64)
    bounds = [*np.flatnonzero(np.diff(which, prepend=-1)).tolist(), len(sizes)]
    return [range(*bounds[i : i + 2]) for i in range(len(bounds) - 1)]


def _pinned(*shape: int) -> Tensor:
    """Memory that a GPU copies from by itself, or other memory where no more of it is to be had."""
    try:
        return torch.empty(*shape, dtype=torch.float32, pin_memory=True)
    except RuntimeError:
        return torch.empty(*shape, dtype=torch.float32)


def _gpu(device: torch.device | None) -> torch.device | None:
    return device if device is not None and device.type == "cuda" else None


def _starts(values: int, batches: Sequence[np.ndarray]) -> np.ndarray:
    """Where each batch begins, and the end, for so many values per row."""
    sizes = [-(-values * len(rows) // _PAGE) * _PAGE for rows in batches]
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _sum(values: np.ndarray) -> int:
    """Of float32 by pairs, as whole numbers; zeros behind them change nothing. It sees any lost page or changed bit,
    and is ten times faster than a CRC.
    """
    pairs = values[: len(values) // 2 * 2].view("<u8").sum()
    odd = values[len(values) // 2 * 2 :].view("<u4").sum(dtype=np.uint64)
    return int(np.add(pairs, odd, dtype=np.uint64))


def _checksum(sums: Sequence[int]) -> int:
    return zlib.crc32(np.array(sums, dtype=np.uint64).tobytes())


def _allocated(path: Path) -> int:
    """Bytes that the file takes of the disk, which for a file with holes are fewer than its size."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    return min(512 * getattr(status, "st_blocks", 0), status.st_size)


def _cannot_write(error: OSError) -> OutputFolderError:
    return OutputFolderError(
        f'The feature store can\'t be written: {error}. Name a folder with room as cache_dir="..."; where one was '
        "named, the same call goes on from what is there."
    )
