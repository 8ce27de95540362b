"""How calibration cuts long texts into windows: from the caller's options, the tokenizer and the backbone."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ..windows import Windows
from .errors import CalibrationError, TextPairError, demand_whole

_SOME_TEXT = "a"


def check_window_options(windows: bool, overlap: int | None) -> None:
    """Raise before any work for options that contradict each other.

    Raises:
        CalibrationError: for an overlap without windows, or values of other types.
    """
    if not isinstance(windows, bool):
        raise CalibrationError(f"windows must be True or False; got {windows!r}. Their size is max_length=.")
    if overlap is not None:
        demand_whole("overlap", overlap, least=0)
        if not windows:
            raise CalibrationError(f"overlap={overlap} is for texts in windows: pass windows=True too.")


def make_windows(
    tokenizer: PreTrainedTokenizerBase, size: int | None, overlap: int | None, *, pairs: bool = False
) -> Windows:
    """Windows of this many tokens, special ones included.

    Args:
        tokenizer: says which special tokens stand around a text.
        size: tokens of a window, ``None`` where nothing sets a limit.
        overlap: tokens that neighbours share at least; by default a quarter of what the special tokens leave.
        pairs: whether the texts are sentence pairs.

    Raises:
        TextPairError: for pairs.
        CalibrationError: without a size, for an overlap that leaves no new tokens to a window, or a tokenizer that does
            not put its special tokens around the text.
    """
    if pairs:
        raise TextPairError("windows=True is for single texts: of a pair it is open which one to cut. Leave it out.")
    if size is None:
        raise CalibrationError(
            "Neither tokenizer nor backbone limits the length of a text, so windows=True needs the size of a window: "
            "spin_calibrate(..., windows=True, max_length=512)."
        )
    before, after = _special_tokens(tokenizer)
    room = size - before - after
    windows = Windows(size, room // 4 if overlap is None else overlap, before, after)
    if windows.overlap >= room:
        raise CalibrationError(
            f"overlap={overlap} must be smaller than the {room} tokens that a window of {size} has beside "
            f"{before + after} special ones."
        )
    return windows


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """How many of them stand before and behind a text."""
    bare = list(tokenizer(_SOME_TEXT, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_SOME_TEXT)["input_ids"])
    spare = len(whole) - len(bare)
    for before in range(spare + 1):
        if bare and whole[before : before + len(bare)] == bare:
            return before, spare - before
    raise CalibrationError(
        f"{type(tokenizer).__name__} does not put its special tokens around the text ({bare} became {whole}), so that "
        "a text can't be cut into windows. Leave windows out."
    )
