"""Accuracy of six ways to classify with a frozen model, on public data sets: the table in this folder's README.

Every choice (C of the baselines, everything in SPIN) is made on validation; test is scored once per row and method.
Results are appended to a JSON-lines file and skipped when already there, so a stopped run goes on.

    python examples/accuracy_table.py --data DATA --model minilm --sets sst2 trec edos imdb
    python examples/accuracy_table.py --data DATA --model PATH/TO/SmolLM2-135M --sets sst2 trec
    python examples/accuracy_table.py --show

Several processes share a calibration: torchrun --nproc-per-node 8 examples/accuracy_table.py ... --cache DIR
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.demo import backbone_folder
from spin_hf.prediction import predict

METHODS = ("tfidf", "last layer", "best probe", "spin paper", "spin mean max", "spin")
SETS = {"sst2": "accuracy", "trec": "accuracy", "edos": "macro_f1", "imdb": "accuracy"}
IMDB_ROWS = 5000
SEED = common.SEED
MAIN = os.environ.get("RANK", "0") == "0"  # of the processes of a launch, the one that writes
CS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def load(folder: Path, name: str) -> tuple[list[dict], list[dict], list[dict]]:
    """Train, validation, test; IMDb is cut to 5000 + 5000; a fifth of train validates where there is no split."""
    if name != "imdb":
        return common.load(folder, name)
    draw = np.random.default_rng(SEED)
    parts = (common.read_split(folder, name, split) for split in ("train", "test"))
    train, test = ([rows[i] for i in draw.permutation(len(rows))[:IMDB_ROWS]] for rows in parts)
    return *common.hold_out(train), test


def score(metric: str, labels: Any, predictions: Any) -> float:
    if metric == "macro_f1":
        return float(f1_score(labels, predictions, average="macro"))
    return float(accuracy_score(labels, predictions))


def best_on_validation(
    make: Callable[[float], Any], metric: str, x: list[Any], y: list[list[Any]]
) -> tuple[float, float, str]:
    """Fit for every C on train, choose on validation, report test."""
    fitted = [(C, make(C).fit(x[0], y[0])) for C in CS]
    C, model = max(fitted, key=lambda pair: score(metric, y[1], pair[1].predict(x[1])))
    return score(metric, y[1], model.predict(x[1])), score(metric, y[2], model.predict(x[2])), f"C={C:g}"


def tfidf(texts: list[list[str]], y: list[list[Any]], metric: str) -> tuple[float, float, str]:
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2).fit(texts[0])
    x = [vectors.transform(part) for part in texts]
    return best_on_validation(lambda C: LogisticRegression(C=C, max_iter=2000), metric, x, y)


@torch.no_grad()
def last_layer(path: str, texts: list[list[str]], y: list[list[Any]], metric: str, device: str) -> Any:
    """Mean of ``last_hidden_state`` over the tokens, standardised, logistic regression: no code of spin_hf."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModel.from_pretrained(path).eval().to(device)
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    x = []
    for part in texts:
        rows: list[Any] = [None] * len(part)
        order = sorted(range(len(part)), key=lambda i: -len(part[i]))
        for start in range(0, len(order), 32):
            index = order[start : start + 32]
            batch = tokenizer(
                [part[i] for i in index],
                padding=True,
                truncation=True,
                max_length=limit,
                padding_side="right",
                return_tensors="pt",
            ).to(device)
            mask = batch["attention_mask"][..., None].float()
            mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            for i, row in zip(index, mean.cpu().numpy(), strict=True):
                rows[i] = row
        x.append(np.stack(rows))
    return best_on_validation(
        lambda C: make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000)), metric, x, y
    )


def spin(path: str, data: Any, metric: str, device: str, cache: Path, **options: Any) -> tuple[float, float, str]:
    train, validation, test = data
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = SpinForSequenceClassification.from_backbone(path).to(device)
    result = spin_calibrate(
        model, tokenizer, train, validation, metric=metric, cache_dir=cache, progress=sys.stderr.isatty(), **options
    )
    if MAIN:
        sys.stderr.write(f"{result}\n")
    prediction = predict(model, tokenizer, [row["text"] for row in test])
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if isinstance(test[0]["label"], str):
        labels: Any = [names.index(row["label"]) for row in test]
    else:
        labels = [row["label"] for row in test]
    chosen = result.chosen
    detail = f"{chosen.name}; {chosen.num_features} features; {_seconds(result.seconds)}"
    return chosen.score, score(metric, labels, prediction.labels), detail


def _seconds(stages: Any) -> str:
    return ", ".join(f"{name} {value:.0f} s" for name, value in stages.items())


def run(arguments: argparse.Namespace) -> None:
    name = "MiniLM" if arguments.model == "minilm" else Path(arguments.model).name
    done = {(row["model"], row["set"], row["method"]) for row in read_results(arguments.results)}
    for dataset in arguments.sets:
        data = load(arguments.data, dataset)
        with tempfile.TemporaryDirectory() as scratch:
            for method in arguments.methods or METHODS:
                if (name, dataset, method) in done:
                    continue
                start = time.perf_counter()
                validation, test, detail = measure(method, dataset, data, arguments, arguments.cache or Path(scratch))
                row = {
                    "model": name,
                    "set": dataset,
                    "method": method,
                    "metric": SETS[dataset],
                    "rows": [len(part) for part in data],
                    "validation": round(100 * validation, 2),
                    "test": round(100 * test, 2),
                    "seconds": round(time.perf_counter() - start, 1),
                    "detail": detail,
                }
                if MAIN:
                    with arguments.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    sys.stderr.write(f"{row}\n")


def measure(
    method: str, dataset: str, data: Any, arguments: argparse.Namespace, cache: Path
) -> tuple[float, float, str]:
    """Validation score, test score and what was chosen."""
    metric = SETS[dataset]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = str(backbone_folder()) if arguments.model == "minilm" else arguments.model
    texts = [[row["text"] for row in part] for part in data]
    labels = [[row["label"] for row in part] for part in data]
    if method == "tfidf":
        return tfidf(texts, labels, metric)
    if method == "last layer":
        return last_layer(path, texts, labels, metric, device)
    options: dict[str, Any] = {}
    if method == "best probe":
        options = {"etas": [], "poolings": ["mean", "max"]}
    elif method == "spin mean max":
        options = {"poolings": ["mean", "max"]}
    elif method == "spin paper":
        options = {"preset": "paper", "poolings": arguments.paper_poolings}
    return spin(path, data, metric, device, cache, **options)


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def show(path: Path) -> str:
    """The results as a Markdown table of test scores, validation in brackets."""
    rows = read_results(path)
    cells = {(row["model"], row["set"], row["method"]): f"{row['test']:.1f} ({row['validation']:.1f})" for row in rows}
    lines = ["| | " + " | ".join(METHODS) + " |", "|" + " --- |" * (len(METHODS) + 1)]
    for model, dataset in dict.fromkeys((row["model"], row["set"]) for row in rows):
        values = [cells.get((model, dataset, method), "") for method in METHODS]
        lines.append(f"| {model}, {dataset} | " + " | ".join(values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with sst2, trec, edos and imdb")
    parser.add_argument("--model", default="minilm", help="minilm, or the folder of a model")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--paper-poolings", nargs="+", default=None, help="all four by default")
    parser.add_argument("--cache", type=Path, help="keep extracted features here")
    common.measure_or_show(parser, run, show, "accuracy_table.jsonl")
