import copy
import json

import pytest
import torch
import transformers as hf
from builders import CONFIGS, calibrated, make_backbone, make_batch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging

from spin_hf import NotCalibratedError, SpinConfig, SpinForSequenceClassification, SpinModel
from spin_hf.configuration_spin import trusting_remote_code
from spin_hf.features import FeatureGroup
from spin_hf.taps import Tap


def close(found, expected):
    """Invariant 1's bound."""
    return (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())


def padded_left(batch, extra=0):
    """The same rows with their padding, and ``extra`` more, on the left."""
    mask = batch["attention_mask"]
    order = mask.argsort(dim=1, stable=True)
    moved = {}
    for name, value in batch.items():
        index = order.reshape(order.shape + (1,) * (value.dim() - 2)).expand_as(value)
        junk = value[:, :1].expand(-1, extra, *value.shape[2:])
        moved[name] = torch.cat([junk, value.gather(1, index)], 1)
    moved["attention_mask"][:, :extra] = 0
    return moved


def rows_alone(batch):
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        yield {name: value[row : row + 1, :length] for name, value in batch.items()}


# -- invariant 1: the same text, however it is batched ---------------------------------------------------------------

EXTRAS = {
    "token_type_ids": ("bert", "roberta", "gpt2"),
    "position_ids": ("bert", "distilbert", "roberta", "gpt2", "llama", "gemma", "qwen3"),
}


def assert_same_in_any_batch(model, batch):
    with torch.no_grad():
        alone = torch.cat([model(**row).logits for row in rows_alone(batch)])
        assert close(model(**batch).logits, alone)
        assert close(model(**padded_left(batch)).logits, alone)
        assert close(model(**padded_left(batch, extra=3)).logits, alone)
        assert not close(model(**{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}).logits, alone)
    return alone


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_and_embeddings_in_any_batch(name):
    model = calibrated(make_backbone(name))
    batch = make_batch()
    by_ids = assert_same_in_any_batch(model, batch)
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert close(assert_same_in_any_batch(model, {**batch, "inputs_embeds": embeds}), by_ids)


@pytest.mark.parametrize(("extra", "name"), [(extra, name) for extra, names in EXTRAS.items() for name in names])
def test_token_types_and_positions_in_any_batch(extra, name):
    model = calibrated(make_backbone(name))
    batch = make_batch()
    plain = model(**batch).logits
    tokens = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    batch[extra] = tokens % 2 if extra == "token_type_ids" else tokens * 2 + 3
    assert not close(assert_same_in_any_batch(model, batch), plain)


def test_a_real_model_in_any_batch(minilm_path):
    tokenizer = hf.AutoTokenizer.from_pretrained(minilm_path)
    model = calibrated(hf.AutoModel.from_pretrained(minilm_path), count=8)
    texts = ["A joy from start to end.", "Dull.", "Nothing in it surprised me, and it was three hours long."]
    assert_same_in_any_batch(model, dict(tokenizer(texts, padding=True, return_tensors="pt")))


def test_boolean_and_float_masks(bert_backbone):
    model = calibrated(bert_backbone)
    batch = make_batch()
    expected = model(**batch).logits
    for dtype in (torch.bool, torch.int32):
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"].to(dtype)).logits, expected)


def test_a_missing_mask_takes_every_token_and_warns_once(bert_backbone, caplog):
    model = calibrated(bert_backbone)
    ids = make_batch()["input_ids"]
    logging.get_logger("spin_hf.inputs").warning_once.__func__.cache_clear()
    found = [model(ids).logits for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "No attention_mask was given: every token is taken as real, padding included."
    ]
    assert torch.equal(found[0], model(ids, torch.ones_like(ids)).logits)


def test_one_row_without_a_mask_warns_of_nothing(bert_backbone, caplog):
    logging.get_logger("spin_hf.inputs").warning_once.__func__.cache_clear()
    calibrated(bert_backbone)(make_batch(rows=1)["input_ids"])
    assert not caplog.records


