"""Learning the queries of the pooling ``attention``: which tokens of a text count, tap by tap.

The states of the hidden taps are read once and kept in float16, of all texts or of as many as 4 GB hold: on a GPU that
has the room, in files otherwise. Then one query for each tap is trained on them with a linear head over all taps, by
Adam: with the weights given, the head is linear in the states, so a query learns to point at the tokens that carry the
label. The head is dropped; probes and heads are fitted on what the queries pool. The pass with the least loss on the
evaluation rows is kept, as these rows choose everything else too.

The states are standardised in all this, but their shift and scale fold into the query, since a softmax does not feel
what all tokens share: what is left is one vector of the tap's width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attention import source
from ..pooling import PositionsError
from ..spin_model import SpinModel
from ..taps import Tap, model_device, tap_width
from .errors import CalibrationError, OutputFolderError
from .extraction import Encoded, not_finite, pad, plan_batches
from .halving import in_halves, is_out_of_memory, no_room
from .probes import Labelled
from .solver import balance

_MOST_BYTES = 4 * 2**30  # of states; of more texts than that a part is drawn to learn from
_EPOCHS, _LEAST_STEPS = 10, 200
_MOST_TEXTS, _LEAST_TEXTS, _MOST_TOKENS = 96, 8, 6144  # of a step
_RATE = 0.02
_VARIANCE = 25.0  # of a logit, in the prior of the head that learns with the queries
_FLOAT16 = 65504.0


@dataclass(frozen=True)
class Texts:
    """What is learned from: token ids, and the rows of the calibration that train and that evaluate."""

    encoded: Encoded
    data: Labelled
    pad_token_id: int
    batching: str
    batch_tokens: int


def learn_queries(
    model: SpinModel, taps: Sequence[Tap], texts: Texts, folder: Path, *, seed: int, advance: Callable[[int], Any]
) -> list[Tensor]:
    """A query for each tap, ``(width of its source,)`` float32 on the CPU; taps of one source have the same.

    Args:
        folder: where the states are kept meanwhile, where the device has no room for them.
        advance: called with the parts done, out of :data:`PARTS`.

    Raises:
        CalibrationError: for a backbone that works on other positions than its tokens.
        DeviceMemoryError: where a text does not fit the device's memory even alone, or the few of a step do not.
        NonFiniteFeaturesError: naming the tap that produced NaN or infinity.
        OutputFolderError: without room for the states.
    """
    device = model_device(model)
    with _States.reading(model, _widths(model, taps), texts, learning_rows(model, taps, texts, seed), folder) as states:
        advance(1)
        try:
            learned = _train(states, texts.data, device, seed, advance)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise no_room(int(np.diff(states.starts).max()), device, error) from error
            raise
    return [learned[source(tap)] for tap in taps]


@torch.no_grad()
def can_weigh(model: SpinModel, taps: Sequence[Tap], ids: Sequence[Sequence[int]], pad_token_id: int) -> bool:
    """Whether each tap has one position for each token, on some texts."""
    found: list[bool] = []

    class Counting:
        def __init__(self, mask: Tensor) -> None:
            self.mask = mask

        def read(self, tap: Tap, values: Tensor) -> None:
            found.append(values.shape[1] == self.mask.shape[1])

        def finish(self) -> dict[Tap, list[Tensor]]:
            return {}

    read = list(dict.fromkeys([*map(source, taps), *taps]))
    model.eval()
    with model.hooked(read):
        for row in ids:
            batch = pad([list(row)], pad_token_id).to(model_device(model))
            model.read_taps({tap: () for tap in read}, Counting, torch.ones_like(batch), batch, None, windows=None)
    return all(found)


PARTS = 1 + _EPOCHS  # the reading, and about as many passes


def states_bytes(model: SpinModel, taps: Sequence[Tap], encoded: Encoded) -> int:
    """What :func:`learn_queries` needs of the disk, or of a GPU, meanwhile."""
    return min(_MOST_BYTES, 2 * sum(_widths(model, taps).values()) * sum(_lengths(encoded)))


def _widths(model: SpinModel, taps: Sequence[Tap]) -> dict[Tap, int]:
    """Of the taps whose states are read."""
    return {tap: tap_width(model.backbone, model.layout, tap) for tap in dict.fromkeys(map(source, taps))}


def learning_rows(model: SpinModel, taps: Sequence[Tap], texts: Texts, seed: int) -> list[np.ndarray]:
    """Rows that train and rows that evaluate, the longest first: all of them, or as many of both as there is room for,
    some of each class.
    """
    ((train, held_out),) = texts.data.folds
    bytes_per_token = 2 * sum(_widths(model, taps).values())
    lengths = np.asarray(_lengths(texts.encoded))
    share = _MOST_BYTES / (bytes_per_token * max(1, int(lengths[train].sum() + lengths[held_out].sum())))
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
class _States:
    """States of the tokens of some texts, one after another: ``(tokens, width)`` float16 for each tap.

    Attributes:
        rows: of the calibration, in the order of the texts here; those from ``trained`` on evaluate.
        starts: where each text's tokens begin, and where the last one's end.
    """

    values: Mapping[Tap, Tensor]
    rows: np.ndarray
    trained: int
    starts: np.ndarray

    @classmethod
    @contextmanager
    def reading(
        cls, model: SpinModel, widths: Mapping[Tap, int], texts: Texts, parts: Sequence[np.ndarray], folder: Path
    ) -> Iterator[_States]:
        lengths = _lengths(texts.encoded)
        rows = np.concatenate(parts)
        starts = np.concatenate([[0], np.cumsum([lengths[row] for row in rows])])
        with _room(widths, int(starts[-1]), model_device(model), folder / "states") as values:
            found = cls(values, rows, len(parts[0]), starts)
            found._read(model, texts, lengths)
            yield found

    @torch.no_grad()
    def _read(self, model: SpinModel, texts: Texts, lengths: Sequence[int]) -> None:
        encoded, device = texts.encoded, model_device(model)
        model.eval()

        def run(places: Sequence[int]) -> list[int]:
            own = [int(self.rows[place]) for place in places]
            batch = pad([encoded.input_ids[row][: lengths[row]] for row in own], texts.pad_token_id).to(device)
            mask = pad([[1] * lengths[row] for row in own], 0).to(device)
            types = None
            if encoded.token_type_ids is not None:
                types = pad([encoded.token_type_ids[row][: lengths[row]] for row in own], 0).to(device)
            names: dict[Tap, Sequence[str]] = {tap: () for tap in self.values}
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
        with model.hooked(list(self.values)):
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

    def load(self, tap: Tap, own: slice, step: _Step) -> Tensor:
        """States of some texts ``(texts, tokens, width)``, float32, zeros behind a text's end."""
        tokens = self.values[tap][self.starts[own.start] : self.starts[own.stop]].to(step.mask.device).float()
        found = tokens.new_zeros(step.mask.numel(), tokens.shape[1])
        return found.index_copy_(0, step.places, tokens).view(*step.mask.shape, -1)

    def step(self, own: slice, device: torch.device) -> _Step:
        return _Step.of(np.diff(self.starts[own.start : own.stop + 1]), device)


