"""Ways to adapt one pretrained model to a data set: reading it, training a head, gates, LoRA, fine-tuning, SetFit.

Every method that trains gets a small grid of learning rates, tried with the first seed, and its best epoch is kept,
both by validation; test is scored with the chosen rate alone. Seconds are those of one run at that rate, from texts to
classifier; what starts from a calibrated model includes the calibration. Results are appended to a JSON-lines file and
skipped when already there, so a stopped run goes on. SetFit needs `pip install setfit`.

With ``--per-class N`` a method gets N texts of each class, drawn by the seed, and nothing to choose by: SPIN holds out
some of them or makes folds, SetFit takes its own default rate and number of steps, fine-tuning the rate that all texts
chose (which must be there already) and 300 steps.

    python examples/adaptation_table.py --data DATA --model minilm --sets sst2 trec edos imdb
    python examples/adaptation_table.py --data DATA --model PATH/TO/SmolLM2-135M
    python examples/adaptation_table.py --data DATA --per-class 8 32 128 512 --methods SPIN SetFit "full fine-tuning"
    python examples/adaptation_table.py --show
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from accuracy_table import SETS, load, read_results
from adaptations import CUDA, DEVICE, METHODS, SPINS, Setting, calibrate, labels, scored
from transformers import AutoTokenizer, set_seed

from spin_hf.demo import backbone_folder


def measure(
    method: str, setting: Setting, rates: tuple[float, ...], rows: dict[str, list[dict]], device: str
) -> dict[str, Any]:
    """One row: of the rates the one with the best score on validation."""
    make = METHODS[method][0]
    if "SPIN" in method or "LoRA" in method:
        _, seconds_before = calibrate(setting, method if method in SPINS else "SPIN")
    tried = []
    for rate in rates:
        set_seed(setting.seed)
        start = time.perf_counter()
        outcome = make(setting._replace(rate=rate))
        seconds = time.perf_counter() - start
        tried.append((scored(outcome, rows["validation"], setting.metric), seconds, rate, outcome))
        sys.stderr.write(f"{method}, seed {setting.seed}, rate {rate:g}: {100 * tried[-1][0]:.2f}, {seconds:.0f} s\n")
    value, seconds, rate, outcome = max(tried, key=lambda entry: entry[0])
    return {
        "method": method,
        "seed": setting.seed,
        "rate": rate,
        "validation": round(100 * value, 2),
        "test": round(100 * scored(outcome, rows["test"], setting.metric), 2),
        "seconds": round(seconds + (seconds_before if "SPIN" in method else 0), 1),
        "parameters": outcome.parameters,
        "note": outcome.note,
        "device": device,
    }


def rates_of(method: str, done: list[dict[str, Any]], here: tuple[str, str, int | None]) -> tuple[float, ...]:
    """Those to try: once a seed has chosen one, that one; on a few texts there is nothing to choose by.

    Raises:
        SystemExit: if the rate of all texts is wanted and not known yet.
    """
    chosen = [row["rate"] for row in done if where(row) == here]
    rates = METHODS[method][1]
    if here[2] is None or len(rates) == 1:
        return (chosen[0],) if chosen else rates
    if method == "SetFit":
        return (2e-5,)  # its default
    whole = [row["rate"] for row in done if where(row) == (*here[:2], None)]
    if not whole:
        raise SystemExit(f"{method} on {here[1]}: measure it with all texts first, which chooses the rate.")
    return (whole[0],)


def draws(method: str) -> bool:
    """Whether another seed gives another result from all texts: what trains does, and what learns token weights."""
    return len(METHODS[method][1]) > 1 or method == "SPIN"


def where(row: dict[str, Any]) -> tuple[str, str, int | None]:
    return row["model"], row["set"], row["per_class"]


def run(arguments: argparse.Namespace) -> None:
    name = "MiniLM" if arguments.model == "minilm" else Path(arguments.model).name
    path = str(backbone_folder()) if arguments.model == "minilm" else arguments.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    runs = [
        (dataset, per_class, method, seed)
        for dataset in arguments.sets
        for per_class in arguments.per_class or [None]
        for method in arguments.methods or METHODS
        for seed in (arguments.seeds if per_class or draws(method) else arguments.seeds[:1])
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for dataset, per_class, method, seed in runs:
            here = (name, dataset, per_class)
            done = [row for row in read_results(arguments.results) if row["method"] == method]
            if seed in [row["seed"] for row in done if where(row) == here]:
                continue
            rows = numbered(dict(zip(("train", "validation", "test"), load(arguments.data, dataset), strict=True)))
            rows = {part: own[: arguments.rows] for part, own in rows.items()}
            few = few_of(rows["train"], per_class, seed) if per_class else None
            own = f"{per_class}-{seed}" if few else f"all-{seed}" if method == "SPIN" and seed else "all"
            work = (arguments.work or Path(scratch)) / f"{name}-{dataset}" / own
            work.mkdir(parents=True, exist_ok=True)
            setting = Setting(
                path,
                tokenizer,
                SETS[dataset],
                few or rows["train"],
                [] if few else rows["validation"],
                work,
                arguments.calibrate_on,
                scratch,
                seed=seed,
            )
            row = measure(method, setting, rates_of(method, done, here), rows, device)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"model": name, "set": dataset, "per_class": per_class, **row}) + "\n")


def numbered(parts: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The rows with whole numbers for labels."""
    names = sorted({row["label"] for row in parts["train"]})
    return {part: [{**row, "label": names.index(row["label"])} for row in rows] for part, rows in parts.items()}


