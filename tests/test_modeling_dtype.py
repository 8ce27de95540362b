"""Invariant 5: head, indices and standardiser stay as they are in float32, whatever the backbone is cast to."""

import copy

import pytest
import torch
import transformers as hf
from builders import calibrated, make_backbone, make_batch
from torch.nn import functional as F

from spin_hf import SpinForSequenceClassification

LOW = [torch.bfloat16, torch.float16]


def own_tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "backbone" not in name}


def assert_kept(model, before, dtype):
    """The head's tensors equal ``before``, the backbone has ``dtype``, and the outputs are float32."""
    after = own_tensors(model)
    assert (
        set(after)
        == set(before)
        == {
            "score.weight",
            "score.bias",
            *(f"spin.standardizer.{name}" for name in ("neurons", "mean", "scale")),
            *(["spin.standardizer.queries"] if model.spin.standardizer.queries is not None else []),
        }
    )
    assert {name: value.dtype for name, value in after.items()} == {name: value.dtype for name, value in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {parameter.dtype for parameter in model.spin.backbone.parameters()} == {dtype}
    output = model(**make_batch(), output_features=True)
    assert output.logits.dtype == output.features.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        expected = F.linear(output.features, before["score.weight"], before["score.bias"])
    assert torch.equal(output.logits, expected)


@pytest.fixture
def model(bert_backbone):
    made = calibrated(bert_backbone)
    assert (made.score.weight != made.score.weight.bfloat16()).any()
    return made


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("auto", [SpinForSequenceClassification, hf.AutoModelForSequenceClassification])
def test_loading_with_a_dtype(model, folder, auto, dtype):
    assert_kept(auto.from_pretrained(folder, dtype=dtype), own_tensors(model), dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}])
def test_loading_a_mixed_checkpoint(model, tmp_path, dtype, options):
    before = own_tensors(model)
    model.to(dtype).save_pretrained(tmp_path)
    assert_kept(SpinForSequenceClassification.from_pretrained(tmp_path, **options), before, dtype)


def test_widening_a_mixed_checkpoint(model, tmp_path):
    before = own_tensors(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert_kept(loaded, before, torch.float32)
    assert torch.equal(loaded.spin.backbone.pooler.dense.weight, model.spin.backbone.pooler.dense.weight.float())


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda model: model.half(), torch.float16),
        (lambda model: model.bfloat16(), torch.bfloat16),
        (lambda model: model.to(torch.bfloat16), torch.bfloat16),
        (lambda model: model.to("cpu", torch.float16), torch.float16),
        (lambda model: model.to(torch.float64), torch.float64),
        (lambda model: model.bfloat16().float(), torch.float32),
    ],
)
def test_casting(model, cast, dtype):
    before = own_tensors(model)
    assert cast(model) is model
    assert_kept(model, before, dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_building_with_a_dtype(model, dtype):
    built = hf.AutoModelForSequenceClassification.from_config(model.config, dtype=dtype).eval()
    assert_kept(built, own_tensors(built), dtype)
    assert {name: value.dtype for name, value in own_tensors(built).items()} == {
        name: value.dtype for name, value in own_tensors(model).items()
    }


def test_casting_the_body(model):
    before = own_tensors(model)
    model.spin.to(torch.bfloat16)
    assert_kept(model, before, torch.bfloat16)


@pytest.mark.parametrize("dtype", LOW)
def test_calibrating_a_low_precision_backbone(dtype):
    model = calibrated(make_backbone("llama").to(dtype))
    assert_kept(model, own_tensors(model), dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_wrapping_with_a_dtype(bert_backbone, tmp_path, dtype):
    """Before there are features the head is empty, and float32 already."""
    bert_backbone.save_pretrained(tmp_path)
    model = SpinForSequenceClassification.from_backbone(tmp_path, dtype=dtype)
    assert model.score.weight.dtype == model.spin.standardizer.mean.dtype == torch.float32
    assert {parameter.dtype for parameter in model.spin.backbone.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", LOW)
def test_autocast(model, dtype):
    batch, before = make_batch(), own_tensors(model)
    plain = model(**batch).logits
    neurons = []
    model.spin.backbone.encoder.layer[0].output.dense.register_forward_pre_hook(
        lambda module, args: neurons.append(args[0].dtype)
    )
    with torch.autocast("cpu", dtype=dtype):
        assert_kept(model, before, torch.float32)
        logits = model(**batch).logits
        loss = model(**batch, labels=torch.tensor([0, 1, 1, 0])).loss
    assert set(neurons) == {dtype}
    assert loss.dtype == torch.float32
    assert not torch.equal(logits, plain)
    torch.testing.assert_close(logits, plain, rtol=0, atol=0.2)


@pytest.mark.parametrize("dtype", LOW)
def test_the_head_learns_under_autocast_as_without(model, dtype):
    """What Trainer's ``fp16`` and ``bf16`` flags do: float16 with a scaled loss."""
    labels = torch.tensor([0, 1, 1, 0])
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    for each, low in ((plain, False), (other, True)):
        optimizer = torch.optim.SGD(each.score.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=low and dtype == torch.float16, init_scale=2.0**10)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=low):
                loss = each(**make_batch(), labels=labels).loss
            scaler.scale(loss).backward()
            assert each.score.weight.grad.dtype == torch.float32
            scaler.step(optimizer)
            scaler.update()
    learnt = plain.score.weight - model.score.weight
    assert learnt.abs().max() > 1e-3
    torch.testing.assert_close(
        other.score.weight - model.score.weight, learnt, rtol=0.05, atol=0.05 * learnt.abs().max().item()
    )


def test_gradients_stay_float32_in_a_low_precision_model(model):
    model.to(torch.bfloat16)
    model.unfreeze_backbone()
    model(**make_batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    assert model.score.weight.grad.dtype == torch.float32
    assert model.spin.backbone.encoder.layer[0].output.dense.weight.grad.dtype == torch.bfloat16
