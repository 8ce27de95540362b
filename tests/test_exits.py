"""Exits: what they answer, what keeping one leaves, and that the classifier's own answer never notices them."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers as hf
from builders import CONFIGS, calibrated, make_backbone, make_batch, make_tokenizer, with_exits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from spin_hf import CheckpointError, SpinForSequenceClassification
from spin_hf.exits import Exit, ExitError, Exits
from spin_hf.export import export_program
from spin_hf.features import FeatureGroup
from spin_hf.prediction import predict
from spin_hf.taps import Tap
from spin_hf.training import add_gates
from spin_hf.windows import Windows

LOW = [torch.bfloat16, torch.float16]


def alone(model, number):
    kept = copy.deepcopy(model)
    kept.keep_exit(number)
    return kept


@pytest.fixture
def model(bert_backbone):
    """Its own head needs one block of three."""
    return with_exits(calibrated(bert_backbone, taps=["hidden.0", "ffn.1", "hidden.1"]))


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_an_exit_answers_as_the_classifier_that_keeping_it_leaves(name):
    taps = ["ffn.1", "hidden.1"]
    backbone = make_backbone(name)
    plain = calibrated(copy.deepcopy(backbone), taps=taps)
    model = with_exits(calibrated(backbone, taps=taps))
    batch = make_batch()
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    output = model(**batch, output_exits=True)
    assert torch.equal(output.logits, plain(**batch).logits)
    assert output.exit_logits.shape == (4, 2 * model.spin.depth, 2)
    for number, entry in enumerate(model.config.exits):
        one = alone(model, number)
        answer = model(**batch, exit=number, output_features=True)
        assert torch.equal(one(**batch).logits, answer.logits)
        assert torch.equal(one(**batch, output_features=True).features, answer.features)
        torch.testing.assert_close(output.exit_logits[:, number], answer.logits, rtol=1e-5, atol=1e-5)
        assert (one.spin.depth, one.config.num_features) == (entry["depth"], entry["num_features"])
        assert len(one.spin._hooks) <= len(one.spin.groups)
        assert (one.exits, one.config.exits, one.config.exit_features) == (None, [], [])
    own = alone(model, None)
    assert torch.equal(own(**batch).logits, plain(**batch).logits)
    assert own.spin.depth == 1


def test_by_hand(model):
    """From the standardiser and the head's numbers, on features that another model reads."""
    batch, exits = make_batch(), model.exits
    reader = calibrated(make_backbone("bert"))
    everything = exits.select()
    reader.spin.set_features(everything.groups(), everything.mean, everything.scale, depth=3)
    features = reader.spin(**batch).features
    for number, (head, entry) in enumerate(zip(exits.heads, model.config.exits, strict=True)):
        own = features[:, head.columns]
        wanted = (own @ head.weight.T + head.bias) / entry["temperature"]
        torch.testing.assert_close(model(**batch, exit=number).logits, wanted, rtol=1e-5, atol=1e-5)


