"""One calibration by several processes: what they save, and whether they end with what one makes.

Random weights of a real shape and texts made here; each part prints its rows as they are found.

- ``scaling``: seconds by stage on 1, 2, 4 and 8 GPUs; neurons and logits against the run on one.
- ``split``: a backbone spread over the GPUs by ``device_map``, in one process.
- ``trainer``: a few steps with the frozen backbone and with LoRA under DDP, and with LoRA under FSDP, which accelerate
  runs on GPUs only.
- ``killed``: one process gets SIGKILL while it reads; the same command then goes on from the store.

``split`` and ``killed`` read ``--few`` texts. Give ``--folder`` to keep what runs found, and not to run these again.

    python examples/benchmarks/several_gpus.py --record
    python examples/benchmarks/several_gpus.py --shape tiny --texts 64 --few 64 --tokens 16    # on CPUs, for a try
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import results
import torch
from safetensors.torch import load_file
from shapes import SHAPES, make, make_classifier

from spin_hf import SpinForSequenceClassification
from spin_hf.calibration.store import recorded

HERE = Path(__file__).parent
# The rest is what a calibration does between its stages, above all to hash the weights; what is around it are imports,
# joining the processes, loading the backbone and making the texts.
STAGES = ("tokenize", "extract", "probe", "heads", "rest", "total", "around")
Row = dict[str, Any]


class Failed(Exception):
    """A launch that did not end well."""


class Bench:
    """Runs workers for these options; what they find lies in ``folder``."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.until = float("inf")

    def backbone(self, shape: str) -> Path:
        """The folder of a backbone, which all processes load."""
        made = self.folder / f"backbone-{shape}-{self.arguments.dtype}"
        if not made.exists():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            backbone = make(shape, dtype=getattr(torch, self.arguments.dtype), device=device)
            backbone.save_pretrained(made.with_suffix(".part"))
            made.with_suffix(".part").rename(made)
            del backbone
            torch.cuda.empty_cache()
        return made

    def classifier(self, shape: str) -> Path:
        """The folder of a classifier that reads neurons of all blocks in the lower half, so that all of these learn."""
        made = self.folder / f"classifier-{shape}"
        if not made.exists():
            model = SpinForSequenceClassification.from_backbone(self.backbone(shape), num_labels=2, dtype=torch.float32)
            model.config.pad_token_id = 0
            half = model.spin.depth // 2
            make_classifier(model, half, keep=half).save_pretrained(made)
        return made

    def calibrate(self, shape: str, texts: int, count: int, *, name: str = "", **more: Any) -> Path:
        """The folder of a calibration by ``count`` processes; its features stay only where one is killed."""
        given = self.arguments
        words = [shape, given.dtype, f"{texts}x{given.tokens}", f"in{given.batch_tokens}", f"Cs{given.Cs}", str(count)]
        out = self.folder / "-".join([*words, *([name] if name else [])])
        if (out / "about.json").exists():
            print(f"{out.name} was run before", file=sys.stderr)
            return out
        shutil.rmtree(out, ignore_errors=True)  # with features that would not be read again
        options = {
            **{"backbone": str(self.backbone(shape)), "texts": texts, "tokens": given.tokens, "dtype": given.dtype},
            **{"batch_tokens": given.batch_tokens, "Cs": given.Cs, **more},
        }
        began = time.monotonic()
        try:
            self.launch("calibrate", out, count, options)
        finally:
            if "kill_at" not in more:
                shutil.rmtree(out / "cache", ignore_errors=True)  # of a large shape it takes tens of gigabytes
        about = _about(out)
        about["seconds"]["around"] = time.monotonic() - began - about["seconds"]["total"]
        (out / "about.json").write_text(json.dumps(about))
        return out

    def launch(self, task: str, out: Path, count: int, options: Row) -> None:
        """Run a task of the worker in so many processes, by ``accelerate launch`` where there are several.

        Raises:
            Failed: with the end of what it wrote, or when the part's time is over.
        """
        out.mkdir(parents=True, exist_ok=True)
        (out / "options.json").write_text(json.dumps({**options, "out": str(out)}))
        command = [sys.executable]
        if count > 1:
            command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
            command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            command += ["--main_process_port", str(_free_port())]
        command += [str(HERE / "several_gpus_worker.py"), task, str(out / "options.json")]
        # As many threads however many processes: sums of other lengths would round differently on a CPU.
        threads = max(1, (os.cpu_count() or 1) // max(self.arguments.processes))
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        env = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "true"}
        if not torch.cuda.is_available():
            env["ACCELERATE_USE_CPU"] = "true"
        began = time.monotonic()
        with (out / "log").open("w") as log:
            started = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            code = None
            try:
                code = started.wait(max(1.0, min(self.until - began, 1e6)))
            except subprocess.TimeoutExpired:
                started.terminate()  # the launcher ends its processes
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(60)
            finally:
                started.kill()
        if code is None:
            raise Failed(f"the time of the part was over, {time.monotonic() - began:.0f} s after this launch")
        if code:
            raise Failed((out / "log").read_text(errors="replace")[-3000:])


