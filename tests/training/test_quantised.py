"""The shape of QLoRA on the CPU: a quantised backbone, adapters on it, a head in full precision."""

import pytest
import torch
import transformers as hf
from builders import calibrated, make_backbone, make_batch, make_tokenizer
from test_trainer import trainer
from torch import nn

import spin_hf
from spin_hf import SpinForSequenceClassification, spin_calibrate

peft = pytest.importorskip("peft")


def four_bit():
    pytest.importorskip("bitsandbytes")
    return hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return hf.BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    return hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.parametrize("quantised", [four_bit, eight_bit, torchao_int8], ids=lambda make: make.__name__),
]


@pytest.fixture
def load(quantised, tmp_path):
    """The same quantised backbone at every call."""
    options = {"quantization_config": quantised(), "device_map": "cpu"}
    # 4 bits on the CPU take widths that are multiples of 32.
    make_backbone("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "backbone")
    return lambda: hf.AutoModel.from_pretrained(tmp_path / "backbone", **options)


@torch.no_grad()  # with gradients bitsandbytes computes in another precision
def logits(model):
    return model.eval()(**make_batch()).logits


def test_calibrates(load, sentiment_rows):
    model = SpinForSequenceClassification.from_backbone(load())
    down = model.spin.backbone.layers[0].mlp.down_proj
    assert (type(down), type(down.weight.data)) != (nn.Linear, torch.Tensor)
    rows = (sentiment_rows["text"], sentiment_rows["label"])
    result = spin_calibrate(model, make_tokenizer(), rows, progress=False, Cs=3, etas=(1.0,), poolings=["mean"])
    assert result.chosen.score > 0.5
    assert type(model.score) is nn.Linear
    assert model.score.weight.dtype == model.spin.standardizer.mean.dtype == torch.float32


def test_lora(load, sentiment_rows, tmp_path):
    """Not after a forward in eval: on some CPUs bitsandbytes then repacks 4 bits, and no gradient passes any more."""
    model = calibrated(load(), poolings=("mean",))
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=spin_hf.lora_targets(model))
    made = peft.get_peft_model(model, config)
    before = made.base_model.model.score.modules_to_save["default"].weight.detach().clone()
    trainer(made, sentiment_rows, tmp_path / "run", max_steps=4).train()
    head = made.base_model.model.score.modules_to_save["default"]
    assert type(head) is nn.Linear
    assert head.weight.dtype == torch.float32
    assert not torch.equal(head.weight, before)
    moved = [name for name, parameter in made.named_parameters() if "lora_B" in name and parameter.detach().any()]
    assert len(moved) == 2 * model.spin.depth
    expected = logits(made)
    made.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(calibrated(load(), poolings=("mean",)), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