def test_loss_and_tuples_are_those_of_the_answer(model):
    batch, labels = make_batch(), torch.tensor([0, 1, 1, 0])
    output = model(**batch, labels=labels, exit=2, output_exits=True)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    as_tuple = model(**batch, labels=labels, exit=2, output_features=True, output_exits=True, return_dict=False)
    features = model(**batch, exit=2, output_features=True).features
    for found, wanted in zip(as_tuple, (output.loss, output.logits, features, output.exit_logits), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("batching", ["padded", "equal_length", "single"])
@pytest.mark.parametrize("windows", [None, Windows(6, 1, 1, 1)])
def test_same_text_same_answers_in_any_batch(model, batching, windows):
    model.config.batching = batching
    model.config.windows = windows and windows.to_dict()
    batch = make_batch(rows=5, tokens=14)
    flipped = {name: values.flip(1) for name, values in make_batch(rows=5, tokens=14).items()}
    flipped["input_ids"] = torch.zeros_like(batch["input_ids"])
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        flipped["input_ids"][row, -length:] = batch["input_ids"][row, :length]
    together = model(**batch, output_exits=True).exit_logits
    torch.testing.assert_close(model(**flipped, output_exits=True).exit_logits, together, rtol=1e-4, atol=1e-4)
    for row in range(5):
        single = {name: values[row : row + 1] for name, values in batch.items()}
        found = model(**single, output_exits=True).exit_logits[0]
        torch.testing.assert_close(found, together[row], rtol=1e-4, atol=1e-4)
        assert torch.equal(model(**single, exit=3).logits, alone(model, 3)(**single).logits)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_selection_holds_the_exits_neurons(data):
    """Whatever columns an exit has: what is read for it is what the shared features hold there."""
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    names = ["hidden.0", "ffn.1", "hidden.1", "ffn.2", "hidden.2", "ffn.3"]
    groups = [
        FeatureGroup(Tap.parse(names[i // 2]), ("max", "mean")[i % 2], torch.arange(count))
        for i, count in enumerate(counts)
    ]
    total = sum(counts)
    columns = torch.tensor(sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1))))
    exit = Exit(1, 1.0, 0.0, 1.0, columns, torch.zeros(2, len(columns)), torch.zeros(2))
    entries = [{"tap": str(g.tap), "pooling": g.pooling, "count": len(g.neurons)} for g in groups]
    exits = Exits(entries, [exit.to_dict()], 2)
    exits.fill(groups, torch.arange(total) * 1.0, torch.arange(total) + 1.0, [exit])
    places = [(str(g.tap), g.pooling, int(neuron)) for g in groups for neuron in g.neurons]
    found = exits.select(0)
    assert [(str(g.tap), g.pooling, int(n)) for g in found.groups() for n in g.neurons] == [places[i] for i in columns]
    assert torch.equal(found.mean, columns * 1.0)
    assert torch.equal(found.scale, columns + 1.0)


# -- what can't be asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [6, -1, True, "deepest", 1.0])
def test_an_exit_that_there_is_not(model, number):
    for ask in (lambda: model(**make_batch(), exit=number), lambda: model.keep_exit(number)):
        with pytest.raises(ExitError, match=r"a number from 0 to 5; got .*config\.exits lists them"):
            ask()
    assert len(model.config.exits) == 6


def test_numbers_of_numpy_are_numbers(model):
    answer = model(**make_batch(), exit=np.int64(3)).logits
    assert torch.equal(answer, model(**make_batch(), exit=3).logits)
    model.keep_exit(np.int64(3))
    assert torch.equal(model(**make_batch()).logits, answer)


def test_a_classifier_without_exits_says_how_to_make_them(bert_backbone):
    model = calibrated(bert_backbone)
    asks = (
        lambda: model(**make_batch(), exit=0),
        lambda: model(**make_batch(), output_exits=True),
        lambda: model.keep_exit(0),
        lambda: model.keep_exit(None),
        lambda: predict(model, make_tokenizer(), ["a film"], exit=0),
    )
    for ask in asks:
        with pytest.raises(ExitError, match=r"spin_calibrate\(model, tokenizer, train, exits=True\)"):
            ask()


def test_features_read_before_are_the_heads_own(model):
    features = model(**make_batch(), output_features=True).features
    for options in ({"exit": 0}, {"output_exits": True}):
        with pytest.raises(ValueError, match="read other features"):
            model(features=features, **options)


def test_gates_want_one_head(model):
    with pytest.raises(ValueError, match=r"model\.keep_exit\(None\)"):
        add_gates(model)
    model.keep_exit(None)
    add_gates(model)


def test_blocks_that_exits_need_stay(model):
    groups, chosen = model.spin.feature_groups(), model.spin.standardizer
    with pytest.raises(ValueError, match=r"need 3 blocks.*keep_exit\(None\)"):
        model.spin.set_features(groups, chosen.mean, chosen.scale, depth=1)
    assert model.spin.depth == 3
    model(**make_batch(), output_exits=True)


def test_nothing_of_them_trains(model):
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "score.weight",
        "score.bias",
    }


