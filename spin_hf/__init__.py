"""Turn any pretrained Hugging Face model into a text classifier by reading its inside. No training of the model.

Importing this package registers its models with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .calibration import CalibrationResult, spin_calibrate
from .configuration_spin import SpinConfig
from .estimator import SpinClassifier, SpinRegressor
from .modeling_spin import NotCalibratedError, SpinForSequenceClassification
from .pipelines import SpinTextClassificationPipeline
from .spin_model import SpinModel
from .taps import TapError
from .training import lora_targets
from .trust import CheckpointError

AutoConfig.register(SpinConfig.model_type, SpinConfig, exist_ok=True)
AutoModel.register(SpinConfig, SpinModel, exist_ok=True)
AutoModelForSequenceClassification.register(SpinConfig, SpinForSequenceClassification, exist_ok=True)

__version__ = "0.1.0"

__all__ = [
    "CalibrationResult",
    "CheckpointError",
    "NotCalibratedError",
    "SpinClassifier",
    "SpinConfig",
    "SpinForSequenceClassification",
    "SpinModel",
    "SpinRegressor",
    "SpinTextClassificationPipeline",
    "TapError",
    "lora_targets",
    "spin_calibrate",
]
