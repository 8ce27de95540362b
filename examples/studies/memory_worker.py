"""Peak memory of one calibration or training, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1]

CALIBRATION = "calibration"
METHODS = (CALIBRATION, "head on the last block", "LoRA", "full fine-tuning")
LORA = {"mpnet": ["q", "v"]}  # PEFT has no default for it; of the others it adapts the same
WORDS = 150  # of a text: no longer than 256 tokens, so that batches have the same shape


def start(job: dict[str, Any]) -> dict[str, Any]:
    """Measure in a fresh process. Raises :class:`subprocess.CalledProcessError` where that fails."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if job["device"] == "cpu" else {}
    command = [sys.executable, __file__, json.dumps(job)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **hidden})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of the process's own memory over what it had before the model came, and of the device.

    The device's are those of tensors, weights among them; ``None`` on a CPU, where the host has them all.
    """
    sys.path += [str(EXAMPLES), str(EXAMPLES / "benchmarks")]
    import common
    import torch
    from adaptations import DEVICE, Setting, native, tokens, trained, with_lora
    from memory import Watch
    from shared import MAX_LENGTH, Source

    from spin_hf import SpinForSequenceClassification, spin_calibrate

    rows = common.draw(common.read_split(Path(job["data"]), "imdb", "train"), job["texts"])
    rows = [{"text": " ".join(row["text"].split()[:WORDS]), "label": row["label"]} for row in rows]
    source = Source.of(job["model"])
    tokenizer = source.tokenizer()
    if DEVICE == "cuda":
        torch.zeros(1, device=DEVICE)  # the context is no part of either
    watch = Watch()
    watch.start()
    with tempfile.TemporaryDirectory() as scratch:
        if job["method"] == CALIBRATION:
            model: Any = SpinForSequenceClassification.from_backbone(source.path).to(DEVICE)
            options = {"max_length": MAX_LENGTH, "batch_tokens": job["batch"], "progress": False}
            options["validation_fraction"] = 0.2  # the same steps for any number of texts: few would be folded
            spin_calibrate(model, tokenizer, rows, **options)
        else:
            setting = Setting(
                source.path,
                tokenizer,
                "accuracy",
                rows,
                rows[:8],
                Path(scratch),
                DEVICE,
                scratch,
                rate=1e-5,
                batch=job["batch"],
            )
            model = native(setting)
            if job["method"] == "LoRA":
                model = with_lora(model, LORA.get(model.config.model_type))
            elif job["method"] == "head on the last block":
                model.base_model.requires_grad_(False)
            trained(model, setting, tokens(setting), epochs=1, best_epoch=False)
    watch.done.set()
    watch.join()
    device = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
    return {"host": max(watch.peaks.values()), "device": device}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
