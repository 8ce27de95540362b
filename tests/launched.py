"""What the tests run in several processes: ``python tests/launched.py TASK FOLDER``, one for each RANK."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import builders
import torch
import transformers as hf
from safetensors.torch import save_file

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration.errors import CalibrationError
from spin_hf.calibration.ranks import Ranks
from spin_hf.calibration.result import CalibrationResult

SHARDS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # gloo's reduce-scatter for FSDP
QUICK = {
    "progress": False,
    "poolings": ["mean", "max"],
    "validation_fraction": 0.2,
    "Cs": 4,
    "etas": (0.5, 1.0),
    "batch_tokens": 64,
}
WHOLE = {"exits": True, "poolings": ("mean", "attention")}


def calibrate(folder: Path, name: str, **options: object) -> None:
    """Save model and result as this process has them."""
    rows = builders.make_sentiment_rows()
    model = SpinForSequenceClassification.from_backbone(builders.make_backbone("bert"))
    if (kill_at := int(os.environ.get("KILL_AT", "0"))) and os.environ["RANK"] == "1":
        run, calls = model.spin.run_backbone, []

        def dying(*arguments: object) -> None:
            calls.append(1)
            if len(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            run(*arguments)

        model.spin.run_backbone = dying
    result = spin_calibrate(model, builders.make_tokenizer(), rows, **{**QUICK, **WHOLE, **options})
    (folder / name).mkdir(parents=True)
    save_file(
        model.state_dict(), folder / name / "model.safetensors"
    )  # save_pretrained writes on the main process only
    (folder / name / "config.json").write_text(model.config.to_json_string())
    result.save(folder / name / "calibration.json")


def same(made: Path, expected: Path) -> None:
    """Assert that two folders hold the same model and result, to the bit, but for the time that it took."""
    for name in ("model.safetensors", "config.json"):
        assert (made / name).read_bytes() == (expected / name).read_bytes(), name
    one, another = (CalibrationResult.load(folder / "calibration.json") for folder in (made, expected))
    assert set(one.seconds) == set(another.seconds)
    assert one.differences(another) == {}


def fail(folder: Path) -> None:
    """One process fails in the middle of the extraction, while the other has a long way to go."""
    from spin_hf.calibration import calibrate, ranks

    calibrate.find_batching = lambda *arguments: "padded"  # whose forwards would be counted here
    ranks._LOOK_SECONDS = 0.0
    rows = builders.make_sentiment_rows(400)
    model = SpinForSequenceClassification.from_backbone(builders.make_backbone("bert"))
    rank, run, calls = int(os.environ["RANK"]), model.spin.run_backbone, []

    def breaking(*arguments: object) -> None:
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            raise RuntimeError("the device is lost")
        run(*arguments)
        deadline = time.monotonic() + 60
        while rank == 0 and len(calls) == 4 and time.monotonic() < deadline:  # until the other has failed
            if list((folder / "cache").glob("*/failed.*")):
                break
            time.sleep(0.01)

    model.spin.run_backbone = breaking
    told = {}
    try:
        spin_calibrate(model, builders.make_tokenizer(), rows, cache_dir=folder / "cache", **QUICK)
    except (RuntimeError, CalibrationError) as error:
        told["extraction"] = f"{type(error).__name__}: {error}"
    told["batches"] = len(calls)
    for name, count, prefer in (("data", 20 + rank, "score"), ("options", 20, ("score", "widest")[rank])):
        model = SpinForSequenceClassification.from_backbone(builders.make_backbone("bert"))
        rows = builders.make_sentiment_rows(count)
        try:
            spin_calibrate(model, builders.make_tokenizer(), rows, prefer=prefer, **QUICK)
        except CalibrationError as error:
            told[name] = f"{type(error).__name__}: {error}"
    (folder / f"told.{rank}.json").write_text(json.dumps(told))


def wait(folder: Path) -> None:
    """Wait for another longer than the group that was joined before would."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
    ranks = Ranks.here()
    found = ranks.on_main(lambda: (time.sleep(5), "made")[1])
    model = SpinForSequenceClassification.from_backbone(builders.make_backbone("bert"))
    rows = builders.make_sentiment_rows(40 if ranks.main else 0)  # which one finds out before any work is shared
    try:
        spin_calibrate(model, builders.make_tokenizer(), rows, **QUICK)
        told = "nothing"
    except CalibrationError as error:
        told = type(error).__name__
    (folder / f"waited.{ranks.index}").write_text(
        f"{found} {ranks.gather(ranks.index)} {Ranks.here().gather(1)} {told}"
    )


def train(folder: Path, batch: int = 4) -> hf.PreTrainedModel:
    """Train the head, and save it."""
    model = builders.calibrated(builders.make_backbone("bert"))
    rows = builders.make_sentiment_rows()
    encoded = builders.make_tokenizer()(rows["text"])
    data = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        for ids, label in zip(encoded["input_ids"], rows["label"], strict=True)
    ]
    arguments = hf.TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        per_device_train_batch_size=batch,
        num_train_epochs=2,
        learning_rate=0.05,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    collator = hf.DataCollatorWithPadding(builders.make_tokenizer())
    hf.Trainer(model, arguments, train_dataset=data, data_collator=collator).train()
    return model


def finetune(*, shard: bool = False) -> dict[str, torch.Tensor]:
    """The weights after a few steps of the whole model; sharded, each of two processes has half of every batch."""
    model = builders.calibrated(
        builders.make_backbone("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    model.unfreeze_backbone()
    model.train()
    mine = slice(None)
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model.spin.backbone.encoder.layer:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        mine = slice(torch.distributed.get_rank(), None, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(3):
        batch = {**builders.make_batch(seed=seed), "labels": torch.tensor([0, 1, 1, 0])}
        model(**{name: values[mine] for name, values in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = model.state_dict()
    return {name: w.full_tensor() if hasattr(w, "full_tensor") else w for name, w in weights.items()}


if __name__ == "__main__":
    hf.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task == "calibrate":
        calibrate(folder, f"rank{os.environ['RANK']}", cache_dir=folder / "cache")
    elif task == "wait":
        wait(folder)
    elif task == "fail":
        fail(folder)
        save_file(train(folder).score.state_dict(), folder / f"trained.{os.environ['RANK']}.safetensors")
        if SHARDS:
            save_file(finetune(shard=True), folder / f"sharded.{os.environ['RANK']}.safetensors")
