"""``spin-hf`` in a process of its own, which notes what it does and can kill itself there as ``kill -9`` would."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers as hf

import spin_hf.calibration.calibrate
import spin_hf.hub.card  # noqa: F401  both loaded before the fork
from spin_hf import cli
from spin_hf.calibration import recipe

STAGES = ("extraction", "probing", "selection", "saving")


def work(
    arguments: list[str], out: Path, log: Path, stage: str | None = None, number: int = 0, delay: float = 0.0
) -> None:
    """Run a command, on few penalties. ``log`` gets a line for each forward, probe, heads, and file in ``out``.

    It dies with the event of this ``number`` of a stage, or so many seconds later.
    """
    seen: Counter[str] = Counter()
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def event(name: str) -> None:
        os.write(notes, f"{name}\n".encode())
        seen[name] += 1
        if name == stage and seen[name] == number:
            if delay:
                threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL))).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def audited(what: str, details: tuple[Any, ...]) -> None:
        if what == "os.rename":
            name = Path(os.fsdecode(details[1])).name
            if name.startswith("probe.") or name.startswith("heads."):
                event("probing" if name.startswith("probe.") else "selection")
            elif out in Path(os.fsdecode(details[1])).parents:
                event("saving")
        elif what == "open" and details[2] & (os.O_WRONLY | os.O_RDWR) and isinstance(details[0], str):
            event("saving") if out in Path(details[0]).parents else None

    torch.set_num_threads(1)
    recipe._PRESETS["default"] = replace(recipe._PRESETS["default"], Cs=(0.05, 0.2), etas=(0.5, 1.0))
    hf.utils.logging.disable_progress_bar()
    forward = torch.nn.modules.module.register_module_forward_pre_hook
    forward(lambda module, _: event("extraction") if isinstance(module, hf.BertModel) else None)
    sys.addaudithook(audited)
    cli.app(arguments)


def run(*arguments: Any, **options: Any) -> int:
    """Call :func:`work` in a process forked from one that has imported everything; its exit code, -9 if killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dying"])
    process = context.Process(target=work, args=arguments, kwargs=options)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with patch.dict(os.environ, PYTHONPATH=path):  # the process that forks looks there, and not in sys.path
        process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
