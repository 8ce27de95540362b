import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import transformers as hf
from builders import CONFIGS, calibrated, make_backbone, make_batch
from torch import nn
from torch.nn import functional as F

from spin_hf import TapError
from spin_hf.structure import find_layout
from spin_hf.taps import Layout, Tap, attach, record, tap_width

LAYOUTS = {
    "bert": ("encoder.layer", "output.dense", None),
    "albert": ("encoder.albert_layer_groups", "albert_layers.0.ffn_output", None),
    "distilbert": ("transformer.layer", "ffn.lin2", None),
    "roberta": ("encoder.layer", "output.dense", None),
    "gpt2": ("h", "mlp.c_proj", "ln_f"),
    "llama": ("layers", "mlp.down_proj", "norm"),
    "gemma": ("layers", "mlp.down_proj", "norm"),
    "qwen3": ("layers", "mlp.down_proj", "norm"),
    "t5": ("encoder.block", "layer.1.DenseReluDense.wo", "encoder.final_layer_norm"),
}


def read_all(backbone, batch, layout=None):
    """Every tap's activations in one forward, and the backbone's own output."""
    layout = layout or find_layout(backbone)
    taps = layout.taps(backbone)
    handles = attach(backbone, layout, taps)
    values = {}
    with torch.no_grad(), record(taps, lambda tap, value: values.__setitem__(str(tap), value)):
        output = backbone(**batch, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return values, output


class Block(nn.Module):
    def __init__(self, size=8, inner=16):
        super().__init__()
        self.up = nn.Linear(size, inner)
        self.down = nn.Linear(inner, size)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Toy(nn.Module):
    """Calls its blocks in a given order, to be read zero, one or two times each."""

    def __init__(self, blocks, order=None, size=8):
        super().__init__()
        self.config = hf.PreTrainedConfig(hidden_size=size)
        self.blocks = nn.ModuleList(blocks)
        self.order = order or range(len(blocks))

    def forward(self, x):
        for number in self.order:
            x = self.blocks[number](x)
        return x


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_layout_of_each_architecture(name):
    backbone = make_backbone(name)
    layout = find_layout(backbone)
    assert (layout.blocks, layout.ffn, layout.norm) == LAYOUTS[name]
    total = backbone.config.num_hidden_layers
    taps = layout.taps(backbone)
    assert [tap.block for tap in taps if tap.kind == "hidden"] == list(range(total + 1))
    assert [tap.block for tap in taps if tap.kind == "ffn"] == list(range(1, total + 1))
    assert [tap.block for tap in taps if tap.kind == "norm"] == ([total] if layout.norm else [])
    assert [Tap.parse(str(tap)) for tap in taps] == taps
    widths = {tap.kind: tap_width(backbone, layout, tap) for tap in taps}
    assert (widths["hidden"], widths["ffn"], widths.get("norm", 32)) == (32, 48, 32)


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_taps_equal_output_hidden_states(name):
    backbone = make_backbone(name)
    values, output = read_all(backbone, make_batch())
    total = backbone.config.num_hidden_layers
    for block, states in enumerate(output.hidden_states[:-1]):
        assert torch.equal(values[f"hidden.{block}"], states)
    last = "norm" if LAYOUTS[name][2] else "hidden"
    assert torch.equal(values[f"{last}.{total}"], output.last_hidden_state)
    if last == "norm":
        norm = backbone.get_submodule(LAYOUTS[name][2])
        with torch.no_grad():
            assert torch.equal(norm(values[f"hidden.{total}"]), values[f"norm.{total}"])
        assert not torch.equal(values[f"hidden.{total}"], values[f"norm.{total}"])


NEURONS = {
    "bert": ("intermediate", lambda m, x: F.gelu(m.dense(x))),
    "gpt2": ("mlp", lambda m, x: F.gelu(m.c_fc(x), approximate="tanh")),
    "llama": ("mlp", lambda m, x: F.silu(m.gate_proj(x)) * m.up_proj(x)),
    "gemma": ("mlp", lambda m, x: F.gelu(m.gate_proj(x), approximate="tanh") * m.up_proj(x)),
}


@pytest.mark.parametrize("name", NEURONS)
def test_ffn_taps_equal_the_formula(name):
    backbone = make_backbone(name)
    part, formula = NEURONS[name]
    inputs = []
    for block in backbone.get_submodule(LAYOUTS[name][0]):
        block.get_submodule(part).register_forward_pre_hook(lambda module, args: inputs.append((module, args[0])))
    values, _ = read_all(backbone, make_batch())
    assert len(inputs) == 3 + (name == "gpt2")
    for block, (module, x) in enumerate(inputs, 1):
        with torch.no_grad():
            torch.testing.assert_close(values[f"ffn.{block}"], formula(module, x))


def test_an_ffn_as_wide_as_the_model():
    assert find_layout(make_backbone("bert", intermediate_size=32)).ffn == "output.dense"


def test_attention_as_wide_as_the_ffn_is_no_ffn():
    block = nn.Module()
    block.mlp, block.self_attn = Block(), Block()
    assert find_layout(Toy([block, block])).ffn == "mlp.down"


def test_lists_inside_blocks_are_not_blocks():
    def experts():
        block = Block()
        block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        return block

    assert find_layout(Toy([experts(), experts()])).blocks == "blocks"


def test_a_norm_of_the_embeddings_is_not_the_final_norm():
    config = hf.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48
    )
    layout = find_layout(hf.BartModel(config).encoder)
    assert (layout.blocks, layout.ffn, layout.norm) == ("layers", "fc2", None)