def test_inputs_that_do_not_fit(bert_backbone):
    model = calibrated(bert_backbone)
    batch = make_batch()
    with pytest.raises(ValueError, match=r"attention_mask should be \(4, 9\) \(batch, tokens\), not \(4, 8\)"):
        model(batch["input_ids"], batch["attention_mask"][:, 1:])
    with pytest.raises(ValueError, match="Give input_ids or inputs_embeds"):
        model(attention_mask=batch["attention_mask"])


# -- outputs ---------------------------------------------------------------------------------------------------------


def test_features_and_logits(bert_backbone):
    model = calibrated(copy.deepcopy(bert_backbone), taps=["hidden.0", "ffn.2"], poolings=["mean", "max"], count=2)
    batch = make_batch(rows=1, tokens=5)
    values = {}
    block = bert_backbone.encoder.layer
    block[0].register_forward_pre_hook(lambda module, args: values.__setitem__("hidden.0", args[0][0]))
    block[1].output.dense.register_forward_pre_hook(lambda module, args: values.__setitem__("ffn.2", args[0][0]))
    bert_backbone(**batch)
    raw = torch.cat(
        [
            (values[str(group.tap)].amax(0) if group.pooling == "max" else values[str(group.tap)].mean(0))[
                group.neurons
            ]
            for group in model.spin.feature_groups()
        ]
    )
    expected = (raw - model.spin.standardizer.mean) / model.spin.standardizer.scale
    output = model(**batch, output_features=True)
    torch.testing.assert_close(output.features[0], expected)
    torch.testing.assert_close(output.logits[0], model.score.weight @ expected + model.score.bias)
    assert [(str(g.tap), g.pooling, len(g.neurons)) for g in model.spin.feature_groups()] == [
        (e["tap"], e["pooling"], e["count"]) for e in model.config.features
    ]


def test_what_is_returned(bert_backbone):
    model = calibrated(bert_backbone)
    batch = make_batch()
    labels = torch.tensor([0, 1, 1, 0])
    full = model(**batch, labels=labels, output_features=True)
    assert list(full) == ["loss", "logits", "features"]
    assert list(model(**batch)) == ["logits"]
    for options, names in (
        ({}, ["logits"]),
        ({"labels": labels}, ["loss", "logits"]),
        ({"labels": labels, "output_features": True}, ["loss", "logits", "features"]),
    ):
        parts = model(**batch, **options, return_dict=False)
        assert isinstance(parts, tuple)
        assert all(torch.equal(part, full[name]) for part, name in zip(parts, names, strict=True))
    assert torch.equal(model.spin(**batch).features, full.features)
    assert torch.equal(model.spin(**batch, return_dict=False)[0], full.features)


# -- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_temperature_divides_logits_and_the_loss_sees_it(tmp_path, bert_backbone, problem_type):
    model = calibrated(bert_backbone, labels=["a", "b", "c"], problem_type=problem_type)
    multi_label = problem_type == "multi_label_classification"
    labels = torch.ones(4, 3) if multi_label else torch.tensor([0, 1, 2, 0])
    plain = model(**make_batch(), labels=labels)
    model.config.logit_temperature = 2.5
    model.save_pretrained(tmp_path)
    scaled = SpinForSequenceClassification.from_pretrained(tmp_path)(**make_batch(), labels=labels)
    torch.testing.assert_close(scaled.logits, plain.logits / 2.5)
    assert torch.equal(scaled.logits.argmax(1), plain.logits.argmax(1))
    assert torch.equal(scaled.logits > 0, plain.logits > 0)
    loss = F.binary_cross_entropy_with_logits if multi_label else F.cross_entropy
    torch.testing.assert_close(scaled.loss, loss(scaled.logits, labels))
    model.set_head(model.score.weight.detach(), model.score.bias.detach())
    assert model.config.logit_temperature == 1.0
    assert torch.equal(model(**make_batch()).logits, plain.logits)


