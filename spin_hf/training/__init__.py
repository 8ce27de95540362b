"""Training what calibration made: with Trainer, with gates that drop features, with PEFT."""

from .adapters import lora_targets
from .gating import add_gates, prune_gates
from .recalibration import SpinTrainerCallback
from .stored_features import store_features

__all__ = ["SpinTrainerCallback", "add_gates", "lora_targets", "prune_gates", "store_features"]
