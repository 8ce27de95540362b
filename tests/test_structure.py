"""Blocks and FFNs found by structure; the values of their taps against formulas written out here."""

import pytest
import torch
import transformers as hf
from census.checks import make_model
from census.population import needs
from torch import nn
from torch.nn import functional as F

from spin_hf import SpinForSequenceClassification, TapError, spin_calibrate
from spin_hf.calibration.errors import CalibrationError
from spin_hf.structure import find_layout
from spin_hf.taps import Layout, Tap, tap_width


def read(backbone, tokens=7, rows=2, layout=None):
    """The activations of every tap, and what the named modules were given."""
    model = SpinForSequenceClassification.from_backbone(backbone)
    spin, values = model.spin, {}
    ids = torch.randint(4, 56, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with (
        torch.no_grad(),
        spin.hooked(spin.taps),
        spin.recording(spin.taps, lambda tap, value: values.__setitem__(str(tap), value.clone()), mask),
    ):
        spin.run_backbone(ids, mask)
    return spin, values


def inputs_of(backbone, names):
    """For each name the first input of that module in each call."""
    seen = {name: [] for name in names}
    for name in names:
        backbone.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append(args[0] if args else next(iter(kwargs.values()))),
            with_kwargs=True,
        )
    return seen


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def gated(act):
    return lambda m, x: act(m.gate_proj(x)) * m.up_proj(x)


# For each type the module whose input goes in, and the neurons as its paper has them.
NEURONS = {
    "bert": ("encoder.layer.{}.intermediate", lambda m, x: F.gelu(m.dense(x))),
    "distilbert": ("transformer.layer.{}.ffn", lambda m, x: F.gelu(m.lin1(x))),
    "gpt2": ("h.{}.mlp", lambda m, x: gelu_tanh(m.c_fc(x))),
    "llama": ("layers.{}.mlp", gated(F.silu)),
    "gemma3_text": ("layers.{}.mlp", gated(gelu_tanh)),
    "qwen3": ("layers.{}.mlp", gated(F.silu)),
    "t5": ("encoder.block.{}.layer.1.DenseReluDense", lambda m, x: F.relu(m.wi(x))),
    "mpnet": ("encoder.layer.{}.intermediate", lambda m, x: F.gelu(m.dense(x))),
    "deberta-v2": ("encoder.layer.{}.intermediate", lambda m, x: F.gelu(m.dense(x))),
    "bart": ("layers.{}.fc1", lambda m, x: F.gelu(m(x))),
    "modernbert": (
        "layers.{}.mlp",
        lambda m, x: F.gelu(m.Wi(x).chunk(2, -1)[0]) * m.Wi(x).chunk(2, -1)[1],
    ),
}


@pytest.mark.parametrize("model_type", NEURONS)
def test_ffn_taps_equal_the_formula(model_type):
    place, formula = NEURONS[model_type]
    model = SpinForSequenceClassification.from_backbone(make_model(model_type))
    backbone = model.spin.backbone
    names = [place.format(block) for block in range(model.spin.depth)]
    seen = inputs_of(backbone, names)
    spin, values = read(backbone)
    assert sum(tap.kind == "ffn" for tap in spin.taps) == len(names)
    for block, name in enumerate(names, 1):
        with torch.no_grad():
            expected = formula(backbone.get_submodule(name), seen[name][0])
        torch.testing.assert_close(values[f"ffn.{block}"], expected)
        assert values[f"ffn.{block}"].shape == (2, 7, tap_width(backbone, spin.layout, Tap("ffn", block)))


def test_the_neurons_of_a_state_space_block_are_what_its_output_projection_gets():
    for model_type, name in (("mamba", "mixer.out_proj"), ("mamba2", "mixer.out_proj")):
        backbone = make_model(model_type)
        seen = inputs_of(backbone, [f"layers.{block}.{name}" for block in range(4)])
        _, values = read(backbone)
        for block in range(4):
            assert torch.equal(values[f"ffn.{block + 1}"], seen[f"layers.{block}.{name}"][0])


def test_routed_experts_have_no_ffn_taps_and_shared_ones_do(tokenizer, sentiment_rows):
    model = SpinForSequenceClassification.from_backbone(make_model("mixtral"))
    assert [str(tap) for tap in model.spin.taps] == [*(f"hidden.{block}" for block in range(5)), "norm.4"]
    with pytest.raises(
        CalibrationError, match=r"No tap of kind ffn.*MixtralModel.*routed experts.*kinds=\[\"hidden\"\]"
    ):
        spin_calibrate(model, tokenizer, sentiment_rows, kinds=["ffn"], progress=False)
    backbone = make_model("deepseek_v3")  # a dense FFN first, then experts
    assert find_layout(backbone).ffn == ("mlp.down_proj", *["mlp.shared_experts.down_proj"] * 3)
    seen = inputs_of(backbone, ["layers.2.mlp.shared_experts.down_proj"])
    _, values = read(backbone)
    expected = seen["layers.2.mlp.shared_experts.down_proj"][0]
    assert torch.equal(values["ffn.3"], expected.reshape(2, 7, -1))


