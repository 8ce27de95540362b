"""Whether a text's features depend on what it shares a batch with: tried on the backbone itself before long work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batching import Batching
from ..modeling_spin import SpinModel
from ..pooling import PositionsError, pool
from ..quantization import is_quantized
from ..taps import Tap, TapError, model_device
from .errors import CalibrationError
from .extraction import pad

_FEWEST_TOKENS, _MOST_TOKENS = 8, 256  # models that pool neighbours can't read less
_PARTS = (1, 2, 4, 1, 3, 8)  # how much of each text


@torch.no_grad()
def find_batching(model: SpinModel, taps: Sequence[Tap], ids: list[list[int]], pad_token_id: int) -> Batching:
    """Compare a few texts of different lengths alone, in a padded batch and in batches of one length.

    Args:
        model: its backbone runs about a dozen times, on at most 256 tokens of a text.
        taps: that are compared.
        ids: token ids of texts.
        pad_token_id: what shorter ones are filled with.

    Raises:
        CalibrationError: if the same text does not give the same features twice.
    """
    model.eval()
    longest = sorted(ids, key=len, reverse=True)[: len(_PARTS)]
    texts = [
        row[: max(_FEWEST_TOKENS, min(len(row), _MOST_TOKENS) // part)]
        for row, part in zip(longest, _PARTS, strict=False)
    ]
    alone = [_features(model, taps, [text], pad_token_id)[0] for text in texts]
    if not _equal(model, [alone[0]], [_features(model, taps, [texts[0]], pad_token_id)[0]]):
        raise CalibrationError(
            f"{type(model.backbone).__name__} gives other features each time it reads the same text, so nothing could "
            "be learned from them. If it hashes at random, set a seed in its config, such as hash_seed=0."
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
