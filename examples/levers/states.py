"""One forward over a data set: the hidden states of every token, and statistics of every tap, in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from spin_hf import SpinForSequenceClassification
from spin_hf.calibration.extraction import encode, pad, plan_batches, window
from spin_hf.taps import Tap, tap_width

STATISTICS = ("mean", "max", "min", "std", "top3", "ends", "halves")
LAST = "last"  # token; read where it is asked for alone
_OUTPUT_PROJECTIONS = ("attention.output.dense", "self_attn.o_proj", "attn.c_proj", "attention.dense", "out_proj")


@dataclass(frozen=True)
class Texts:
    """What a folder holds: labels, tokens of each text, hidden states ``(tokens, width)``, statistics of the taps."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, list]:
        return json.loads((self.folder / "about.json").read_text(encoding="utf-8"))

    @cached_property
    def labels(self) -> np.ndarray:
        return np.asarray(self.about["labels"])

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each text's tokens begin, and where the last one's end."""
        return np.concatenate([[0], np.cumsum(self.about["lengths"])])

    def places(self, kind: str) -> list[str]:
        return [name for name in self.about["taps"] if name.startswith(f"{kind}.")]

    def states(self, tap: str) -> np.ndarray:
        return np.load(self.folder / f"{tap}.tokens.npy", mmap_mode="r")

    @cached_property
    def _on_device(self) -> dict[str, Tensor]:
        return {}

    def on(self, device: torch.device, tap: str) -> Tensor:
        """The states of all tokens, ``(tokens, width)`` in float16; a GPU holds them from the first call on."""
        if device.type == "cpu":
            return torch.from_numpy(np.load(self.folder / f"{tap}.tokens.npy", mmap_mode="c"))
        if tap not in self._on_device:
            self._on_device[tap] = torch.from_numpy(np.array(self.states(tap))).to(device)
        return self._on_device[tap]

    def padded(self, rows: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Numbers of the tokens of some texts, and the mask ``(texts, tokens)`` that they fill."""
        starts = torch.from_numpy(self.starts).to(device)
        own = torch.tensor(rows, device=device)
        first, lengths = starts[own], starts[own + 1] - starts[own]
        position = torch.arange(int(lengths.max()), device=device)
        mask = position < lengths[:, None]
        return (first[:, None] + position)[mask], mask

    def pooled(self, tap: str, statistic: str) -> Tensor:
        return torch.from_numpy(np.load(self.folder / f"{tap}.{statistic}.npy")).float()

    def batches(self, tokens: int = 4096) -> list[list[int]]:
        return plan_batches(self.about["lengths"], tokens)


