"""Learning the queries of the pooling ``attention``: which tokens of a text count, tap by tap.

The states of the hidden taps are read once and kept (:mod:`spin_hf.calibration.token_states`). Then one query for each
tap is trained on them with a linear head over all taps, by Adam: with the weights given, the head is linear in the
states, so a query learns to point at the tokens that carry the label. The head is dropped; probes and heads are fitted
on what the queries pool. The pass with the least loss on the evaluation rows is kept, as these rows choose everything
else too.

The states are standardised in all this, but their shift and scale fold into the query, since a softmax does not feel
what all tokens share: what is left is one vector of the tap's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attention import source
from ..spin_model import SpinModel
from ..taps import Tap, model_device
from .errors import DeviceMemoryError
from .extraction import pad
from .halving import is_out_of_memory
from .probes import Labelled
from .replay import Recording, can_replay
from .solver import balance
from .token_states import SAMPLE, States, Step, Texts, learning_rows, states_widths

_EPOCHS, _LEAST_STEPS = 10, 200
_MOST_TEXTS, _LEAST_TEXTS = 96, 8  # of a step
_RATE, _LAST_RATE = 0.02, 0.02  # the second a share of the first, to which it falls
_VARIANCE = 25.0  # of a logit, in the prior of the head that learns with the queries


def learn_queries(
    model: SpinModel, taps: Sequence[Tap], texts: Texts, folder: Path, *, seed: int, advance: Callable[[int], Any]
) -> list[Tensor]:
    """A query for each tap, ``(width of its source,)`` float32 on the CPU; taps of one source have the same.

    Args:
        folder: where the states are kept meanwhile if the device has no room for them.
        advance: called with the parts done, out of :data:`PARTS`.

    Raises:
        CalibrationError: for a backbone that works on other positions than its tokens.
        DeviceMemoryError: where a text does not fit the device's memory even alone, or the few of a step do not.
        NonFiniteFeaturesError: naming the tap that produced NaN or infinity.
        OutputFolderError: without room for the states.
    """
    device, widths = model_device(model), states_widths(model, taps)
    rows = learning_rows(model, taps, texts, seed)

    learned: dict[Tap, Tensor] = {}
    for in_files in (False, True):
        try:
            with States.reading(model, widths, texts, rows, folder, in_files=in_files) as states:
                advance(int(not in_files))  # told already where they are read once more
                try:
                    learned = _train(states, texts.data, device, seed, advance)
                except (RuntimeError, MemoryError) as error:
                    if is_out_of_memory(error):
                        raise _no_room(states, device, error) from error
                    raise
            break
        except DeviceMemoryError:  # the states in the device's memory may have been what was too much
            if in_files:
                raise
    return [learned[source(tap)] for tap in taps]


def _no_room(states: States, device: torch.device, error: BaseException) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"Learning token weights from {len(states.rows):,} texts of up to {np.diff(states.starts).max():,} tokens does "
        f"not fit the memory of {device} ({str(error).strip()}). Free what else holds that memory, read less of each "
        'text, spin_calibrate(..., max_length=256), or leave token weights out, poolings=["mean", "max"]. With '
        "cache_dir the same call goes on from what is done."
    )


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


class _Weighted(nn.Module):
    """A linear head over the tokens' weighted means of all taps, in standardised states; the taps of a stack together.

    Of each stack: mean and scale ``(taps, 1, width)``, query ``(taps, 1, width)``, weight ``(taps, columns, width)``.
    """

    def __init__(self, states: States, bias: Tensor) -> None:
        super().__init__()
        self.stacks = list(states.stacks)
        self._room = [torch.empty(0) for _ in self.stacks]  # of a step's states in float32, on a CPU
        self.mean, self.scale = [], []
        for stack in states.stacks.values():
            found = [_mean_and_scale(values, bias.device) for values in stack]
            self.mean.append(torch.stack([mean for mean, _ in found])[:, None])
            self.scale.append(torch.stack([scale for _, scale in found])[:, None])
        self.size = sum(mean.numel() for mean in self.mean) ** 0.5
        self.query = nn.ParameterList(torch.zeros_like(mean) for mean in self.mean)
        self.weight = nn.ParameterList(torch.zeros_like(mean).repeat(1, len(bias), 1) for mean in self.mean)
        self.bias = nn.Parameter(bias)

    def scorers(self) -> list[Tensor]:
        """The queries for states as they are."""
        return [query / (scale * query.shape[2] ** 0.5) for query, scale in zip(self.query, self.scale, strict=True)]

    def queries(self) -> dict[Tap, Tensor]:
        """These, of each tap ``(width,)`` on the CPU."""
        own = [scorer.detach()[:, 0].cpu() for scorer in self.scorers()]
        return {
            tap: query
            for taps, rows in zip(self.stacks, own, strict=True)
            for tap, query in zip(taps, rows, strict=True)
        }

    def forward(self, states: States, own: slice, step: Step) -> Tensor:
        """Scores ``(texts, columns)``."""
        total: Tensor = self.bias
        for number, (taps, scorer, weight, mean, scale) in enumerate(
            zip(self.stacks, self.scorers(), self.weight, self.mean, self.scale, strict=True)
        ):
            both = torch.cat([scorer, weight / (scale * self.size)], 1)
            loaded = self._loaded(number, states.of_texts(taps, own))
            found: Tensor = _Product.apply(-(mean @ both.mT), loaded, both)
            found = step.padded(found)  # (taps, texts, tokens, 1 + columns)
            attention = found[..., 0].masked_fill(~step.mask, -torch.inf).softmax(2)
            total = total + (attention[..., None, :] @ found[..., 1:]).sum(0)[:, 0]
        return total

    def _loaded(self, number: int, kept: Tensor) -> Tensor:
        """States of a stack in float32, on the device.

        On a CPU they take the place of those of the last forward, since most of the time would go to memory that the
        system hands out anew, page by page. So a forward's backward comes before the next forward, or raises an error.
        """
        device = self.bias.device
        if device.type != "cpu":
            return kept.to(device).float()
        if len(self._room[number]) < kept.numel():
            self._room[number] = torch.empty(kept.numel(), dtype=torch.float32, device=device)
        return self._room[number][: kept.numel()].view(kept.shape).copy_(kept)

    def penalty(self) -> Tensor:
        parts = [weight.square().sum() / _VARIANCE for weight in self.weight]
        return torch.stack([*parts, *(query.square().sum() for query in self.query)]).sum()


class _Product(torch.autograd.Function):
    """``shift + states @ vectors.mT``, whose gradient reads the states row by row, as they lie in memory. That of
    ``torch.baddbmm`` reads them column by column, which takes a CPU twice as long.
    """

    @staticmethod
    def forward(ctx: Any, shift: Tensor, states: Tensor, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        return torch.baddbmm(shift, states, vectors.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        (states,) = ctx.saved_tensors
        return gradient.sum(1, keepdim=True), None, gradient.mT @ states


def _mean_and_scale(values: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    some = values[:: 1 + len(values) // SAMPLE].to(device).float()
    mean = some.mean(0)
    return mean, some.sub_(mean).square_().mean(0).sqrt().clamp_min(1e-6)


def _train(
    states: States, data: Labelled, device: torch.device, seed: int, advance: Callable[[int], Any]
) -> dict[Tap, Tensor]:
    y, s = data.targets[states.rows], data.weights[states.rows]
    learned = slice(0, states.trained)
    if data.task.problem_type == "regression":  # of any unit; only which tokens matter is learned
        scale, centre = torch.std_mean(y[learned], 0, correction=0)
        y = (y - centre) / scale.clamp_min(1e-6)
    start = torch.zeros_like(y[learned], dtype=torch.float64)
    bias = balance(data.task.loss, start, start[0], y[learned].double(), s[learned].double())
    y, s = y.to(device), s.to(device)
    model = _Weighted(states, bias.float().to(device))
    most = min(_MOST_TEXTS, max(_LEAST_TEXTS, states.trained // 20))
    steps, looks = (
        [(own, states.step(own, device)) for own in found]
        for found in (
            states.steps(0, states.trained, most),
            states.steps(states.trained, len(states.rows), _MOST_TEXTS),
        )
    )
    epochs = max(_EPOCHS, -(-_LEAST_STEPS // len(steps)))
    on_gpu = can_replay(y)
    rate = torch.tensor(_RATE, device=device) if on_gpu else _RATE  # a recording reads it anew
    optimiser = torch.optim.Adam(
        model.parameters(), lr=rate, betas=(0.9, 0.98), fused=device.type == "cuda" or None, capturable=on_gpu
    )
    draw = torch.Generator().manual_seed(seed)
    total = s[learned].mean(1).sum()
    best, kept = float("inf"), model.queries()

    def loss(own: slice, step: Step) -> Tensor:
        value: Tensor = data.task.loss.value(model(states, own, step), y[own], s[own]).sum()
        return value

    def take(number: int) -> None:
        own, step = steps[number]
        objective = loss(own, step) / s[own].mean(1).sum() + model.penalty() / (2 * total)
        optimiser.zero_grad()
        objective.backward()
        optimiser.step()

    taken = _Replayed(take, device) if on_gpu and not states.in_files else take
    done = 0
    for epoch in range(1, epochs + 1):
        for count, number in enumerate(torch.randperm(len(steps), generator=draw).tolist(), (epoch - 1) * len(steps)):
            slower = _RATE * (1 - (1 - _LAST_RATE) * count / (epochs * len(steps)))
            (group,) = optimiser.param_groups
            group["lr"] = rate.fill_(slower) if isinstance(rate, Tensor) else slower
            taken(number)
        with torch.no_grad():
            value = float(torch.stack([loss(*look) for look in looks]).sum())
        if value < best:
            best, kept = value, model.queries()
        reached = _EPOCHS * epoch // epochs
        advance(reached - done)
        done = reached
    return kept


class _Replayed:
    """Steps on a GPU: each is taken as it is the first time, recorded the second time, and then replayed.

    A step of a small backbone's states is many small kernels, which take a tenth of the time that launching them does.
    """

    def __init__(self, take: Callable[[int], object], device: torch.device) -> None:
        self._take, self._device = take, device
        self._recorded: dict[int, Recording | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._room = True

    def __call__(self, number: int) -> None:
        known = self._recorded.get(number)
        if known is None and number in self._recorded and self._room:
            known = self._record(number)
        if known is None:
            self._take(number)
        else:
            known()
        self._recorded[number] = known

    def _record(self, number: int) -> Recording | None:
        """Of one step, or nothing where there is no memory for another one."""
        try:
            return Recording(lambda: self._take(number), self._device, self._pool)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self._room = False
        return None
