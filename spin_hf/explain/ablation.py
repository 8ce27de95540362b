"""Neurons switched off inside the backbone: whether what comes after them misses them.

A head on a model's neurons is bound to suffer when its own inputs are set to zero, which says nothing about the model.
So neurons are held at zero where they arise, and what the later blocks make of it can be read at the last one, by a
head that never saw them. To be told from damage as such, it takes others to compare with: as many neurons of the same
taps, drawn at random, or such as are as active; see :func:`random_neurons`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase

from ..calibration.errors import CalibrationError, demand_whole
from ..modeling_spin import SpinForSequenceClassification
from ..pooling import pool
from ..prediction import encode_for
from ..taps import Tap, TapError, tap_width
from ..windows import Windows
from .attribution import ExplanationError
from .explaining import input_batches, read_head
from .result import Neuron

_NEIGHBOURS = 20  # in size, that a matched neuron is drawn from


def salient_neurons(
    model: SpinForSequenceClassification, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Neuron]:
    """The neurons that weigh most in a classifier's head.

    A neuron's weight is the salience of the paper, on the head: its squared weights, of features in standard
    deviations, summed over labels and poolings.

    Args:
        model: a calibrated classifier.
        tokenizer: its own.
        count: how many at most; the heaviest first.

    Raises:
        CalibrationError: for a count that is none.
    """
    demand_whole("count", count, least=1)
    reading, _ = read_head(model, tokenizer)
    neurons, of_feature = reading.group("neuron")
    weights = np.bincount(of_feature, (reading.weight**2).sum(1))
    return [neurons[i] for i in np.argsort(-weights, kind="stable")[:count]]


def random_neurons(
    model: SpinForSequenceClassification,
    like: Sequence[Neuron],
    seed: int,
    *,
    sizes: Mapping[str, np.ndarray] | None = None,
) -> list[Neuron]:
    """As many other neurons of the same taps.

    Args:
        model: a classifier.
        like: neurons, none of which is drawn.
        seed: of the draw.
        sizes: of each tap how active its neurons are, ``(width,)``, see :func:`tap_means`: then each is drawn among
            the 20 that are nearest in size to the one that it stands for.

    Raises:
        CalibrationError: where a tap has too few others.
    """
    rng = np.random.default_rng(seed)
    drawn: list[Neuron] = []
    for tap in dict.fromkeys(neuron.tap for neuron in like):
        own = [neuron.neuron for neuron in like if neuron.tap == tap]
        width = tap_width(model.spin.backbone, model.spin.layout, Tap.parse(tap))
        free = np.setdiff1d(np.arange(width), own)
        if len(free) < len(own):
            raise CalibrationError(f"{len(own)} of the {width} neurons of {tap} leave too few others. Take fewer.")
        if sizes is None:
            drawn += [Neuron(tap, int(i)) for i in rng.choice(free, len(own), replace=False)]
            continue
        for neuron in rng.permutation(own):
            near = free[np.argsort(np.abs(sizes[tap][free] - sizes[tap][neuron]), kind="stable")[:_NEIGHBOURS]]
            chosen = int(rng.choice(near))
            free = free[free != chosen]
            drawn.append(Neuron(tap, chosen))
    return drawn


@contextmanager
def ablated(model: SpinForSequenceClassification, neurons: Iterable[Neuron]) -> Iterator[None]:
    """Hold neurons at zero inside the backbone, for all that comes after them, for the length of a context.

    Whatever reads the model inside sees it: ``predict``, ``explain``, :func:`tap_means`, the backbone's own output.

    Args:
        model: a classifier; not compiled.
        neurons: by the names of their taps and their numbers, such as ``Neuron("ffn.3", 17)``.

    Raises:
        ExplanationError: for a backbone whose blocks share a module or run in several streams.
        TapError: for a tap that the backbone doesn't have.
    """
    spin = model.spin
    if spin.layout.form(spin.backbone).streams > 1:
        raise ExplanationError(f"{type(spin.backbone).__name__} runs in several streams; single neurons can't be cut.")
    columns: dict[str, list[int]] = {}
    for tap, neuron in neurons:
        columns.setdefault(tap, []).append(neuron)
    hooks: list[RemovableHandle] = []
    try:
        for name, own in columns.items():
            place = Tap.parse(name)
            if place not in spin.taps:
                raise TapError(f"The backbone has no {name}. It has: {', '.join(map(str, spin.taps))}.")
            if spin.layout.call(spin.backbone, place)[1] > 1:
                raise ExplanationError(f"The module of {name} serves several blocks, so that one can't be cut alone.")
            module, reads_input = spin.layout.hooked(spin.backbone, place)
            hooks.append(_hold(module, torch.tensor(own), reads_input=reads_input))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tap_means(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    taps: Sequence[str],
    *,
    sizes: bool = False,
    batch_tokens: int = 4096,
) -> dict[str, np.ndarray]:
    """Whole taps of the backbone as it is now, the mean over the tokens of each text, ``(texts, width)``.

    Args:
        model, tokenizer, texts: as in :func:`spin_hf.explain.explain`.
        taps: their names.
        sizes: the mean of the activations' sizes instead of the activations.
        batch_tokens: padded tokens per batch.

    Raises:
        CalibrationError, NotCalibratedError: as :func:`spin_hf.explain.explain`.
        TapError: for a tap that the backbone doesn't have.
    """
    spin, wanted = model.spin, [Tap.parse(name) for name in taps]
    encoded = encode_for(model, tokenizer, texts, None)
    windows = None if spin.config.windows is None else Windows(**spin.config.windows)
    model.eval()

    def read(tap: Tap, values: Tensor, mask: Tensor) -> list[Tensor]:
        return [pool(values.abs() if sizes else values, mask, ["mean"])[:, 0]]

    with spin.hooked(wanted), torch.no_grad():
        widths = {tap: tap_width(spin.backbone, spin.layout, tap) for tap in wanted}
        found = {tap: np.empty((len(encoded.lengths), width), dtype=np.float32) for tap, width in widths.items()}
        for rows, (mask, *inputs) in input_batches(model, tokenizer, encoded, batch_tokens):
            pooled = spin.pooled({tap: ["mean"] for tap in wanted}, read, mask, *inputs, windows=windows)
            for tap in wanted:
                found[tap][rows] = pooled[tap][0].cpu().numpy()
    return {str(tap): values for tap, values in found.items()}


def _hold(module: nn.Module, columns: Tensor, *, reads_input: bool) -> RemovableHandle:
    """A hook in front of all others, so that those that read see it too."""

    def zero(value: Tensor) -> Tensor:
        return value.index_fill(-1, columns.to(value.device), 0.0)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (zero(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: zero(kwargs[name])}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return zero(output)
        return type(output)([zero(output[0]), *output[1:]])

    if reads_input:
        return module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    return module.register_forward_hook(after, prepend=True)