def scaling(bench: Bench) -> Iterator[Row]:
    given = bench.arguments
    for shape in given.shape:
        alone: Path | None = None
        for count in given.processes:
            out = bench.calibrate(shape, given.texts, count)
            alone = alone or out
            about, first = _about(out), _about(alone)
            yield {
                **{"shape": shape, "processes": count, "texts": [given.texts, given.tokens], "dtype": given.dtype},
                **{name: about[name] for name in ("chosen", "score", "features", "depth")},
                **{name: about[name] for name in ("features_gb", "peak_gpu_gb")},
                "seconds": {stage: round(about["seconds"][stage], 2) for stage in STAGES},
                "speedup": {stage: round(first["seconds"][stage] / about["seconds"][stage], 2) for stage in STAGES},
                **_compared(out, alone, count),
            }


def split(bench: Bench) -> Iterator[Row]:
    given = bench.arguments
    for shape in given.shape:
        alone = bench.calibrate(shape, given.few, 1)
        for device_map in ("auto", "balanced") if torch.cuda.is_available() else ("auto",):
            out = bench.calibrate(shape, given.few, 1, name=device_map, device_map=device_map)
            about = _about(out)
            yield {
                **{"shape": shape, "device_map": device_map, "texts": [given.few, given.tokens], "dtype": given.dtype},
                **{"devices": " ".join(about["devices"]), "features": about["features"], "depth": about["depth"]},
                **_compared(out, alone, 1),
                "seconds": {stage: round(about["seconds"][stage], 2) for stage in STAGES},
            }


def trainer(bench: Bench) -> Iterator[Row]:
    given, count = bench.arguments, max(bench.arguments.processes)
    for shape in given.shape:
        classifier = bench.classifier(shape)
        for way in ("frozen", "lora", "lora, fsdp") if torch.cuda.is_available() else ("frozen", "lora"):
            out = bench.folder / f"train-{shape}-{count}-{way.replace(', ', '-')}"
            shutil.rmtree(out, ignore_errors=True)
            began = time.monotonic()
            row = {"shape": shape, "way": way, "processes": count, "steps": given.steps, "dtype": "float32"}
            options = {"classifier": str(classifier), "way": way, "tokens": given.tokens, "steps": given.steps}
            try:
                bench.launch("train", out, count, options)
            except Failed as error:  # the other ways are still worth knowing
                yield {**row, "failed": (re.findall(r"\w+Error: .*", str(error)) or [str(error)])[0]}
                print(error, file=sys.stderr, flush=True)
                continue
            yield {**row, **_about(out), "seconds": round(time.monotonic() - began, 1)}
            shutil.rmtree(out)