def few_of(rows: list[dict], per_class: int, seed: int) -> list[dict]:
    """So many of each class, or all that a class has, drawn by the seed."""
    draw = random.Random(seed)
    found = []
    for label in sorted(set(labels(rows))):
        own = [row for row in rows if row["label"] == label]
        found += draw.sample(own, min(per_class, len(own)))
    return draw.sample(found, len(found))


def show(path: Path) -> str:
    """The results as Markdown tables: means, and the spread over seeds where there are several."""
    rows = read_results(path)
    lines = [
        "| | | | test | validation | seconds | trained parameters | rate | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    whole = [row for row in rows if row["per_class"] is None]
    for model, dataset, method in dict.fromkeys((row["model"], row["set"], row["method"]) for row in whole):
        mine = [row for row in whole if (row["model"], row["set"], row["method"]) == (model, dataset, method)]
        test, validation = (spread([row[key] for row in mine]) for key in ("test", "validation"))
        seconds = statistics.mean(row["seconds"] for row in mine)
        rate = f"{mine[0]['rate']:g}" if mine[0]["rate"] else ""
        lines.append(
            f"| {model} | {dataset} | {method} | {test} | {validation} | {seconds:.0f} | {mine[0]['parameters']:,} "
            f"| {rate} | {together([row['note'] for row in mine])} |"
        )
    few = [row for row in rows if row["per_class"] is not None]
    sizes = sorted({row["per_class"] for row in few})
    if sizes:
        lines += [
            "",
            "| texts of a class | | | " + " | ".join(map(str, sizes)) + " |",
            "| --- " * (3 + len(sizes)) + "|",
        ]
    for model, dataset, method in dict.fromkeys((row["model"], row["set"], row["method"]) for row in few):
        cells = []
        for size in sizes:
            found = [row["test"] for row in few if (*where(row), row["method"]) == (model, dataset, size, method)]
            cells.append(spread(found) if found else "")
        lines.append(f"| {model} | {dataset} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def together(notes: list[str]) -> str:
    """One note of all seeds, whose numbers go from the least to the largest where nothing else differs."""
    number = r"\d+(?:\.\d+)?"
    if len({re.sub(number, "#", note) for note in notes}) > 1:
        return "; ".join(dict.fromkeys(notes))
    columns = zip(*(re.findall(number, note) for note in notes), strict=True)
    ends = [(min(column, key=float), max(column, key=float)) for column in columns]
    parts = iter(least if least == most else f"{least} to {most}" for least, most in ends)
    return re.sub(number, lambda _: next(parts), notes[0])


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--model", default="minilm", help="minilm, or the folder of a model")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["sst2"])
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--per-class", nargs="+", type=int, help="texts of each class, instead of all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="at most so many of each split, for a trial")
    parser.add_argument("--calibrate-on", default=DEVICE, help="device of the calibration: cpu or cuda")
    parser.add_argument("--work", type=Path, help="keep the calibrated classifier here")
    common.measure_or_show(parser, run, show, "adaptation_table.jsonl")
