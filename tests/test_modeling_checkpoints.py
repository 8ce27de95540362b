"""Invariants 3 and 4: what is saved, and who may load it."""

import json

import pytest
import torch
import transformers as hf
from builders import CONFIGS, calibrated, make_backbone, make_batch, make_tokenizer
from safetensors.torch import load_file, save_file

from spin_hf import CheckpointError, SpinForSequenceClassification, SpinModel

CUT = {"llama cut": ("llama", 1), "t5 cut": ("t5", 2), "albert cut": ("albert", 2)}
CASES = {**{name: (name, None) for name in CONFIGS}, **CUT}

LOAD = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification
import spin_hf

torch.set_num_threads(1)
batch, target, *folders = sys.argv[1:]
batch, found = load_file(batch), {}
with torch.no_grad():
    for folder in folders:
        found[f"{folder} own"] = spin_hf.SpinForSequenceClassification.from_pretrained(folder)(**batch).logits
        found[f"{folder} auto"] = AutoModelForSequenceClassification.from_pretrained(folder)(**batch).logits
        found[f"{folder} features"] = AutoModel.from_pretrained(folder)(**batch).features
save_file(found, target)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, run_python):
    """Each case's folder, output here, and outputs in a fresh process."""
    root = tmp_path_factory.mktemp("saved")
    batch = make_batch()
    save_file(batch, root / "batch.safetensors")
    folders, outputs = {}, {}
    for case, (name, depth) in CASES.items():
        model = calibrated(make_backbone(name), depth=depth)
        folders[case] = root / case
        model.save_pretrained(folders[case])
        outputs[case] = model(**batch, output_features=True)
    run_python(LOAD, root / "batch.safetensors", root / "found.safetensors", *folders.values())
    return folders, outputs, load_file(root / "found.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_gives_the_same_bits(saved, case):
    folders, outputs, found = saved
    assert torch.equal(found[f"{folders[case]} own"], outputs[case].logits)
    assert torch.equal(found[f"{folders[case]} auto"], outputs[case].logits)
    assert torch.equal(found[f"{folders[case]} features"], outputs[case].features)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved(saved, case):
    folder = saved[0][case]
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["SpinForSequenceClassification"]
    assert "auto_map" not in config
    blocks = config["layout"]["blocks"]
    weights = load_file(folder / "model.safetensors")
    stored = {int(key.split(f"{blocks}.")[1].split(".")[0]) for key in weights if f"backbone.{blocks}." in key}
    name, depth = CASES[case]
    modules = 1 if name == "albert" else depth or CONFIGS[name]().num_hidden_layers
    assert stored == set(range(modules))


def test_the_body_alone_can_be_saved(saved, tmp_path):
    folders, outputs, _ = saved
    body = SpinModel.from_pretrained(folders["bert"])
    body.save_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path)
    assert type(again) is SpinModel
    assert torch.equal(again(**make_batch()).features, outputs["bert"].features)


def test_nothing_is_downloaded_for_the_backbone(saved, tmp_path, monkeypatch):
    folder, outputs = saved[0]["bert"], saved[1]["bert"]
    rewritten = rewrite(folder, tmp_path, backbone_id="nobody/nothing", backbone_revision="main")
    monkeypatch.setattr(hf.BertModel, "from_pretrained", None)
    assert torch.equal(SpinForSequenceClassification.from_pretrained(rewritten)(**make_batch()).logits, outputs.logits)


@pytest.mark.parametrize("auto", [SpinForSequenceClassification, hf.AutoModelForSequenceClassification])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_is_the_backbones(saved, auto, attention):
    model = auto.from_pretrained(saved[0]["llama"], attn_implementation=attention)
    assert model.spin.backbone.config._attn_implementation == attention
    assert auto.from_pretrained(saved[0]["llama"]).spin.backbone.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**make_batch()).logits, saved[1]["llama"].logits, rtol=1e-4, atol=1e-4)


def test_pipeline(saved):
    tokenizer = make_tokenizer()
    model = calibrated(make_backbone("bert"), labels=["no", "yes"])
    folder = saved[0]["bert"].parent / "pipeline"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = ["a lovely film", "dull plot and a dull end of it"]
    rows = hf.pipeline("text-classification", str(folder), device="cpu")(texts, top_k=None, batch_size=2)
    expected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    for row, probabilities in zip(rows, expected.tolist(), strict=True):
        assert {answer["label"]: answer["score"] for answer in row} == pytest.approx(
            dict(zip(["no", "yes"], probabilities, strict=True)), rel=1e-4
        )


# -- folders that are refused ----------------------------------------------------------------------------------------


