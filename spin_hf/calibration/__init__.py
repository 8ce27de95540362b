"""The step that makes a classifier: extract, probe, select, fit the head."""

from .calibrate import spin_calibrate
from .errors import CalibrationError
from .result import CalibrationResult

__all__ = ["CalibrationError", "CalibrationResult", "spin_calibrate"]
