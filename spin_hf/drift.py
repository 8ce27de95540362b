"""Whether a backbone still has the weights that its neurons were chosen on: a few numbers of every parameter tell."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

_PER_PARAMETER = 64


def sample(backbone: nn.Module) -> dict[str, Tensor]:
    """Up to 64 evenly spaced numbers of each parameter, on the CPU, in the parameter's dtype.

    Left out are parameters without plain storage: on the meta device, quantised or sharded by a tensor subclass.
    """
    found = {}
    for name, parameter in backbone.named_parameters():
        values = parameter.detach()
        if type(values) is Tensor and values.device.type != "meta" and values.numel():
            step = max(1, values.numel() // _PER_PARAMETER)
            found[name] = values.reshape(-1)[::step][:_PER_PARAMETER].cpu().clone()
    return found


def moved(before: dict[str, Tensor], backbone: nn.Module) -> bool:
    """Whether a parameter differs from its sample, or an adapter trains. Casts and removed blocks don't count."""
    if {name for name, parameter in backbone.named_parameters() if parameter.requires_grad} - before.keys():
        return True
    return any(
        name in before and not torch.equal(before[name].to(values.dtype), values)
        for name, values in sample(backbone).items()
    )


def warn_if_moved(model: Any, *_: Any) -> None:
    """Before a ``SpinModel``'s state is taken to be saved: warn, once, if its neurons were chosen on other weights."""
    if model._weights_seen is not None and moved(model._weights_seen, model.backbone):
        model.forget_backbone()
        warnings.warn(
            "The backbone has changed since this model was calibrated, by training or by an adapter: its neurons were "
            "chosen on other weights. It works as it is; spin_calibrate(model, tokenizer, train, recalibrate=True) "
            "may find better ones, with an adapter after model = model.merge_and_unload().",
            UserWarning,
            stacklevel=2,
        )
