"""Sorting texts by length against the stock pipeline, on reviews (IMDb) and sentences (SST-2) in random order.

The pipelines take turns, and the median of each one's ratio to ours is shown; all must give the same labels.

    python examples/benchmarks/pipeline.py --data DATA [--model CLASSIFIER]
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path

import results
import torch
from shapes import make_classifier
from transformers import pipeline

from spin_hf import SpinForSequenceClassification, SpinTextClassificationPipeline
from spin_hf.demo import backbone_folder
from spin_hf.loading import load_classifier, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import draw, read_split


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with imdb and sst2")
    parser.add_argument("--model", help="folder of a classifier; MiniLM with random neurons by default")
    parser.add_argument("--reviews", type=int, default=50)
    parser.add_argument("--sentences", type=int, default=150)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 32], help="batch sizes of the stock pipeline")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.model:
        model, tokenizer = load_classifier(arguments.model, arguments.device, False)
    else:
        model = SpinForSequenceClassification.from_backbone(backbone_folder()).to(arguments.device)
        model, tokenizer = (
            make_classifier(model, model.spin.depth, keep=model.spin.depth),
            load_tokenizer(backbone_folder()),
        )
    rows = [
        *draw(read_split(arguments.data, "imdb", "test"), arguments.reviews),
        *draw(read_split(arguments.data, "sst2", "test"), arguments.sentences),
    ]
    texts = [row["text"] for row in random.Random(0).sample(rows, len(rows))]
    options = {"model": model.eval(), "tokenizer": tokenizer, "device": arguments.device}
    stock = pipeline("text-classification", **options)
    ours = pipeline("text-classification", pipeline_class=SpinTextClassificationPipeline, **options)
    runs = {"sorted, by default": lambda: ours(texts, truncation=True)}
    for size in arguments.sizes:
        runs[f"stock, batch_size={size}"] = lambda size=size: stock(texts, truncation=True, batch_size=size)
    clock = time.perf_counter if arguments.device == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    answers = {}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            began = clock()
            answers[name] = run()
            seconds[name].append(clock() - began)
    first = next(iter(runs))
    found = [
        {
            "pipeline": name,
            "seconds": round(statistics.median(own), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(own, seconds[first], strict=True)), 3),
            "same_labels": [each["label"] for each in answers[name]] == [each["label"] for each in answers[first]],
            "largest_difference": max(
                abs(a["score"] - b["score"]) for a, b in zip(answers[name], answers[first], strict=True)
            ),
            "texts": len(texts),
            "rounds": arguments.rounds,
        }
        for name, own in seconds.items()
    ]
    results.report(arguments.record, "Pipeline: mixed lengths", found, on=arguments.device)


if __name__ == "__main__":
    main()
