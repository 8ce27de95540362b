"""Choosing neurons and head anew once a ``Trainer`` has moved the backbone."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..calibration import CalibrationResult, spin_calibrate
from ..calibration.extraction import check_tokenizer
from ..calibration.folds import prepare
from ..calibration.limits import check_fresh
from ..modeling_spin import SpinForSequenceClassification


class SpinTrainerCallback(TrainerCallback):
    """Re-calibrates at the end of a ``Trainer`` run that trains the backbone, and every few epochs on request.

    At the end it works on the model that Trainer ends with, the best one under ``load_best_model_at_end``; save it with
    ``trainer.save_model()``, since the checkpoints are older. After ``every`` epochs it runs before Trainer evaluates
    and saves; the head's new parameters take their predecessors' place in the optimizer with a state of their own,
    those of removed blocks leave it, and everything else in it goes on. To resume such a run, load the model from the
    checkpoint with ``from_pretrained`` first: its features are not those the run began with.

    Args:
        tokenizer, train, eval: as for :func:`spin_hf.spin_calibrate`.
        every: re-calibrate after so many epochs too.
        **options: the other options of :func:`spin_hf.spin_calibrate`.

    Attributes:
        results: the record of each calibration.

    Raises:
        TypeError: for an option that ``spin_calibrate`` does not have.
        ValueError: for ``every`` below 1; and when training begins, for a model or settings it can't work with:
            a frozen backbone, a PEFT model, and with ``every`` also ``load_best_model_at_end`` or several processes.
        CalibrationError: when training begins, for data or a tokenizer that don't fit.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Any,
        eval: Any = None,
        *,
        every: int | None = None,
        **options: Any,
    ) -> None:
        inspect.signature(spin_calibrate).bind(None, tokenizer, train, eval, **options)
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 epoch; got {every}.")
        self.tokenizer, self.train, self.eval = tokenizer, train, eval
        self.every, self.options = every, options
        self.results: list[CalibrationResult] = []
        self._step: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        check_fresh(model, recalibrate=True)
        if not any(parameter.requires_grad for parameter in model.spin.backbone.parameters()):
            raise ValueError(
                "The backbone is frozen, so that re-calibration would only undo the training of the head. Call "
                "model.unfreeze_backbone() before making the Trainer, or leave SpinTrainerCallback out."
            )
        if self.every is not None and args.load_best_model_at_end:
            raise ValueError(
                "With every=, checkpoints have different features, so that the best can't be loaded into the last "
                "model. Set load_best_model_at_end=False, or leave every out: it then re-calibrates the best model."
            )
        if self.every is not None and args.world_size > 1:
            raise ValueError("every= replaces parameters, which several processes don't allow. Leave it out.")
        check_tokenizer(self.tokenizer, model)
        cv, fraction, seed = (self.options.get(name) for name in ("cv", "validation_fraction", "seed"))
        columns: dict[str, Any] = {name: self.options.get(name) for name in ("text_column", "label_column")}
        prepare(model, self.train, self.eval, cv, fraction, seed or 0, **columns)
        model.spin.forget_backbone()  # what Trainer saves meanwhile is no reason to warn

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every is not None and round(state.epoch or 0) % self.every == 0:
            before = dict(kwargs["model"].named_parameters())
            self._calibrate(kwargs["model"], state)
            replace_parameters(kwargs["optimizer"], before, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._step != state.global_step:
            self._calibrate(kwargs["model"], state)

    def _calibrate(self, model: SpinForSequenceClassification, state: TrainerState) -> None:
        training = model.training
        result = spin_calibrate(model, self.tokenizer, self.train, self.eval, **self.options, recalibrate=True)
        model.train(training)
        self.results.append(result)
        self._step = state.global_step


def replace_parameters(optimizer: Any, before: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Let an optimizer go on with a model that got other parameters under old names, or lost some. **In place.**

    Args:
        optimizer: of torch, or accelerate's wrapper of one.
        before: the model's parameters by name, as the optimizer knows them.
        model: as it is now.
    """
    now = dict(model.named_parameters())
    heir = {id(parameter): now.get(name) for name, parameter in before.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if heir.get(id(parameter), parameter) is not parameter:
                optimizer.state.pop(parameter, None)
        heirs = [heir.get(id(parameter), parameter) for parameter in group["params"]]
        group["params"] = [parameter for parameter in heirs if parameter is not None]