def test_single_label_loss(bert_backbone):
    model = calibrated(bert_backbone, labels=["a", "b", "c"])
    batch, labels = make_batch(), torch.tensor([0, 2, 1, 2])
    log_p = model(**batch).logits.log_softmax(-1)[range(4), labels]
    torch.testing.assert_close(model(**batch, labels=labels).loss, -log_p.mean())
    model.config.class_weights = [1.0, 2.0, 0.5]
    weight = torch.tensor([1.0, 0.5, 2.0, 0.5])
    torch.testing.assert_close(model(**batch, labels=labels[:, None]).loss, -(weight * log_p).sum() / weight.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_multi_label_loss(bert_backbone, dtype):
    model = calibrated(bert_backbone, labels=["a", "b"], problem_type="multi_label_classification")
    batch, labels = make_batch(), torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]])
    logits = model(**batch).logits
    present, absent = -F.logsigmoid(logits) * labels, -F.logsigmoid(-logits) * (1 - labels)
    torch.testing.assert_close(model(**batch, labels=labels.to(dtype)).loss, (present + absent).mean())
    model.config.class_weights = [3.0, 0.5]
    weighted = present * torch.tensor([3.0, 0.5]) + absent
    torch.testing.assert_close(model(**batch, labels=labels.to(dtype)).loss, weighted.mean())


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_regression_loss(bert_backbone, shape):
    model = calibrated(bert_backbone, problem_type="regression")
    batch, labels = make_batch(), torch.tensor([1.5, -2.0, 0.0, 3.0])
    expected = (model(**batch).logits[:, 0] - labels).square().mean()
    torch.testing.assert_close(model(**batch, labels=labels.reshape(shape)).loss, expected)


# -- making one ------------------------------------------------------------------------------------------------------


def test_from_backbone_writes_the_config(tmp_path, bert_backbone):
    bert_backbone.save_pretrained(tmp_path)
    model = SpinForSequenceClassification.from_backbone(str(tmp_path), labels=["no", "yes"], dtype=torch.bfloat16)
    config = model.config
    assert model.spin.backbone.dtype == torch.bfloat16
    assert (config.backbone_id, config.problem_type) == (str(tmp_path), "single_label_classification")
    assert (config.id2label, config.label2id) == ({0: "no", 1: "yes"}, {"no": 0, "yes": 1})
    assert config.layout == {"blocks": "encoder.layer", "ffn": "output.dense", "norm": None, "calls": 1}
    assert not model.training
    assert not model.calibrated


def test_from_backbone_reads_the_encoder_alone(tmp_path):
    hf.T5Model(CONFIGS["t5"]()).save_pretrained(tmp_path)
    model = SpinForSequenceClassification.from_backbone(str(tmp_path))
    assert type(model.spin.backbone) is hf.T5EncoderModel
    assert model.spin.depth == 3


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["LABEL_0", "LABEL_1"]),
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"labels": ["a", "b"], "num_labels": 2}, ["a", "b"]),
        ({"problem_type": "regression"}, ["LABEL_0"]),
        ({"problem_type": "multi_label_classification", "num_labels": 1}, ["LABEL_0"]),
    ],
)
def test_label_names(bert_backbone, options, names):
    model = SpinForSequenceClassification.from_backbone(bert_backbone, **options)
    assert list(model.config.id2label.values()) == names
    assert model.score.out_features == len(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem_type": "ranking"}, "problem_type must be one of single_label_classification, .*; got 'ranking'"),
        ({"labels": ["a", "b"], "num_labels": 3}, "labels names 2 labels, num_labels says 3"),
        ({"labels": ["a", "a"]}, "must differ from each other"),
        ({"labels": ["a"]}, "at least two labels; got 1"),
        ({"labels": ["a", "b"], "problem_type": "regression"}, "predicts one number; got 2"),
        ({"labels": "ab"}, "must be a list of names; got 'ab'"),
        ({"id2label": {0: "a", 1: "b"}}, r"by labels=\[...\] instead of id2label="),
        ({"dtype": torch.float16}, "dtype can only be used when the backbone is loaded here"),
    ],
)
def test_options_that_contradict(bert_backbone, options, message):
    with pytest.raises(ValueError, match=message):
        SpinForSequenceClassification.from_backbone(bert_backbone, **options)


