"""The processes of a launch, forked from one that has imported everything: in place of ``accelerate launch``."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from spin_hf.calibration import recipe


def work(
    env: dict[str, str], preset: dict[str, Any], log: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    recipe._PRESETS["default"] = replace(recipe._PRESETS["default"], **preset)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    function(*arguments)


def launch(count: int, env: dict[str, str], preset: dict[str, Any], log: str, function: Any, *arguments: Any) -> int:
    """Call a function in so many processes that belong together; all end when one fails. The first bad exit code, or 0.

    Args:
        env: variables of all of them.
        preset: fields of the default settings that are others there.
        log: a file that gets what they print.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dying", "peft", "accelerate"])
    joined = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"} if count > 1 else {}
    processes = []
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with patch.dict(os.environ, PYTHONPATH=path):  # the process that forks looks there, and not in sys.path
        for rank in map(str, range(count)):
            own = {**env, **joined, **({"RANK": rank, "LOCAL_RANK": rank} if joined else {})}
            process = context.Process(target=work, args=(own, preset, log, function, arguments))
            process.start()
            processes.append(process)
    while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
        time.sleep(0.02)
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    for process in processes:
        process.kill()
        process.join()
    return code
