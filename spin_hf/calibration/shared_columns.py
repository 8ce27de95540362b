"""The features that heads are fitted on, read from the store once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..features import FeatureGroup
from ..taps import Tap
from .blocks import empty, slices
from .store import FeatureStore


class Readable(Protocol):
    """A :class:`~spin_hf.calibration.store.FeatureStore`, or a part of one at hand."""

    def read(self, tap: Tap, pooling: str, columns: np.ndarray) -> np.ndarray:
        """Some features of a tap and pooling, of all texts ``(n, columns)``."""
        ...


class SharedColumns:
    """All features that some heads draw on, in one matrix, filled tap by tap as they are asked for.

    The store holds batches of whole taps, so that reading some neurons costs as much as reading all of them; heads by
    the dozen ask for much the same neurons. Here a neuron's values lie side by side, and only those asked for are read.

    Args:
        store: what to read from, also what is not among the wanted.
        wanted: neurons of each tap and pooling, ascending.
    """

    def __init__(self, store: FeatureStore, wanted: Mapping[tuple[Tap, str], np.ndarray]) -> None:
        self._store, self._wanted = store, dict(wanted)
        stops = np.cumsum([len(neurons) for neurons in wanted.values()]).tolist()
        self._places = {
            place: slice(stop - len(neurons), stop)
            for (place, neurons), stop in zip(wanted.items(), stops, strict=True)
        }
        self._matrix: Tensor | None = None  # (columns, n)
        self._filled: set[tuple[Tap, str]] = set()

    @classmethod
    def of(cls, store: FeatureStore, groups: Iterable[FeatureGroup]) -> SharedColumns:
        """Of all neurons that are in any of these groups."""
        masks: dict[tuple[Tap, str], np.ndarray] = {}
        for group in groups:
            place = group.tap, group.pooling
            masks.setdefault(place, np.zeros(store.widths[group.tap], dtype=bool))[group.neurons.numpy()] = True
        return cls(store, {place: np.flatnonzero(mask) for place, mask in masks.items()})

    def read(self, tap: Tap, pooling: str, columns: np.ndarray) -> np.ndarray:
        """Features of all texts ``(n, columns)``; a copy, a column side by side."""
        place = tap, pooling
        known = self._wanted.get(place, columns[:0])
        found = np.searchsorted(known, columns)
        if not len(known) or not np.array_equal(known.take(found, mode="clip"), columns):
            return self._store.read(tap, pooling, columns)
        if self._matrix is None:
            self._matrix = empty(sum(map(len, self._wanted.values())), self._store.rows)
        own = self._matrix[self._places[place]]
        if place not in self._filled:
            own.copy_(torch.from_numpy(self._store.read(tap, pooling, known)).T)
            self._filled.add(place)
        values = torch.index_select(own, 0, torch.from_numpy(found), out=empty(len(found), own.shape[1]))
        return np.asarray(values.numpy().T)


def read_features(
    source: Readable,
    groups: Sequence[FeatureGroup],
    mean: Tensor,
    scale: Tensor,
    device: torch.device,
    *rows: np.ndarray,
) -> list[Tensor]:
    """The standardised features ``(rows, columns)`` of each of these sets of rows."""
    found = [empty(len(some), len(mean)) for some in rows]
    start = 0
    for group in groups:
        of_all = source.read(group.tap, group.pooling, group.neurons.numpy())
        stop = start + len(group.neurons)
        for part, some in zip(found, rows, strict=True):
            for block in slices(len(some), stop - start):
                part[block, start:stop] = torch.from_numpy(of_all[some[block]])
        start = stop
    on_device = [part.to(device) for part in found]
    for part in on_device:
        part.sub_(mean.to(device)).div_(scale.to(device))
    return on_device
