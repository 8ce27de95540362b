"""Token ids of any number of texts, kept in a file."""

from __future__ import annotations

import tempfile
import weakref
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class Tokens(Sequence[list[int]]):
    """Rows of token ids. They lie in a temporary file that is mapped into memory, which the system takes back where it
    is short of it: as lists of Python's they would take ten times as much, and a million texts several gigabytes.
    """

    def __init__(self, rows: Iterable[Sequence[int]] = ()) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])
        self._flat: np.ndarray | None = None
        self.extend(rows)

    def extend(self, rows: Iterable[Sequence[int]]) -> None:
        """Add rows, none of them empty."""
        for row in rows:
            self._file.write(np.asarray(row, dtype=np.int32).tobytes())
            self._ends.append(self._ends[-1] + len(row))
        self._file.flush()
        self._flat = None

    @property
    def lengths(self) -> list[int]:
        return np.diff(self._ends).tolist()

    @property
    def flat(self) -> np.ndarray:
        """All ids one after another, int32."""
        if self._flat is None:
            self._flat = np.memmap(self._file, dtype=np.int32, mode="r").view(np.ndarray)  # whose slices are quicker
        return self._flat

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(len(self))[row]]
        row = range(len(self))[row]
        return self.flat[self._ends[row] : self._ends[row + 1]].tolist()