def test_given_names():
    backbone = make_backbone("llama")
    layout = find_layout(backbone, blocks="layers", ffn="self_attn.o_proj")
    assert layout == Layout("layers", "self_attn.o_proj", "norm")
    assert tap_width(backbone, layout, Tap("ffn", 1)) == 32


def test_wrong_names_list_the_candidates(bert_backbone):
    with pytest.raises(TapError, match=r"no list of blocks at 'encoder.layers'.*encoder.layer \(3 x BertLayer\)"):
        find_layout(bert_backbone, blocks="encoder.layers")
    with pytest.raises(TapError, match=r"no list of blocks at 'embeddings'"):
        find_layout(bert_backbone, blocks="embeddings")
    with pytest.raises(TapError, match=r"no module 'mlp'.*intermediate.dense, output.dense"):
        find_layout(bert_backbone, ffn="mlp")


def test_a_model_without_blocks_or_hidden_size():
    model = Toy([Block(8, 16), Block(8, 16)])
    model.config = hf.PreTrainedConfig()
    with pytest.raises(TapError, match="names no hidden_size"):
        find_layout(model)
    flat = nn.Module()
    flat.first, flat.second = nn.Linear(8, 8), nn.Linear(8, 8)
    with pytest.raises(TapError, match='No blocks found.*first, second.*blocks="encoder.layers"'):
        find_layout(flat)


def test_blocks_without_ffn_have_hidden_taps_only():
    model = Toy([nn.Linear(8, 8), nn.Linear(8, 8)])
    layout = find_layout(model)
    assert [str(tap) for tap in layout.taps(model)] == ["hidden.0", "hidden.1", "hidden.2"]


@pytest.mark.parametrize("name", ["ffn", "ffn.", "ffn.x", "logits.3", "ffn.-1"])
def test_names_that_are_no_taps(name):
    with pytest.raises(TapError, match="is not a tap"):
        Tap.parse(name)


def test_attach_refuses_taps_the_backbone_lacks(bert_backbone):
    with pytest.raises(TapError, match=r"BertModel has no ffn.4, norm.3. It has: hidden.0, ffn.1, .*hidden.3\."):
        attach(bert_backbone, find_layout(bert_backbone), [Tap("ffn", 1), Tap("ffn", 4), Tap("norm", 3)])
    assert not bert_backbone.encoder.layer[0].output.dense._forward_pre_hooks


# -- each tap exactly once -------------------------------------------------------------------------------------------


def test_a_tap_read_twice_or_never():
    layout = Layout("blocks", "down", None)
    x = torch.randn(1, 2, 8)
    with pytest.raises(TapError, match=r"Tap ffn.2 was read 2 times"):
        read_toy(Toy([Block(), Block()], order=[0, 1, 1]), layout, x)
    with pytest.raises(TapError, match=r"Tap ffn.2 was read 0 times"):
        read_toy(Toy([Block(), Block()], order=[0]), layout, x)
    shared = Block()
    with pytest.raises(TapError, match="was read 2 times"):
        read_toy(Toy([shared, shared], order=[0, 1, 1]), layout, x)
    shared = Block()
    assert set(read_toy(Toy([shared, shared]), layout, x)) == {"hidden.0", "ffn.1", "hidden.1", "ffn.2", "hidden.2"}
    assert read_toy(Toy([Block(), Block()]), layout, x) == {
        "hidden.0": 1,
        "ffn.1": 1,
        "hidden.1": 1,
        "ffn.2": 1,
        "hidden.2": 1,
    }


