"""The shape of QLoRA on the CPU: a quantised backbone, adapters on it, a head in full precision."""

import pytest
import torch
import transformers as hf
from builders import make_backbone, make_batch, make_tokenizer
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("quantised", [four_bit, eight_bit, torchao_int8], ids=lambda make: make.__name__)
def test_calibrate_then_lora(quantised, sentiment_rows, tmp_path):
    options = quantised()
    # 4 bits on the CPU take widths that are multiples of 32.
    make_backbone("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "backbone")
    model = SpinForSequenceClassification.from_backbone(
        tmp_path / "backbone", quantization_config=options, device_map="cpu"
    )
    down = model.spin.backbone.layers[0].mlp.down_proj
    assert (type(down), type(down.weight.data)) != (nn.Linear, torch.Tensor)
    rows, tokenizer = (sentiment_rows["text"], sentiment_rows["label"]), make_tokenizer()
    quick = {"progress": False, "Cs": 3, "etas": (1.0,), "poolings": ["mean"]}
    result = spin_calibrate(model, tokenizer, rows, **quick)
    assert result.chosen.score > 0.5
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=spin_hf.lora_targets(model))
    made = peft.get_peft_model(model, config)
    trainer(made, sentiment_rows, tmp_path / "run", max_steps=4).train()
    head = made.base_model.model.score.modules_to_save["default"]
    assert type(head) is nn.Linear
    assert head.weight.dtype == torch.float32
    moved = [p for name, p in made.named_parameters() if "lora_B" in name and p.detach().any()]
    assert moved
    expected = made.eval()(**make_batch()).logits
    made.save_pretrained(tmp_path / "adapter")
    again = SpinForSequenceClassification.from_backbone(
        tmp_path / "backbone", quantization_config=options, device_map="cpu"
    )
    spin_calibrate(again, tokenizer, rows, **quick)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**make_batch()).logits, expected, rtol=1e-4, atol=1e-5)
