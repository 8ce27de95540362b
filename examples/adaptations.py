"""The ways to adapt a pretrained model that ``adaptation_table.py`` compares: each makes a classifier of a setting."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from accuracy_table import score
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from spin_hf import SpinForSequenceClassification, lora_targets, spin_calibrate
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
    "SPIN, best score": {"prefer": "score"},  # with few texts the default takes the widest candidate
    "SPIN, mean and max": {"poolings": ["mean", "max"]},
    "SPIN, mean and max, folds": {"poolings": ["mean", "max"], "cv": 5, "prefer": "score"},
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