def test_an_exported_or_compiled_classifier_has_its_own_answer(model):
    program, batch = export_program(model).module(), make_batch(rows=2, tokens=5)
    torch.testing.assert_close(program(**batch).logits, model(**batch).logits)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, model(**batch).logits)


# -- float32, whatever the backbone is ---------------------------------------------------------------------------------


def own_tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith("exits.")}


def assert_kept(model, before, dtype):
    after = own_tensors(model)
    assert set(after) == set(before)
    assert len(before) == 4 + 3 * 6
    for name, value in after.items():
        assert value.dtype == (torch.int64 if name.endswith(("neurons", "columns")) else torch.float32), name
        assert torch.equal(value, before[name]), name
    assert {parameter.dtype for parameter in model.spin.backbone.parameters()} == {dtype}
    output = model(**make_batch(), exit=4, output_features=True, output_exits=True)
    assert output.logits.dtype == output.features.dtype == output.exit_logits.dtype == torch.float32
    weight, bias = before["exits.heads.4.weight"], before["exits.heads.4.bias"]
    with torch.autocast("cpu", enabled=False):
        wanted = F.linear(output.features, weight, bias) / model.config.exits[4]["temperature"]
    assert torch.equal(output.logits, wanted)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("auto", [SpinForSequenceClassification, hf.AutoModelForSequenceClassification])
def test_loading_with_a_dtype(model, tmp_path, auto, dtype):
    model.save_pretrained(tmp_path)
    assert_kept(auto.from_pretrained(tmp_path, dtype=dtype), own_tensors(model), dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}, {"dtype": torch.float32}])
def test_loading_a_mixed_checkpoint(model, tmp_path, dtype, options):
    before = own_tensors(model)
    model.to(dtype).save_pretrained(tmp_path)
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path, **options)
    assert_kept(loaded, before, torch.float32 if options.get("dtype") is torch.float32 else dtype)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_casting(model, cast):
    before = own_tensors(model)
    assert_kept(model.to(cast), before, cast)


@pytest.mark.parametrize("dtype", LOW)
def test_autocast(model, dtype):
    before, plain = own_tensors(model), model(**make_batch(), exit=4).logits
    with torch.autocast("cpu", dtype=dtype):
        assert_kept(model, before, torch.float32)
        logits = model(**make_batch(), exit=4).logits
    assert not torch.equal(logits, plain)
    torch.testing.assert_close(logits, plain, rtol=0, atol=0.3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_quantised_backbone(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    make_backbone("bert").save_pretrained(tmp_path / "backbone")
    config = hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = with_exits(calibrated(str(tmp_path / "backbone"), quantization_config=config))
    before, expected = own_tensors(model), model(**make_batch(), output_exits=True).exit_logits
    model.save_pretrained(tmp_path / "saved")
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path / "saved")
    after = own_tensors(loaded)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(loaded(**make_batch(), output_exits=True).exit_logits, expected)
    plain = with_exits(calibrated(make_backbone("bert")))
    plain.save_pretrained(tmp_path / "plain")
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path / "plain", quantization_config=config)
    weight = loaded.spin.backbone.encoder.layer[0].output.dense.weight
    assert type(weight).__module__.startswith("torchao.")
    after = own_tensors(loaded)
    assert all(torch.equal(after[name], value) for name, value in own_tensors(plain).items())


# -- checkpoints -------------------------------------------------------------------------------------------------------

