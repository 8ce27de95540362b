"""Calibrating again after the backbone has moved, by hand and from Trainer."""

import copy
import warnings

import pytest
import torch
from builders import calibrated, make_backbone, make_tokenizer
from test_trainer import trainer

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import CalibrationError
from spin_hf.calibration.errors import UnknownLabelError
from spin_hf.prediction import predict
from spin_hf.training import SpinTrainerCallback, add_gates

QUICK = {"progress": False, "Cs": 3, "etas": (1.0,), "poolings": ["mean"], "kinds": ["ffn"], "validation_fraction": 0.2}


@pytest.fixture
def rows(sentiment_rows):
    return sentiment_rows["text"], sentiment_rows["label"]


@pytest.fixture
def model():
    made = calibrated(make_backbone("bert"), depth=2, poolings=("mean",))
    made.config.id2label = {0: "bad", 1: "good"}
    made.config.label2id = {"bad": 0, "good": 1}
    return made


def test_it_is_a_calibration_of_the_backbone_as_it_is(model, tokenizer, rows):
    """The oracle: the same weights, wrapped afresh."""
    with torch.no_grad():
        for parameter in model.spin.backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    backbone = copy.deepcopy(model.spin.backbone)
    fresh = SpinForSequenceClassification.from_backbone(
        type(backbone)._from_config(backbone.config), labels=["bad", "good"]
    )
    fresh.spin.backbone.load_state_dict(backbone.state_dict())
    assert fresh.spin.depth == 2
    with pytest.raises(CalibrationError, match="recalibrate=True"):
        spin_calibrate(model, tokenizer, rows, **QUICK)
    again = spin_calibrate(model, tokenizer, rows, **QUICK, recalibrate=True)
    first = spin_calibrate(fresh, tokenizer, rows, **QUICK)
    assert again.chosen == first.chosen
    assert (again.settings["recalibrate"], first.settings["recalibrate"]) == (True, False)
    assert again.chosen.depth <= 2
    assert model.config.features == fresh.config.features
    assert model.config.id2label == {0: "bad", 1: "good"}
    texts = rows[0][:8]
    assert (predict(model, tokenizer, texts).logits == predict(fresh, tokenizer, texts).logits).all()


def test_a_failed_recalibration_leaves_the_model_as_it_was(model, tokenizer, rows, monkeypatch):
    before = predict(model, tokenizer, rows[0][:8]).logits
    with pytest.raises(UnknownLabelError):
        spin_calibrate(model, tokenizer, (rows[0], ["bad", "ugly"] * 40), **QUICK, recalibrate=True)
    run, calls = model.spin.run_backbone, []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    monkeypatch.setattr(model.spin, "run_backbone", dying)
    with pytest.raises(KeyboardInterrupt):
        spin_calibrate(model, tokenizer, rows, **QUICK, batch_tokens=64, recalibrate=True)
    monkeypatch.undo()
    assert (predict(model, tokenizer, rows[0][:8]).logits == before).all()


def test_gates_and_foreign_models_are_refused(model, tokenizer, rows):
    add_gates(model)
    with pytest.raises(CalibrationError, match="prune_gates"):
        spin_calibrate(model, tokenizer, rows, recalibrate=True)
    with pytest.raises(CalibrationError, match="A BertModel can't be calibrated"):
        spin_calibrate(make_backbone("bert"), tokenizer, rows)


def test_trainer_ends_with_a_calibration(model, sentiment_rows, rows, tmp_path):
    tokenizer = make_tokenizer()
    model.spin.remember_backbone()
    model.unfreeze_backbone()
    callback = SpinTrainerCallback(tokenizer, rows, **QUICK)
    made = trainer(
        model,
        sentiment_rows,
        tmp_path,
        callbacks=[callback],
        learning_rate=1e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # its own checkpoints are no reason to warn
        made.train()
        made.save_model(str(tmp_path / "end"))
    (result,) = callback.results
    assert model.config.num_features == result.chosen.num_features
    best = SpinForSequenceClassification.from_pretrained(made.state.best_model_checkpoint)
    for name, value in model.spin.backbone.state_dict().items():
        assert torch.equal(value, best.spin.backbone.state_dict()[name])
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path / "end")
    assert loaded.config.features == model.config.features
    assert made.evaluate()["eval_accuracy"] > 0.5


def test_every_epoch_with_an_optimizer_that_goes_on(model, sentiment_rows, rows, tmp_path):
    tokenizer = make_tokenizer()
    model.unfreeze_backbone()
    whole = copy.deepcopy(model)
    options = {"learning_rate": 1e-3, "num_train_epochs": 3, "save_strategy": "epoch"}

    def run(each, folder, **more):
        callback = SpinTrainerCallback(tokenizer, rows, every=1, **QUICK)
        made = trainer(each, sentiment_rows, folder, callbacks=[callback], **options)
        made.train(**more)
        return made, callback

    made, callback = run(whole, tmp_path / "whole")
    assert len(callback.results) == 3  # none twice for the last
    alive = {id(parameter) for parameter in whole.parameters()}
    in_optimizer = [parameter for group in made.optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in in_optimizer} == alive
    assert len(in_optimizer) == len(alive)
    assert {id(parameter) for parameter in made.optimizer.state} <= alive
    assert not any(parameter in made.optimizer.state for parameter in whole.score.parameters())  # since the last time
    embedding = made.optimizer.state[whole.get_input_embeddings().weight]
    assert int(embedding["step"]) == 12

    # from the second epoch's checkpoint to the same end
    second = tmp_path / "whole" / "checkpoint-8"
    resumed = SpinForSequenceClassification.from_pretrained(second)
    resumed.unfreeze_backbone()
    run(resumed, tmp_path / "resumed", resume_from_checkpoint=str(second))
    assert resumed.config.features == whole.config.features
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_misuse_is_told_before_training(model, sentiment_rows, rows, tmp_path):
    tokenizer = make_tokenizer()
    with pytest.raises(TypeError, match="kind"):
        SpinTrainerCallback(tokenizer, rows, kind=["ffn"])
    with pytest.raises(ValueError, match="every must be at least 1"):
        SpinTrainerCallback(tokenizer, rows, every=0)

    def begin(callback, **options):
        trainer(model, sentiment_rows, tmp_path, callbacks=[callback], max_steps=1, **options).train()

    with pytest.raises(ValueError, match="The backbone is frozen"):
        begin(SpinTrainerCallback(tokenizer, rows))
    model.unfreeze_backbone()
    with pytest.raises(UnknownLabelError):
        begin(SpinTrainerCallback(tokenizer, (rows[0], ["bad", "ugly"] * 40)))
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="load_best_model_at_end=False"):
        begin(SpinTrainerCallback(tokenizer, rows, every=1), **best)