def statistics(values: Tensor, mask: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Some of :data:`STATISTICS` of the tokens, ``(texts, width)``, of right-padded ``(texts, tokens, width)``."""
    values, real = values.float(), mask.bool()
    lengths = mask.sum(1, keepdim=True)
    position = torch.arange(values.shape[1], device=values.device)
    first = position < (lengths + 1) // 2
    parts = torch.stack([part / part.sum(1, keepdim=True).clamp_min(1) for part in (real, first, real & ~first)], 1)
    filled = values.masked_fill(~real[..., None], 0.0)
    mean, start, end = torch.bmm(parts, filled).unbind(1)
    found = {"mean": mean, "halves": end - start}
    if "max" in names or "top3" in names:
        without = values.masked_fill(~real[..., None], -torch.inf)
        found["max"] = without.amax(1)
        if "top3" in names:
            top = without.topk(min(3, values.shape[1]), dim=1).values
            found["top3"] = top.masked_fill(top.isinf(), 0.0).sum(1) / lengths.clamp_max(3)
    if "min" in names:
        found["min"] = values.masked_fill(~real[..., None], torch.inf).amin(1)
    if "std" in names:
        found["std"] = (torch.bmm(parts[:, :1], filled.square())[:, 0] - mean.square()).clamp_min(0).sqrt()
    last = values[torch.arange(len(values), device=values.device), lengths[:, 0] - 1]
    found |= {LAST: last, "ends": last - values[:, 0]}
    return {name: found[name] for name in names}


def read_of(tap: str) -> Sequence[str]:
    """Statistics to read of a tap: the three best of many neurons' tokens take longer than the forward."""
    if tap.startswith("attn"):
        return ("mean", "max")
    return [name for name in STATISTICS if name != "top3" or not tap.startswith("ffn")]


class Backbone:
    """Forwards of a frozen backbone, with a function that reads each tap ``(texts, tokens, width)``."""

    def __init__(self, path: str, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = SpinForSequenceClassification.from_backbone(path).to(device).eval()
        self.device = device
        backbone, layout = self.model.spin.backbone, self.model.spin.layout
        self.taps = list(layout.taps(backbone))
        self.widths = {str(tap): tap_width(backbone, layout, tap) for tap in self.taps}
        self.projections = [m for name, m in backbone.named_modules() if name.endswith(_OUTPUT_PROJECTIONS)]
        for block, module in enumerate(self.projections, 1):
            self.widths[f"attn.{block}"] = module.weight.shape[1] if isinstance(module, nn.Linear) else 0

    def encode(self, texts: list[str], max_length: int, prompt: str | None = None) -> list[list[int]]:
        """Tokens of the texts, or of a prompt around each, of which the text alone is cut."""
        limit = min(max_length, window(self.tokenizer, self.model) or max_length)
        if prompt is None:
            return list(encode(self.tokenizer, texts, None, limit).input_ids)
        before, after = prompt.split("{text}")
        start = before.rstrip(" ")  # a space belongs to the token after it
        spaced = [before[len(start) :] + text for text in texts]
        first = self.tokenizer(start)["input_ids"]
        last, every = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (after, spaced))
        return [first + ids[: limit - len(first) - len(last)] + last for ids in every]

    @torch.no_grad()
    def forwards(
        self, ids: list[list[int]], read: Callable[[list[int], str, Tensor, Tensor], None], budget: int = 8192
    ) -> Iterator[list[int]]:
        """Run all texts; ``read`` is given the rows, the tap's name, values and mask. Yields the rows that are done."""
        spin = self.model.spin
        lengths = list(map(len, ids))
        for rows in plan_batches(lengths, budget):
            batch = pad([ids[row] for row in rows], self.tokenizer.pad_token_id).to(self.device)
            mask = pad([[1] * lengths[row] for row in rows], 0).to(self.device)

            def take(tap: Tap, values: Tensor, mask: Tensor, rows: list[int] = rows) -> list[Tensor]:
                read(rows, str(tap), values, mask)
                return []

            def hook(block: int, mask: Tensor = mask, rows: list[int] = rows) -> Callable:
                return lambda module, args: read(rows, f"attn.{block}", args[0], mask)

            handles = [m.register_forward_pre_hook(hook(i)) for i, m in enumerate(self.projections, 1)]
            with spin.hooked(self.taps):
                spin.pooled(dict.fromkeys(self.taps, ()), take, mask, batch, None, windows=None)
            for handle in handles:
                handle.remove()
            yield rows


def extract(
    path: str,
    texts: list[str],
    labels: list,
    folder: Path,
    device: str,
    max_length: int,
    kinds: Sequence[str],
    prompt: str | None = None,
) -> Texts:
    """Fill the folder, unless it is filled: float16, as this is for choosing between levers.

    Taps that are not of these kinds are left out, unless all kinds are asked for: then attention outputs come too.

    Args:
        prompt: around each text, in the place of ``{text}``; then the last token of each tap is read, and nothing else.

    Raises:
        ValueError: if the folder was filled with fewer kinds, or with another prompt.
    """
    if (folder / "about.json").exists():
        found = Texts(folder)
        if missing := [kind for kind in kinds if not found.places(kind)]:
            raise ValueError(f"{folder} was filled without {', '.join(missing)}. Remove it and run again.")
        if found.about.get("prompt") != prompt:
            raise ValueError(f"{folder} was filled with another prompt. Remove it and run again.")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    backbone = Backbone(path, device)
    ids = backbone.encode(texts, max_length, prompt)
    lengths = list(map(len, ids))
    starts = np.concatenate([[0], np.cumsum(lengths)])

    def file(name: str, *shape: int) -> np.ndarray:
        return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape)

    wanted = ("hidden", "norm") if list(kinds) == ["hidden"] else ("hidden", "norm", "ffn", "attn")
    widths = {name: width for name, width in backbone.widths.items() if width and name.split(".")[0] in wanted}
    of_tap = {tap: read_of(tap) if prompt is None else [LAST] for tap in widths}
    tokens = {}
    if prompt is None:
        tokens = {t: file(f"{t}.tokens", int(starts[-1]), width) for t, width in widths.items() if t[0] in "hn"}
    pooled = {(t, s): file(f"{t}.{s}", len(ids), width) for t, width in widths.items() for s in of_tap[t]}

    def read(rows: list[int], tap: str, values: Tensor, mask: Tensor) -> None:
        if tap not in widths:
            return
        for statistic, found in statistics(values, mask, of_tap[tap]).items():
            pooled[tap, statistic][rows] = found.half().cpu().numpy()
        if tap in tokens:
            states = values.half().cpu().numpy()
            for row, own in zip(rows, states, strict=True):
                tokens[tap][starts[row] : starts[row + 1]] = own[: lengths[row]]

    for _ in backbone.forwards(ids, read):
        pass
    names = sorted(set(labels))
    about = {"labels": [names.index(label) for label in labels], "lengths": lengths, "taps": list(widths), "ids": ids}
    (folder / "about.json").write_text(json.dumps(about | {"prompt": prompt}), encoding="utf-8")
    return Texts(folder)
