"""Ways to adapt one pretrained model to SST-2: reading it, training a head, gates, LoRA, fine-tuning, SetFit.

Every method that trains gets a small grid of learning rates, tried with the first seed, and its best epoch is kept,
both by validation; test is scored with the chosen rate alone. Seconds are those of one run at that rate, from texts to
classifier; what starts from a calibrated model includes the calibration. Results are appended to a JSON-lines file and
skipped when already there, so a stopped run goes on. SetFit needs `pip install setfit`.

    python examples/adaptation_table.py --data DATA --model minilm
    python examples/adaptation_table.py --data DATA --model PATH/TO/SmolLM2-135M
    python examples/adaptation_table.py --show
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import peft
import torch
from accuracy_table import load, read_results
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


class Setting(NamedTuple):
    """What a run starts from. ``calibrated`` is the folder of a SPIN classifier that took ``seconds`` to make."""

    path: str
    tokenizer: Any
    train: list[dict]
    validation: list[dict]
    calibrated: str
    seconds: float
    scratch: str
    rate: float
    seed: int


class Outcome(NamedTuple):
    """A finished classifier as a function from texts to labels, and what was trained."""

    predict: Callable[[list[str]], Any]
    parameters: int
    note: str = ""


def accuracy(outcome: Outcome, rows: list[dict]) -> float:
    return float(np.mean(np.asarray(outcome.predict(texts(rows))) == labels(rows)))


def texts(rows: list[dict]) -> list[str]:
    return [row["text"] for row in rows]


def labels(rows: list[dict]) -> list[int]:
    return [row["label"] for row in rows]


def trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def calibrated(setting: Setting) -> SpinForSequenceClassification:
    return SpinForSequenceClassification.from_pretrained(setting.calibrated).to(DEVICE)


def trained(model: Any, setting: Setting, data: list[Dataset], *, epochs: int, best_epoch: bool = True) -> Any:
    """The model after ``Trainer``, with the settings that all methods share."""
    choosing: dict[str, Any] = {"save_strategy": "no"}
    if best_epoch:
        choosing = {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy",
        }
    arguments = TrainingArguments(
        setting.scratch,
        num_train_epochs=epochs,
        learning_rate=setting.rate,
        seed=setting.seed,
        per_device_train_batch_size=32,
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
        eval_dataset=data[1],
        data_collator=DataCollatorWithPadding(setting.tokenizer) if "input_ids" in data[0].column_names else None,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    return model


def tokens(setting: Setting) -> list[Dataset]:
    return [
        Dataset.from_dict({**setting.tokenizer(texts(rows), truncation=True, max_length=256), "labels": labels(rows)})
        for rows in (setting.train, setting.validation)
    ]


@torch.no_grad()
def answers(model: Any, setting: Setting, given: list[str]) -> np.ndarray:
    """Labels by any model that gives logits."""
    model.eval()
    found = []
    for start in range(0, len(given), 64):
        batch = setting.tokenizer(
            given[start : start + 64], truncation=True, max_length=256, padding=True, return_tensors="pt"
        )
        found.append(model(**batch.to(DEVICE)).logits.argmax(-1).cpu().numpy())
    return np.concatenate(found)


def spin(setting: Setting) -> Outcome:
    return of_spin(calibrated(setting), setting, 0)


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
    steps = 1000  # of 64 pairs: all pairs of 6,920 texts are tens of millions
    arguments = SetFitArguments(
        setting.scratch,
        batch_size=64,
        max_steps=steps,
        body_learning_rate=setting.rate,
        seed=setting.seed,
        use_amp=CUDA,
        report_to="none",
        save_strategy="no",
    )
    SetFitTrainer(model, arguments, train_dataset=data).train()
    parameters = sum(parameter.numel() for parameter in model.model_body.parameters())
    return Outcome(lambda given: np.asarray(model.predict(given)), parameters, f"{steps} steps of 64 pairs")


def of_spin(model: SpinForSequenceClassification, setting: Setting, parameters: int) -> Outcome:
    note = f"{model.config.num_features} features, {model.spin.depth} blocks"
    return Outcome(lambda given: predict(model, setting.tokenizer, given).labels, parameters, note)


def with_lora(model: Any, targets: Any) -> Any:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=targets)
    return peft.get_peft_model(model, config)


def native(setting: Setting) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(setting.path, num_labels=2).to(DEVICE)
    model.config.pad_token_id = setting.tokenizer.pad_token_id
    return model


LORA_RATES = (1e-4, 3e-4, 1e-3)
METHODS: dict[str, tuple[Callable[[Setting], Outcome], tuple[float, ...]]] = {
    "SPIN": (spin, (0.0,)),
    "SPIN, head trained": (spin_head, (1e-5, 1e-4, 1e-3)),
    "SPIN, gates": (spin_gates, (1e-3, 3e-3)),
    "LoRA, SPIN head": (lora_spin, LORA_RATES),
    "LoRA, native head": (lora_native, LORA_RATES),
    "full fine-tuning": (fine_tuning, (2e-5, 5e-5, 1e-4)),
    "SetFit": (setfit, (2e-5, 1e-4)),
}


def calibrate(setting: Setting, *, device: str) -> float:
    """Makes the calibrated classifier in its folder; seconds, also of an earlier run."""
    record = Path(setting.calibrated) / "seconds.json"
    if not record.exists():
        start = time.perf_counter()
        model = SpinForSequenceClassification.from_backbone(setting.path).to(device)
        result = spin_calibrate(model, setting.tokenizer, setting.train, setting.validation, progress=False)
        seconds = time.perf_counter() - start
        sys.stderr.write(f"{result}\n")
        model.save_pretrained(setting.calibrated)
        record.write_text(json.dumps(seconds), encoding="utf-8")
    return float(json.loads(record.read_text(encoding="utf-8")))


def measure(method: str, setting: Setting, seed: int, done: list[dict[str, Any]], test: list[dict]) -> dict[str, Any]:
    """One row: with the first seed every rate is tried, with the others the one that was chosen."""
    make, rates = METHODS[method]
    if done:
        rates = (done[0]["rate"],)
    tried = []
    for rate in rates:
        set_seed(seed)
        start = time.perf_counter()
        outcome = make(setting._replace(rate=rate, seed=seed))
        seconds = time.perf_counter() - start
        tried.append((accuracy(outcome, setting.validation), seconds, rate, outcome))
        sys.stderr.write(
            f"{method}, seed {seed}, rate {rate:g}: validation {100 * tried[-1][0]:.2f}, {seconds:.0f} s\n"
        )
    score, seconds, rate, outcome = max(tried, key=lambda entry: entry[0])
    return {
        "method": method,
        "seed": seed,
        "rate": rate,
        "validation": round(100 * score, 2),
        "test": round(100 * accuracy(outcome, test), 2),
        "seconds": round(seconds + setting.seconds * ("SPIN" in method), 1),
        "parameters": outcome.parameters,
        "note": outcome.note,
        "device": torch.cuda.get_device_name() if CUDA else "CPU",
    }


def run(arguments: argparse.Namespace) -> None:
    name = "MiniLM" if arguments.model == "minilm" else Path(arguments.model).name
    path = str(backbone_folder()) if arguments.model == "minilm" else arguments.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, validation, test = (rows[: arguments.rows] for rows in load(arguments.data, "sst2"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = str((arguments.work or Path(scratch)) / f"spin-{name}")
        setting = Setting(path, tokenizer, train, validation, folder, 0.0, scratch, 0.0, 0)
        setting = setting._replace(seconds=calibrate(setting, device=arguments.calibrate_on))
        for method in arguments.methods or METHODS:
            for seed in arguments.seeds if len(METHODS[method][1]) > 1 else arguments.seeds[:1]:
                rows = [r for r in read_results(arguments.results) if (r["model"], r["method"]) == (name, method)]
                if seed not in [row["seed"] for row in rows]:
                    row = {"model": name, **measure(method, setting, seed, rows, test)}
                    with arguments.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


def show(path: Path) -> str:
    """The results as a Markdown table: means, and the spread over seeds where there are several."""
    lines = [
        "| | | test | validation | seconds | trained parameters | rate | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = read_results(path)
    for model, method in dict.fromkeys((row["model"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        test, validation = (spread([row[key] for row in mine]) for key in ("test", "validation"))
        seconds = statistics.mean(row["seconds"] for row in mine)
        rate = f"{mine[0]['rate']:g}" if mine[0]["rate"] else ""
        lines.append(
            f"| {model} | {method} | {test} | {validation} | {seconds:.0f} | {mine[0]['parameters']:,} | {rate} "
            f"| {mine[0]['note']} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with sst2")
    parser.add_argument("--model", default="minilm", help="minilm, or the folder of a model")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="at most so many of each split, for a trial")
    parser.add_argument("--calibrate-on", default=DEVICE, help="device of the calibration: cpu or cuda")
    parser.add_argument("--work", type=Path, help="keep the calibrated classifier here")
    common.measure_or_show(parser, run, show, "adaptation_table.jsonl")
