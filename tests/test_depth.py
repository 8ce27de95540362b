import copy

import pytest
import torch
import transformers as hf
from builders import CONFIGS, calibrated, make_backbone, make_batch

from spin_hf import TapError
from spin_hf.depth import shortened, truncate
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
