"""What the studies share: data sets and models by name, their rows of results, and the features of a data set."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration.extraction import encode, extract, plan_batches, window
from spin_hf.calibration.folds import prepare
from spin_hf.calibration.probes import Labelled, Probe, fit_probes, in_groups
from spin_hf.calibration.store import FeatureStore
from spin_hf.calibration.task import Task
from spin_hf.demo import backbone_folder
from spin_hf.taps import Tap, tap_width

sys.path.append(str(Path(__file__).parents[1]))
import common
from accuracy_table import SETS as SINGLE
from accuracy_table import load as load_set
from accuracy_table import read_results

METRICS = {**SINGLE, "mrpc": "accuracy", "go_emotions": "micro_f1"}
RESULTS = Path(__file__).parents[1] / "findings" / "studies.jsonl"
MAX_LENGTH = 256
BATCH_TOKENS = 8192
SEEDS = (0, 1, 2)

Parts = tuple[common.Rows, common.Rows, common.Rows]


def parser(doc: str | None, *, sets: Sequence[str], rows: int) -> argparse.ArgumentParser:
    """The options that all studies have."""
    made: argparse.ArgumentParser = common.parser(doc, data=True, rows=rows)
    made.add_argument("--test-rows", type=int, help="most rows of test (default: all)")
    made.add_argument("--models", nargs="+", default=["minilm"], help="minilm, or folders of models")
    made.add_argument("--sets", nargs="+", choices=METRICS, default=list(sets))
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--results", type=Path, default=RESULTS, help="rows are appended here, and skipped if there")
    return made


class Study:
    """The rows of one study in the file of results."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        logging.disable_progress_bar()

    def rows(self) -> list[dict[str, Any]]:
        return [row for row in read_results(self.path) if row["study"] == self.name]

    def done(self, **key: Any) -> bool:
        """Whether a row with these values is there."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows())

    def add(self, **row: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"study": self.name, **_rounded(row)}) + "\n")
        sys.stderr.write(f"{self.name}: { {name: row[name] for name in list(row)[:4]} }\n")


def _rounded(value: Any) -> Any:
    """Six digits are enough, and keep the file small."""
    if isinstance(value, dict):
        return {name: _rounded(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(own) for own in value]
    return float(f"{value:.6g}") if isinstance(value, (float, np.floating)) else value


@dataclass(frozen=True)
class Source:
    """A pretrained model by its short name and its folder."""

    name: str
    path: str

    @classmethod
    def of(cls, given: str) -> Source:
        return cls("MiniLM", str(backbone_folder())) if given == "minilm" else cls(Path(given).name, given)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        found = AutoTokenizer.from_pretrained(self.path)
        found.pad_token = found.pad_token or found.eos_token
        return found

    def model(self, parts: Parts, device: str) -> SpinForSequenceClassification:
        """Not calibrated yet; several labels per text where the rows have a list of them."""
        options: dict[str, Any] = {}
        if "labels" in parts[0][0]:
            names = sorted({name for part in parts for row in part for name in row["labels"]})
            options = {"labels": names, "problem_type": "multi_label_classification"}
        return SpinForSequenceClassification.from_backbone(self.path, **options).to(device)


def load(options: Any, name: str) -> Parts:
    """Train and validation of at most ``--rows`` each, and test of at most ``--test-rows``, drawn with a fixed seed."""
    train, validation, test = load_set(options.data, name)
    return (
        common.draw(train, options.rows),
        common.draw(validation, options.rows),
        common.draw(test, options.test_rows),
    )


def sizes(parts: Parts) -> list[int]:
    return list(map(len, parts))


def max_length(source: Source, model: Any) -> int:
    """Tokens per text in all studies, within what the model allows."""
    return min(MAX_LENGTH, window(source.tokenizer(), model) or MAX_LENGTH)


def calibrated(source: Source, parts: Any, metric: str, device: str, **options: Any) -> tuple[Any, Any, Any]:
    """The model that train and validation give, its tokenizer and the calibration's result."""
    model, tokenizer = source.model(parts, device), source.tokenizer()
    options = {"max_length": max_length(source, model), "progress": False, **options}
    return model, tokenizer, spin_calibrate(model, tokenizer, *parts[:2], metric=metric, **options)


@dataclass(frozen=True)
class Features:
    """Pooled activations of every tap for the rows of train, then validation; and their labels."""

    store: FeatureStore
    data: Labelled
    taps: list[Tap]
    device: torch.device

    def groups(self) -> list[list[tuple[Tap, str]]]:
        """Taps and poolings that are solved together."""
        places = [(tap, pooling) for tap in self.taps for pooling in self.store.poolings]
        outputs = self.data.targets.shape[1]
        return in_groups(places, self.store.widths, self.store.rows, self.device, fits=1, outputs=outputs)

    def read(self, group: Sequence[tuple[Tap, str]]) -> list[torch.Tensor]:
        """``(rows, width)`` for each."""
        return [self.store.read(*place, device=self.device) for place in group]

    def probes(self, **options: Any) -> list[list[Probe]]:
        """For each (tap, pooling) its probes at all values of C, the best first; see ``fit_probes``."""
        found = []
        for group in self.groups():
            found += fit_probes(self.read(group), group, self.data, **options)
        return found


@contextmanager
def extracted(
    source: Source, parts: Parts, metric: str, device: str, poolings: Sequence[str] = ("mean",)
) -> Iterator[Features]:
    """Read the backbone once over train and validation; the features are removed in the end."""
    model, tokenizer = source.model(parts, device), source.tokenizer()
    prepared = prepare(model, parts[0], parts[1], None, 0.2, common.SEED)
    task = Task.make(model.config.problem_type, prepared.names, metric, "multinomial")
    labels, rows = prepared.labels, prepared.rows
    weights = task.row_weights(labels, None, None)
    data = Labelled(task, labels, task.targets(labels), weights, prepared.folds, prepared.refit)
    encoded = encode(tokenizer, rows.texts, rows.pairs, max_length(source, model))
    taps = list(model.spin.taps)
    widths = {tap: tap_width(model.spin.backbone, model.spin.layout, tap) for tap in taps}
    batches = plan_batches(encoded.lengths, BATCH_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder), widths=widths, poolings=poolings, batches=batches)
        store.create({})
        extract(model.spin, encoded, store, range(len(batches)), int(tokenizer.pad_token_id), lambda tokens: None)
        del model
        yield Features(store, data, taps, torch.device(device))
        store.close()
