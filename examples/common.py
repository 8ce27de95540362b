"""What the examples share: their options, reading the data sets, saving with a card, and a table."""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sklearn.model_selection import train_test_split

from spin_hf.demo import BACKBONE_ID, backbone_folder, load_split
from spin_hf.hub import write_card

Rows = list[dict[str, Any]]
SEED = 0


def parser(doc: str | None, *, data: bool = False, rows: int | None = None, out: str | None = None) -> Any:
    """The options that examples have: ``--data`` where public data is needed, ``--rows``, ``--out``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        made.add_argument("--data", type=Path, required=True, help="folder with NAME/{train,validation,test}.jsonl.gz")
    made.add_argument("--rows", type=int, default=rows, help=f"most rows of each split (default: {rows or 'all'})")
    if out is not None:
        made.add_argument("--out", type=Path, default=Path(out), help=f"folder to write to (default: {out})")
    return made


def measure_or_show(made: Any, run: Callable[[Any], None], show: Callable[[Path], str], results: str) -> None:
    """The main program of a table of results: with ``--show`` print what there is, else measure what is missing."""
    made.add_argument("--results", type=Path, default=Path(__file__).parent / results)
    made.add_argument("--show", action="store_true", help="print the table of the results so far")
    chosen = made.parse_args()
    if chosen.show:
        print(show(chosen.results))
    elif chosen.data is None:
        made.error("--data is needed: the folder with the data sets")
    else:
        run(chosen)


def read_split(folder: Path, name: str, split: str) -> Rows:
    """The rows of ``folder/name/split.jsonl.gz``."""
    with gzip.open(folder / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load(folder: Path, name: str, rows: int | None = None) -> tuple[Rows, Rows, Rows]:
    """Train, validation and test of a public set; a fifth of train validates where there is no split for it."""
    train, test = read_split(folder, name, "train"), read_split(folder, name, "test")
    if (folder / name / "validation.jsonl.gz").exists():
        validation = read_split(folder, name, "validation")
    else:
        train, validation = hold_out(train)
    return draw(train, rows), draw(validation, rows), draw(test, rows)


def load_demo(rows: int | None = None) -> tuple[Rows, Rows, Rows]:
    """Train, validation and test of the customer messages that come with the package."""
    train, validation, test = (draw(load_split(split), rows) for split in ("train", "validation", "test"))
    return train, validation, test


def hold_out(train: Rows) -> tuple[Rows, Rows]:
    """Four fifths to train on and one to choose by, with equal shares of every label."""
    labels = [row["label"] for row in train]
    kept, held_out = train_test_split(train, test_size=0.2, random_state=SEED, stratify=labels)
    return kept, held_out


def draw(rows: Rows, count: int | None) -> Rows:
    """So many rows at most, drawn with a fixed seed."""
    return rows if count is None or count >= len(rows) else random.Random(SEED).sample(rows, count)


def save(model: Any, tokenizer: Any, folder: Path, *, dataset: str, **facts: Any) -> None:
    """Write model, tokenizer and card; ``facts`` are the calibration's ``result`` and the scores of the ``test``."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The copy of MiniLM that the demo extra installs lies in a folder, so the card is told where it came from.
    write_card(folder, backbone=backbone_folder(), base_model=BACKBONE_ID, dataset=dataset, language="en", **facts)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as aligned text; floats with four digits."""
    lines = [list(head), *([f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *rest = widths
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], rest, strict=True))])
        for line in lines
    )
