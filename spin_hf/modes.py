"""What torch is doing as our code runs: under autocast, or tracing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast for a device; entering it costs nothing where there is none anyway."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def is_exporting() -> bool:
    """Whether a graph is traced that will run elsewhere. Where torch can't tell export from compile, both are."""
    # Not torch.compiler.is_exporting(), which torch.compile takes to be true in some versions, torch 2.11 among them.
    return torch.compiler.is_compiling() and getattr(torch.compiler, "_is_exporting_flag", True)
