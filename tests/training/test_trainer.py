"""Trainer on a calibrated model, beyond the gradients that tests/test_modeling_training.py looks at."""

import copy
import warnings

import numpy as np
import pytest
import torch
import transformers as hf
from builders import calibrated, make_backbone, make_tokenizer

from spin_hf import SpinForSequenceClassification, configuration_spin

HEAD = {"score.weight", "score.bias"}


@pytest.fixture
def model(bert_backbone):
    made = calibrated(bert_backbone, poolings=("mean",))
    made.spin.remember_backbone()
    return made


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(model, rows, folder, *, callbacks=None, **options):
    tokenizer = make_tokenizer()
    data = [{**tokenizer(text), "label": label} for text, label in zip(rows["text"], rows["label"], strict=True)]
    defaults = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "learning_rate": 0.05,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
    }
    return hf.Trainer(
        model,
        hf.TrainingArguments(str(folder), **{**defaults, **options}),
        train_dataset=data[:64],
        eval_dataset=data[64:],
        data_collator=hf.DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


def same_weights(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    return all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_evaluates_and_ends_with_the_best_checkpoint(model, sentiment_rows, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(configuration_spin.logger, "warning_once", heard.append)
    made = trainer(
        model,
        sentiment_rows,
        tmp_path,
        eval_strategy="epoch",
        save_strategy="epoch",
        num_train_epochs=4,
        learning_rate=2.0,  # so high that the last epoch is hardly the best
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing to warn of while the backbone is frozen
        made.train()
    losses = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4
    assert min(losses) < losses[-1]
    assert made.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    output = made.predict(made.eval_dataset)
    assert output.metrics["test_accuracy"] == accuracy(output)["accuracy"]
    assert output.predictions.shape == (16, 2)
    best = SpinForSequenceClassification.from_pretrained(made.state.best_model_checkpoint)
    assert same_weights(best, model)
    assert not heard  # what Trainer writes into a config is known


def test_resuming_ends_with_the_same_weights(model, sentiment_rows, tmp_path):
    whole, stopped, resumed = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    trainer(whole, sentiment_rows, tmp_path / "whole").train()
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(stopped, sentiment_rows, tmp_path / "parts", **options).train()
    assert same_weights(stopped, whole)
    made = trainer(resumed, sentiment_rows, tmp_path / "parts", **options)
    made.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert made.state.global_step == 8
    assert same_weights(resumed, whole)
    assert not torch.equal(whole.score.weight, model.score.weight)


def test_a_frozen_backbone_costs_neither_gradients_nor_optimizer_state(model, sentiment_rows, tmp_path):
    made = trainer(model, sentiment_rows, tmp_path)
    made.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == HEAD
    in_optimizer = {id(parameter) for group in made.optimizer.param_groups for parameter in group["params"]}
    assert in_optimizer == {id(parameter) for parameter in model.score.parameters()}
    assert set(map(id, made.optimizer.state)) == in_optimizer
    assert all(parameter.grad is None for parameter in model.spin.backbone.parameters())
    assert model.num_parameters(only_trainable=True) == 2 * (model.config.num_features + 1)
    assert made.get_num_trainable_parameters() == model.num_parameters(only_trainable=True)


@pytest.mark.parametrize(
    "flags", [{"bf16": True}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}]
)
def test_flags_do_not_change_what_the_head_learns(model, sentiment_rows, tmp_path, flags):
    """Accumulated gradients give the logged loss and weights of whole batches, bf16 those of fp32 to its precision."""
    options = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 4}
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    logs = []
    for each, more in ((plain, {}), (other, flags)):
        made = trainer(each, sentiment_rows, tmp_path, **options, **more)
        made.train()
        logs.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    tolerance = 0.05 if "bf16" in flags else 1e-5
    np.testing.assert_allclose(logs[0], logs[1], rtol=tolerance)
    torch.testing.assert_close(other.score.weight, plain.score.weight, rtol=tolerance, atol=tolerance)
    assert other.score.weight.dtype == torch.float32


def test_whole_model_with_gradient_checkpointing(model, sentiment_rows, tmp_path):
    model.unfreeze_backbone()
    before = copy.deepcopy(model)
    name = "activation_checkpointing" if hasattr(hf.TrainingArguments, "activation_checkpointing") else None
    options = {name or "gradient_checkpointing": True}
    calls = []
    model.spin.backbone.encoder.layer[0].intermediate.register_forward_hook(lambda *args: calls.append(1))
    made = trainer(model, sentiment_rows, tmp_path, learning_rate=1e-3, max_steps=2, **options)
    made.train()
    assert len(calls) == 4  # forward, and once more for backward
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    assert changed == {name for name, _ in model.named_parameters() if "pooler" not in name}


def test_label_names_and_the_tuple_form(sentiment_rows, tmp_path):
    model = calibrated(make_backbone("llama"), poolings=("last",))
    made = trainer(model, sentiment_rows, tmp_path, label_names=["labels"], max_steps=1)
    made.train()
    assert set(made.evaluate()) >= {"eval_loss", "eval_accuracy"}


def test_a_trained_backbone_is_warned_of_once_when_saved(model, sentiment_rows, tmp_path):
    model.save_pretrained(tmp_path / "calibrated")
    model = SpinForSequenceClassification.from_pretrained(tmp_path / "calibrated")
    model.unfreeze_backbone(from_block=3)
    trainer(model, sentiment_rows, tmp_path, learning_rate=1e-3, max_steps=1).train()
    with pytest.warns(UserWarning, match="recalibrate=True"):
        model.save_pretrained(tmp_path / "trained")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "trained")
        half = SpinForSequenceClassification.from_pretrained(tmp_path / "calibrated").to(torch.bfloat16)
        half.save_pretrained(tmp_path / "half")  # a cast is no training
