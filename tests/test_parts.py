"""The part of a model that reads text: encoders, text models of multimodal ones, and both stacks."""

import copy

import pytest
import torch
import transformers as hf
from builders import calibrated, make_batch
from census.by_hand import BY_HAND
from census.checks import make_model
from census.population import needs
from census.shrink import tiny_config

from spin_hf import SpinConfig, SpinForSequenceClassification, TapError, spin_calibrate
from spin_hf.calibration.errors import CalibrationError
from spin_hf.checkpoint import fingerprint
from spin_hf.depth import truncate, why_whole
from spin_hf.parts import shifted_right

QUICK = {"progress": False, "poolings": ["mean", "max"], "validation_fraction": 0.2, "Cs": [0.05, 0.2], "etas": (0.5,)}


def whole_model(model_type):
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(tiny_config(model_type, BY_HAND)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def test_of_an_encoder_decoder_the_encoder_alone_is_kept_run_and_saved(tmp_path):
    bart = whole_model("bart")
    expected = bart.encoder(**make_batch()).last_hidden_state
    bart.save_pretrained(tmp_path / "bart")
    model = SpinForSequenceClassification.from_backbone(str(tmp_path / "bart"))
    assert type(model.spin.backbone) is type(bart.encoder)
    with torch.no_grad():
        assert torch.equal(model.spin.backbone(**make_batch()).last_hidden_state, expected)
    cut = calibrated(model.spin.backbone, depth=2)
    cut.save_pretrained(tmp_path / "spin")
    names = cut.state_dict()
    assert not [name for name in names if "decoder" in name]
    assert not [name for name in names if ".layers.2." in name]
    again = SpinForSequenceClassification.from_pretrained(tmp_path / "spin")
    assert torch.equal(again(**make_batch()).logits, cut(**make_batch()).logits)


def test_of_a_multimodal_model_the_text_part_is_kept_run_and_saved(tmp_path):
    gemma = whole_model("gemma3")
    batch = make_batch()
    gemma.save_pretrained(tmp_path / "gemma")
    model = SpinForSequenceClassification.from_backbone(str(tmp_path / "gemma"))
    assert type(model.spin.backbone).__name__ == "Gemma3TextModel"
    with torch.no_grad():
        found = model.spin.backbone(**batch).last_hidden_state
        assert torch.equal(found, gemma.language_model(**batch).last_hidden_state)
    cut = calibrated(model.spin.backbone, depth=3)
    cut.save_pretrained(tmp_path / "spin")
    assert SpinConfig.from_pretrained(tmp_path / "spin").backbone_config.model_type == "gemma3_text"
    assert not [name for name in cut.state_dict() if "vision" in name]
    again = SpinForSequenceClassification.from_pretrained(tmp_path / "spin")
    assert torch.equal(again(**batch).logits, cut(**batch).logits)


@needs("hy_v4")  # older versions don't build this text model from a config
def test_a_text_part_without_a_model_type_of_its_own(tmp_path):
    backbone = make_model("emu3")
    attention = backbone.config._attn_implementation
    model = calibrated(backbone, depth=2)
    assert model.spin.backbone.config._attn_implementation == attention
    assert model.config.backbone_config.model_type == "emu3"
    model.save_pretrained(tmp_path)
    again = SpinForSequenceClassification.from_pretrained(tmp_path)
    assert again.spin.depth == 2
    assert again.spin.backbone.config._attn_implementation == attention
    assert torch.equal(again(**make_batch()).logits, model(**make_batch()).logits)


def test_models_of_images_or_sound():
    vision = hf.ViTModel(hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32))
    with pytest.raises(ValueError, match="ViTModel reads 'pixel_values', not text"):
        SpinForSequenceClassification.from_backbone(vision)
    audio = hf.WhisperModel(tiny_config("whisper"))
    with pytest.raises(ValueError, match="WhisperModel reads 'input_features', not text"):
        SpinForSequenceClassification.from_backbone(audio)


def test_an_image_model_is_refused_before_its_weights_are_loaded(tmp_path):
    hf.ViTConfig(hidden_size=32).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(ValueError, match="'pixel_values', not text"):
        SpinForSequenceClassification.from_backbone(str(tmp_path))


@pytest.mark.parametrize("model_type", ["siglip", "blip", "chinese_clip"])
def test_a_text_part_that_could_not_be_built_again(model_type):
    with pytest.raises(
        ValueError, match=r"reads more than text, and AutoModel does not build its text part, a \w+Text"
    ):
        SpinForSequenceClassification.from_backbone(whole_model(model_type))


def test_the_text_part_of_a_dual_encoder(tmp_path):
    model = calibrated(whole_model("clip"), depth=2)
    assert type(model.spin.backbone).__name__ == "CLIPTextModel"
    model.save_pretrained(tmp_path)
    again = SpinForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(**make_batch()).logits, model(**make_batch()).logits)


def test_a_model_that_wants_images_besides_text(tokenizer, sentiment_rows):
    model = SpinForSequenceClassification.from_backbone(whole_model("vilt"))
    with pytest.raises(CalibrationError, match=r"ViltModel can't be run on token ids alone: .*pixel_values"):
        spin_calibrate(model, tokenizer, sentiment_rows, **QUICK)


