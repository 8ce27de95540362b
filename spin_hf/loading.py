"""What a command line names, loaded: device, tokenizer, classifier; what can't be loaded is told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake of the caller's, told in one line."""


def pick_device(name: str | None) -> str:
    """The device of that name, or the best there is. Raises :class:`UserError` for one that can't be used."""
    import torch

    if name is not None:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"Device {name!r} can't be used: {error}") from None
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


class telling_what_fails:
    """Say what can't be loaded in one line, and keep transformers' bars for its own messages away."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from .configuration_spin import CheckpointError

        if isinstance(error, (OSError, ValueError)) and not isinstance(error, CheckpointError):
            raise UserError(f"{self.source} can't be loaded: {error}") from None


def load_tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> Any:
    """A model's tokenizer, able to pad."""
    from transformers import AutoTokenizer

    with telling_what_fails(f"The tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked out, so any token does
    return tokenizer


def load_classifier(folder: Path, device: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """A saved classifier, on a device, and its tokenizer."""
    from .modeling_spin import SpinForSequenceClassification

    with telling_what_fails(str(folder)):
        model = SpinForSequenceClassification.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model.to(pick_device(device)), load_tokenizer(str(folder), None, trust_remote_code)
