"""What PEFT needs to know of the wrapped backbone."""

from __future__ import annotations

from torch import nn

from ..modeling_spin import SpinForSequenceClassification


def lora_targets(model: SpinForSequenceClassification) -> list[str] | str:
    """The modules that PEFT by itself adapts in a model of the backbone's type, for ``LoraConfig(target_modules=...)``.

    Returns:
        Names of linear layers, or a regular expression, as PEFT has it.

    Raises:
        ValueError: if PEFT has no default for that type; the message lists the backbone's linear layers.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    model_type = model.spin.backbone.config.model_type
    if model_type not in DEFAULTS:
        names = {
            name.rpartition(".")[2] for name, module in model.spin.named_modules() if isinstance(module, nn.Linear)
        }
        raise ValueError(
            f"PEFT has no default for a {model_type!r} backbone. Name the layers, of {', '.join(sorted(names))}: "
            'LoraConfig(task_type="SEQ_CLS", target_modules=[...]), or take all with target_modules="all-linear".'
        )
    targets = DEFAULTS[model_type]
    return targets if isinstance(targets, str) else list(targets)