def test_backbones_that_could_not_be_loaded_again(tmp_path, bert_backbone):
    with pytest.raises(ValueError, match="here as BertModel.*with a BertForSequenceClassification"):
        SpinForSequenceClassification.from_backbone(hf.BertForSequenceClassification(CONFIGS["bert"]()))
    with pytest.raises(ValueError, match="here as T5EncoderModel.*with a T5Stack"):
        SpinForSequenceClassification.from_backbone(make_backbone("t5").encoder)
    with pytest.raises(ValueError, match="here as BartEncoder.*with a BartDecoder"):
        SpinForSequenceClassification.from_backbone(hf.BartModel(hf.BartConfig(d_model=16, decoder_layers=1)).decoder)
    model = calibrated(bert_backbone)
    model.save_pretrained(tmp_path)
    for spin in (model.spin, model, str(tmp_path)):
        with pytest.raises(ValueError, match="is a SPIN model already; load it with from_pretrained"):
            SpinForSequenceClassification.from_backbone(spin)
    backbone = model.spin.backbone
    del model, spin
    with pytest.raises(ValueError, match="A classifier was calibrated on this backbone, which it reads.* it anew"):
        SpinForSequenceClassification.from_backbone(backbone)


@pytest.mark.parametrize("backbone", [None, nn.Linear(2, 2), hf.BertModel])
def test_what_is_no_backbone(backbone):
    with pytest.raises(ValueError, match=f"a loaded model of transformers; got a {type(backbone).__name__}"):
        SpinForSequenceClassification.from_backbone(backbone)


