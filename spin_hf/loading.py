"""What a person names, loaded: device, tokenizer, classifier; what can't be loaded is told in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class UserError(ValueError):
    """A mistake of the caller's, told in one line."""


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, or the best there is. Raises :class:`UserError` for one that can't be used."""
    import torch

    if name is None:
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"Device {name!r} can't be used: {error}") from None


class telling_what_fails:
    """Say what can't be loaded in one line, and keep transformers' bars for its own messages away."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from .trust import CheckpointError

        if isinstance(error, (OSError, ValueError)) and not isinstance(error, (CheckpointError, UserError)):
            raise UserError(f"{self.source} can't be loaded: {error}") from None


def load_tokenizer(source: str | Path, **kwargs: Any) -> Any:
    """A tokenizer by Hub id or folder; one without a pad token gets its end-of-text token as such.

    Args:
        source: the Hub id or folder.
        **kwargs: for ``AutoTokenizer.from_pretrained``.

    Raises:
        UserError: if it can't be loaded.
    """
    from transformers import AutoTokenizer

    with telling_what_fails(f"The tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked out, so any token does
    return tokenizer


def load_classifier(
    source: str, device: str | None, trust_remote_code: bool, backbone: str | None = None
) -> tuple[Any, Any]:
    """A saved classifier, on a device, and its tokenizer; ``backbone`` is that of a head-only one."""
    from .modeling_spin import SpinForSequenceClassification

    with telling_what_fails(source):
        model = SpinForSequenceClassification.from_pretrained(
            source, backbone=backbone, trust_remote_code=trust_remote_code
        )
    return model.to(pick_device(device)), load_tokenizer(source, trust_remote_code=trust_remote_code)


def texts_to_predict(
    texts: list[str] | None, file: Path | None, text_column: list[str] | None
) -> tuple[list[str], list[str] | None]:
    """The texts of a ``predict`` command, and their pairs: its arguments, a file's, or lines of standard input.

    Of a ``.txt`` file every line counts, so that outputs stand in the lines of their texts.

    Raises:
        UserError: for options that don't go together, or a file that can't be read.
    """
    from .calibration.data import read_texts

    if texts and file:
        raise UserError("Give texts or --file, not both.")
    if text_column and (file is None or file.suffix == ".txt"):
        raise UserError("--text-column names a column, and these texts have none. Leave it out.")
    if texts:
        return texts, None
    if file is not None and file.suffix != ".txt":
        return read_texts(file, text_column=text_column)
    try:
        lines = (file.read_text(encoding="utf-8-sig") if file else sys.stdin.read()).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file or 'standard input'} can't be read: {error}") from None
    return lines[:-1] if lines[-1] == "" else lines, None
