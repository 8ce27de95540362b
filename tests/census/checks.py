"""What a model type has to pass: its taps, their values, a calibrated and truncated classifier, and its batches."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import builders
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.depth import why_whole
from spin_hf.parts import auto_class
from spin_hf.taps import attach

from .by_hand import BY_HAND, LEFT_OUT, MORE_AFTER, WITHOUT_FFN
from .shrink import tiny_config

# One penalty and one split: the checks are of values, blocks and batches, whichever neurons are kept.
QUICK = {
    "Cs": [0.3],
    "etas": (0.5,),
    "poolings": ("mean", "last"),
    "validation_fraction": 0.25,
    "progress": False,
    "max_features": 64,
}


class LeftOut(Exception):
    """A type that does not belong to the population, and why."""


@dataclass
class Outcome:
    """What a type's checks gave. ``passed`` holds their numbers, ``notes`` what a reader of the table should know."""

    model_type: str
    left_out: str = ""
    blocks: int = 0
    hidden: int = 0
    ffn: int = 0
    norm: int = 0
    passed: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_model(model_type: str) -> hf.PreTrainedModel:
    """A tiny random model of a type, as ``from_backbone`` would load it.

    Raises:
        LeftOut: where transformers builds no such model that reads ``input_ids`` from a config alone.
    """
    if model_type not in MODEL_MAPPING_NAMES:
        raise LeftOut("AutoModel has no class for it")
    if model_type in LEFT_OUT:
        raise LeftOut(LEFT_OUT[model_type])
    config = tiny_config(model_type, BY_HAND)
    try:
        torch.manual_seed(0)
        auto, config = auto_class(config)
        model = auto.from_config(config)
    except ImportError as error:
        raise LeftOut(f"needs a further package: {str(error).strip().splitlines()[0]}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def check(outcome: Outcome, folder: Path) -> None:
    """Run the checks that need no fresh process, and save a classifier for the one that does."""
    backbone = make_model(outcome.model_type)
    try:
        whole = SpinForSequenceClassification.from_backbone(backbone)
    except ValueError as error:
        if "not text" in str(error):
            raise LeftOut(str(error)) from error
        raise
    taps = whole.spin.taps
    outcome.blocks = whole.spin.depth
    for kind in ("hidden", "ffn", "norm"):
        setattr(outcome, kind, sum(tap.kind == kind for tap in taps))
    values = _attempt(outcome, 1, lambda: _read_all(whole))
    if values is not None:
        _attempt(outcome, 2, lambda: _compare_hidden_states(whole, values, outcome))
    model = _attempt(outcome, 3, lambda: _calibrate(whole, outcome, folder))
    if model is not None:
        _attempt(outcome, 4, lambda: _compare_batches(model, outcome))


def check_reloaded(folder: Path) -> None:
    """In a fresh process: the saved classifier gives the logits it gave."""
    model = SpinForSequenceClassification.from_pretrained(folder)
    saved = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model(input_ids=saved["input_ids"], attention_mask=saved["attention_mask"]).logits
    assert torch.equal(logits, saved["logits"]), f"reloaded, logits are {_away(logits, saved['logits']):.1g} away"


def _attempt(outcome: Outcome, number: int, run: Any) -> Any:
    try:
        result = run()
    except Exception as error:
        outcome.failed[number] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return None
    outcome.passed.append(number)
    return result


def _batch() -> dict[str, torch.Tensor]:
    return builders.make_batch(rows=4, tokens=12)


def _read_all(model: SpinForSequenceClassification) -> dict[str, torch.Tensor]:
    spin = model.spin
    taps, values = spin.taps, {}
    handles = attach(spin.backbone, spin.layout, taps)
    batch = {name: tensor[:1] for name, tensor in _batch().items()}
    keep = lambda tap, value: values.__setitem__(str(tap), value.clone())  # noqa: E731
    with torch.no_grad(), spin.recording(taps, keep, batch["attention_mask"]):
        spin.run_backbone(batch["input_ids"], batch["attention_mask"])
    for handle in handles:
        handle.remove()
    total = spin.depth
    assert [tap.block for tap in taps if tap.kind == "hidden"] == list(range(total + 1))
    assert model.spin.backbone.config.model_type in WITHOUT_FFN or not (without := _no_ffn(spin)), without
    return values


def _no_ffn(spin: Any) -> str:
    """Which blocks have no ffn tap, although they have no routed experts either."""
    found = {tap.block for tap in spin.taps if tap.kind == "ffn"}
    missing = [
        block
        for block in set(range(1, spin.depth + 1)) - found
        if not any(
            "expert" in f"{name} {type(module).__name__}".lower()
            for name, module in spin.layout.module(spin.backbone, block).named_modules()
        )
    ]
    return f"no ffn tap in blocks {missing}, which have no experts" if missing else ""


def _compare_hidden_states(model: Any, values: dict[str, torch.Tensor], outcome: Outcome) -> None:
    batch = {name: tensor[:1] for name, tensor in _batch().items()}
    given: list[Any] = []
    handle = model.spin.backbone.register_forward_hook(lambda module, args, output: given.append(output))
    with torch.no_grad():
        model.spin.run_backbone(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    handle.remove()
    form = model.spin.layout.form(model.spin.backbone)
    states = getattr(given[0], "hidden_states", None) if not isinstance(given[0], tuple) else None
    total = model.spin.depth
    if states is not None and states[0].dim() == 4 and not form.tokens_first:
        states = [form.by_token(each, None) for each in states]
    if states is None or len(states) < total or any(each.shape != values["hidden.1"].shape for each in states[:total]):
        outcome.notes.append("transformers gives no hidden states of each block to compare with")
        return
    away = [_away(values[f"hidden.{block}"], states[block]) for block in range(total)]
    if len(states) == total + 1 and away[0] > 1e-6:  # some don't give the embeddings, but the last block's output twice
        away = [_away(values[f"hidden.{block}"], states[block - 1]) for block in range(1, total)]
    last = getattr(given[0], "last_hidden_state", None)
    normed = values.get(f"norm.{total}")
    if normed is None and outcome.model_type not in MORE_AFTER:
        normed = values[f"hidden.{total}"]  # nothing follows
    if last is not None and normed is not None and last.shape == normed.shape:
        away.append(_away(normed, last))
    wrong = [f"{difference:.1g}" for difference in away if not difference <= 1e-6]  # NaN is wrong, too
    assert not wrong, f"{len(wrong)} taps are not transformers' own (away by {', '.join(wrong)})"


def _calibrate(whole: Any, outcome: Outcome, folder: Path) -> Any:
    total = whole.spin.depth
    tokenizer, rows = builders.make_tokenizer(), builders.make_sentiment_rows(64)
    if (getattr(whole.config.backbone_config, "type_vocab_size", 0) or 0) < 2:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    depths = [depth for depth in (total // 2, total - 1, 1) if 1 <= depth < total]
    reasons = {depth: why_whole(whole.spin.backbone, whole.spin.layout, depth) for depth in depths}
    depth = next((depth for depth, reason in reasons.items() if not reason), total)
    if depth == total:
        outcome.notes.append(f"all blocks are kept: {next(iter(reasons.values()), 'there is one')}")
    model = SpinForSequenceClassification.from_backbone(copy.deepcopy(whole.spin.backbone))
    spin_calibrate(model, tokenizer, rows, depths=[depth], **QUICK)
    assert model.spin.depth <= depth, f"{model.spin.depth} blocks are left, not {depth}"
    batch = tokenizer(rows["text"][:6], padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        cut = model(**inputs).logits
    standardizer = model.spin.standardizer
    whole.config.batching = model.config.batching
    whole.spin.set_features(model.spin.feature_groups(), standardizer.mean, standardizer.scale, depth=total)
    whole.set_head(model.score.weight, model.score.bias)
    whole.config.logit_temperature = model.config.logit_temperature
    with torch.no_grad():
        full = whole(**inputs).logits
    assert torch.isfinite(cut).all(), "logits are not finite"
    assert torch.equal(cut, full), f"truncated to {model.spin.depth} blocks, logits are {_away(cut, full):.1g} away"
    model.save_pretrained(folder)
    save_file({**inputs, "logits": cut}, folder / "expected.safetensors")
    return model


def _compare_batches(model: Any, outcome: Outcome) -> None:
    if model.config.batching != "padded":
        outcome.notes.append(
            {
                "equal_length": "padding changes its features: batches of one length",
                "single": "examples of a batch change each other: one text at a time",
            }[model.config.batching]
        )
    batch = _batch()
    shortest = next(tokens for tokens in (1, 2, 4, 5, 8) if _reads(model, batch["input_ids"][:1, :tokens]))
    if shortest > 1:
        outcome.notes.append(f"can't read texts of fewer than {shortest} tokens")
    mask = (torch.arange(12) < batch["attention_mask"].sum(1).clamp_min(shortest)[:, None]).long()
    ids = torch.randint(4, builders.SIZE - 8, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    lengths = mask.sum(1).tolist()
    wider = torch.nn.functional.pad
    variants = {
        "padded right": (wider(ids, (0, 3)), wider(mask, (0, 3))),
        "padded left": (
            torch.stack([row.roll(ids.shape[1] - length) for row, length in zip(ids, lengths, strict=True)]),
            torch.stack([row.roll(ids.shape[1] - length) for row, length in zip(mask, lengths, strict=True)]),
        ),
        "batched": (ids, mask),
    }
    with torch.no_grad():
        alone = torch.cat(
            [model(ids[row : row + 1, :n], mask[row : row + 1, :n]).logits for row, n in enumerate(lengths)]
        )
        for name, (some_ids, some_mask) in variants.items():
            away = _away(model(some_ids, some_mask).logits, alone) / max(1.0, alone.abs().max().item())
            assert away <= 1e-4, f"{name}, logits are {away:.1g} away from those of each text alone"


def _reads(model: Any, ids: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model(ids, torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


def _away(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item() if one.shape == other.shape else float("inf")
