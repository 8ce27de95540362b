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
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import peft
import torch
from accuracy_table import SETS, load, read_results, score
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from spin_hf import SpinForSequenceClassification, lora_targets, spin_calibrate
from spin_hf.demo import backbone_folder
from spin_hf.prediction import predict
from spin_hf.training import add_gates, prune_gates, store_features

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


FEW_STEPS = 300  # of fine-tuning on a few texts, at least
MOST_STEPS = 1000  # of SetFit
MAX_LENGTH = 512
BATCH = 32
SPINS: dict[str, dict[str, Any]] = {
    "SPIN": {},
    "SPIN, mean and max": {"poolings": ["mean", "max"]},
    "SPIN, mean and max, folds": {"poolings": ["mean", "max"], "cv": 5},
    "SPIN, attention": {"poolings": ["attention"]},
    "SPIN, mean, max, attention": {"poolings": ["mean", "max", "attention"]},
}


class Setting(NamedTuple):
    """What a run starts from. ``work`` keeps calibrated classifiers."""

    path: str
    tokenizer: Any
    metric: str
    train: list[dict]
    validation: list[dict]  # empty where a method gets a few texts alone
    work: Path
    calibrate_on: str
    scratch: str
    rate: float = 0.0
    seed: int = 0
    batch: int = BATCH

    @property
    def classes(self) -> int:
        return 1 + max(labels(self.train))


class Outcome(NamedTuple):
    """A finished classifier as a function from texts to labels, and what was trained."""

    predict: Callable[[list[str]], Any]
    parameters: int
    note: str = ""


def scored(outcome: Outcome, rows: list[dict], metric: str) -> float:
    return score(metric, labels(rows), outcome.predict(texts(rows)))


def texts(rows: list[dict]) -> list[str]:
    return [row["text"] for row in rows]


def labels(rows: list[dict]) -> list[int]:
    return [row["label"] for row in rows]


def trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def calibrated(setting: Setting, method: str = "SPIN") -> SpinForSequenceClassification:
    folder, _ = calibrate(setting, method)
    return SpinForSequenceClassification.from_pretrained(folder).to(DEVICE)


def calibrate(setting: Setting, method: str) -> tuple[Path, float]:
    """The folder of the calibrated classifier and the seconds that it took, now or in an earlier run."""
    folder = setting.work / method.replace(", ", "-").replace(" ", "-")
    record = folder / "seconds.json"
    if not record.exists():
        rows = (setting.train, setting.validation or None)
        options = {"metric": setting.metric, "seed": setting.seed, "progress": False, **SPINS[method]}
        start = time.perf_counter()
        model = SpinForSequenceClassification.from_backbone(setting.path).to(setting.calibrate_on)
        result = spin_calibrate(model, setting.tokenizer, *rows, **options)
        seconds = time.perf_counter() - start
        sys.stderr.write(f"{result}\n")
        model.save_pretrained(folder)
        record.write_text(json.dumps(seconds), encoding="utf-8")
    return folder, float(json.loads(record.read_text(encoding="utf-8")))


def trained(model: Any, setting: Setting, data: list[Dataset], *, epochs: int, best_epoch: bool = True) -> Any:
    """The model after ``Trainer``, with the settings that all methods share."""
    if not setting.validation:
        best_epoch, epochs = False, max(epochs, math.ceil(FEW_STEPS / math.ceil(len(setting.train) / BATCH)))
    choosing: dict[str, Any] = {"save_strategy": "no"}
    if best_epoch:
        choosing = {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
        }
    arguments = TrainingArguments(
        setting.scratch,
        num_train_epochs=epochs,
        learning_rate=setting.rate,
        seed=setting.seed,
        per_device_train_batch_size=setting.batch,
        per_device_eval_batch_size=128,
        warmup_steps=0.06,
        bf16=CUDA,
        label_names=["labels"],
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        **choosing,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data[0],
        eval_dataset=data[1] if best_epoch else None,
        data_collator=DataCollatorWithPadding(setting.tokenizer) if "input_ids" in data[0].column_names else None,
        compute_metrics=lambda p: {"score": score(setting.metric, p.label_ids, p.predictions.argmax(-1))},
    )
    trainer.train()
    return model


def tokens(setting: Setting) -> list[Dataset]:
    return [
        Dataset.from_dict(
            {**setting.tokenizer(texts(rows), truncation=True, max_length=MAX_LENGTH), "labels": labels(rows)}
        )
        for rows in (setting.train, setting.validation)
        if rows
    ]


@torch.no_grad()
def answers(model: Any, setting: Setting, given: list[str]) -> np.ndarray:
    """Labels by any model that gives logits."""
    model.eval()
    found = []
    for start in range(0, len(given), 64):
        batch = setting.tokenizer(
            given[start : start + 64], truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
        )
        found.append(model(**batch.to(DEVICE)).logits.argmax(-1).cpu().numpy())
    return np.concatenate(found)