def killed(bench: Bench) -> Iterator[Row]:
    given, count = bench.arguments, max(bench.arguments.processes)
    for shape in given.shape:
        alone = bench.calibrate(shape, given.few, 1)
        batches = _about(alone)["batches"]
        row = {"shape": shape, "processes": count, "texts": [given.few, given.tokens], "batches": batches}
        number = max(2, batches // count // 2)
        said = ""
        try:
            bench.calibrate(shape, given.few, count, name="killed", kill_at=number)
        except Failed as error:
            said = str(error)
        ended = time.time()
        out = next(bench.folder.glob(f"{shape}-*-{count}-killed"))
        if not (out / "killed").exists():
            raise Failed(f"no process was killed: {said}")
        row["seconds_to_the_end_of_all"] = round(ended - float((out / "killed").read_text()), 1)
        row["left_alive"] = sum(map(_lives, out.glob("pid.*")))
        cause = re.search(r"rank +: (\d+).*(Signal \d+ [^\n]*)", said.rpartition("Root Cause")[2], re.DOTALL)
        row["told"] = f"rank {cause[1]}: {cause[2]}" if cause else said
        recorded_before = _lines(out)
        row["kept"] = len(recorded(_store(out), batches))
        bench.launch("calibrate", out, count, {**json.loads((out / "options.json").read_text()), "kill_at": 0})
        row["read_again"] = _lines(out) - recorded_before
        yield {**row, "not_redone": batches - row["read_again"], **_compared(out, alone, count)}
        shutil.rmtree(out)


PARTS = {"scaling": scaling, "split": split, "trainer": trainer, "killed": killed}


def _about(out: Path) -> Row:
    about: Row = json.loads((out / "about.json").read_text())
    return about


def _compared(out: Path, alone: Path, count: int) -> Row:
    """How what each process ended with differs from what one alone made."""
    expected = load_file(alone / "found.0.safetensors")
    found = [load_file(out / f"found.{rank}.safetensors") for rank in range(count)]
    neurons = {name: values.tolist() for name, values in expected.items() if name != "logits"}
    return {
        "same_neurons": all(
            {name: values.tolist() for name, values in each.items() if name != "logits"} == neurons for each in found
        ),
        "logits_differ_by": max(float((each["logits"] - expected["logits"]).abs().max()) for each in found),
        "largest_logit": float(expected["logits"].abs().max()),
    }


def _store(out: Path) -> Path:
    return next((out / "cache").glob("*/store.json")).parent


def _lines(out: Path) -> int:
    """Batches that were recorded, as often as they were."""
    return sum(bool(line) for path in _store(out).glob("done.*") for line in path.read_text().splitlines())


def _lives(path: Path) -> bool:
    try:
        os.kill(int(path.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = results.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-1b", "gpt2-xl"])
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1, 2, 4 and 8 as far as there are GPUs")
    parser.add_argument("--texts", type=int, default=25000)
    parser.add_argument("--few", type=int, default=2000, help="texts of the other parts")
    parser.add_argument("--tokens", type=int, default=256, help="of each text")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--Cs", type=int, default=10, help="as of spin_calibrate")
    parser.add_argument("--steps", type=int, default=5, help="of Trainer")
    parser.add_argument("--dtype", default="bfloat16" if gpus else "float32")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for each part")
    parser.add_argument("--folder", type=Path, help="for backbones, features and what was found; default: a temporary")
    arguments = parser.parse_args()
    arguments.processes = arguments.processes or [
        count for count in (1, 2, 4, 8) if count <= max(gpus, 1 if gpus else 2)
    ]
    if max(arguments.processes) < 2 and {"trainer", "killed"} & set(arguments.parts):
        parser.error("trainer and killed need two processes: choose other --parts, or a machine with two GPUs")
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "CPU"
    failed = False
    with contextlib.ExitStack() as held:
        folder = arguments.folder or Path(held.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(arguments, folder.resolve())
        for part in arguments.parts:
            rows: list[Row] = []
            bench.until = time.monotonic() + arguments.limit
            name = f"Several GPUs, {part}: {' '.join(arguments.shape)}, {device}"
            try:
                for row in PARTS[part](bench):
                    rows.append(row)
                    print(json.dumps({"part": part, **row}), flush=True)
                    results.write_section(arguments.record, name, rows)  # what comes next may take too long
                    failed |= "failed" in row
            except Failed as error:
                failed = True
                print(json.dumps({"part": part, "failed": str(error)}), flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