def test_a_backbone_with_code_of_its_own_is_refused_without_a_question(tmp_path, monkeypatch):
    values = {**CONFIGS["bert"]().to_dict(), "model_type": "tiny", "auto_map": {"AutoConfig": "tiny.TinyConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "tiny.py").write_text("raise AssertionError('it ran')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asked"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SpinForSequenceClassification.from_backbone(tmp_path)


def test_uncalibrated_models_refuse(tmp_path, bert_backbone):
    model = SpinForSequenceClassification.from_backbone(bert_backbone)
    for refusing in (model, model.spin):
        with pytest.raises(NotCalibratedError, match=r"Call spin_calibrate\(model, tokenizer, train_dataset\) first"):
            refusing(**make_batch())
    with pytest.raises(NotCalibratedError, match="run spin_calibrate before saving"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_refused_features_leave_the_model_as_it_was(bert_backbone):
    model = calibrated(bert_backbone)
    batch = make_batch()
    before = model(**batch).logits
    groups = [FeatureGroup(Tap("ffn", block), "mean", torch.tensor([1])) for block in (2, 1)]
    with pytest.raises(ValueError, match="must be sorted by block, kind and pooling"):
        model.spin.set_features(groups, torch.zeros(2), torch.ones(2), depth=2)
    with pytest.raises(ValueError, match="depth must lie between 1 and the backbone's 3"):
        model.spin.set_features(groups[::-1], torch.zeros(2), torch.ones(2), depth=4)
    assert torch.equal(model(**batch).logits, before)


# -- invariant 4: built from the config alone ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_init_builds_from_the_config_alone(name, monkeypatch):
    made = calibrated(make_backbone(name), depth=2)
    config = SpinConfig.from_dict(made.config.to_dict())
    config.backbone_id = "nobody/nothing"
    monkeypatch.setattr(hf.PreTrainedModel, "from_pretrained", None)
    built = SpinForSequenceClassification(config)
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in made.state_dict().items()}
    built.load_state_dict(made.state_dict())
    batch = make_batch()
    assert torch.equal(built.eval()(**batch).logits, made(**batch).logits)


@pytest.mark.parametrize("trust", [True, False])
def test_trusted_code_is_taken_at_the_stored_revision(bert_backbone, monkeypatch, trust):
    class RemoteConfig(hf.BertConfig):
        pass

    config = calibrated(bert_backbone).config
    config.backbone_config = RemoteConfig()
    config.backbone_revision = "abc"
    asked = []
    monkeypatch.setattr(hf.AutoModel, "from_config", lambda config, **options: asked.append(options) or bert_backbone)
    with trusting_remote_code(trust):
        SpinForSequenceClassification(config)
    code = {"code_revision": "abc"} if trust else {}
    assert asked == [{"trust_remote_code": trust, "dtype": torch.float32, **code}]


def test_a_fresh_head_is_zero(bert_backbone):
    config = calibrated(bert_backbone).config
    built = SpinForSequenceClassification(config)
    assert not built.score.weight.any()
    assert not built.score.bias.any()
    assert SpinModel(config).standardizer.scale.eq(1).all()


def test_the_backbones_own_answers(bert_backbone):
    model = calibrated(bert_backbone)
    assert model.get_input_embeddings() is bert_backbone.embeddings.word_embeddings
    assert set(model._no_split_modules) >= set(bert_backbone._no_split_modules)
    embeddings = torch.nn.Embedding(80, 32)
    model.set_input_embeddings(embeddings)
    assert bert_backbone.embeddings.word_embeddings is embeddings


class Operations(TorchDispatchMode):
    """Counts the operations that compute something: each is a launch on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
def test_a_tap_more_is_one_operation_more(padded):
    """A small batch costs what is launched, so reading must stay as short as this."""
    batch = make_batch()
    if not padded:
        del batch["attention_mask"]

    def operations(taps, poolings):
        model = calibrated(make_backbone("llama"), taps=taps, poolings=poolings, depth=3)
        with torch.no_grad(), Operations() as counter:
            model(**batch)
        with torch.no_grad(), Operations() as bare:
            model.spin.backbone(**batch, use_cache=False)
        return counter.count - bare.count

    few, many = (
        operations(taps, ["max", "mean"]) for taps in (["ffn.1", "ffn.2"], ["ffn.1", "ffn.2", "hidden.2", "ffn.3"])
    )
    assert many == few + 2
    assert operations(["ffn.1", "ffn.2"], ["mean"]) < few < 30


@pytest.mark.parametrize("name", ["neurons", "mean", "scale", "queries"])
@pytest.mark.parametrize("how", ["in place", "replaced", "data"])
def test_what_is_read_follows_the_buffers(name, how):
    model, batch = calibrated(make_backbone("bert"), poolings=["attention", "mean"]), make_batch()
    before, made = model(**batch).logits, model.spin.standardizer
    changed = getattr(made, name).flip(0)
    if how == "in place":
        getattr(made, name).copy_(changed)
    elif how == "replaced":
        setattr(made, name, changed)
    else:
        getattr(made, name).data = changed
    fresh = SpinForSequenceClassification(model.config, backbone=make_backbone("bert"))
    fresh.load_state_dict(model.state_dict())
    found = model(**batch).logits
    assert torch.equal(found, fresh.eval()(**batch).logits)
    assert not torch.equal(found, before)


def test_gradients_come_back_after_a_forward_in_inference_mode():
    model, batch = calibrated(make_backbone("bert"), poolings=["attention", "mean"]), make_batch()
    with torch.inference_mode():
        expected = model(**batch).logits.clone()
    model.unfreeze_backbone()
    found = model(**batch).logits
    found.sum().backward()
    assert torch.equal(found, expected)
    assert all(parameter.grad is not None for parameter in model.spin.backbone.encoder.parameters())
