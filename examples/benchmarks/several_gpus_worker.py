"""What each process of ``several_gpus.py`` does: ``python several_gpus_worker.py TASK OPTIONS.json``."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
import transformers as hf
from safetensors.torch import save_file
from texts import make_rows, make_tokenizer

from spin_hf import SpinForSequenceClassification, lora_targets, spin_calibrate
from spin_hf.calibration import progress
from spin_hf.calibration.ranks import Ranks
from spin_hf.prediction import predict

COMPARED = 64  # texts whose logits are compared
BATCH = 4  # texts of a step of Trainer, for each of the processes


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def placement(options: dict[str, Any]) -> dict[str, Any]:
    """Where the backbone is loaded: this process's device, or spread over all there are."""
    if options.get("device_map") and torch.cuda.is_available():
        return {"device_map": options["device_map"]}
    if options.get("device_map"):  # a CPU can only be shared with the disk
        files = Path(options["backbone"]).glob("*.safetensors")
        most = sum(file.stat().st_size for file in files) // 2
        return {"device_map": "auto", "max_memory": {"cpu": most}, "offload_folder": options["out"] + "/offload"}
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        return {"device_map": f"cuda:{local}"}
    return {"device_map": "cpu"}


def calibrate(options: dict[str, Any]) -> None:
    """Calibrate, and write what it came to; a process that is told to kills itself on the way."""
    out = Path(options["out"])
    tokenizer = make_tokenizer(options["tokens"])
    rows = options.get("rows")
    rows = json.loads(Path(rows).read_text()) if rows else make_rows(options["texts"], options["tokens"])
    model = SpinForSequenceClassification.from_backbone(
        options["backbone"],
        num_labels=max(rows["label"]) + 1,
        dtype=getattr(torch, options["dtype"]),
        **placement(options),
    )
    held: Counter[str] = Counter()  # by device, while all blocks are there
    for parameter in model.spin.backbone.parameters():
        place = "disk" if parameter.is_meta else str(parameter.device)
        held[place] += parameter.numel() * parameter.element_size()
    if options.get("kill_at") and rank() == 1:
        _dies(model, options["kill_at"], out)
    with busy() as seconds:
        result = spin_calibrate(
            model,
            tokenizer,
            rows,
            Cs=options["Cs"],
            poolings=options["poolings"],
            validation_fraction=0.2,
            batch_tokens=options["batch_tokens"],
            cache_dir=out / "cache",
            exits=options["exits"],
            progress=False,
        )
    # All that this process has of the outcome: the record, the config, each tensor but for the backbone's, the answers.
    result.save(out / f"calibration.{rank()}.json")
    (out / f"config.{rank()}.json").write_text(model.config.to_json_string())
    texts = make_rows(COMPARED, options["tokens"], seed=1)["text"]
    found = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("spin.backbone.")}
    found["logits"] = torch.from_numpy(predict(model, tokenizer, texts).logits)
    if options["exits"]:
        found["exit_logits"] = exit_logits(model, tokenizer, texts)
    save_file({name: value.cpu().contiguous() for name, value in found.items()}, out / f"found.{rank()}.safetensors")
    of_all = accelerate.utils.gather_object([{"seconds": seconds, "peak": _peak()}])
    if rank():
        return
    about = {
        "rest": 2 * result.seconds["total"] - sum(result.seconds.values()),
        "busy": [each["seconds"] for each in of_all],
        "peak_gpu_gb": [gb for each in of_all for gb in each["peak"]],
        "weights_gb": {device: size / 1e9 for device, size in sorted(held.items())},
        "exit_taps": [len(model.exits.select(number).kept) for number in range(len(model.config.exits))],
    }
    (out / "about.json").write_text(json.dumps(about))


@torch.no_grad()
def exit_logits(
    model: SpinForSequenceClassification, tokenizer: hf.PreTrainedTokenizerBase, texts: list[str]
) -> torch.Tensor:
    """What each exit answers ``(texts, exits, labels)``; texts are of one length."""
    found = []
    for first in range(0, len(texts), 16):
        batch = tokenizer(texts[first : first + 16], return_tensors="pt").to(model.device)
        found.append(model(**batch, output_exits=True).exit_logits)
    return torch.cat(found)


@contextmanager
def busy() -> Iterator[dict[str, float]]:
    """Seconds that this process spends in each stage, without those in which it waits for the others."""
    seconds: dict[str, float] = {}
    waited, stage = 0.0, progress.Clock.__call__

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **more: Any) -> Any:
            nonlocal waited
            started = time.perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                waited += time.perf_counter() - started

        return wrapper

    @contextmanager
    def entered(clock: progress.Clock, name: str) -> Iterator[None]:
        started = time.perf_counter() - waited
        with stage(clock, name):
            yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - waited - started

    with (
        mock.patch.object(progress.Clock, "__call__", entered),
        mock.patch.object(Ranks, "_exchange", timed(Ranks._exchange)),
        mock.patch.object(Ranks, "_broadcast", timed(Ranks._broadcast)),
    ):
        yield seconds


