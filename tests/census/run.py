"""The census: ``python tests/census/run.py [TYPE ...]``. Every type in a process of its own, then the table."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers as hf  # noqa: E402

from census.checks import LeftOut, Outcome, check, check_reloaded, make_model  # noqa: E402
from census.population import model_types  # noqa: E402
from census.table import totals, write_table  # noqa: E402

SECONDS = 120  # for a type


def run_census(types: list[str], folder: Path, *, loud: bool = False) -> list[Outcome]:
    """The outcomes of all checks for these types. Classifiers are saved under ``folder``."""
    for model_type in ("bert", "llama"):  # so that each child finds the modules that all of them need imported
        make_model(model_type)
    outcomes = []
    for model_type in types:
        outcome = _apart(model_type, folder)
        outcomes.append(outcome)
        if loud:
            failed = "; ".join(f"{number}: {why}" for number, why in outcome.failed.items())
            print(f"{model_type:28s} {outcome.seconds:5.1f}s {outcome.passed} {failed or outcome.left_out}", flush=True)
    _reload([outcome for outcome in outcomes if 3 in outcome.passed], folder)
    return outcomes


def _apart(model_type: str, folder: Path) -> Outcome:
    """Run a type's checks in a forked process, which may crash or hang."""
    read, write = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(SECONDS)
        outcome = Outcome(model_type)
        try:
            check(outcome, folder / model_type)
        except LeftOut as reason:
            outcome.left_out = str(reason)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(where.filename)}:{where.lineno}"
            outcome.failed[1] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({place})"
        with os.fdopen(write, "w") as pipe:
            json.dump(outcome.to_dict(), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    outcome = Outcome(model_type, failed={1: f"the process ended with status {status}"})
    if told:
        values = json.loads(told)
        outcome = Outcome(**{**values, "failed": {int(number): why for number, why in values["failed"].items()}})
    outcome.seconds = time.monotonic() - started
    return outcome


def _reload(outcomes: list[Outcome], folder: Path) -> None:
    """Reload what was saved, in a fresh process that does all of it; take check 3 back where that fails."""
    names = [outcome.model_type for outcome in outcomes]
    code = "import sys; from census.run import reload; reload(sys.argv[1], sys.argv[2:])"
    here = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(folder), *names], cwd=here, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    told = {entry["model_type"]: entry["error"] for entry in map(json.loads, lines)}
    for outcome in outcomes:
        error = told.get(outcome.model_type, f"the process that reloads ended early: {done.stderr[-300:]}")
        if error:
            outcome.passed.remove(3)
            outcome.failed[3] = error


def reload(folder: str, names: list[str]) -> None:
    """What the fresh process does: one line of JSON for each type."""
    torch.set_num_threads(1)
    for name in names:
        error = ""
        try:
            check_reloaded(Path(folder) / name)
        except Exception as failure:
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]
        print(json.dumps({"model_type": name, "error": error}), flush=True)


def main() -> None:
    """All types, or those named; the table only of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_census(arguments.types or model_types(), Path(folder), loud=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([outcome.to_dict() for outcome in outcomes], indent=1))
    if arguments.out:
        write_table(outcomes, arguments.out)
    print(totals(outcomes))


if __name__ == "__main__":
    main()
