"""What each process of ``several_gpus.py`` does: ``python several_gpus_worker.py TASK OPTIONS.json``."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from spin_hf import SpinForSequenceClassification, lora_targets, spin_calibrate
from spin_hf.prediction import predict

RANK, LOCAL_RANK = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
WORDS = 512  # every shape has so many ids
COMPARED = 64  # texts whose logits are compared


def make_tokenizer(tokens: int) -> hf.PreTrainedTokenizerFast:
    """One token per word and nothing else."""
    ids = {word: number for number, word in enumerate(["[PAD]", *(f"w{number}" for number in range(1, WORDS))])}
    made = Tokenizer(models.WordLevel(ids, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", model_max_length=tokens)


def make_rows(count: int, tokens: int, seed: int = 0) -> dict[str, list[Any]]:
    """Texts of so many words. Each label has 16 words that stand in its texts three times as often; 5% are mislabelled.

    A label that could be read without fault would end the probes' paths at once.
    """
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, count)
    odds = np.ones((2, WORDS - 1))
    odds[0, :16] = odds[1, 16:32] = 3
    texts = []
    for label in labels:
        words = draw.choice(WORDS - 1, size=tokens, p=odds[label] / odds[label].sum()) + 1
        texts.append(" ".join(f"w{word}" for word in words))
    return {"text": texts, "label": np.where(draw.random(count) < 0.05, 1 - labels, labels).tolist()}


def placement(options: dict[str, Any]) -> dict[str, Any]:
    """Where the backbone is loaded: this process's device, or spread over all there are."""
    if options.get("device_map") and torch.cuda.is_available():
        return {"device_map": options["device_map"]}
    if options.get("device_map"):  # a CPU can only be shared with the disk
        files = Path(options["backbone"]).glob("*.safetensors")
        most = sum(file.stat().st_size for file in files) // 2
        return {"device_map": "auto", "max_memory": {"cpu": most}, "offload_folder": options["out"] + "/offload"}
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
        return {"device_map": f"cuda:{LOCAL_RANK}"}
    return {"device_map": "cpu"}


def calibrate(options: dict[str, Any]) -> None:
    """Calibrate, and write what it came to; a process that is told to kills itself on the way."""
    out = Path(options["out"])
    tokenizer = make_tokenizer(options["tokens"])
    rows = make_rows(options["texts"], options["tokens"])
    model = SpinForSequenceClassification.from_backbone(
        options["backbone"], num_labels=2, dtype=getattr(torch, options["dtype"]), **placement(options)
    )
    if options.get("kill_at") and RANK == 1:
        _dies(model, options["kill_at"], out)
    result = spin_calibrate(
        model,
        tokenizer,
        rows,
        Cs=options["Cs"],
        batch_tokens=options["batch_tokens"],
        cache_dir=out / "cache",
        progress=False,
    )
    texts = make_rows(COMPARED, options["tokens"], seed=1)["text"]
    found = {"logits": torch.from_numpy(predict(model, tokenizer, texts).logits).contiguous()}
    found |= {f"neurons.{group.tap}.{group.pooling}": group.neurons.cpu() for group in model.spin.feature_groups()}
    save_file(found, out / f"found.{RANK}.safetensors")
    if RANK:
        return
    devices = {str(parameter.device) for parameter in model.spin.backbone.parameters()}
    peak = max((torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())), default=0)
    rest = 2 * result.seconds["total"] - sum(result.seconds.values())
    about = {
        "seconds": {**result.seconds, "rest": rest},
        "chosen": result.chosen.name,
        "score": result.chosen.score,
        "features": result.chosen.num_features,
        "depth": result.chosen.depth,
        "batches": result.data["batches"],
        "features_gb": result.bytes["features"] / 1e9,
        "peak_gpu_gb": peak / 1e9,
        "devices": sorted(devices),
    }
    (out / "about.json").write_text(json.dumps(about))


