"""What is needed around a model: its tokenizer and a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(source: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """A tokenizer by Hub id or folder; one without a pad token gets its end-of-text token as such.

    Args:
        source: the Hub id or folder.
        **kwargs: for ``AutoTokenizer.from_pretrained``.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **kwargs)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked out, so any token does
    return tokenizer


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of this name, or the best there is.

    Raises:
        ValueError: if it can't be used here.
    """
    if name is None:
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"Device {name!r} can't be used: {error}") from None
