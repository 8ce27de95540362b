"""PEFT on a calibrated model, and a calibration of what PEFT left."""

import copy
import warnings

import pytest
import torch
from builders import calibrated, make_backbone, make_batch, make_tokenizer
from test_trainer import same_weights, trainer
from torch import nn

import spin_hf
from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import CalibrationError
from spin_hf.prediction import predict
from spin_hf.training import SpinTrainerCallback

peft = pytest.importorskip("peft")

METHODS = {
    "lora by name": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "output.dense"], init_lora_weights=False
    ),
    "lora all-linear": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False
    ),
    "ia3": lambda: peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[], init_ia3_weights=False
    ),
}


@pytest.fixture
def model(bert_backbone):
    made = calibrated(bert_backbone, poolings=("mean",))
    made.spin.remember_backbone()
    return made


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(**make_batch()).logits


def adapted(model, method):
    """An adapter whose weights are not zero, and a head that has moved."""
    torch.manual_seed(0)
    made = peft.get_peft_model(model, METHODS[method]())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "score" in name:
                parameter.add_(0.1)
    return made


@pytest.mark.parametrize("method", METHODS)
def test_adapter_goes_through_a_file_into_a_fresh_process(model, method, tmp_path, run_python):
    model.save_pretrained(tmp_path / "base")
    before = logits(model)
    made = adapted(model, method)
    trainable = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    head = {f"base_model.model.score.modules_to_save.default.{name}" for name in ("weight", "bias")}
    assert head < trainable
    assert all("lora_" in name or "ia3_" in name for name in trainable - head)
    assert not any("score" in name for name in trainable - head)
    expected = logits(made)
    assert not torch.allclose(expected, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(tmp_path / "adapter")
    torch.save(make_batch(), tmp_path / "batch.pt")
    found = run_python(
        "import sys, json, torch, peft, spin_hf, transformers;"
        "base = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]);"
        "model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval();"
        "print(json.dumps(model(**torch.load(sys.argv[3])).logits.tolist()))",
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "batch.pt",
    )
    assert torch.equal(torch.tensor(eval(found.splitlines()[-1])), expected)


@pytest.mark.parametrize("method", METHODS)
def test_merging_gives_an_ordinary_model(model, method, tmp_path):
    made = adapted(model, method)
    expected = logits(made)
    merged = made.merge_and_unload()
    assert type(merged) is SpinForSequenceClassification
    assert type(merged.score) is nn.Linear
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="recalibrate=True"):
        merged.save_pretrained(tmp_path)
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path)
    assert same_weights(loaded, merged)
    assert torch.equal(logits(loaded), logits(merged))


def test_hooks_read_once_and_gradients_reach_the_adapter(model):
    """Reading a tap twice or not at all is an error of the forward."""
    made = adapted(model, "lora all-linear").train()
    assert len(made.base_model.model.spin._hooks) == len(made.base_model.model.spin.groups)
    made(**make_batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    first = made.base_model.model.spin.backbone.encoder.layer[0].attention.self.query
    assert first.lora_A["default"].weight.grad.any()
    assert first.base_layer.weight.grad is None


def test_lora_targets_are_pefts_own():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as defaults

    for name in ("bert", "llama", "gpt2", "t5"):
        targets = spin_hf.lora_targets(calibrated(make_backbone(name), poolings=("mean",)))
        assert targets == defaults[name]
        assert targets is not defaults[name]  # the caller may change the list
    with pytest.raises(ValueError, match=r"no default for a 'distilbert' backbone.* q_lin, v_lin") as error:
        spin_hf.lora_targets(calibrated(make_backbone("distilbert"), poolings=("mean",)))
    assert "target_modules=" in str(error.value)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_the_default_targets_are_found(name):
    model = calibrated(make_backbone(name), poolings=("mean",))
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=spin_hf.lora_targets(model), fan_in_fan_out=name == "gpt2"
    )
    before = logits(model)
    made = peft.get_peft_model(model, config)
    assert sum("lora_A" in key for key, _ in made.named_parameters()) >= model.spin.depth
    assert torch.equal(logits(made), before)  # LoRA starts as nothing


def test_trainer_evaluates_keeps_the_best_and_warns(model, sentiment_rows, tmp_path):
    made = adapted(model, "lora by name")
    run = trainer(
        made,
        sentiment_rows,
        tmp_path,
        learning_rate=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        label_names=["labels"],
    )
    base = copy.deepcopy(made.base_model.model.spin.backbone.encoder.layer[0].attention.self.query.base_layer.weight)
    with pytest.warns(UserWarning, match="by an adapter") as caught:
        run.train()
    assert len([each for each in caught if "by an adapter" in str(each.message)]) == 1
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    after = made.base_model.model.spin.backbone.encoder.layer[0].attention.self.query.base_layer.weight
    assert torch.equal(after, base)


def test_recalibration_is_of_the_merged_model(model, sentiment_rows, tmp_path):
    tokenizer, rows = make_tokenizer(), (sentiment_rows["text"], sentiment_rows["label"])
    options = {"progress": False, "Cs": 3, "etas": (1.0,), "poolings": ["mean"], "recalibrate": True}
    made = adapted(model, "lora by name")
    for given in (made, made.base_model.model):
        with pytest.raises(CalibrationError, match="merge_and_unload"):
            spin_calibrate(given, tokenizer, rows, **options)
    with pytest.raises(CalibrationError, match="merge_and_unload"):
        trainer(made, sentiment_rows, tmp_path, callbacks=[SpinTrainerCallback(tokenizer, rows)]).train()
    merged = made.merge_and_unload()
    weights = copy.deepcopy(merged.spin.backbone.state_dict())
    result = spin_calibrate(merged, tokenizer, rows, **options)
    assert merged.config.num_features == result.chosen.num_features
    for name, value in merged.spin.backbone.state_dict().items():
        assert torch.equal(value, weights[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged.save_pretrained(tmp_path)
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path)
    texts = rows[0][:8]
    assert (predict(loaded, tokenizer, texts).logits == predict(merged, tokenizer, texts).logits).all()


def test_an_adapted_backbone_is_merged_first(sentiment_rows):
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    adapted_backbone = peft.get_peft_model(make_backbone("bert"), config)
    with pytest.raises(ValueError, match=r"from_backbone\(backbone.merge_and_unload\(\)"):
        SpinForSequenceClassification.from_backbone(adapted_backbone)
    model = SpinForSequenceClassification.from_backbone(adapted_backbone.merge_and_unload())
    rows = (sentiment_rows["text"], sentiment_rows["label"])
    result = spin_calibrate(model, make_tokenizer(), rows, progress=False, Cs=3, etas=(1.0,), poolings=["mean"])
    assert result.chosen.score > 0.5


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_refused(model, kind):
    config = getattr(peft, kind)(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(AttributeError, match="not supported.*Use LoraConfig"):
        peft.get_peft_model(model, config)
