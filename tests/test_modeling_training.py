"""Invariant 10: what is trained, and what training leaves alone."""

import copy
import gc
import json
import weakref

import pytest
import torch
import transformers as hf
from builders import CONFIGS, calibrated, make_backbone, make_batch, make_tokenizer
from torch import nn

from spin_hf import SpinForSequenceClassification, TapError
from spin_hf.taps import Layout, attach, record

LABELS = torch.tensor([0, 1, 1, 0])


def trained(model):
    """Names of the backbone's parameters that require a gradient."""
    return {name for name, parameter in model.spin.backbone.named_parameters() if parameter.requires_grad}


def gradients(model):
    model.zero_grad()
    model(**make_batch(), labels=LABELS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model(bert_backbone):
    return calibrated(bert_backbone)


def test_frozen_as_returned(bert_backbone, tmp_path):
    assert all(parameter.requires_grad for parameter in bert_backbone.parameters())
    model = SpinForSequenceClassification.from_backbone(bert_backbone)
    assert not trained(model)
    model = calibrated(make_backbone("bert"))
    assert not trained(model)
    assert all(parameter.requires_grad for parameter in model.score.parameters())
    model.save_pretrained(tmp_path)
    for auto in (SpinForSequenceClassification, hf.AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(tmp_path)
        assert not trained(loaded)
        assert all(parameter.requires_grad for parameter in loaded.score.parameters())
    assert not any(parameter.requires_grad for parameter in hf.AutoModel.from_pretrained(tmp_path).parameters())
    loaded, info = SpinForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not trained(loaded)
    assert not info["missing_keys"]


def test_a_frozen_backbone_stays_in_eval(model):
    before = model(**make_batch()).logits
    model.train()
    assert (model.training, model.spin.training, model.spin.backbone.training) == (True, True, False)
    assert torch.equal(model(**make_batch()).logits, before)
    model.unfreeze_backbone()
    assert model.spin.backbone.training
    assert not torch.equal(model(**make_batch()).logits, model(**make_batch()).logits)
    model.eval()
    assert not model.spin.backbone.training
    model.train()
    model.freeze_backbone()
    assert (model.training, model.spin.backbone.training) == (True, False)
    assert torch.equal(model(**make_batch()).logits, before)


def test_unfreezing_an_evaluating_model_leaves_it_evaluating(model):
    model.unfreeze_backbone()
    assert not any(module.training for module in model.spin.backbone.modules())


def test_unfreeze_and_freeze(model):
    everything = {name for name, _ in model.spin.backbone.named_parameters()}
    model.unfreeze_backbone()
    assert trained(model) == everything
    model.freeze_backbone()
    assert not trained(model)
    model.unfreeze_backbone(from_block=2)
    assert trained(model) == {name for name in everything if name.startswith(("encoder.layer.1.", "encoder.layer.2."))}
    for block in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and 3; got {block}"):
            model.unfreeze_backbone(from_block=block)


def test_unfreezing_is_not_stored(model, tmp_path):
    model.unfreeze_backbone()
    model.train()
    model.save_pretrained(tmp_path)
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path)
    assert not trained(loaded)
    assert not loaded.training
    assert "freeze" not in json.dumps(loaded.config.to_dict())


def test_gradients(model):
    head = {"score.weight", "score.bias"}
    assert set(gradients(model)) == head
    model.unfreeze_backbone(from_block=3)
    block = {
        f"spin.backbone.encoder.layer.2.{name}" for name, _ in model.spin.backbone.encoder.layer[2].named_parameters()
    }
    assert set(gradients(model)) == head | block
    model.unfreeze_backbone()
    found = gradients(model)
    assert set(found) == {name for name, _ in model.named_parameters() if "pooler" not in name}
    assert all(gradient.any() for gradient in found.values())


def test_no_graph_is_built_for_a_frozen_backbone(model):
    enabled = []
    model.spin.backbone.register_forward_pre_hook(lambda module, args: enabled.append(torch.is_grad_enabled()))
    assert not model.spin(**make_batch()).features.requires_grad
    model.unfreeze_backbone()
    assert model.spin(**make_batch()).features.requires_grad
    with torch.no_grad():
        assert not model.spin(**make_batch()).features.requires_grad
    assert enabled == [False, True, False]


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_get_gradients_through_a_frozen_backbone(name):
    model = calibrated(make_backbone(name))
    batch = make_batch()
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
    model(inputs_embeds=embeds, **batch).logits.sum().backward()
    real = batch["attention_mask"].bool()
    assert embeds.grad[real].any(-1).all()
    assert not embeds.grad[~real].any()
    assert all(parameter.grad is None for parameter in model.spin.backbone.parameters())


# -- gradient checkpointing ------------------------------------------------------------------------------------------


def checkpointing(model, **options):
    """The method has a new name in later versions of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    return model.train()


def without_dropout(name):
    backbone = make_backbone(name)
    for module in backbone.modules():
        for field in ("p", "dropout", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    return backbone


@pytest.mark.parametrize("name", [name for name in CONFIGS if make_backbone(name).supports_gradient_checkpointing])
def test_checkpointing_gives_the_same_gradients(name):
    model = calibrated(without_dropout(name))
    model.unfreeze_backbone()
    other = checkpointing(copy.deepcopy(model), use_reentrant=False)
    down, calls = other.spin.layout.down_projection(other.spin.backbone, 1), []
    down.register_forward_pre_hook(lambda *args: calls.append(args))
    expected, found = gradients(model.train()), gradients(other)
    assert len(calls) == 2
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


def test_reentrant_checkpointing_is_refused_since_it_hides_gradients(model):
    model.unfreeze_backbone()
    checkpointing(model, use_reentrant=True)
    with pytest.raises(TapError, match=r'Tap \S+ lies in a reentrant checkpoint.*"use_reentrant": False'):
        model(**make_batch(), labels=LABELS)


def test_reading_with_gradients_leaves_no_cycle():
    toy = nn.Module()
    toy.blocks = nn.ModuleList([nn.Linear(4, 4)])
    layout = Layout("blocks", None, None)
    attach(toy, layout, layout.taps(toy)[1:])
    results, made = [], []

    def read(tap, value):
        kept = value.exp()
        made.append(weakref.ref(kept))
        results.append(kept.sum())

    gc.disable()
    try:
        with record(layout.taps(toy)[1:], read):
            toy.blocks[0](torch.ones(1, 2, 4))
        results.clear()
        assert made[0]() is None
    finally:
        gc.enable()


# -- Trainer ---------------------------------------------------------------------------------------------------------


def trainer(model, rows, folder, **options):
    tokenizer = make_tokenizer()
    data = [
        {**tokenizer(text), "label": label} for text, label in zip(rows["text"][:16], rows["label"][:16], strict=True)
    ]
    arguments = hf.TrainingArguments(
        str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0,
        **{"max_steps": 1, "per_device_train_batch_size": 8, **options},
    )
    return hf.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, data_collator=hf.DataCollatorWithPadding(tokenizer)
    )


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}])
def test_trainer_trains_the_head(model, sentiment_rows, tmp_path, options):
    before = copy.deepcopy(model)
    made = trainer(model, sentiment_rows, tmp_path, **options)
    expected = copy.deepcopy(model)
    batch = made.data_collator([made.train_dataset[i] for i in first_rows(made, 8)])
    expected(**batch).loss.backward()
    made.train()
    for name, value in expected.named_parameters():
        after = model.get_parameter(name)
        if "backbone" in name:
            assert torch.equal(after, before.get_parameter(name))
        else:
            torch.testing.assert_close(after, value - 0.1 * value.grad, rtol=1e-4, atol=1e-6)
            assert not torch.equal(after, before.get_parameter(name))


def first_rows(made, count):
    """The rows that Trainer will see first."""
    hf.set_seed(made.args.seed)
    loader = made.get_train_dataloader()
    return [row for batch in loader.batch_sampler for row in batch][:count]


def test_trainer_trains_an_unfrozen_backbone_and_predicts(model, sentiment_rows, tmp_path):
    model.unfreeze_backbone(from_block=2)
    before = copy.deepcopy(model)
    checkpointing(model, use_reentrant=False)
    made = trainer(model, sentiment_rows, tmp_path, max_steps=2)
    made.train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    assert {name.split(".")[4] for name in changed if "backbone" in name} == {"1", "2"}
    output = made.predict(made.eval_dataset)
    assert output.predictions.shape == (16, 2)
    tokenizer = make_tokenizer()
    rows = tokenizer(sentiment_rows["text"][:16], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**rows).logits
    torch.testing.assert_close(torch.tensor(output.predictions), logits, rtol=1e-4, atol=1e-4)
