"""What a calibration of this model can be: whether there can be one, how long texts, how many blocks, which taps."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from ..depth import why_whole
from ..modeling_spin import SpinForSequenceClassification
from ..structure import has_routed_experts
from ..taps import Tap
from .errors import CalibrationError
from .extraction import window
from .recipe import Recipe


def check_fresh(model: Any, *, recalibrate: bool) -> None:
    """Raise for a model that can't be calibrated in its present state.

    Raises:
        CalibrationError: if it is calibrated and that is not wanted anew, has gates, or is wrapped for PEFT.
    """
    if not isinstance(model, SpinForSequenceClassification):
        advice = "Make one with SpinForSequenceClassification.from_backbone(...)."
        if hasattr(model, "peft_config"):
            advice = "Merge its adapter first: model = model.merge_and_unload()."
        raise CalibrationError(f"A {type(model).__name__} can't be calibrated. {advice}")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise CalibrationError(
            "This model is part of a PEFT model. Merge the adapter first: model = peft_model.merge_and_unload()."
        )
    if model.gates is not None:
        raise CalibrationError("This model has gates; remove them first: spin_hf.training.prune_gates(model).")
    if model.calibrated and not recalibrate:
        raise CalibrationError(
            "This model is calibrated already, and blocks above its depth are gone. Start from the backbone again: "
            f"SpinForSequenceClassification.from_backbone({model.config.backbone_id!r}, ...). Where its backbone was "
            "trained since, calibrate it as it is: spin_calibrate(model, ..., recalibrate=True)."
        )


def token_limit(
    asked: int | None, tokenizer: PreTrainedTokenizerBase, model: SpinForSequenceClassification
) -> int | None:
    """Tokens per text: as asked for, within what tokenizer and backbone allow.

    Raises:
        CalibrationError: for a number beyond that.
    """
    most, special = window(tokenizer, model), tokenizer.num_special_tokens_to_add()
    if asked is None:
        return most
    if not special < asked <= (most or asked):
        raise CalibrationError(
            f"max_length={asked} must be more than the {special} special tokens of a text"
            + (f" and at most {most}, the window of tokenizer and backbone." if most else ".")
        )
    return asked


def depths_to_try(model: SpinForSequenceClassification, recipe: Recipe, *, whole: bool) -> list[int]:
    """Depths to try; without those that the backbone can't be cut to, where nothing else was asked for.

    Raises:
        CalibrationError: if one was asked for that it can't be cut to.
    """
    spin, blocks = model.spin, model.spin.depth
    if whole:
        return [blocks]
    found = recipe.depths_of(blocks)
    reasons = {depth: why_whole(spin.backbone, spin.layout, depth) for depth in found if depth < blocks}
    chosen = recipe.depths is not None or recipe.max_depth is not None
    for depth, reason in reasons.items():
        if reason and chosen:
            raise CalibrationError(f"{reason} Leave depths and max_depth out, or choose others than {depth}.")
    return [depth for depth in found if not reasons.get(depth)]


def taps_to_read(model: SpinForSequenceClassification, recipe: Recipe, deepest: int) -> list[Tap]:
    """The taps of the kinds asked for, up to a depth.

    Raises:
        CalibrationError: if there are none.
    """
    taps = [
        tap
        for tap in model.spin.taps
        if tap.block <= deepest and ("ffn" if tap.kind == "ffn" else "hidden") in recipe.kinds
    ]
    if not taps:
        spin = model.spin
        experts = has_routed_experts(spin.backbone, spin.layout)
        raise CalibrationError(
            f"No tap of kind {', '.join(recipe.kinds)} was found in {type(spin.backbone).__name__}. "
            + ("Its FFNs are routed experts, of which no module sees every token. " if experts else "")
            + 'Use kinds=["hidden"], or name the down projection with ffn="..." in from_backbone.'
        )
    return taps
