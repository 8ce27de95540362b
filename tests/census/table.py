"""``ARCHITECTURES.md``: the outcome of the census, type by type."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from .checks import Outcome


def write_table(outcomes: list[Outcome], path: Path | None) -> str:
    """Write the page, and return its totals."""
    built = [outcome for outcome in outcomes if not outcome.left_out]
    all_four = [outcome for outcome in built if not outcome.failed]
    share = len(all_four) / max(1, len(built))
    totals = (
        f"{len(outcomes)} model types in transformers' mappings for causal, masked and sequence-to-sequence language "
        f"models and for sequence classification; {len(built)} of them read `input_ids` and build from a random config; "
        f"{len(all_four)} of those ({share:.1%}) pass all four checks."
    )
    if path is not None:
        path.write_text(_page(totals, outcomes), encoding="utf-8")
    return totals


def _page(totals: str, outcomes: list[Outcome]) -> str:
    return totals