def spin(method: str) -> Callable[[Setting], Outcome]:
    return lambda setting: of_spin(calibrated(setting, method), setting, 0)


def spin_head(setting: Setting) -> Outcome:
    model = calibrated(setting)
    data = [store_features(model, setting.tokenizer, rows) for rows in (setting.train, setting.validation)]
    return of_spin(trained(model, setting, data, epochs=10), setting, trainable(model))


def spin_gates(setting: Setting) -> Outcome:
    model = calibrated(setting)
    add_gates(model, penalty=1e-3)
    data = [store_features(model, setting.tokenizer, rows) for rows in (setting.train, setting.validation)]
    parameters = trainable(model)
    trained(model, setting, data, epochs=15, best_epoch=False)  # an early epoch has hardly closed a gate
    prune_gates(model)
    return of_spin(model, setting, parameters)


def lora_spin(setting: Setting) -> Outcome:
    model = calibrated(setting)
    adapted = with_lora(model, lora_targets(model))
    parameters = trainable(adapted)
    trained(adapted, setting, tokens(setting), epochs=3)
    return of_spin(adapted.merge_and_unload(), setting, parameters)


def lora_native(setting: Setting) -> Outcome:
    adapted = with_lora(native(setting), lora_targets(calibrated(setting)))
    trained(adapted, setting, tokens(setting), epochs=3)
    return Outcome(lambda given: answers(adapted, setting, given), trainable(adapted))


def fine_tuning(setting: Setting) -> Outcome:
    model = trained(native(setting), setting, tokens(setting), epochs=3)
    return Outcome(lambda given: answers(model, setting, given), trainable(model))


def setfit(setting: Setting) -> Outcome:
    from setfit import SetFitModel
    from setfit import Trainer as SetFitTrainer
    from setfit import TrainingArguments as SetFitArguments

    model = SetFitModel.from_pretrained(setting.path).to(DEVICE)
    data = Dataset.from_dict({"text": texts(setting.train), "label": labels(setting.train)})
    batch, steps = pairs_of(labels(setting.train))
    arguments = SetFitArguments(
        setting.scratch,
        batch_size=batch,
        max_steps=steps,
        body_learning_rate=setting.rate,
        seed=setting.seed,
        use_amp=CUDA,
        report_to="none",
        save_strategy="no",
    )
    SetFitTrainer(model, arguments, train_dataset=data).train()
    parameters = sum(parameter.numel() for parameter in model.model_body.parameters())
    return Outcome(lambda given: np.asarray(model.predict(given)), parameters, f"{steps} steps of {batch} pairs")


def pairs_of(labels: list[int]) -> tuple[int, int]:
    """Batch and steps of SetFit: its defaults, which are one pass over all pairs, 16 in a step. Where that would be
    more than 1000 steps, 64 in a step and 1000 at most: all pairs of 6,920 texts are tens of millions.
    """
    counts = Counter(labels).values()
    alike = sum(count * (count + 1) // 2 for count in counts)
    pairs = 2 * max(alike, math.comb(len(labels), 2) - sum(math.comb(count, 2) for count in counts))
    batch = 16 if pairs <= 16 * MOST_STEPS else 64
    return batch, min(MOST_STEPS, math.ceil(pairs / batch))


def of_spin(model: SpinForSequenceClassification, setting: Setting, parameters: int) -> Outcome:
    note = f"{model.config.num_features} features, {model.spin.depth} blocks"
    return Outcome(lambda given: predict(model, setting.tokenizer, given).labels, parameters, note)


def with_lora(model: Any, targets: Any) -> Any:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=targets)
    return peft.get_peft_model(model, config)


def native(setting: Setting) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(setting.path, num_labels=setting.classes).to(DEVICE)
    model.config.pad_token_id = setting.tokenizer.pad_token_id
    return model


LORA_RATES = (1e-4, 3e-4, 1e-3)
METHODS: dict[str, tuple[Callable[[Setting], Outcome], tuple[float, ...]]] = {
    **{method: (spin(method), (0.0,)) for method in SPINS},
    "SPIN, head trained": (spin_head, (1e-5, 1e-4, 1e-3)),
    "SPIN, gates": (spin_gates, (1e-3, 3e-3)),
    "LoRA, SPIN head": (lora_spin, LORA_RATES),
    "LoRA, native head": (lora_native, LORA_RATES),
    "full fine-tuning": (fine_tuning, (2e-5, 5e-5, 1e-4)),
    "SetFit": (setfit, (2e-5, 1e-4)),
}


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
        for seed in (arguments.seeds if per_class or len(METHODS[method][1]) > 1 else arguments.seeds[:1])
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
            work = (arguments.work or Path(scratch)) / f"{name}-{dataset}" / (f"{per_class}-{seed}" if few else "all")
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
            f"| {rate} | {mine[0]['note']} |"
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