def _dies(model: SpinForSequenceClassification, call: int, out: Path) -> None:
    run, calls = model.spin.run_backbone, []

    def dying(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            (out / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        run(*arguments)

    model.spin.run_backbone = dying


def train(options: dict[str, Any]) -> None:
    """A few steps of ``Trainer`` in float32, then the same texts' logits from the trained model and from its files."""
    import peft
    from accelerate.utils import gather_object

    out, way = Path(options["out"]), options["way"]
    model: Any = SpinForSequenceClassification.from_pretrained(options["classifier"], dtype=torch.float32)
    blocks = model.spin.backbone._no_split_modules
    hf.set_seed(0)  # FSDP takes each process's part from its own weights, and those of an adapter are drawn
    if way != "frozen":
        lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=lora_targets(model), lora_dropout=0.0)
        model = peft.get_peft_model(model, lora)
    sharded: dict[str, Any] = {
        "fsdp": "full_shard auto_wrap",  # versions before 5.20 may know no other way to say it
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": list(blocks),
            "cpu_ram_efficient_loading": False,
        },
    }
    arguments = hf.TrainingArguments(
        output_dir=str(out / "trainer"),
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=options["steps"],
        learning_rate=1e-3,
        logging_steps=1,
        label_names=["labels"],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **(sharded if way == "lora, fsdp" else {}),
    )
    tokenizer, count = make_tokenizer(options["tokens"]), 4 * int(os.environ["WORLD_SIZE"])
    data, unseen = (
        [
            {**encoded, "labels": label}
            for encoded, label in zip(
                ({"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokenizer(rows["text"])["input_ids"]),
                rows["label"],
                strict=True,
            )
        ]
        for rows in (make_rows(count * size, options["tokens"], seed=2) for size in (options["steps"], 1))
    )
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = hf.Trainer(model, arguments, train_dataset=data, data_collator=hf.default_data_collator)
    trainer.train()
    trained = {
        name: p.detach()
        for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        if name in before
    }
    shards = sum(hasattr(p, "full_tensor") for p in trained.values())
    if way == "lora, fsdp" and not shards:
        raise RuntimeError(f"Trainer sharded nothing: it ran as {trainer.accelerator.distributed_type}.")
    whole = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).cpu() for name, p in trained.items()}
    digest = hashlib.sha256(b"".join(whole[name].numpy().tobytes() for name in sorted(whole))).hexdigest()
    digests = gather_object([digest])
    logits = torch.as_tensor(trainer.predict(unseen).predictions)
    trainer.save_model(str(out / "trained"))
    trainer.accelerator.wait_for_everyone()
    if RANK:
        return
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    about = {
        "losses": [losses[0], losses[-1]],
        "finite": bool(np.isfinite(losses).all()),
        "run_as": f"{trainer.accelerator.distributed_type.value}, {type(trainer.model_wrapped).__name__}",
        "trained_tensors": len(trained),
        "sharded_tensors": shards,
        "largest_step": max(float((whole[name] - before[name]).abs().max()) for name in before),
        "equal_on_all": len(set(digests)) == 1,
    }
    again: Any = SpinForSequenceClassification
    if way == "frozen":
        again = again.from_pretrained(out / "trained", dtype=torch.float32)
    else:
        again = again.from_pretrained(options["classifier"], dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(again, out / "trained")
    again = again.to(arguments.device).eval()
    batches = [hf.default_data_collator(unseen[first : first + 4]) for first in range(0, count, 4)]
    with torch.no_grad():
        parts = [again(**{name: ids.to(arguments.device) for name, ids in batch.items()}).logits for batch in batches]
    about["largest_logit"] = float(logits.abs().max())
    about["reloaded_logits_differ_by"] = float((torch.cat(parts).cpu() - logits).abs().max())
    (out / "about.json").write_text(json.dumps(about))


if __name__ == "__main__":
    hf.utils.logging.disable_progress_bar()
    task, given = {"calibrate": calibrate, "train": train}[sys.argv[1]], json.loads(Path(sys.argv[2]).read_text())
    (Path(given["out"]) / f"pid.{RANK}").write_text(str(os.getpid()))
    task(given)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