def _dies(model: SpinForSequenceClassification, call: int, out: Path) -> None:
    run, calls = model.spin.run_backbone, []

    def dying(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            (out / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        run(*arguments)

    model.spin.run_backbone = dying


def _peak() -> list[float]:
    """Most gigabytes that were allocated on each GPU of which this process holds something."""
    peaks = [torch.cuda.max_memory_allocated(i) / 1e9 for i in range(torch.cuda.device_count())]
    return [peak for peak in peaks if peak]


def train(options: dict[str, Any]) -> None:
    """A few steps of ``Trainer`` in each of some ways, one after another."""
    for way in options["ways"]:
        train_one(options, way)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def train_one(options: dict[str, Any], way: str) -> None:
    """A few steps in float32, then the same texts' logits from the trained model and from its files."""
    import peft

    out = Path(options["out"]) / way
    model: Any = SpinForSequenceClassification.from_pretrained(options["classifier"], dtype=torch.float32)
    blocks = list(model.spin.backbone._no_split_modules)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each process would draw its own
    hf.set_seed(0)  # FSDP takes each process's part from its own weights, and those of an adapter are drawn
    if way != "frozen":
        # B as drawn, not zero: with it A would have no gradient at first, and go less than float32 can tell.
        options_of_lora = {"lora_dropout": 0.0, "init_lora_weights": False}
        lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=lora_targets(model), **options_of_lora)
        model = peft.get_peft_model(model, lora)
    sharded: dict[str, Any] = {
        "fsdp": "full_shard auto_wrap",  # versions before 5.20 may know no other way to say it
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": blocks, "cpu_ram_efficient_loading": False},
    }
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    count = BATCH * options["share"] * processes  # of texts in a step: as many, however many processes
    arguments = hf.TrainingArguments(
        output_dir=str(out / "trainer"),
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=count // processes,
        per_device_eval_batch_size=BATCH,
        max_steps=options["steps"],
        # Plain steps can be compared. Adam divides each by the size of the gradient: one that is all rounding moves
        # its weight as far as any other.
        optim="sgd",
        learning_rate=0.03,
        logging_steps=1,
        label_names=["labels"],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **(sharded if way == "lora-fsdp" else {}),
    )
    data, unseen = (
        _encoded(make_rows(count * size, options["tokens"], seed=2), options["tokens"])
        for size in (options["steps"], 1)
    )
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = hf.Trainer(model, arguments, train_dataset=data, data_collator=hf.default_data_collator)
    trainer.train()
    every = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())  # the frozen ones too
    parts = {name: p for name, p in every.items() if hasattr(p, "full_tensor")}
    if way == "lora-fsdp" and not parts:
        raise RuntimeError(f"Trainer sharded nothing: it ran as {trainer.accelerator.distributed_type}.")
    trained = {name: p.detach() for name, p in every.items() if name in before}
    whole = {name: (p.full_tensor() if name in parts else p).cpu().contiguous() for name, p in trained.items()}
    digest = hashlib.sha256(b"".join(whole[name].numpy().tobytes() for name in sorted(whole))).hexdigest()
    own = sum(_bytes(p.to_local() if name in parts else p) for name, p in every.items())
    of_all = accelerate.utils.gather_object([{"digest": digest, "own": own / 1e9, "peak": _peak()}])
    logits = torch.as_tensor(trainer.predict(unseen).predictions)
    trainer.save_model(str(out / "trained"))
    trainer.accelerator.wait_for_everyone()
    if rank():
        return
    save_file({f"before.{name}": tensor for name, tensor in before.items()} | whole, out / "weights.safetensors")
    again: Any = SpinForSequenceClassification
    if way == "frozen":
        again = again.from_pretrained(out / "trained", dtype=torch.float32)
    else:
        again = again.from_pretrained(options["classifier"], dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(again, out / "trained")
    again = again.to(arguments.device).eval()
    batches = [hf.default_data_collator(unseen[first : first + BATCH]) for first in range(0, count, BATCH)]
    with torch.no_grad():
        answers = [again(**{name: ids.to(arguments.device) for name, ids in batch.items()}).logits for batch in batches]
    about = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "run_as": type(trainer.model_wrapped).__name__ if processes > 1 else "",
        "weights_gb": sum(map(_bytes, every.values())) / 1e9,
        "sharded_gb": sum(map(_bytes, parts.values())) / 1e9,
        "own_gb": [each["own"] for each in of_all],
        "peak_gpu_gb": [gb for each in of_all for gb in each["peak"]],
        "equal_on_all": len({each["digest"] for each in of_all}) == 1,
        "reloaded_logits_differ_by": float((torch.cat(answers).cpu() - logits).abs().max()),
        "largest_logit": float(logits.abs().max()),
    }
    for folder in ("trained", "trainer"):
        shutil.rmtree(out / folder, ignore_errors=True)
    (out / "about.json").write_text(json.dumps(about))


def _encoded(rows: dict[str, list[Any]], tokens: int) -> list[dict[str, Any]]:
    every = make_tokenizer(tokens)(rows["text"])["input_ids"]
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        for ids, label in zip(every, rows["label"], strict=True)
    ]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def main(task: str, options: Path) -> None:
    hf.utils.logging.disable_progress_bar()
    given = json.loads(options.read_text())
    (Path(given["out"]) / f"pid.{rank()}").write_text(str(os.getpid()))
    {"calibrate": calibrate, "train": train}[task](given)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