def rewrite(folder, target, **changes):
    """A copy of a checkpoint with other values in its config.json; ``None`` drops one."""
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config.update(changes)
    kept = {name: value for name, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def test_another_kind_of_model(tmp_path, bert_backbone):
    bert_backbone.save_pretrained(tmp_path)
    for spin_class in (SpinForSequenceClassification, SpinModel):
        with pytest.raises(CheckpointError, match="holds a 'bert' model, not a SPIN checkpoint.*from_backbone"):
            spin_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spin_format": 2}, "has format 2, .* pip install -U spin_hf"),
        ({"backbone_config": None}, "has no backbone_config"),
        ({"backbone_config": {"model_type": "bert9"}}, "model_type is 'bert9'"),
        ({"features": [{"tap": "ffn.1"}]}, "An entry of `features` should look like"),
    ],
)
def test_configs_that_are_refused(saved, tmp_path, changes, message):
    folder = rewrite(saved[0]["bert"], tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        SpinForSequenceClassification.from_pretrained(folder)


def test_a_checkpoint_without_its_neurons(saved, tmp_path):
    weights = load_file(rewrite(saved[0]["bert"], tmp_path) / "model.safetensors")
    del weights["spin.standardizer.neurons"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks spin\.standardizer\.neurons"):
        SpinForSequenceClassification.from_pretrained(tmp_path)


# -- remote code -----------------------------------------------------------------------------------------------------

REMOTE = {
    "configuration_tiny.py": """
import os
from transformers import BertConfig
open(os.environ["TINY_MARK"], "a").write("ran ")

class TinyConfig(BertConfig):
    model_type = "tiny"
""",
    "modeling_tiny.py": """
from transformers import BertModel
from .configuration_tiny import TinyConfig

class TinyModel(BertModel):
    config_class = TinyConfig
""",
}

TRUST = """
import json, os, pathlib, sys
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline
from spin_hf import CheckpointError, SpinConfig, SpinForSequenceClassification, SpinModel

source, folder, batch, logits = sys.argv[1:]
batch, logits = load_file(batch), load_file(logits)["logits"]

def refused():
    for config in (AutoConfig.from_pretrained(folder), SpinConfig.from_pretrained(folder)):
        assert config.backbone_config.model_type == "tiny" and type(config.backbone_config).__name__ == "SealedConfig"
        config.save_pretrained(folder + "-config")
        saved = json.loads(pathlib.Path(folder + "-config", "config.json").read_text())["backbone_config"]
        assert saved == json.loads(path.read_text())["backbone_config"]
    still_refused()

def still_refused():
    for auto in (AutoModel, AutoModelForSequenceClassification, SpinForSequenceClassification, SpinModel):
        for options in ({}, {"trust_remote_code": False}):
            try:
                auto.from_pretrained(folder, **options)
            except CheckpointError as error:
                assert "trust_remote_code=True" in str(error), error
            else:
                raise AssertionError(f"{auto} loaded it")

ran = pathlib.Path(os.environ["TINY_MARK"])
path = pathlib.Path(folder, "config.json")
original = path.read_text()
refused()
granting = json.loads(original)
granting["trust_remote_code"] = granting["backbone_config"]["trust_remote_code"] = True
path.write_text(json.dumps(granting))
still_refused()
path.write_text(original)
assert not ran.exists()

model = SpinForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
assert ran.exists() and type(model.spin.backbone).__name__ == "TinyModel"
assert (model(**batch).logits == logits).all()
for auto in (AutoModelForSequenceClassification, SpinForSequenceClassification):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(model.spin.backbone).__name__ == "TinyModel" and (model(**batch).logits == logits).all()
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True).backbone).__name__ == "TinyModel"
classify = pipeline("text-classification", folder, trust_remote_code=True, device="cpu")
assert type(classify.model.spin.backbone).__name__ == "TinyModel"
assert (classify.model(**batch).logits == logits).all()
refused()
again = pathlib.Path(folder, "again")
model.save_pretrained(again)
assert (SpinForSequenceClassification.from_pretrained(again, trust_remote_code=True)(**batch).logits == logits).all()
model = SpinForSequenceClassification.from_backbone(source, trust_remote_code=True)
assert type(model.spin.backbone).__name__ == "TinyModel" and model.config.backbone_id == source
refused()
"""


def test_remote_code_runs_by_the_callers_word_only(tmp_path, run_python, monkeypatch, bert_backbone):
    source, folder = tmp_path / "source", tmp_path / "folder"
    auto_map = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    bert_backbone.save_pretrained(source)
    model = calibrated(bert_backbone)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "model_type": "tiny", "auto_map": auto_map}))
    values = json.loads((folder / "config.json").read_text())
    values["backbone_id"] = str(source)
    values["backbone_config"] |= {"model_type": "tiny", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(values))
    for name, code in REMOTE.items():
        (source / name).write_text(code)
    save_file(make_batch(), tmp_path / "batch")
    save_file({"logits": model(**make_batch()).logits.detach()}, tmp_path / "logits")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("TINY_MARK", str(tmp_path / "ran"))
    run_python(TRUST, source, folder, tmp_path / "batch", tmp_path / "logits")
