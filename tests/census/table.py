"""``ARCHITECTURES.md``: the outcome of the census, type by type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from .by_hand import REASONS
from .checks import Outcome

_CHECKS = """\
1. **Taps found and read.** One `hidden` tap for each block and one for the embeddings, one `ffn` tap for each block
   that has an FFN (or, in a state-space block, an output projection), and one for the final norm where there is one;
   each is read exactly once in a forward.
2. **Values.** The `hidden` taps are transformers' own `output_hidden_states` (before the final norm); the `norm` tap,
   or where there is none the last `hidden` one, is the model's output.
3. **Calibrate, truncate, save.** Calibrated on 64 texts; the logits of the truncated model are those of the whole
   one, to the bit, and so are those of the model that a fresh process loads.
4. **Batches.** The logits of a text are the same alone, in a batch, padded right and padded left (1e-4 relative).
"""

_HINTS = """\
Where structure alone can't tell, these names decide, of a module or of a config's field: `att` (attention),
`expert` without `shared` (routed experts), `norm_emb` (a norm of embeddings), `final_`, `norm`, `ln_f` (a final norm
before the blocks); `num_hidden_layers` (which list holds the blocks), `num_hidden_groups` (blocks that share weights),
`num_kv_shared_layers` (counted from the last block), `hc_mult`, `hc_count`, `altup_num_inputs` (residual streams),
`prompt_length` (positions before the text), `reuse_len` (positions as the first dimension). Where they mislead, name
the places by hand: `from_backbone(..., blocks="encoder.layers", ffn="mlp.down_proj")`.
"""


def totals(outcomes: Sequence[Outcome]) -> str:
    """The counts, in one sentence."""
    built = [outcome for outcome in outcomes if not outcome.left_out]
    passing = [outcome for outcome in built if not outcome.failed]
    return (
        f"{len(outcomes)} model types are in transformers' mappings for causal, masked and sequence-to-sequence "
        f"language models and sequence classification; {len(built)} of them read text and build from a config alone; "
        f"{len(passing)} of those ({len(passing) / max(1, len(built)):.1%}) pass all four checks."
    )


def write_table(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the page."""
    built = [outcome for outcome in outcomes if not outcome.left_out]
    rows = [
        f"| {outcome.model_type} | {_taps(outcome)} | {_passed(outcome)} | {_remarks(outcome)} |" for outcome in built
    ]
    left_out = [f"| {outcome.model_type} | {_cell(outcome.left_out)} |" for outcome in outcomes if outcome.left_out]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    page = [
        "# Architectures",
        "",
        totals(outcomes),
        "",
        f"Made by `make census` with {versions}: every type from a tiny random config, on the CPU, in a process of its "
        "own. Nothing in `spin_hf` knows a model by name; what is found here is found by structure.",
        "",
        _CHECKS,
        _HINTS,
        "## Types",
        "",
        "| type | taps: hidden, ffn, norm | passes | remarks |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "## Left out",
        "",
        "| type | why |",
        "| --- | --- |",
        *left_out,
        "",
    ]
    path.write_text("\n".join(page), encoding="utf-8")


def _taps(outcome: Outcome) -> str:
    return f"{outcome.hidden}, {outcome.ffn}, {outcome.norm}" if outcome.hidden else ""


def _passed(outcome: Outcome) -> str:
    return "all" if not outcome.failed else ", ".join(map(str, sorted(outcome.passed))) or "none"


def _remarks(outcome: Outcome) -> str:
    failed = [REASONS.get(outcome.model_type, why) for _, why in sorted(outcome.failed.items())]
    return _cell("; ".join([*failed[:1], *outcome.notes]))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
