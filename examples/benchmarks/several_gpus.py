"""One calibration by several processes: what they save, and whether they end with what one makes.

Random weights of a real shape and texts made here; each part prints its rows as they are found.

- ``scaling``: seconds by stage on 1, 2, 4 and 8 GPUs, on ``--texts`` whose labels words carry.
- ``split``: a backbone spread over the GPUs by ``device_map``, in one process, against one GPU.
- ``command``: ``spin-hf calibrate`` and ``accelerate launch -m spin_hf calibrate``, and what both save.
- ``killed``: one process gets SIGKILL while it reads; the same command then goes on from the store.
- ``trainer``: a few steps with the frozen backbone and with LoRA on one GPU and under DDP, and with LoRA under FSDP,
  which accelerate runs on GPUs only.

``split``, ``command`` and ``killed`` read ``--few`` texts whose labels deep neurons carry, so that deep taps are read,
and keep exits, so that heads on many taps are compared even where a single probe is best. What is compared of a
calibration is all of it: every value of its record but the seconds (of each candidate score, loss, C and neurons, of
each probe the score at every C), the config, neurons, shift, scale and head, those of the exits, and the logits of
unseen texts that the classifier and each exit give, of each process. They must be equal to the bit (tolerance 0), since
work is shared by whole batches, taps and heads. Training is another matter: batches of half the size are summed in
another order. Its weights may differ by 1e-3 of the way that they went, beyond what rounding them at each step can
make, its losses by 1e-4 of themselves.

Give ``--folder`` to keep what runs found, and not to run these again.

    python examples/benchmarks/several_gpus.py --record
    python examples/benchmarks/several_gpus.py --shape tiny --texts 64 --few 64 --tokens 16 --batch-tokens 64  # CPUs
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import results
import torch
from launches import Bench, Failed, Row, about, chosen, compared, each, lives, record, saved, trained
from shapes import SHAPES

from spin_hf.calibration.store import recorded

# Token weights are learned by one process alone, the others wait, and there are none where folds are made. The rest is
# what a calibration does between its stages, above all to hash the weights; the start is what comes around it: imports,
# joining the processes, loading the backbone and making the texts.
STAGES = ("tokenize", "token weights", "extract", "probe", "heads", "rest", "total")
SHARED = ("extract", "probe", "heads")
TOLERANCE = {"weights_differ_by": 1e-3, "losses_differ_by": 1e-4}
WAYS = {"frozen": "head", "lora": "LoRA", "lora-fsdp": "LoRA, FSDP"}


def seconds(out: Path) -> dict[str, float]:
    found = {**dict.fromkeys(STAGES, 0.0), **record(out).seconds, "rest": about(out)["rest"]}
    start = float((out / "done").read_text()) - found["total"]
    return {
        stage: round(value, 2) for stage, value in {**{stage: found[stage] for stage in STAGES}, "start": start}.items()
    }


def scaling(bench: Bench) -> Iterator[Row]:
    given = bench.arguments
    for shape in given.shape:
        alone: Path | None = None
        for count in given.processes:
            out = bench.calibrate(shape, count, deep=False)
            alone = alone or out
            now, first, told = seconds(out), seconds(alone), about(out)
            yield {
                **{"shape": shape, "processes": count, "texts": [given.texts, given.tokens], "dtype": given.dtype},
                "seconds": now,
                "speedup": {
                    **{stage: round(first[stage] / max(now[stage], 0.01), 2) for stage in (*SHARED, "total")},
                    "with start": round((first["total"] + first["start"]) / (now["total"] + now["start"]), 2),
                },
                "busy": {stage: each([own[stage] for own in told["busy"]]) for stage in SHARED},
                "peak_gpu_gb": each(told["peak_gpu_gb"]),
                "features_gb": record(out).bytes["features"] / 1e9,
                **{name: chosen(out)[name] for name in ("chosen", "score")},
                **compared(out, alone, count),
            }


def split(bench: Bench) -> Iterator[Row]:
    given = bench.arguments
    for shape in given.shape:
        alone = bench.calibrate(shape, 1, deep=True)
        for device_map in ("", "auto", "balanced") if torch.cuda.is_available() else ("", "auto"):
            out = alone
            if device_map:
                out = bench.calibrate(shape, 1, deep=True, name=device_map, device_map=device_map)
            told = about(out)
            yield {
                **{"shape": shape, "device_map": device_map or "none", "texts": [given.few, given.tokens]},
                "dtype": given.dtype,
                "weights_gb": ", ".join(f"{place} {gb:.3g}" for place, gb in told["weights_gb"].items()),
                "peak_gpu_gb": each(told["peak_gpu_gb"]),
                **chosen(out),
                **compared(out, alone, 1),
                "seconds": {stage: seconds(out)[stage] for stage in ("extract", "total")},
            }


def command(bench: Bench) -> Iterator[Row]:
    given = bench.arguments
    options = ["--batch-tokens", str(given.batch_tokens), "--dtype", given.dtype, "--exits"]
    for shape in given.shape:
        folders = {}
        for count in sorted({1, max(given.processes)}):
            out = folders[count] = bench.folder / bench.name(shape, given.few, count, "command")
            if not (out / "done").exists():
                shutil.rmtree(out, ignore_errors=True)
                began = time.monotonic()
                words = [*bench.files(shape), *options, "--out", str(out / "model"), "--cache-dir", str(out / "cache")]
                bench.run(["-m", "spin_hf", "calibrate", *words], out, count)
                shutil.rmtree(out / "cache")
                (out / "done").write_text(str(time.monotonic() - began))
            yield {
                **{"shape": shape, "processes": count, "texts": [given.few, given.tokens], "dtype": given.dtype},
                "seconds": round(float((out / "done").read_text()), 1),
                **saved(out / "model", folders[1] / "model"),
            }


def killed(bench: Bench) -> Iterator[Row]:
    given, count = bench.arguments, max(bench.arguments.processes)
    for shape in given.shape:
        yield bench.kept(bench.name(shape, given.few, count, "killed"), lambda: _killed(bench, shape, count))  # noqa: B023


def _killed(bench: Bench, shape: str, count: int) -> Row:
    given = bench.arguments
    alone = bench.calibrate(shape, 1, deep=True)
    batches = record(alone).data["batches"]
    row = {"shape": shape, "processes": count, "texts": [given.few, given.tokens], "batches": batches}
    out, said = bench.folder / bench.name(shape, given.few, count, "deep", "killed"), ""
    try:
        bench.calibrate(shape, count, deep=True, name="killed", kill_at=max(4, batches // count // 2))
    except Failed as error:
        said = str(error)
    ended = time.time()
    if not (out / "killed").exists():
        raise Failed(f"no process was killed: {said}")
    row["seconds_until_all_ended"] = round(ended - float((out / "killed").read_text()), 1)
    row["left_alive"] = lives(out.glob("pid.*"))
    cause = re.search(r"rank +: (\d+).*?(Signal \d+ [^\n]*?) received", said.rpartition("Root Cause")[2], re.DOTALL)
    row["launcher_told"] = f"rank {cause[1]}: {cause[2]}" if cause else said
    row["others_ended_by"] = ", ".join(sorted(set(re.findall(r"closing signal (SIG\w+)", said)))) or "themselves"
    recorded_before = _lines(out)
    row["kept"] = len(recorded(_store(out), batches))
    bench.launch("calibrate", out, count, {**json.loads((out / "options.json").read_text()), "kill_at": 0})
    row["read_again"] = _lines(out) - recorded_before
    row |= {**chosen(out), **compared(out, alone, count)}
    shutil.rmtree(out)
    return row


def trainer(bench: Bench) -> Iterator[Row]:
    given, most = bench.arguments, max(bench.arguments.processes)
    launches = [(1, ["frozen", "lora"]), (most, ["frozen", "lora"])]
    if torch.cuda.is_available():
        launches.append((most, ["lora-fsdp"]))
    for shape in given.shape:
        for count, ways in launches:
            names = {way: bench.name(shape, given.steps, count, "train", str(most), way) for way in ways}
            out = bench.folder / bench.name(shape, given.steps, count, "train", str(most), ways[-1], "launch")
            problem = ""
            if not all((bench.folder / f"row-{name}.json").exists() for name in names.values()):
                shutil.rmtree(out, ignore_errors=True)
                options = {"classifier": bench.classifier(shape), "ways": ways, "tokens": given.tokens}
                try:
                    bench.launch("train", out, count, {**options, "steps": given.steps, "share": most // count})
                except Failed as error:  # other ways are still worth knowing
                    problem = str(error)
                    print(problem, file=sys.stderr, flush=True)
            for way in ways:
                row = {"shape": shape, "trained": WAYS[way], "processes": count}
                if problem and not (out / way / "about.json").exists():
                    yield {**row, "failed": (re.findall(r"\w+Error: .*", problem) or [problem[-300:]])[0]}
                    continue
                alone = bench.folder / bench.name(shape, given.steps, 1, "train", str(most), "lora", "launch")
                alone = alone / way.partition("-")[0]
                yield bench.kept(names[way], lambda: {**row, **_trained(out / way, alone)})  # noqa: B023


def _trained(out: Path, alone: Path) -> Row:
    told = about(out)
    parts = {"sharded_gb": "n/a", "own_gb": "n/a"}
    if told["sharded_gb"]:
        parts = {"sharded_gb": f"{told['sharded_gb']:.3g} of {told['weights_gb']:.3g}", "own_gb": each(told["own_gb"])}
    against = trained(out, alone) if (alone / "about.json").exists() else {}
    return {
        **{"run_as": told["run_as"], "first_loss": told["losses"][0], "last_loss": told["losses"][-1]},
        **against,
        "within": all(against[name] <= most for name, most in TOLERANCE.items()) if against else "n/a",
        **parts,
        "peak_gpu_gb": each(told["peak_gpu_gb"]),
        **{name: told[name] for name in ("equal_on_all", "reloaded_logits_differ_by", "largest_logit")},
    }


PARTS = {"split": split, "command": command, "killed": killed, "trainer": trainer, "scaling": scaling}


def wrong(row: Row) -> bool:
    """Whether a row shows something that should not be."""
    return (
        "failed" in row
        or any(row.get(name, 0) for name in ("unequal_values", "left_alive", "reloaded_logits_differ_by"))
        or any(row.get(name) is False for name in ("within", "equal_on_all"))
        or row.get("seconds_until_all_ended", 0) > 60
    )


def _store(out: Path) -> Path:
    return next((out / "cache").glob("*/store.json")).parent


def _lines(out: Path) -> int:
    """Batches that were recorded, as often as they were."""
    return sum(bool(line) for path in _store(out).glob("done.*") for line in path.read_text().splitlines())


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
    parser.add_argument("--poolings", nargs="+", help="as of spin_calibrate")
    parser.add_argument("--steps", type=int, default=5, help="of Trainer, in float32")
    parser.add_argument("--dtype", default="bfloat16" if gpus else "float32")
    parser.add_argument("--limit", type=float, default=7200, help="seconds in all; then what runs is ended")
    parser.add_argument("--folder", type=Path, help="for backbones, features and what was found; default: a temporary")
    arguments = parser.parse_args()
    arguments.processes = arguments.processes or [
        count for count in (1, 2, 4, 8) if count <= max(gpus, 1 if gpus else 2)
    ]
    if max(arguments.processes) < 2 and {"trainer", "command", "killed"} & set(arguments.parts):
        parser.error("trainer, command and killed need two processes: choose other --parts, or a machine with two GPUs")
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "CPU"
    failed = False
    with contextlib.ExitStack() as held:
        folder = arguments.folder or Path(held.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments, folder.resolve())
        bench.until = time.monotonic() + arguments.limit
        for part in arguments.parts:
            rows: list[Row] = []
            name = f"Several GPUs, {part}: {' '.join(arguments.shape)}, {device}"
            try:
                for row in PARTS[part](bench):
                    rows.append(row)
                    print(json.dumps({"part": part, **row}), flush=True)
                    results.write_section(arguments.record, name, rows)  # what comes next may take too long
                    failed |= wrong(row)
            except Failed as error:
                failed = True
                print(json.dumps({"part": part, "failed": str(error)}), flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
