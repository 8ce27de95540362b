"""A cache of Hub repositories made by hand, so that ids resolve offline."""

from __future__ import annotations

from pathlib import Path

import transformers as hf

COMMIT = "a" * 40


def put_in_cache(cache: Path, repo_id: str, *parts: hf.PreTrainedModel, commit: str = COMMIT) -> Path:
    """Store what ``save_pretrained`` writes of each part as a commit of a repository, its ``main``; the snapshot."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for part in parts:
        part.save_pretrained(snapshot)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return snapshot
