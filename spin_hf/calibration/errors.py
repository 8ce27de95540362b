"""Errors of calibration, one type for each thing a caller can put right. All raised before long work starts, but for
:class:`NonFiniteFeaturesError`, :class:`DeviceMemoryError` and :class:`RankError`, which can only be seen in passing.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class CalibrationError(ValueError):
    """Base of them all."""


def demand_whole(name: str, value: Any, *, least: int) -> None:
    """Raise :class:`CalibrationError` unless an option is a whole number, and no less than this."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise CalibrationError(f"{name} must be a whole number; got {value!r}.")
    if value < least:
        raise CalibrationError(f"{name} must be at least {least}; got {value}.")


def demand_between(name: str, value: Any, low: float, high: float) -> None:
    """Raise :class:`CalibrationError` unless an option is a number above ``low`` and below ``high``."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not (number and low < value < high):
        raise CalibrationError(f"{name} must be a number between {low:g} and {high:g}; got {value!r}.")


class SourceError(CalibrationError):
    """A file, a folder or a data set on the Hub that is not there or can't be read."""


class SplitError(CalibrationError):
    """A split that is missing or ambiguous."""


class ColumnError(CalibrationError):
    """Text or label columns are missing or ambiguous."""


class TextPairError(CalibrationError):
    """Single texts where pairs are due, or the other way round."""


class EmptyDatasetError(CalibrationError):
    """No rows."""


class EmptyTextError(CalibrationError):
    """Nothing but empty texts, or texts that are not strings."""


class InvalidTextError(CalibrationError):
    """A string that is no Unicode text, since it holds one half of a surrogate pair; no tokenizer reads it."""


class MissingLabelsError(CalibrationError):
    """Rows without a label, or a class without rows where rows are needed."""


class OneClassError(CalibrationError):
    """All training rows carry the same label."""


class LabelTypeError(CalibrationError):
    """Labels that do not fit the problem type."""


class UnknownLabelError(CalibrationError):
    """Labels that the model does not have."""


class PadTokenError(CalibrationError):
    """The tokenizer has no pad token, so a batch could not be served later."""


class TokenizerMismatchError(CalibrationError):
    """The tokenizer produces ids beyond the backbone's embedding."""


class NonFiniteFeaturesError(CalibrationError):
    """A tap produced NaN or infinity."""

    @classmethod
    def of(cls, tap: object, where: str) -> NonFiniteFeaturesError:
        """The one to raise where a tap's activations are no numbers."""
        return cls(
            f"Tap {tap} produced NaN or infinity ({where}). In float16 the backbone may overflow: load it with "
            "dtype=torch.bfloat16 or float32. Otherwise its weights are damaged."
        )


class DeviceMemoryError(CalibrationError):
    """A single text, or a single model to be fitted, does not fit the device's memory."""


class ConfidenceError(CalibrationError):
    """A confidence that is no probability, that no threshold reaches, or that the problem type does not have."""


class OutputFolderError(CalibrationError):
    """A folder that can't be written to, or has too little room."""


class StoreInUseError(CalibrationError):
    """Another process is filling the same feature store."""


class RankError(CalibrationError):
    """Another process of the same launch failed."""