# -- both stacks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoder"), [("T5Model", "T5EncoderModel"), ("MT5ForConditionalGeneration", "MT5EncoderModel")]
)
def test_the_encoder_of_a_loaded_model_is_that_of_its_folder(tmp_path, name, encoder):
    torch.manual_seed(0)
    config = hf.T5Config if name.startswith("T5") else hf.MT5Config
    whole = getattr(hf, name)(config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=99)).eval()
    whole.save_pretrained(tmp_path / "whole")
    loaded = SpinForSequenceClassification.from_backbone(whole)
    named = SpinForSequenceClassification.from_backbone(str(tmp_path / "whole"))
    assert type(loaded.spin.backbone).__name__ == type(named.spin.backbone).__name__ == encoder
    with torch.no_grad():
        outputs = [m.spin.backbone(**make_batch()).last_hidden_state for m in (loaded, named)]
    assert torch.equal(*outputs)
    weights = [m.spin.backbone.state_dict() for m in (loaded, named)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("model_type", ["t5", "bart", "mbart", "t5gemma"])
def test_both_stacks_read_what_the_models_own_heads_read(model_type, tmp_path, tokenizer, sentiment_rows):
    whole = whole_model(model_type)
    batch = make_batch()
    model = SpinForSequenceClassification.from_backbone(copy.deepcopy(whole), stacks="both")
    spin, values = model.spin, {}
    assert spin.depth == 8
    assert {tap.block for tap in spin.taps if tap.kind == "hidden"} == set(range(9))
    with (
        torch.no_grad(),
        spin.hooked(spin.taps),
        spin.recording(spin.taps, lambda tap, value: values.__setitem__(str(tap), value), batch["attention_mask"]),
    ):
        spin.run_backbone(batch["input_ids"], batch["attention_mask"])
        decoder_ids = shifted_right(batch["input_ids"], batch["attention_mask"], whole.config)
        mask = batch["attention_mask"]
        own = whole(**batch, decoder_input_ids=decoder_ids, decoder_attention_mask=mask)
    last = "norm.8" if "norm.8" in values else "hidden.8"
    torch.testing.assert_close(values[last], own.last_hidden_state)
    encoded = "norm.4" if "norm.4" in values else "hidden.4"
    torch.testing.assert_close(values[encoded], own.encoder_last_hidden_state)
    spin_calibrate(model, tokenizer, sentiment_rows, depths=[6], **QUICK)
    assert 5 <= model.spin.depth <= 6
    model.save_pretrained(tmp_path)
    again = SpinForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    left = {
        name: torch.stack([row.roll(int(n)) for row, n in zip(rows, 9 - mask.sum(1), strict=True)])
        for name, rows in batch.items()
    }
    torch.testing.assert_close(model(**left).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_the_decoder_starts_as_barts_own_head_starts_it():
    from transformers.models.bart.modeling_bart import shift_tokens_right
    from transformers.models.mbart.modeling_mbart import shift_tokens_right as wrapped

    batch = make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    config = hf.BartConfig(pad_token_id=0, decoder_start_token_id=2)
    assert torch.equal(shifted_right(ids, mask, config), shift_tokens_right(ids, 0, 2))
    config = hf.MBartConfig(pad_token_id=0)
    assert torch.equal(shifted_right(ids, mask, config), wrapped(ids, 0))


def test_truncation_of_both_stacks_leaves_the_encoder_whole():
    model = SpinForSequenceClassification.from_backbone(whole_model("t5"), stacks="both")
    assert "leave its decoder empty" in why_whole(model.spin.backbone, model.spin.layout, 4)
    truncate(model.spin.backbone, model.spin.layout, 6)
    assert (len(model.spin.backbone.encoder.block), len(model.spin.backbone.decoder.block)) == (4, 2)
    assert (model.spin.backbone.config.num_layers, model.spin.backbone.config.num_decoder_layers) == (4, 2)


def test_training_from_a_block_on_reaches_the_norms_after_it_alone():
    model = SpinForSequenceClassification.from_backbone(whole_model("t5"), stacks="both")

    def trained():
        names = [name for name, weight in model.spin.backbone.named_parameters() if weight.requires_grad]
        return {".".join(name.split(".")[:3]) for name in names}

    model.unfreeze_backbone(from_block=8)
    assert trained() == {"decoder.block.3", "decoder.final_layer_norm.weight"}
    model.unfreeze_backbone(from_block=4)
    norms = {"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}
    assert trained() == {"encoder.block.3", *(f"decoder.block.{number}" for number in range(4)), *norms}


def test_stacks_that_contradict(bert_backbone):
    with pytest.raises(ValueError, match="BertModel is no encoder-decoder. Leave stacks out"):
        SpinForSequenceClassification.from_backbone(bert_backbone, stacks="both")
    with pytest.raises(ValueError, match='stacks must be "encoder" or "both"; got \'decoder\''):
        SpinForSequenceClassification.from_backbone(bert_backbone, stacks="decoder")
    with pytest.raises(TapError, match="name one stack"):
        SpinForSequenceClassification.from_backbone(whole_model("t5"), stacks="both", ffn="layer.1.DenseReluDense.wo")
    model = calibrated(whole_model("t5"), stacks="both")
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_a_fingerprint_proves_the_decoder_too():
    model = SpinForSequenceClassification.from_backbone(whole_model("t5"), stacks="both")
    backbone, layout = model.spin.backbone, model.spin.layout
    before = fingerprint(backbone, layout, "float32")
    with torch.no_grad():
        backbone.decoder.block[0].layer[0].layer_norm.weight.add_(1)
    assert fingerprint(backbone, layout, "float32") != before


def test_a_model_whose_ffns_run_twice_is_read_at_its_hidden_taps(tokenizer, sentiment_rows):
    model = SpinForSequenceClassification.from_backbone(make_model("pegasus_x"))
    with pytest.raises(TapError, match=r"ffn.1 was read 2 times.*leave this kind out with kinds="):
        spin_calibrate(model, tokenizer, sentiment_rows, **QUICK)
    spin_calibrate(model, tokenizer, sentiment_rows, kinds=["hidden"], **QUICK)
    assert model(**make_batch()).logits.isfinite().all()
