"""Which gates to learn: the measurement behind ``spin_hf.training.add_gates``.

On a calibrated MiniLM with stored features, head and gates train together from the calibrated set under

- ``l1``: non-negative gates with an L1 price and a projected step, as ``spin_hf.gates`` has them;
- ``l0``: hard-concrete gates (Louizos et al. 2018, their beta, gamma and zeta), nearly open at first.

Both take the rate ``--lr`` for gates and ``--head-lr`` for the head, linearly to zero. As a control, ``cut`` keeps the
columns of the calibrated head with the largest norm, as many as ``l1`` kept. One JSON line a run, scored on validation.

    python examples/benchmarks/gates.py --data DATA --set sst2
    python examples/benchmarks/gates.py --show results.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import results
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from accuracy_table import load

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.demo import backbone_folder
from spin_hf.gates import SPEED, Gates
from spin_hf.training import store_features

PENALTIES = {"l1": (3e-4, 1e-3, 2e-3, 3e-3), "l0": (1e-3, 2e-3, 3e-3, 5e-3)}


class HardConcrete(nn.Module):
    """Gates that are 0, 1 or between at random, with a differentiable probability of not being 0."""

    beta, low, high = 2 / 3, -0.1, 1.1

    def __init__(self, num_features: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.weight = nn.Parameter(torch.full((num_features,), math.log(9.0)))

    def _stretch(self, gate: Tensor) -> Tensor:
        return (gate * (self.high - self.low) + self.low).clamp(0, 1)

    def values(self) -> Tensor:
        return self._stretch(self.weight.sigmoid())

    def penalty(self) -> Tensor:
        return self.strength * (self.weight - self.beta * math.log(-self.low / self.high)).sigmoid().sum()

    def forward(self, features: Tensor) -> Tensor:
        noise = torch.rand_like(self.weight).clamp(1e-6, 1 - 1e-6).logit()
        return features * self._stretch(((noise + self.weight) / self.beta).sigmoid())


def train(kind: str, penalty: float, seed: int, head: nn.Linear, data: Any, arguments: argparse.Namespace) -> dict:
    """One run; the share of features kept, and how well they do without any fit afterwards."""
    (x, y), validation = data
    torch.manual_seed(seed)
    score = nn.Linear(head.in_features, head.out_features)
    score.load_state_dict(head.state_dict())
    gates = (Gates if kind == "l1" else HardConcrete)(head.in_features, penalty)
    groups = [
        {"params": gates.parameters(), "lr": arguments.lr / (SPEED if kind == "l1" else 1)},
        {"params": score.parameters(), "lr": arguments.head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = arguments.epochs * math.ceil(len(x) / arguments.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(arguments.epochs):
        for rows in torch.randperm(len(x)).split(arguments.batch):
            loss = F.cross_entropy(score(gates(x[rows])), y[rows]) + gates.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        values = gates.values()
        kept = int((values > 0).sum())
        return {"kept": kept, **measure(score.weight * values, score.bias, *validation)}


def cut(head: nn.Linear, keep: int, validation: tuple[Tensor, Tensor]) -> dict:
    """The calibrated head without its smallest columns."""
    with torch.no_grad():
        largest = head.weight.norm(dim=0).topk(keep).indices
        weight = torch.zeros_like(head.weight)
        weight[:, largest] = head.weight[:, largest]
        return {"kept": keep, **measure(weight, head.bias, *validation)}


def measure(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> dict:
    logits = F.linear(x, weight, bias)
    accuracy = float((logits.argmax(1) == y).float().mean())
    return {"accuracy": round(100 * accuracy, 2), "loss": round(float(F.cross_entropy(logits, y)), 4)}


def run(arguments: argparse.Namespace) -> None:
    train_rows, validation_rows, _ = load(arguments.data, arguments.set)
    folder = str(backbone_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = SpinForSequenceClassification.from_backbone(folder)
    options = json.loads(arguments.options)
    result = spin_calibrate(model, tokenizer, train_rows, validation_rows, progress=sys.stderr.isatty(), **options)
    sys.stderr.write(f"{result}\n")
    stored = [store_features(model, tokenizer, rows)[:] for rows in (train_rows, validation_rows)]
    data = [(part["features"], part["labels"]) for part in stored]
    torch.set_num_threads(1)

    rows: list[dict[str, Any]] = []

    def note(kind: str, penalty: float, seed: int, found: dict) -> None:
        rows.append({"set": arguments.set, "kind": kind, "penalty": penalty, "seed": seed, **found})
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()

    note("calibrated", 0.0, 0, cut(model.score, model.config.num_features, data[1]))
    for kind, penalties in PENALTIES.items():
        for penalty in penalties:
            for seed in range(arguments.seeds):
                found = train(kind, penalty, seed, model.score, data, arguments)
                note(kind, penalty, seed, found)
                if kind == "l1":
                    note("cut", penalty, seed, cut(model.score, found["kept"], data[1]))
    results.write_section(arguments.record, f"Gates: {arguments.set}", means(rows))


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["kind"], row["penalty"]), []).append(row)
    return [
        {
            "set": name,
            "gates": kind,
            "penalty": penalty,
            **{key: round(statistics.mean(row[key] for row in own), 3) for key in ("kept", "accuracy", "loss")},
        }
        for (name, kind, penalty), own in groups.items()
    ]


if __name__ == "__main__":
    parser = results.parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder with sst2 and trec")
    parser.add_argument("--set", choices=("sst2", "trec"), default="sst2")
    parser.add_argument("--options", default="{}", help="JSON: options of spin_calibrate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--head-lr", type=float, default=1e-3)
    parser.add_argument("--show", type=Path, help="print the table of a file of results")
    chosen = parser.parse_args()
    if chosen.show:
        lines = chosen.show.read_text(encoding="utf-8").splitlines()
        sys.stdout.write(results.table(means([json.loads(line) for line in lines])) + "\n")
    elif chosen.data is None:
        parser.error("--data is needed: the folder with the data sets")
    else:
        run(chosen)