LOAD = """
import sys
place, batch, target, backbone, *folders = sys.argv[1:]
options = {}
if place == "without":
    sys.modules["spin_hf"] = None  # importing it fails from here on
    options["trust_remote_code"] = True
else:
    import spin_hf
import torch, transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
batch, found = load_file(batch), {}
for folder in folders:
    extra = {"backbone": backbone} if folder.endswith("/head") else {}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **options, **extra)
    classify = transformers.pipeline("text-classification", folder, device="cpu", model_kwargs=extra, **options)
    body = transformers.AutoModel.from_pretrained(folder, **options, **extra)
    with torch.no_grad():
        found[folder + ":logits"] = classify.model(**batch).logits
        found[folder + ":exits"] = model(**batch, output_exits=True).exit_logits
        assert (body(**batch).features == model(**batch, output_features=True).features).all()
        assert classify("a lovely film")[0]["label"] in model.config.label2id
        model.keep_exit(1)
        found[folder + ":kept"] = model(**batch).logits
        model.save_pretrained(folder + "-kept")
        again = transformers.AutoModelForSequenceClassification.from_pretrained(folder + "-kept", **options)
        assert (again(**batch).logits == found[folder + ":kept"]).all()
save_file(found, target)
"""


@pytest.mark.parametrize("place", ["fresh", "without"])
def test_every_form_in_a_fresh_process(place, tmp_path, run_python, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    make_backbone("bert").save_pretrained(tmp_path / "backbone")
    model = with_exits(calibrated(str(tmp_path / "backbone"), taps=["ffn.1"]))
    folders = []
    for form in ("full", "head") if place == "fresh" else ("self_contained",):
        folders.append(tmp_path / form)
        model.save_pretrained(folders[-1], form=form)
        make_tokenizer().save_pretrained(folders[-1])
    save_file(make_batch(), tmp_path / "batch")
    run_python(LOAD, place, tmp_path / "batch", tmp_path / "found", tmp_path / "backbone", *folders)
    found, batch = load_file(tmp_path / "found"), make_batch()
    for folder in folders:
        assert torch.equal(found[f"{folder}:logits"], model(**batch).logits)
        assert torch.equal(found[f"{folder}:exits"], model(**batch, output_exits=True).exit_logits)
        assert torch.equal(found[f"{folder}:kept"], model(**batch, exit=1).logits)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("last", ["cpu", "disk"])
def test_spread_by_a_device_map(model, last, tmp_path):
    """On the CPU "disk" stands for all places where weights are not at hand between their uses."""
    expected = model(**make_batch(), output_exits=True)
    model.save_pretrained(tmp_path / "saved")
    modules = {name.rsplit(".", 1)[0] for name in model.state_dict()}
    places = {name: last if name.startswith("spin.backbone.encoder.layer.2") else "cpu" for name in sorted(modules)}
    loaded = SpinForSequenceClassification.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    output = loaded(**make_batch(), output_exits=True)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.exit_logits, expected.exit_logits)
    assert torch.equal(loaded(**make_batch(), exit=5).logits, model(**make_batch(), exit=5).logits)


def test_a_lost_exit_is_told(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["exits.heads.2.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError):
        SpinForSequenceClassification.from_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["head_checksum"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"lacks exits\.heads\.2\.bias"):
        SpinForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 0},
        {"depth": 1.5},
        {"depth": True},
        {"num_features": 0},
        {"num_features": 2**40},
        {"temperature": 0},
        {"temperature": "1"},
        {"score": None},
        {"more": 1},
    ],
)
def test_a_hostile_config(model, tmp_path, change):
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["exits"][3].update(change)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="An entry of `exits` should look like"):
        SpinForSequenceClassification.from_pretrained(tmp_path)


def test_exits_on_taps_that_there_are_not(model, tmp_path):
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["exit_features"][-1]["tap"] = "ffn.9"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"ffn\.9"):
        SpinForSequenceClassification.from_pretrained(tmp_path)


def test_shared_features_of_another_shape(model, tmp_path):
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["exit_features"][0]["count"] = -1
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="An entry of `exit_features` should look like"):
        SpinForSequenceClassification.from_pretrained(tmp_path)