def read_toy(model, layout, x):
    taps = layout.taps(model)
    attach(model, layout, taps)
    seen = []
    with record(taps, lambda tap, value: seen.append(str(tap))):
        model(x)
    return {name: seen.count(name) for name in seen}


def test_blocks_that_share_a_module_are_told_apart_by_the_call():
    toy = Toy([Block()], order=[0, 0, 0])
    toy.config.num_hidden_layers, toy.config.num_hidden_groups = 3, 1
    layout = find_layout(toy)
    assert layout.calls == 3
    assert [str(tap) for tap in layout.taps(toy)] == [
        "hidden.0", "ffn.1", "hidden.1", "ffn.2", "hidden.2", "ffn.3", "hidden.3"
    ]  # fmt: skip
    wanted = [Tap.parse(name) for name in ("hidden.0", "ffn.2", "hidden.2", "hidden.3")]
    attach(toy, layout, wanted)
    seen, x = {}, torch.randn(1, 2, 8)
    with torch.no_grad(), record(wanted, lambda tap, value: seen.__setitem__(str(tap), value)):
        output = toy(x)
    block = toy.blocks[0]
    with torch.no_grad():
        after = block(block(x))
        assert torch.equal(seen["hidden.0"], x)
        assert torch.equal(seen["ffn.2"], block.up(block(x)).relu())
        assert torch.equal(seen["hidden.2"], after)
        assert torch.equal(seen["hidden.3"], output)
    toy.order = [0, 0, 0, 0]
    with pytest.raises(TapError, match="read 2 times"), record(wanted, lambda tap, value: None):
        toy(x)
    toy.order = [0, 0]
    with pytest.raises(TapError, match=r"Tap hidden.3 was read 0 times"), record(wanted, lambda tap, value: None):
        toy(x)


def test_values_that_are_not_batch_tokens_width():
    model = Toy([Block()])
    with pytest.raises(TapError, match=r"Tap hidden.0 should see.*a tensor of shape \(2, 8\)"):
        read_toy(model, Layout("blocks", "down", None), torch.randn(2, 8))


def test_errors_of_the_forward_come_through_and_end_the_recording(bert_backbone):
    model = calibrated(bert_backbone)
    batch = make_batch()
    with pytest.raises(IndexError):
        model(batch["input_ids"] + 10_000, batch["attention_mask"])
    assert torch.isfinite(model(**batch).logits).all()


def test_forwards_outside_a_recording_are_ignored(bert_backbone):
    model = calibrated(bert_backbone)
    batch = make_batch()
    before = model(**batch).logits
    model.spin.backbone(**batch)
    assert torch.equal(model(**batch).logits, before)


# -- copies and threads ----------------------------------------------------------------------------------------------


def test_deepcopy_is_independent(bert_backbone):
    model = calibrated(bert_backbone)
    batch = make_batch()
    before = model(**batch).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(**batch).logits, before)
    with torch.no_grad():
        for parameter in other.spin.backbone.parameters():
            parameter.mul_(2)
    assert not torch.equal(other(**batch).logits, before)
    assert torch.equal(model(**batch).logits, before)
    groups = other.spin.feature_groups()[:4]
    other.spin.set_features(groups, torch.zeros(12), torch.ones(12), depth=2)
    assert other.spin(**batch).features.shape == (4, 12)
    assert (other.spin.depth, model.spin.depth) == (2, 3)
    assert torch.equal(model(**batch).logits, before)


def test_hooks_hold_nothing_but_their_tap(bert_backbone):
    calibrated(bert_backbone)
    hooks = [
        hook
        for module in bert_backbone.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    held = [str(tap) for hook in hooks for tap in hook.by_call.values()]
    assert sorted(held) == sorted(map(str, find_layout(bert_backbone).taps(bert_backbone)))
    assert all(set(vars(hook)) == {"by_call", "calls"} for hook in hooks)


def test_threads_share_a_model(bert_backbone):
    model = calibrated(bert_backbone)
    batches = [make_batch(tokens=5 + seed, seed=seed) for seed in range(8)]
    alone = [model(**batch).logits for batch in batches]
    start = Barrier(2)

    def predict(part):
        start.wait()
        return [model(**batch).logits for batch in part * 4]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(predict, (batches[:4], batches[4:])))
    for got, expected in zip(together, (alone[:4], alone[4:]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected * 4, strict=True))
