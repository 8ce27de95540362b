import copy

import pytest
import torch
import transformers as hf
from builders import CONFIGS, calibrated, make_backbone, make_batch
from census.checks import make_model
from census.population import needs

from spin_hf import SpinForSequenceClassification, TapError, spin_calibrate
from spin_hf.calibration.errors import CalibrationError
from spin_hf.depth import nearest_depth, shortened, truncate, why_whole
from spin_hf.structure import find_layout

DEPTHS = [(name, depth) for name in CONFIGS for depth in range(1, CONFIGS[name]().num_hidden_layers + 1)]


@pytest.mark.parametrize(("name", "depth"), DEPTHS)
def test_truncated_equals_full_to_the_bit(name, depth):
    backbone = make_backbone(name)
    taps = [str(tap) for tap in find_layout(backbone).taps(backbone) if tap.block <= depth and tap.kind != "norm"]
    full = calibrated(copy.deepcopy(backbone), taps=taps)
    cut = calibrated(backbone, taps=taps, depth=depth)
    batch = make_batch()
    assert (full.spin.depth, cut.spin.depth) == (CONFIGS[name]().num_hidden_layers, depth)
    assert torch.equal(full(**batch).logits, cut(**batch).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_builds_the_truncated_backbone(name):
    backbone = make_backbone(name)
    truncate(backbone, find_layout(backbone), 2)
    assert backbone.config.num_hidden_layers == 2
    auto = hf.AutoModelForTextEncoding if name == "t5" else hf.AutoModel
    again = auto.from_config(type(backbone.config).from_dict(backbone.config.to_dict())).eval()
    again.load_state_dict(backbone.state_dict())
    batch = make_batch()
    with torch.no_grad():
        expected, found = (model(**batch).last_hidden_state for model in (backbone, again))
    assert torch.equal(expected, found)


@pytest.mark.parametrize(
    "config",
    [
        hf.Qwen3Config(num_hidden_layers=6, use_sliding_window=True, max_window_layers=3),
        hf.Gemma2Config(num_hidden_layers=6),
        hf.Gemma3TextConfig(num_hidden_layers=6),
    ],
    ids=lambda config: config.model_type,
)
def test_lists_of_one_entry_per_block_are_cut(config):
    types = config.layer_types
    assert len(types) == 6
    assert len(set(types)) == 2
    config.architectures = list("abcdef")
    config.eos_token_id = [1, 2, 3, 4, 5, 6]
    values = shortened(config.to_dict(), 6, 4)
    assert values["num_hidden_layers"] == 4
    assert values["layer_types"] == types[:4]
    assert values["architectures"] == list("abcdef")
    assert len(values["eos_token_id"]) == 6


def test_all_blocks_change_nothing(bert_backbone):
    before = bert_backbone.config.to_dict()
    truncate(bert_backbone, find_layout(bert_backbone), 3)
    assert len(bert_backbone.encoder.layer) == 3
    assert bert_backbone.config.to_dict() == before


@pytest.mark.parametrize("depth", [0, -1, 4])
def test_depths_the_backbone_lacks(bert_backbone, depth):
    with pytest.raises(ValueError, match=f"between 1 and the backbone's 3 blocks; got {depth}"):
        truncate(bert_backbone, find_layout(bert_backbone), depth)
    assert len(bert_backbone.encoder.layer) == 3


def test_a_config_that_disagrees_leaves_the_backbone_whole(bert_backbone):
    bert_backbone.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"num_hidden_layers=5, but 3 blocks.*depths=\[3\]"):
        truncate(bert_backbone, find_layout(bert_backbone), 2)
    assert len(bert_backbone.encoder.layer) == 3


def test_groups_of_shared_modules_leave_the_backbone_whole():
    backbone = make_backbone("albert", num_hidden_layers=4, num_hidden_groups=2)
    layout = find_layout(backbone)
    assert (layout.calls, layout.depth(backbone)) == (2, 4)
    with pytest.raises(ValueError, match=r"into groups.*depths=\[4\]"):
        truncate(backbone, layout, 3)
    assert len(backbone.encoder.albert_layer_groups) == 2
    single = make_backbone("albert", num_hidden_layers=2, num_hidden_groups=2)
    with pytest.raises(ValueError, match="into groups"):
        truncate(single, find_layout(single), 1)
    uneven = make_backbone("albert", num_hidden_layers=3, num_hidden_groups=2)
    with pytest.raises(TapError, match="3 blocks over 2 groups"):
        find_layout(uneven)


