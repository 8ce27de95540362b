"""The features that heads are fitted on, read from the store once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..features import FeatureGroup
from ..taps import Tap
from .blocks import empty, slices, take_rows
from .store import FeatureStore

_MOST_BYTES = 2**31  # of a matrix on a device, which also holds parts of it for each fold


class Readable(Protocol):
    """A :class:`~spin_hf.calibration.store.FeatureStore`, or a part of one at hand."""

    def read(self, tap: Tap, pooling: str, columns: np.ndarray) -> Tensor:
        """Some features of a tap and pooling, of all texts ``(n, columns)``."""
        ...


class SharedColumns:
    """All features that some heads draw on, in one matrix, filled tap by tap as they are asked for.

    The store holds batches of whole taps, so that reading some neurons costs as much as reading all of them; heads by
    the dozen ask for much the same neurons. Here a neuron's values lie side by side, and only those asked for are read.

    Args:
        store: what to read from, also what is not among the wanted.
        wanted: neurons of each tap and pooling, ascending.
        device: where the heads are fitted, and the matrix lies if it is no larger than 2 GB; else it lies in memory.

    Attributes:
        bytes: of the matrix, if it is meant for a device other than the CPU.
    """

    def __init__(self, store: FeatureStore, wanted: Mapping[tuple[Tap, str], np.ndarray], device: torch.device) -> None:
        self._store, self._wanted = store, dict(wanted)
        stops = np.cumsum([0, *(len(neurons) for neurons in wanted.values())]).tolist()
        self._places = {place: slice(*stops[i : i + 2]) for i, place in enumerate(wanted)}
        self._shape = stops[-1], store.rows
        there = device.type != "cpu" and 4 * stops[-1] * store.rows <= _MOST_BYTES
        self.bytes = 4 * stops[-1] * store.rows if there else 0
        self._device = device if there else None
        self._matrix: Tensor | None = None  # (columns, n)
        self._filled: set[tuple[Tap, str]] = set()

    @classmethod
    def of(cls, store: FeatureStore, groups: Iterable[FeatureGroup], device: torch.device) -> SharedColumns:
        """Of all neurons that are in any of these groups."""
        masks: dict[tuple[Tap, str], np.ndarray] = {}
        for group in groups:
            place = group.tap, group.pooling
            masks.setdefault(place, np.zeros(store.widths[group.tap], dtype=bool))[group.neurons.numpy()] = True
        return cls(store, {place: np.flatnonzero(mask) for place, mask in masks.items()}, device)

    def leave_device(self) -> bool:
        """From now on lie in memory; whether that was not so."""
        moved = self._device is not None
        self._device = None
        if moved:
            self._matrix = None
            self._filled.clear()
        return moved

    def read(self, tap: Tap, pooling: str, columns: np.ndarray) -> Tensor:
        """Features of all texts ``(n, columns)``, on the device or the CPU; a copy, a column side by side."""
        place = tap, pooling
        known = self._wanted.get(place, columns[:0])
        found = np.searchsorted(known, columns)
        if not len(known) or not np.array_equal(known.take(found, mode="clip"), columns):
            return self._store.read(tap, pooling, columns)
        if self._matrix is None:
            self._matrix = empty(*self._shape, device=self._device)
        own = self._matrix[self._places[place]]
        if place not in self._filled:
            own.copy_(self._store.read(tap, pooling, known, device=self._device).T)
            self._filled.add(place)
        return take_rows(own, found).T


def read_features(
    source: Readable,
    groups: Sequence[FeatureGroup],
    mean: Tensor,
    scale: Tensor,
    device: torch.device,
    *rows: np.ndarray,
) -> list[Tensor]:
    """The standardised features ``(rows, columns)`` of each of these sets of rows."""
    found: list[Tensor] = []
    start = 0
    for group in groups:
        of_all = source.read(group.tap, group.pooling, group.neurons.numpy())
        found = found or [empty(len(some), len(mean), device=of_all.device) for some in rows]
        stop = start + len(group.neurons)
        for part, some in zip(found, rows, strict=True):
            for block in slices(len(some), stop - start):
                part[block, start:stop] = take_rows(of_all, some[block])
        start = stop
    on_device = [part.to(device) for part in found or [empty(len(some), 0) for some in rows]]
    for part in on_device:
        part.sub_(mean.to(device)).div_(scale.to(device))
    return on_device
