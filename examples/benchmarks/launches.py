"""How ``several_gpus.py`` starts its workers, what it keeps of them, and how it compares what they left."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from shapes import make, make_classifier
from texts import make_deep_rows, make_tokenizer

from spin_hf import CalibrationResult, SpinForSequenceClassification
from spin_hf.taps import Tap

HERE = Path(__file__).parent
ANSWERS = ("logits", "exit_logits")  # of the classifier and of its exits, among the tensors of a run
Row = dict[str, Any]


class Failed(Exception):
    """A launch that did not end well."""


class Bench:
    """Runs workers for these options; what they find lies in ``folder``, and is not looked for again."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.until = float("inf")

    def wrap(self, shape: str) -> SpinForSequenceClassification:
        """The backbone, ready to be calibrated, on the first device."""
        return SpinForSequenceClassification.from_backbone(
            self.backbone(shape),
            num_labels=2,
            dtype=getattr(torch, self.arguments.dtype),
            device_map="cuda:0" if torch.cuda.is_available() else "cpu",
        )

    def backbone(self, shape: str) -> str:
        """The folder of a backbone, which all processes load."""

        def write(folder: Path) -> None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            make(shape, dtype=getattr(torch, self.arguments.dtype), device=device).save_pretrained(folder)

        return str(self._made(f"backbone-{shape}-{self.arguments.dtype}", write))

    def classifier(self, shape: str) -> str:
        """The folder of a classifier that reads neurons of all blocks in the lower half, so that all of these learn."""

        def write(folder: Path) -> None:
            model = SpinForSequenceClassification.from_backbone(self.backbone(shape), num_labels=2, dtype=torch.float32)
            model.config.pad_token_id = 0
            half = model.spin.depth // 2
            make_classifier(model, half, keep=half).save_pretrained(folder)

        return str(self._made(f"classifier-{shape}", write))

    def deep_rows(self, shape: str) -> str:
        """A file of ``--few`` texts whose labels deep neurons of the backbone carry."""
        few, tokens = self.arguments.few, self.arguments.tokens

        def write(folder: Path) -> None:
            folder.mkdir()
            rows = make_deep_rows(self.wrap(shape), few, tokens, batch_tokens=self.arguments.batch_tokens)
            (folder / "rows.json").write_text(json.dumps(rows))

        return str(self._made(f"rows-{shape}-{self.arguments.dtype}-{few}x{tokens}", write) / "rows.json")

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        made, partial = self.folder / name, self.folder / f"{name}.part"
        if not made.exists():
            shutil.rmtree(partial, ignore_errors=True)
            write(partial)
            partial.rename(made)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return made

    def kept(self, name: str, measure: Callable[[], Row]) -> Row:
        """The row that was measured under that name before, or is now."""
        path = self.folder / f"row-{name}.json"
        if not path.exists():
            row = measure()
            path.write_text(json.dumps(row))
        row = json.loads(path.read_text())
        return row

    def name(self, shape: str, texts: int, count: int, *more: str) -> str:
        """Tells a run from those under other options."""
        given = self.arguments
        words = [shape, given.dtype, f"{texts}x{given.tokens}", f"in{given.batch_tokens}", f"Cs{given.Cs}"]
        words += [*(given.poolings or []), str(count)]
        return "-".join([*words, *more])

    def calibrate(self, shape: str, count: int, *, deep: bool, name: str = "", **more: Any) -> Path:
        """The folder of a calibration by ``count`` processes; its features stay only where one is killed.

        Args:
            deep: on :meth:`deep_rows`, and with exits; otherwise on all ``--texts``, whose labels words carry.
            name: tells it from others by as many processes.
            more: options of the worker.
        """
        given = self.arguments
        texts = given.few if deep else given.texts
        out = self.folder / self.name(shape, texts, count, *(["deep"] if deep else []), *([name] if name else []))
        if (out / "done").exists():
            print(f"{out.name} was run before", file=sys.stderr)
            return out
        shutil.rmtree(out, ignore_errors=True)  # with features that would not be read again
        options = {
            **{"backbone": self.backbone(shape), "texts": texts, "tokens": given.tokens, "dtype": given.dtype},
            **{"batch_tokens": given.batch_tokens, "Cs": given.Cs, "poolings": given.poolings, "exits": deep, **more},
            **({"rows": self.deep_rows(shape)} if deep else {}),
        }
        began = time.monotonic()
        try:
            self.launch("calibrate", out, count, options)
        finally:
            if "kill_at" not in more:
                shutil.rmtree(out / "cache", ignore_errors=True)  # of a large shape it takes tens of gigabytes
        (out / "done").write_text(str(time.monotonic() - began))
        return out

    def files(self, shape: str) -> list[str]:
        """The command's options for a backbone with its tokenizer, and :meth:`deep_rows`, a fifth to validate by."""
        backbone, rows = Path(self.backbone(shape)), json.loads(Path(self.deep_rows(shape)).read_text())
        make_tokenizer(self.arguments.tokens).save_pretrained(backbone)
        every = [{"text": text, "label": label} for text, label in zip(rows["text"], rows["label"], strict=True)]
        parts = {"train": every[len(every) // 5 :], "validation": every[: len(every) // 5]}
        words = [str(backbone)]
        for name, part in parts.items():
            path = self.folder / f"{name}-{self.name(shape, self.arguments.few, 1)}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
            words += [f"--{name}", str(path)]
        return words

    def launch(self, task: str, out: Path, count: int, options: Row) -> None:
        """Run a task of the worker in so many processes. Raises what :meth:`run` does."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "options.json").write_text(json.dumps({**options, "out": str(out)}))
        worker = [str(HERE / "several_gpus_worker.py"), task, str(out / "options.json")]
        self.run(worker, out, count, spread=bool(options.get("device_map")))

    def run(self, program: list[str], out: Path, count: int, *, spread: bool = False) -> None:
        """Run a program in so many processes, by ``accelerate launch`` where there are several.

        Args:
            program: what comes after ``python``.
            out: a folder for what it prints.
            spread: whether one process may see all GPUs; else as many as there are processes.

        Raises:
            Failed: with the end of what it wrote, or when the time is over.
        """
        began = time.monotonic()
        if began > self.until:
            raise Failed(f"the time was over before the launch of {out.name}")
        out.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        # As many threads however many processes: sums of other lengths would round differently on a CPU. NCCL can
        # use NVLink multicast, which many containers and virtual machines don't allow: it would fail at the start.
        threads = max(1, (os.cpu_count() or 1) // max(self.arguments.processes))
        env = {"OMP_NUM_THREADS": str(threads), "NCCL_NVLS_ENABLE": "0", **os.environ}
        env |= {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "true"}
        if not torch.cuda.is_available():
            env["ACCELERATE_USE_CPU"] = "true"
        elif not spread:  # Trainer would use all GPUs that one process sees
            seen = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            env["CUDA_VISIBLE_DEVICES"] = ",".join(seen.split(",")[:count])
        with (out / "log").open("w") as log:
            code = start(program, count, env, log, min(self.until - began, 1e6))
        if code is None:
            raise Failed(f"the time was over, {time.monotonic() - began:.0f} s after the launch of {out.name}")
        if code:
            raise Failed((out / "log").read_text(errors="replace")[-6000:])


def start(program: list[str], count: int, env: dict[str, str], log: Any, seconds: float) -> int | None:
    """Run a program in so many processes; the exit code, or ``None`` where it took longer than so many seconds."""
    command = [sys.executable]
    if count > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(_free_port())]
    started = subprocess.Popen(command + program, env=env, stdout=log, stderr=log)
    try:
        return started.wait(seconds)
    except subprocess.TimeoutExpired:
        started.terminate()  # the launcher ends its processes
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(60)
        return None
    finally:
        started.kill()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# -- what runs left ---------------------------------------------------------------------------------------------------


def record(out: Path, rank: int = 0) -> CalibrationResult:
    return CalibrationResult.load(out / f"calibration.{rank}.json")


def about(out: Path) -> Row:
    found: Row = json.loads((out / "about.json").read_text())
    return found


def chosen(out: Path) -> Row:
    """The classifier of a run: the blocks that it runs, and the taps that it reads of them."""
    result = record(out)
    taps = {Tap.parse(entry["tap"]) for entry in result.kept}
    deepest = {kind: max((tap.block for tap in taps if tap.kind == kind), default=None) for kind in ("ffn", "hidden")}
    told = about(out)["exit_taps"]
    return {
        "chosen": result.chosen.name,
        "score": round(result.chosen.score, 4),
        "features": result.chosen.num_features,
        "taps_read": len(taps),
        "deepest_ffn": "none" if deepest["ffn"] is None else deepest["ffn"],
        "deepest_hidden": "none" if deepest["hidden"] is None else deepest["hidden"],
        "exits": len(told),
        "taps_read_by_exits": f"{min(told)} to {max(told)}" if told else "n/a",
    }


def compared(out: Path, alone: Path, count: int) -> Row:
    """How all that each process of a run ended with differs from what one alone made."""
    result, wanted = record(alone), load_file(alone / "found.0.safetensors")
    unequal, largest = 0, 0.0
    heads, logits = 0.0, 0.0
    for rank in range(count):
        told = record(out, rank).differences(result)
        unequal += len(told) + ((out / f"config.{rank}.json").read_text() != (alone / "config.0.json").read_text())
        gaps = [abs(a - b) for a, b in told.values() if isinstance(a, (int, float)) and isinstance(b, (int, float))]
        largest = max([largest, *gaps])
        found = load_file(out / f"found.{rank}.safetensors")
        for name in wanted.keys() | found.keys():
            difference = _difference(found.get(name), wanted.get(name))
            unequal += difference != 0
            if name in ANSWERS:
                logits = max(logits, difference)
            else:
                heads = max(heads, difference)

    return {
        "candidates": len(result.candidates),
        "probes": len(result.probes),
        "deepest_block": max(Tap.parse(probe["tap"]).block for probe in result.probes),
        "unequal_values": unequal,
        "record_differs_by": largest,
        "head_differs_by": heads,
        "logits_differ_by": logits,
        "largest_logit": max(float(wanted[name].abs().max()) for name in ANSWERS if name in wanted),
        "tolerance": 0,
    }


def saved(out: Path, alone: Path) -> Row:
    """How a saved classifier differs from that of another run."""
    one, other = (load_file(folder / "model.safetensors") for folder in (out, alone))
    records = [CalibrationResult.load(folder / "calibration.json") for folder in (out, alone)]
    told = [name for name in one.keys() | other.keys() if _difference(one.get(name), other.get(name)) != 0]
    configs = {(folder / "config.json").read_text() for folder in (out, alone)}
    return {
        "chosen": records[0].chosen.name,
        "score": round(records[0].chosen.score, 4),
        "tensors": len(one),
        "candidates": len(records[0].candidates),
        "probes": len(records[0].probes),
        "unequal_values": len(told) + len(records[0].differences(records[1])) + len(configs) - 1,
        "tolerance": 0,
    }


def trained(out: Path, alone: Path) -> Row:
    """How the outcome of one way of training differs from that of one process.

    Weights: of all trained tensors the largest distance, over the length of the step from where it began.
    Taken off first is what float32 alone can make of it: each of two runs rounds each weight by up to half a unit in
    the last place at each step. LoRA's A begins with a gradient of 0 and may go less than a millionth of its own size.
    """
    one, other = load_file(alone / "weights.safetensors"), load_file(out / "weights.safetensors")
    names = [name for name in one if not name.startswith("before.")]
    distances = [0.0 if one.keys() == other.keys() else float("inf")]
    rounding = 2**-23 * len(about(alone)["losses"])
    for name in (name for name in names if name in other):
        moved = (one[name] - one[f"before.{name}"]).double().norm()
        size = torch.maximum(one[name].abs(), one[f"before.{name}"].abs()).double().norm()
        beyond = (other[name].double() - one[name].double()).norm() - rounding * size
        distances.append(float(beyond.clamp_min(0) / moved.clamp_min(1e-30)))
    pairs = zip(about(alone)["losses"], about(out)["losses"], strict=True)
    return {
        "trained_tensors": len(names),
        "weights_differ_by": max(distances),
        "losses_differ_by": max(abs(a - b) / abs(a) for a, b in pairs),
    }


def _difference(one: torch.Tensor | None, another: torch.Tensor | None) -> float:
    """The largest difference of two tensors; infinite where they can't be compared."""
    if one is None or another is None or one.shape != another.shape or one.dtype != another.dtype:
        return float("inf")
    return float((one.double() - another.double()).abs().max()) if one.numel() else 0.0


def each(values: list[float]) -> str:
    """The values of all processes, or devices, in one cell."""
    return ", ".join(f"{value:.3g}" for value in values) or "n/a"


def lives(pids: Iterator[Path]) -> int:
    """How many of the processes that these files name are still there."""
    alive = 0
    for path in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # another's, of the same number
            os.kill(int(path.read_text()), 0)
            alive += 1
    return alive
