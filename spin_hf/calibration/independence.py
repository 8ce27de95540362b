"""Whether a text's features depend on what it shares a batch with: tried on the backbone itself before long work."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..batching import Batching
from ..layout import PositionsError
from ..pooling import pool
from ..quantization import is_quantized
from ..spin_model import SpinModel
from ..taps import Tap, TapError, model_device
from .errors import CalibrationError
from .extraction import pad
from .halving import is_out_of_memory, no_room

_FEWEST_TOKENS = 8  # models that pool neighbours can't read less
_TRIALS = ((256, 6), (64, 6), (16, 2))  # most tokens of a text, and texts, where there is no room for more
_PARTS = (1, 2, 4, 1, 3, 8)  # how much of each text


@torch.no_grad()
def find_batching(model: SpinModel, taps: Sequence[Tap], ids: list[list[int]], pad_token_id: int) -> Batching:
    """Compare a few texts of different lengths alone, in a padded batch and in batches of one length.

    Where the device has no room for these, with less of each text.

    Args:
        model: its backbone runs about a dozen times, on at most 256 tokens of a text.
        taps: that are compared.
        ids: token ids of texts.
        pad_token_id: what shorter ones are filled with.

    Raises:
        DeviceMemoryError: if a text of a few tokens is too much.
        CalibrationError: if the backbone can't be run on token ids alone, or the same text does not give the same
            features twice.
    """
    model.eval()
    longest = sorted(ids, key=len, reverse=True)
    for most, count in _TRIALS:
        try:
            return _try_on(model, taps, longest[:count], pad_token_id, most)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            cause = no_room(most, model_device(model), error)
    raise cause


def _try_on(model: SpinModel, taps: Sequence[Tap], longest: list[list[int]], pad_token_id: int, most: int) -> Batching:
    texts = [
        row[: max(_FEWEST_TOKENS, min(len(row), most) // part)] for row, part in zip(longest, _PARTS, strict=False)
    ]
    if len(texts[0]) < 2 * _FEWEST_TOKENS:  # all may be as short, and of one length nothing would be padded
        texts[0] = (texts[0] * 2 * _FEWEST_TOKENS)[: 2 * _FEWEST_TOKENS]
    name, before = type(model.backbone).__name__, _settings(model.backbone)
    try:
        alone = _features(model, taps, texts[:1], pad_token_id)
    except (AttributeError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"{name} can't be run on token ids alone: {str(error).rstrip('.')}. If it wants images or sound besides, "
            "pass its text model to from_backbone instead, loaded or by the name of one."
        ) from error
    alone += [_features(model, taps, [text], pad_token_id)[0] for text in texts[1:]]
    after = _settings(model.backbone)
    changed = sorted({f"{key}={value!r}" for (at, key), value in after.items() if before.get((at, key)) != value})
    advice = f"Load it with from_backbone(name, {', '.join(changed)}), or set that in its config before it is built."
    if not _equal(model, alone[:1], _features(model, taps, texts[:1], pad_token_id)):
        hashing = "If it hashes at random, set a seed in its config, such as hash_seed=0."
        raise CalibrationError(
            f"{name} gives other features each time it reads the same text, so nothing could be learned from them. "
            + (f"It set {', '.join(changed)} of itself while it read others. {advice}" if changed else hashing)
        )
    if changed:
        warnings.warn(
            f"{name} set {', '.join(changed)} of itself when it read a short text, and keeps it: in a fresh process, a "
            f"longer text that comes first may get other logits. {advice}",
            UserWarning,
            stacklevel=2,
        )
    try:
        if _equal(model, alone, _features(model, taps, texts, pad_token_id)):
            return "padded"
    except (PositionsError, TapError):  # the forms of its activations differ with padding
        pass
    for text, first in zip(texts[:3], alone, strict=False):
        if not _equal(model, [first], _features(model, taps, [text, text[::-1]], pad_token_id)[:1]):
            return "single"
    return "equal_length"


def _settings(backbone: nn.Module) -> dict[tuple[str, str], str]:
    """What modules note of themselves in words, such as the kind of their attention."""
    return {
        (name, key): value
        for name, module in backbone.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, str)
    }


def _features(model: SpinModel, taps: Sequence[Tap], texts: list[list[int]], pad_token_id: int) -> list[list[Tensor]]:
    """For each text the pooled values of the taps."""
    device = model_device(model)
    mask = pad([[1] * len(text) for text in texts], 0).to(device)
    pooled: dict[Tap, Tensor] = {}

    def read(tap: Tap, values: Tensor) -> None:
        pooled[tap] = pool(values, mask, ("mean", "last"))

    with model.hooked(taps), model.recording(taps, read, mask):
        model.run_backbone(pad(texts, pad_token_id).to(device), mask)
    return [[values[row] for values in pooled.values()] for row in range(len(texts))]


def _equal(model: SpinModel, first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    limit = _tolerance(model)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            away, size = (a - b).abs(), a.abs()
            # The median too, since a few huge neurons would hide a difference in all the others.
            if away.mean() > limit * size.mean() or away.median() > limit * size.mean().minimum(size.median()):
                return False
    return True  # also for NaN, which the extraction reports


def _tolerance(model: SpinModel) -> float:
    """What rounding may change, relative to the size of the values."""
    if model.backbone.dtype != torch.float32 or is_quantized(model.backbone):
        return 0.1
    return 1e-3 if model_device(model).type == "cpu" else 2e-2
