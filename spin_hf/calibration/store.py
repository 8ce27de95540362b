"""Pooled features on disk: one memory-mapped array per tap, filled batch by batch, resumable."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.lib.format import open_memmap

from ..taps import Tap
from .errors import OutputFolderError

_PROGRESS = "progress.json"


class FeatureStore:
    """Features of ``n`` texts: for each tap a float32 array ``(poolings, n, width)``.

    A store in a folder of the caller's stays there and is taken up again under the same fingerprint; one without a
    folder lives in a temporary place and is removed on leaving the context.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        fingerprint: str,
        widths: Mapping[Tap, int],
        poolings: Sequence[str],
        rows: int,
    ) -> None:
        self.widths, self.poolings, self.rows = dict(widths), tuple(poolings), rows
        self._temporary, made = folder is None, None
        try:
            if folder is None:
                self.folder = made = Path(tempfile.mkdtemp(prefix="spin_hf_"))
            else:
                self.folder = Path(folder) / fingerprint[:32]
                self.folder.mkdir(parents=True, exist_ok=True)
            self.batches_done = self._progress()
            fresh = self.batches_done == 0
            if fresh:
                self._demand_room()
            self._arrays = {tap: self._open(tap, fresh=fresh) for tap in self.widths}
        except OSError as error:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            raise OutputFolderError(
                f'The feature store can\'t be written: {error}. Name a folder with room as cache_dir="...".'
            ) from error

    @property
    def bytes(self) -> int:
        return required_bytes(self.widths, self.poolings, self.rows)

    def write(self, tap: Tap, rows: Sequence[int], pooled: np.ndarray) -> None:
        """Store ``(batch, poolings, width)`` at these rows."""
        self._arrays[tap][:, rows] = pooled.swapaxes(0, 1)

    def commit(self, batches_done: int) -> None:
        """Flush, then record that the first batches of the plan are safe."""
        for array in self._arrays.values():
            array.flush()
        self.batches_done = batches_done
        partial = self.folder / f"{_PROGRESS}.tmp"
        partial.write_text(json.dumps({"batches_done": batches_done}))
        os.replace(partial, self.folder / _PROGRESS)

    def read(self, tap: Tap, pooling: str, columns: np.ndarray | None = None) -> np.ndarray:
        """A copy of the features ``(n, width)`` of a tap and pooling, or of some of its columns."""
        array = self._arrays[tap][self.poolings.index(pooling)]
        return np.array(array if columns is None else array[:, columns])

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arrays.clear()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, tap: Tap, *, fresh: bool) -> np.memmap:
        path = self.folder / f"{tap}.npy"
        shape = (len(self.poolings), self.rows, self.widths[tap])
        if fresh:
            return open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        array = open_memmap(path, mode="r+")
        if array.shape != shape:
            raise OSError(f"{path} has shape {array.shape}, not {shape}; remove the folder")
        return array

    def _progress(self) -> int:
        path = self.folder / _PROGRESS
        return int(json.loads(path.read_text())["batches_done"]) if path.exists() else 0

    def _demand_room(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < self.bytes:
            raise OSError(
                f"{self.folder} has {free / 1e9:.1f} GB free, the features need {self.bytes / 1e9:.1f} GB; "
                "use fewer poolings, kinds or texts, or another disk"
            )


def required_bytes(widths: Mapping[Tap, int], poolings: Sequence[str], rows: int) -> int:
    """Disk needed for the features of ``rows`` texts."""
    return 4 * rows * len(poolings) * sum(widths.values())


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