def test_blocks_of_several_kinds_have_ffns_of_their_own():
    layout = find_layout(make_model("jamba"))  # routed experts in every second block
    assert layout.ffn == ("feed_forward.down_proj", None, "feed_forward.down_proj", None)
    assert Layout.from_dict(layout.to_dict()) == layout
    assert isinstance(layout.to_dict()["ffn"], list)


def test_parts_of_blocks_in_lists_beside_each_other():
    backbone = make_model("xlm")
    layout = find_layout(backbone)
    assert (layout.entry, layout.blocks, layout.ffn) == ("attentions", "layer_norm2", "ffns.*.lin2")
    assert Layout.from_dict(layout.to_dict()) == layout
    seen = inputs_of(backbone, ["ffns.2.lin2", "attentions.0"])
    _, values = read(backbone)
    assert torch.equal(values["ffn.3"], seen["ffns.2.lin2"][0])
    assert torch.equal(values["hidden.0"], seen["attentions.0"][0])


def test_all_parts_of_the_blocks_are_trained_where_they_stand_in_lists():
    model = SpinForSequenceClassification.from_backbone(make_model("xlm"))
    model.unfreeze_backbone(from_block=3)
    trained = {name for name, weight in model.spin.backbone.named_parameters() if weight.requires_grad}
    parts = ("attentions", "layer_norm1", "ffns", "layer_norm2")
    expected = {f"{part}.{number}" for part in parts for number in (2, 3)}
    assert {".".join(name.split(".")[:2]) for name in trained} == expected


@pytest.mark.parametrize(
    ("model_type", "streams"),
    [pytest.param(name, 4, marks=needs(name)) for name in ("hy_v4", "deepseek_v4", "gemma3n_text")],
)
def test_residual_streams_are_read_side_by_side(model_type, streams):
    spin, values = read(make_model(model_type), tokens=4, rows=4)  # as many rows and tokens as streams
    hidden = spin.layout.hidden_size(spin.backbone)
    assert values["hidden.2"].shape == (4, 4, streams * hidden)
    assert tap_width(spin.backbone, spin.layout, Tap("hidden", 2)) == streams * hidden
    alone = read(spin.backbone, tokens=4, rows=1)[1]["hidden.2"]
    torch.testing.assert_close(values["hidden.2"][:1], alone, rtol=1e-4, atol=1e-4)


def test_a_list_of_embeddings_is_no_list_of_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    model = nn.Module()
    model.config = hf.PreTrainedConfig(hidden_size=8)
    model.embeddings = nn.ModuleList(nn.Embedding(4, 8) for _ in range(6))
    model.blocks = nn.ModuleList([Block(), Block()])
    assert find_layout(model) == Layout("blocks", "down", None)


def test_lists_of_a_part_for_images_are_not_searched():
    backbone = make_model("git")
    assert find_layout(backbone).blocks == "encoder.layer"


@pytest.mark.parametrize(
    ("model_type", "norm"),
    [
        pytest.param("lfm2", "embedding_norm", marks=needs("lfm2")),
        ("esm", "encoder.emb_layer_norm_after"),
        ("roberta-prelayernorm", "LayerNorm"),  # beside the encoder, and not inside
        ("bart", None),  # lists the norm of its embeddings last
    ],
)
def test_the_last_tap_is_the_models_output(model_type, norm):
    spin, values = read(make_model(model_type))
    assert spin.layout.norm == norm
    ids = torch.randint(4, 56, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = spin.backbone(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(values["hidden.4" if norm is None else "norm.4"], expected)


def test_a_final_norm_that_is_used_before_is_read_at_its_last_call():
    backbone = make_model("nanochat")
    _, values = read(backbone)
    norm = backbone.get_submodule(find_layout(backbone).norm)
    with torch.no_grad():
        torch.testing.assert_close(norm(values["hidden.4"]), values["norm.4"])


def test_a_module_named_by_hand_that_does_not_run(tokenizer, sentiment_rows):
    backbone = make_model("bert")
    for block in backbone.encoder.layer:
        block.spare = nn.Linear(32, 32)
    model = SpinForSequenceClassification.from_backbone(backbone, ffn="spare")
    with pytest.raises(TapError, match="Tap ffn.1 was read 0 times"):
        spin_calibrate(model, tokenizer, sentiment_rows, progress=False)


def test_a_module_named_by_hand_that_only_later_blocks_have():
    backbone = make_model("deepseek_v3")
    model = SpinForSequenceClassification.from_backbone(backbone, ffn="mlp.shared_experts.down_proj")
    assert [tap.block for tap in model.spin.taps if tap.kind == "ffn"] == [2, 3, 4]


def test_a_module_named_by_hand_that_is_no_linear_layer():
    with pytest.raises(TapError, match=r"have a BertIntermediate at 'intermediate', no linear layer.*output\.dense"):
        SpinForSequenceClassification.from_backbone(make_model("bert"), ffn="intermediate")


def test_an_empty_name_for_the_blocks():
    with pytest.raises(TapError, match=r"no list of blocks at ''. Lists found: encoder.layer"):
        SpinForSequenceClassification.from_backbone(make_model("bert"), blocks="")
