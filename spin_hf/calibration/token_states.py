"""States of the tokens that token weights are learned from: of which texts, and where they lie meanwhile.

They are read once and kept in float16, of all texts or of as many as 4 GB hold: in a GPU's memory while it has the
room, in files otherwise. Of a large model 4 GB hold few texts, so that up to 1,000 texts may take a quarter of the
memory of a GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attention import cannot_weigh, source
from ..layout import PositionsError
from ..spin_model import SpinModel
from ..taps import Tap, model_device, tap_width
from .errors import CalibrationError, NonFiniteFeaturesError, OutputFolderError
from .extraction import Encoded, pad, plan_batches
from .halving import in_halves, is_out_of_memory, no_room
from .probes import Labelled

_MOST_BYTES = 4 * 2**30  # of states; of more texts than that a part is drawn to learn from
_ENOUGH, _SHARE = 1000, 4  # for no more texts than these a larger device gives that part of its memory
_MOST_TOKENS = 6144  # of a step
SAMPLE = 100_000  # tokens that shift and scale are taken from: reading all takes as long as an epoch
_FLOAT16 = 65504.0


@dataclass(frozen=True)
class Texts:
    """What is learned from: token ids, and the rows of the calibration that train and that evaluate."""

    encoded: Encoded
    data: Labelled
    pad_token_id: int
    batching: str
    batch_tokens: int


def states_bytes(model: SpinModel, taps: Sequence[Tap], encoded: Encoded) -> int:
    """What the states take: the same whatever else is in the device's memory, as what is learned depends on it."""
    lengths = _lengths(encoded)
    needed = 2 * sum(states_widths(model, taps).values()) * sum(lengths)
    most, device = _MOST_BYTES, model_device(model)
    if device.type == "cuda":
        gigabytes = round(torch.cuda.get_device_properties(device).total_memory / 2**30)  # drivers keep some megabytes
        most = max(most, min(gigabytes // _SHARE * 2**30, needed * _ENOUGH // len(lengths)))
    return min(most, needed)


def states_place(model: SpinModel, taps: Sequence[Tap], encoded: Encoded) -> str:
    """Where that is needed, as things are now."""
    fits = _fits(states_bytes(model, taps, encoded), states_widths(model, taps), model_device(model))
    return f"the memory of {model_device(model)}" if fits else "disk"


def states_widths(model: SpinModel, taps: Sequence[Tap]) -> dict[Tap, int]:
    """Of the taps whose states are read."""
    return {tap: tap_width(model.backbone, model.layout, tap) for tap in dict.fromkeys(map(source, taps))}


def learning_rows(model: SpinModel, taps: Sequence[Tap], texts: Texts, seed: int) -> list[np.ndarray]:
    """Rows that train and rows that evaluate, the longest first: all of them, or as many of both as there is room for,
    some of each class.
    """
    ((train, held_out),) = texts.data.folds
    bytes_per_token = 2 * sum(states_widths(model, taps).values())
    lengths = np.asarray(_lengths(texts.encoded))
    needed = bytes_per_token * max(1, int(lengths[train].sum() + lengths[held_out].sum()))
    share = states_bytes(model, taps, texts.encoded) / needed
    draw = np.random.default_rng(seed)
    some: list[np.ndarray] = [train, held_out]
    if share < 1:
        orders = [_by_class(draw.permutation(rows), texts.data.labels) for rows in some]
        some = [rows[: max(1, int(share * len(rows)))] for rows in orders]
    return [rows[np.argsort(-lengths[rows], kind="stable")] for rows in some]


def _by_class(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rows in such an order that the first ones have every class in its share."""
    if labels.ndim > 1 or not np.issubdtype(labels.dtype, np.integer):
        return rows
    place = np.empty(len(rows))
    for label in np.unique(labels[rows]):
        own = np.flatnonzero(labels[rows] == label)
        place[own] = np.arange(len(own)) / len(own)
    return rows[np.argsort(place, kind="stable")]


def _lengths(encoded: Encoded) -> list[int]:
    """Of a text in windows its first window is read."""
    most = encoded.windows.size if encoded.windows else None
    return encoded.lengths if most is None else [min(most, length) for length in encoded.lengths]


@dataclass(frozen=True)
class States:
    """States of the tokens of some texts, one after another.

    Attributes:
        stacks: ``(taps, tokens, width)`` float16, of all taps of one width.
        rows: of the calibration, in the order of the texts here; those from ``trained`` on evaluate.
        starts: where each text's tokens begin, and where the last one's end.
        in_files: rather than in the device's memory.
    """

    stacks: Mapping[tuple[Tap, ...], Tensor]
    rows: np.ndarray
    trained: int
    starts: np.ndarray
    in_files: bool

    def of(self, tap: Tap) -> Tensor:
        """``(tokens, width)`` of a tap, a view: nothing but the stacks holds the states."""
        taps = next(taps for taps in self.stacks if tap in taps)
        return self.stacks[taps][taps.index(tap)]

    @classmethod
    @contextmanager
    def reading(
        cls,
        model: SpinModel,
        widths: Mapping[Tap, int],
        texts: Texts,
        parts: Sequence[np.ndarray],
        folder: Path,
        *,
        in_files: bool,
    ) -> Iterator[States]:
        """Read the texts of these rows; into files of the folder if so told, or where the device has no room."""
        lengths = _lengths(texts.encoded)
        rows = np.concatenate(parts)
        starts = np.concatenate([[0], np.cumsum([lengths[row] for row in rows])])
        tokens, device, folder = int(starts[-1]), model_device(model), folder / "states"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        held = {} if in_files else _in_memory(widths, tokens, device)
        with _kept(held) if held else _files(widths, tokens, folder) as stacks:
            found = cls(stacks, rows, len(parts[0]), starts, in_files=not held)
            found._read(model, texts, lengths)
            yield found

    @torch.no_grad()
    def _read(self, model: SpinModel, texts: Texts, lengths: Sequence[int]) -> None:
        encoded, device, taps = texts.encoded, model_device(model), list(chain.from_iterable(self.stacks))
        model.eval()

        def run(places: Sequence[int]) -> list[int]:
            own = [int(self.rows[place]) for place in places]
            batch = pad([encoded.input_ids[row][: lengths[row]] for row in own], texts.pad_token_id).to(device)
            mask = pad([[1] * lengths[row] for row in own], 0).to(device)
            types = None
            if encoded.token_type_ids is not None:
                types = pad([encoded.token_type_ids[row][: lengths[row]] for row in own], 0).to(device)
            names: dict[Tap, Sequence[str]] = dict.fromkeys(taps, ())
            try:
                model.read_taps(names, lambda mask: _Writing(self, places), mask, batch, types, windows=None)
            except (RuntimeError, MemoryError) as error:
                if len(places) == 1 and is_out_of_memory(error):
                    raise no_room(lengths[own[0]], device, error) from error
                raise
            except PositionsError as error:
                raise CalibrationError(str(error)) from error
            return []

        planned = [lengths[row] for row in self.rows]
        with model.hooked(taps):
            for places in plan_batches(planned, texts.batch_tokens, texts.batching):
                in_halves(places, run)

    def steps(self, first: int, last: int, most: int) -> list[slice]:
        """Neighbouring texts from one to another, for one step each: of about the same length."""
        found, begin = [], first
        for place in range(first, last):
            if place - begin == most or (self.starts[place + 1] - self.starts[begin] > _MOST_TOKENS and place > begin):
                found.append(slice(begin, place))
                begin = place
        return [*found, slice(begin, last)]

    def of_texts(self, taps: tuple[Tap, ...], own: slice) -> Tensor:
        """``(taps, tokens, width)`` of a stack, the tokens of some texts one text after another: a view too."""
        return self.stacks[taps][:, self.starts[own.start] : self.starts[own.stop]]

    def step(self, own: slice, device: torch.device) -> Step:
        return Step.of(np.diff(self.starts[own.start : own.stop + 1]), device)


@dataclass(frozen=True)
class Step:
    """Some texts beside each other, padded.

    Attributes:
        mask: ``(texts, tokens)``, of the real tokens.
        places: of the real tokens, text by text, among all.
    """

    mask: Tensor
    places: Tensor

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> Step:
        mask = np.arange(lengths.max()) < lengths[:, None]
        return cls(torch.from_numpy(mask).to(device), torch.from_numpy(np.flatnonzero(mask)).to(device))

    def padded(self, tokens: Tensor) -> Tensor:
        """Values of the real tokens ``(..., tokens, width)`` as ``(..., texts, tokens, width)``, zeros behind a text's
        end.
        """
        found = tokens.new_zeros(*tokens.shape[:-2], self.mask.numel(), tokens.shape[-1])
        return found.index_copy(-2, self.places, tokens).view(*tokens.shape[:-2], *self.mask.shape, -1)


def _shapes(widths: Mapping[Tap, int], tokens: int) -> dict[tuple[Tap, ...], tuple[int, int, int]]:
    """Of a stack for each width, ``(taps, tokens, width)``."""
    alike = {width: tuple(tap for tap in widths if widths[tap] == width) for width in widths.values()}
    return {taps: (len(taps), tokens, width) for width, taps in alike.items()}


@contextmanager
def _kept(held: dict[tuple[Tap, ...], Tensor]) -> Iterator[Mapping[tuple[Tap, ...], Tensor]]:
    try:
        yield held
    finally:
        held.clear()
        torch.cuda.empty_cache()  # others may need it


@contextmanager
def _files(widths: Mapping[Tap, int], tokens: int, folder: Path) -> Iterator[Mapping[tuple[Tap, ...], Tensor]]:
    needed = 2 * tokens * sum(widths.values())
    try:
        try:
            folder.mkdir()
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise OSError(f"{free / 1e9:.1f} GB are free, the states of the tokens need {needed / 1e9:.1f} GB")
            files = {
                taps: np.lib.format.open_memmap(folder / f"{shape[2]}.npy", mode="w+", dtype=np.float16, shape=shape)
                for taps, shape in _shapes(widths, tokens).items()
            }
        except OSError as error:
            raise OutputFolderError(
                f'{folder} can\'t be written: {error}. Name another folder as cache_dir="...", or leave the pooling '
                "attention out."
            ) from error
        yield {taps: torch.from_numpy(file) for taps, file in files.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fits(needed: int, widths: Mapping[Tap, int], device: torch.device) -> bool:
    """Whether a GPU has free twice these bytes, for states and batches that are read, and what a step holds."""
    if device.type != "cuda":
        return False
    step = _MOST_TOKENS * sum(widths.values()) + SAMPLE * max(widths.values())
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # that torch keeps
    return 2 * needed + 3 * 4 * step <= torch.cuda.mem_get_info(device)[0] + unused


def _in_memory(widths: Mapping[Tap, int], tokens: int, device: torch.device) -> dict[tuple[Tap, ...], Tensor]:
    """Room on a GPU that leaves enough to learn in, or nothing: others may also be quicker."""
    if not _fits(2 * tokens * sum(widths.values()), widths, device):
        return {}
    try:
        shapes = _shapes(widths, tokens)
        return {taps: torch.empty(shape, dtype=torch.float16, device=device) for taps, shape in shapes.items()}
    except RuntimeError as error:
        if is_out_of_memory(error):
            return {}
        raise


class _Writing:
    """Writes the activations of one forward to where the texts have their place."""

    def __init__(self, states: States, places: Sequence[int]) -> None:
        self._states, self._places = states, places
        starts = states.starts
        self._step = Step.of(np.asarray([starts[place + 1] - starts[place] for place in places]), torch.device("cpu"))
        self._targets = torch.from_numpy(np.concatenate([np.arange(starts[p], starts[p + 1]) for p in places]))
        self._wrong: list[tuple[Tap, Tensor]] = []  # whether each text has a state that is not finite

    def read(self, tap: Tap, values: Tensor) -> None:
        mask = self._step.mask
        if values.shape[1] < mask.shape[1]:
            raise cannot_weigh(tap, values.shape[1], mask.shape[1])
        values = values[:, : mask.shape[1]]
        finite = values.isfinite().all(-1) | ~mask.to(values.device)
        self._wrong.append((tap, ~finite.all(1)))
        tokens = values.reshape(-1, values.shape[2])[self._step.places.to(values.device)]
        half = tokens.float().clamp(-_FLOAT16, _FLOAT16).half()
        kept = self._states.of(tap)
        kept.index_copy_(0, self._targets.to(kept.device), half.to(kept.device))

    def finish(self) -> dict[Tap, list[Tensor]]:
        """Nothing is pooled.

        Raises:
            NonFiniteFeaturesError: naming a tap and a text.
        """
        for tap, wrong in self._wrong:
            if bool(wrong.any()):
                raise NonFiniteFeaturesError.of(tap, f"text {self._states.rows[self._places[int(wrong.nonzero()[0])]]}")
        return {}