# -- configs and weights that depend on the number of blocks -----------------------------------------------------------


def test_weights_with_a_part_for_each_block_are_cut():
    backbone = make_model("gemma3n_text")
    before = backbone.embed_tokens_per_layer.weight.clone()
    each = before.shape[1] // 4
    truncate(backbone, find_layout(backbone), 3)
    assert torch.equal(backbone.embed_tokens_per_layer.weight, before[:, : 3 * each])
    assert backbone.embed_tokens_per_layer.embedding_dim == 3 * each
    assert (backbone.config.num_hidden_layers, backbone.config.num_kv_shared_layers) == (3, 1)
    again = type(backbone)(type(backbone.config).from_dict(backbone.config.to_dict()))
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in backbone.state_dict().items()
    }


def test_a_list_that_is_as_long_by_chance_stays():
    config = hf.DebertaV2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        relative_attention=True, pos_att_type=["p2c", "c2p"],
    )  # fmt: skip
    backbone = hf.DebertaV2Model(config).eval()
    truncate(backbone, find_layout(backbone), 1)
    assert (backbone.config.num_hidden_layers, backbone.config.pos_att_type) == (1, ["p2c", "c2p"])


def test_lists_of_block_numbers_and_values_of_single_blocks():
    values = {
        "num_hidden_layers": 4, "mlp_only_layers": [0, 2, 3], "hybrid_layer_ids": [1, 3], "mrope_section": [1, 2, 3, 4],
        "per_layer_config": {"1": {"sliding_window": 4}, 3: {"sliding_window": 8}}, "num_kv_shared_layers": 1,
    }  # fmt: skip
    assert shortened(values, 4, 2) == {
        "num_hidden_layers": 2, "mlp_only_layers": [0], "hybrid_layer_ids": [1], "mrope_section": [1, 2, 3, 4],
        "per_layer_config": {"1": {"sliding_window": 4}}, "num_kv_shared_layers": 0,
    }  # fmt: skip
    assert shortened(values, 4, 2, anything=True)["mrope_section"] == [1, 2]


def test_lists_beside_each_other_are_all_cut():
    backbone = make_model("xlm")
    truncate(backbone, find_layout(backbone), 2)
    assert {len(getattr(backbone, name)) for name in ("attentions", "layer_norm1", "ffns", "layer_norm2")} == {2}
    assert backbone.n_layers == 2


@needs("gemma4_text")
def test_depths_at_which_a_block_would_be_another_one_are_passed_over(tokenizer, sentiment_rows):
    backbone = make_model("gemma4_text")  # its last block always has full attention, here the second and the fourth
    layout = find_layout(backbone)
    assert "layers.0.self_attn" in why_whole(backbone, layout, 1)
    assert why_whole(backbone, layout, 2) is None
    assert [nearest_depth(backbone, layout, depth) for depth in (1, 2, 3, 4)] == [2, 2, 4, 4]
    with pytest.raises(ValueError, match=r"built with layers.0.self_attn.*depths=\[4\]"):
        truncate(backbone, layout, 1)
    assert len(backbone.layers) == 4
    model = SpinForSequenceClassification.from_backbone(backbone)
    with pytest.raises(CalibrationError, match="or choose others than 3"):
        spin_calibrate(model, tokenizer, sentiment_rows, depths=[3], progress=False)
    result = spin_calibrate(
        model, tokenizer, sentiment_rows, poolings=["mean"], Cs=[0.2], etas=(0.5,), progress=False, prefer="compact"
    )
    assert model.spin.depth == result.chosen.depth
    assert model.spin.depth in (2, 4)


@needs("minicpm3")
def test_blocks_that_are_scaled_by_their_number_are_kept():
    backbone = make_model("minicpm3")
    assert "residual_scale" in why_whole(backbone, find_layout(backbone), 2)


def test_a_setting_that_changed_since_a_block_was_made_is_no_reason():
    backbone = make_model("big_bird")
    with torch.no_grad():
        backbone(**make_batch())  # short texts turn its sparse attention off
    assert backbone.encoder.layer[0].attention_type == "original_full"
    assert why_whole(backbone, find_layout(backbone), 2) is None


def test_a_depth_at_which_a_backbone_cannot_be_set_up_again():
    backbone = make_model("rwkv")
    layout = find_layout(backbone)
    assert "division by zero" in why_whole(backbone, layout, 1)
    assert nearest_depth(backbone, layout, 1) == 2
