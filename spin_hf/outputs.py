"""What the two models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .configuration_spin import SpinConfig


@dataclass
class SpinModelOutput(ModelOutput):
    """Output of :class:`SpinModel`.

    Args:
        features: the standardised features ``(batch, num_features)``, float32.
    """

    features: Tensor | None = None


@dataclass
class SpinSequenceClassifierOutput(ModelOutput):
    """Output of :class:`SpinForSequenceClassification`.

    Args:
        loss: scalar, when labels were given.
        logits: ``(batch, num_labels)``, float32.
        features: the standardised features ``(batch, num_features)``, with ``output_features=True``.
        exit_logits: those of every exit ``(batch, exits, num_labels)``, with ``output_exits=True``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None
    exit_logits: Tensor | None = None


def wants_dict(asked: bool | None, config: SpinConfig) -> bool:
    """Whether a forward with ``return_dict=asked`` returns an output class, not a tuple."""
    return bool(config.return_dict if asked is None else asked)
