"""Dropping features by gradient: put a gate on each, train with a price on open gates, cut off the closed ones."""

from __future__ import annotations

import math

import torch

from ..gates import Gates
from ..modeling_spin import NotCalibratedError, SpinForSequenceClassification
from ..taps import model_device


def add_gates(model: SpinForSequenceClassification, *, penalty: float = 1e-3) -> None:
    """Put an open gate on every kept feature. **Changes the model in place.**

    The gates train beside the head, in ``Trainer`` or any other loop; in training mode the loss contains their price
    (:class:`spin_hf.gates.Gates` says how that closes them). A gated model saves, loads and predicts like any other.
    End with :func:`prune_gates`. Gates come down from 1 to 0 in steps of about ten times the learning rate: it
    takes a few hundred at 1e-3, far above the 1e-5 that is usual for a whole model.

    Args:
        model: a calibrated classifier.
        penalty: price of an open gate, in units of the mean loss. The higher, the fewer features stay.

    Raises:
        NotCalibratedError: without features.
        ValueError: if it has gates or exits already, or for a penalty that is not a positive number.
    """
    if not model.calibrated:
        raise NotCalibratedError("There are no features to put gates on; run spin_calibrate(model, ...) first.")
    if model.gates is not None:
        raise ValueError("This model has gates already. Train it, or remove them with prune_gates(model).")
    if model.exits is not None:
        raise ValueError(
            "This model has exits, which read features of their own. Keep one head first: model.keep_exit(None) keeps "
            "the one that it answers with."
        )
    if not (isinstance(penalty, (int, float)) and 0 < penalty < math.inf):
        raise ValueError(f"penalty must be a positive number; got {penalty!r}.")
    model.gates = Gates(model.config.num_features, float(penalty)).to(model_device(model.score))
    model.config.gate_penalty = float(penalty)


@torch.no_grad()
def prune_gates(model: SpinForSequenceClassification) -> int:
    """Remove the features whose gate is closed, and then the gates. **Changes the model in place.**

    What the open gates let through is multiplied into ``score``; taps that no feature needs are dropped, and the blocks
    above the last tap removed, where the backbone can be cut. The model predicts as before, to rounding.

    Args:
        model: one that :func:`add_gates` was called on, or its loaded checkpoint.

    Returns:
        Number of features that stay.

    Raises:
        ValueError: if it has no gates, or all of them are closed.
    """
    if model.gates is None:
        raise ValueError("This model has no gates. Call add_gates(model) and train it first.")
    values = model.gates.values()
    kept = values.nonzero()[:, 0]
    if not len(kept):
        raise ValueError(
            f"All {len(values)} gates are closed: penalty={model.config.gate_penalty} is too high. Start from the "
            "calibrated model again, with a lower one."
        )
    spin, groups, start = model.spin, [], 0
    for group in spin.feature_groups():
        neurons = group.neurons[values[start : start + len(group.neurons)].to(group.neurons.device) > 0]
        start += len(group.neurons)
        if len(neurons):
            groups.append(group._replace(neurons=neurons))
    depth = spin.depth_for(groups)
    there = spin.standardizer.mean.device
    mean, scale = spin.standardizer.mean[kept.to(there)], spin.standardizer.scale[kept.to(there)]
    weight, bias = (model.score.weight * values)[:, kept], model.score.bias
    model.gates, model.config.gate_penalty = None, None
    spin.set_features(groups, mean, scale, depth=depth)
    model.set_head(weight, bias)
    return len(kept)