@dataclass(frozen=True)
class _Step:
    """Some texts beside each other, padded.

    Attributes:
        mask: ``(texts, tokens)``, of the real tokens.
        places: of the real tokens, text by text, among all.
    """

    mask: Tensor
    places: Tensor

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> _Step:
        mask = np.arange(lengths.max()) < lengths[:, None]
        return cls(torch.from_numpy(mask).to(device), torch.from_numpy(np.flatnonzero(mask)).to(device))


@contextmanager
def _room(widths: Mapping[Tap, int], tokens: int, device: torch.device, folder: Path) -> Iterator[Mapping[Tap, Tensor]]:
    """Room for the states: a GPU's memory where half of what is free holds them, files in the folder otherwise."""
    needed = 2 * tokens * sum(widths.values())
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    if _fits(needed, device):
        yield {tap: torch.empty(tokens, width, dtype=torch.float16, device=device) for tap, width in widths.items()}
        return
    try:
        try:
            folder.mkdir()
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise OSError(f"{free / 1e9:.1f} GB are free, the states of the tokens need {needed / 1e9:.1f} GB")
            files = {
                tap: np.lib.format.open_memmap(
                    folder / f"{tap}.npy", mode="w+", dtype=np.float16, shape=(tokens, width)
                )
                for tap, width in widths.items()
            }
        except OSError as error:
            raise OutputFolderError(
                f'{folder} can\'t be written: {error}. Name another folder as cache_dir="...", or leave the pooling '
                "attention out."
            ) from error
        yield {tap: torch.from_numpy(file) for tap, file in files.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fits(needed: int, device: torch.device) -> bool:
    return device.type == "cuda" and 2 * needed <= torch.cuda.mem_get_info(device)[0]


class _Writing:
    """Writes the activations of one forward to where the texts have their place."""

    def __init__(self, states: _States, places: Sequence[int]) -> None:
        self._states, self._places = states, places
        starts = states.starts
        self._step = _Step.of(np.asarray([starts[place + 1] - starts[place] for place in places]), torch.device("cpu"))
        self._targets = torch.from_numpy(np.concatenate([np.arange(starts[p], starts[p + 1]) for p in places]))
        self._wrong: list[tuple[Tap, Tensor]] = []  # whether each text has a state that is not finite

    def read(self, tap: Tap, values: Tensor) -> None:
        mask = self._step.mask
        if values.shape[1] < mask.shape[1]:
            raise PositionsError(
                f"Tap {tap} has {values.shape[1]} positions for {mask.shape[1]} tokens, so that tokens can't be "
                "weighted. Leave the pooling attention out."
            )
        values = values[:, : mask.shape[1]]
        finite = values.isfinite().all(-1) | ~mask.to(values.device)
        self._wrong.append((tap, ~finite.all(1)))
        tokens = values.reshape(-1, values.shape[2])[self._step.places.to(values.device)]
        half = tokens.float().clamp(-_FLOAT16, _FLOAT16).half()
        kept = self._states.values[tap]
        kept.index_copy_(0, self._targets.to(kept.device), half.to(kept.device))

    def finish(self) -> dict[Tap, list[Tensor]]:
        """Nothing is pooled.

        Raises:
            NonFiniteFeaturesError: naming a tap and a text.
        """
        for tap, wrong in self._wrong:
            if bool(wrong.any()):
                raise not_finite(tap, f"text {self._states.rows[self._places[int(wrong.nonzero()[0])]]}")
        return {}


class _Weighted(nn.Module):
    """A linear head over the tokens' weighted means of all taps, in standardised states."""

    def __init__(self, states: _States, bias: Tensor) -> None:
        super().__init__()
        self.taps = list(states.values)
        # Of every few tokens: shift and scale need no more, and reading all takes as long as an epoch.
        some = [values[:: 1 + len(values) // 100_000].float() for values in states.values.values()]
        self.mean = [x.mean(0) for x in some]
        self.scale = [x.std(0, correction=0).clamp_min(1e-6) for x in some]
        self.size = sum(x.shape[1] for x in some) ** 0.5
        self.query = nn.ParameterList(torch.zeros(x.shape[1]) for x in some)
        self.weight = nn.ParameterList(torch.zeros(x.shape[1], len(bias)) for x in some)
        self.bias = nn.Parameter(bias)

    def scorers(self) -> list[Tensor]:
        """The queries for states as they are."""
        return [
            query / (scale.to(query.device) * len(query) ** 0.5)
            for query, scale in zip(self.query, self.scale, strict=True)
        ]

    def forward(self, states: _States, own: slice) -> Tensor:
        """Scores ``(texts, columns)``."""
        step = states.step(own, self.bias.device)
        total: Tensor = self.bias
        for tap, scorer, weight, mean, scale in zip(
            self.taps, self.scorers(), self.weight, self.mean, self.scale, strict=True
        ):
            both = torch.cat([scorer[:, None], weight / (scale[:, None].to(weight.device) * self.size)], 1)
            found = states.load(tap, own, step) @ both - mean.to(both.device) @ both
            attention = found[..., 0].masked_fill(~step.mask, -torch.inf).softmax(1)
            total = total + (attention[:, None] @ found[..., 1:])[:, 0]
        return total

    def penalty(self) -> Tensor:
        parts = [weight.square().sum() / _VARIANCE for weight in self.weight]
        return torch.stack([*parts, *(query.square().sum() for query in self.query)]).sum()


def _train(
    states: _States, data: Labelled, device: torch.device, seed: int, advance: Callable[[int], Any]
) -> dict[Tap, Tensor]:
    y, s = data.targets[states.rows], data.weights[states.rows]
    learned = slice(0, states.trained)
    if data.task.problem_type == "regression":  # of any unit; only which tokens matter is learned
        scale, centre = torch.std_mean(y[learned], 0, correction=0)
        y = (y - centre) / scale.clamp_min(1e-6)
    start = torch.zeros_like(y[learned], dtype=torch.float64)
    bias = balance(data.task.loss, start, start[0], y[learned].double(), s[learned].double())
    y, s = y.to(device), s.to(device)
    model = _Weighted(states, bias.float()).to(device)
    most = min(_MOST_TEXTS, max(_LEAST_TEXTS, states.trained // 20))
    steps = states.steps(0, states.trained, most)
    looks = states.steps(states.trained, len(states.rows), _MOST_TEXTS)
    epochs = max(_EPOCHS, -(-_LEAST_STEPS // len(steps)))
    optimiser = torch.optim.Adam(model.parameters(), lr=_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, epochs * len(steps))
    draw = torch.Generator().manual_seed(seed)
    total = s[learned].mean(1).sum()
    best, kept = float("inf"), [query.detach().cpu() for query in model.scorers()]

    def loss(own: slice) -> Tensor:
        value: Tensor = data.task.loss.value(model(states, own), y[own], s[own]).sum()
        return value

    done = 0
    for epoch in range(1, epochs + 1):
        for number in torch.randperm(len(steps), generator=draw).tolist():
            own = steps[number]
            objective = loss(own) / s[own].mean(1).sum() + model.penalty() / (2 * total)
            optimiser.zero_grad()
            objective.backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            value = sum(float(loss(own)) for own in looks)
        if value < best:
            best, kept = value, [query.detach().cpu() for query in model.scorers()]
        reached = _EPOCHS * epoch // epochs
        advance(reached - done)
        done = reached
    return dict(zip(model.taps, kept, strict=True))
