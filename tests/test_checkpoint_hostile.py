"""What a checkpoint's files may not do: run code, name folders, exhaust memory, or load when they are damaged."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers as hf
from builders import CONFIGS, calibrated, make_backbone, make_batch
from safetensors.torch import load_file, save_file

from spin_hf import (
    CheckpointError,
    SpinConfig,
    SpinForSequenceClassification,
    SpinModel,
    configuration_spin,
    pretrained,
)

LOADERS = [SpinForSequenceClassification.from_pretrained, hf.AutoModelForSequenceClassification.from_pretrained]


@pytest.fixture
def folder(tmp_path):
    calibrated(make_backbone("bert")).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def nested(**values):
    return lambda config: config["backbone_config"].update(values)


def top(**values):
    return lambda config: config.update(values)


def features(**values):
    return lambda config: config["features"][0].update(values)


def unknown_with_code(config):
    config["backbone_id"] = "someone/model"
    config["backbone_config"].update(model_type="x", auto_map=EVIL)


EVIL = {"AutoConfig": "evil--configuration_x.X", "AutoModel": "evil--modeling_x.X"}

HOSTILE = {
    "trust at the top": (top(trust_remote_code=True), "no file can grant trust"),
    "trust in the backbone's config": (nested(trust_remote_code=True), "no file can grant trust"),
    "trust further down": (nested(text_config={"deep": [{"trust_remote_code": True}]}), "no file can grant trust"),
    "unknown type with code": (unknown_with_code, "runs code from evil"),
    "code by an absolute path": (nested(auto_map={"AutoModel": "/tmp/evil.X"}), "not a class of a repository"),
    "code that climbs out": (nested(auto_map={"AutoModel": "../../evil.X"}), "not a class of a repository"),
    "code of a climbing repository": (nested(auto_map={"AutoModel": "../x--evil.X"}), "not a class of a repository"),
    "code at the top by path": (top(auto_map={"AutoModel": "..evil.X"}), "not a class of a repository"),
    "an id that climbs out": (top(backbone_id="../../etc"), "climbs out of its folder"),
    "a kernel from a repository": (nested(attn_implementation="evil/kernel"), "would load a kernel"),
    "a kernel at the top": (top(attn_implementation="evil/kernel:f"), "would load a kernel"),
    "a billion layers": (nested(num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "layers below zero": (nested(num_hidden_layers=-3), "num_hidden_layers = -3"),
    "a billion labels": (nested(num_labels=10**9, id2label=None), "num_labels = 1000000000"),
    "a wide embedding": (nested(vocab_size=10**12), "far more than its weights' file holds"),
    "a wide layer": (nested(hidden_size=10**6 * 4, intermediate_size=10**7), "far more than its weights' file holds"),
    "many positions": (nested(max_position_embeddings=10**11), "far more than its weights' file holds"),
    "a size below zero": (nested(hidden_size=-32), "can't be|No backbone can be built"),
    "a size that is text": (nested(hidden_size="32"), "can't be read|No backbone can be built"),
    "10^12 neurons": (features(count=10**12), "with a count from 1 to"),
    "neurons below zero": (features(count=-1), "with a count from 1 to"),
    "NaN neurons": (features(count=float("nan")), "count is NaN"),
    "NaN in a size": (nested(hidden_size=float("nan")), "NaN"),
    "NaN in weights of classes": (top(class_weights=[1.0, float("nan")]), "NaN"),
    "more neurons than stored": (features(count=4), "promises .* features, but its weights hold"),
    "features that are no list": (top(features={"a": 1}), "An entry of `features`"),
    "blocks elsewhere": (lambda config: config["layout"].update(blocks="embeddings"), "no list of blocks"),
    "no layout": (top(layout={"x": 1}), "`layout` should look like"),
    "a tap that is none": (features(tap="evil.1"), "not a tap"),
    "a tap that is not there": (features(tap="ffn.9"), "has no ffn.9"),
    "fewer layers than stored taps": (nested(num_hidden_layers=1), "has no"),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_configs(folder, case, load, monkeypatch):
    change, message = HOSTILE[case]
    rewrite(folder, change)
    for module in (configuration_spin, hf.models.auto.auto_factory, hf.models.auto.configuration_auto):
        monkeypatch.setattr(module, "get_class_from_dynamic_module", lambda *args, **kwargs: pytest.fail("ran code"))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_code_that_climbs_out_is_refused_with_trust_too(folder, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    for reference in (f"{tmp_path}/evil.X", "../evil.X"):
        rewrite(folder, nested(model_type="x", auto_map={"AutoConfig": reference, "AutoModel": reference}))
        for load in LOADERS:
            with pytest.raises(CheckpointError, match="not a class of a repository"):
                load(folder, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_a_known_backbone_runs_no_code_by_its_auto_map(folder):
    expected = SpinForSequenceClassification.from_pretrained(folder)(**make_batch()).logits
    rewrite(folder, nested(auto_map=EVIL))
    for load in LOADERS:
        model = load(folder)
        assert type(model.spin.backbone) is hf.BertModel
        assert torch.equal(model(**make_batch()).logits, expected)


def test_unknown_keys_are_dropped_with_one_warning(folder, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(configuration_spin.logger, "warning_once", heard.append)
    rewrite(folder, top(of_a_later_version={"a": 1}, transformers_weights="../../elsewhere.safetensors"))
    model = SpinForSequenceClassification.from_pretrained(folder)
    assert len(heard) == 1
    assert "of_a_later_version, transformers_weights, which this version of spin_hf does not know" in heard[0]
    assert not hasattr(model.config, "of_a_later_version")
    model.save_pretrained(tmp_path / "again")
    assert "of_a_later_version" not in json.loads((tmp_path / "again" / "config.json").read_text())
    hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert len(heard) == 1


def test_what_the_hub_wrote_into_a_backbones_config_is_not_handed_on(tmp_path):
    backbone = make_backbone("bert")
    backbone.config.trust_remote_code = True
    calibrated(backbone).save_pretrained(tmp_path)
    assert "trust_remote_code" not in (tmp_path / "config.json").read_text()
    SpinForSequenceClassification.from_pretrained(tmp_path)


# -- damaged files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [*LOADERS, SpinModel.from_pretrained])
@pytest.mark.parametrize("part", [0, 4, 100, 0.5, -1])
def test_a_truncated_file(folder, part, load):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part) if isinstance(part, float) else part])
    with pytest.raises(CheckpointError, match=r"model.safetensors of .* is truncated or damaged"):
        load(folder)


def test_a_flipped_bit_in_the_header(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for place in (0, 7, 9, *range(8, 8 + length, max(1, length // 40))):
        flipped = bytearray(data)
        flipped[place] ^= 0b100
        path.write_bytes(flipped)
        try:
            model = SpinForSequenceClassification.from_pretrained(folder)
        except CheckpointError:
            continue
        path.write_bytes(data)  # spaces and the like mean nothing; all else is refused
        whole = SpinForSequenceClassification.from_pretrained(folder)
        assert torch.equal(model(**make_batch()).logits, whole(**make_batch()).logits), place


@pytest.mark.parametrize(
    "tensor",
    ["score.weight", "score.bias", *(f"spin.standardizer.{n}" for n in ("neurons", "mean", "scale", "queries"))],
)
@pytest.mark.parametrize("form", ["full", "self_contained"])
def test_a_flipped_bit_in_the_head(folder, tensor, form):
    SpinForSequenceClassification.from_pretrained(folder).save_pretrained(folder, form=form)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    data[8 + length + start] ^= 1
    path.write_bytes(data)
    for load in LOADERS:
        with pytest.raises(CheckpointError, match="head's tensors in .* are not the ones that were saved"):
            load(folder)


def test_a_backbone_that_lacks_weights(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["spin.backbone.encoder.layer.0.output.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks spin.backbone.encoder.layer.0.output.dense.weight"):
        SpinForSequenceClassification.from_pretrained(folder)


def test_weights_of_another_checkpoint(folder, tmp_path):
    other = calibrated(make_backbone("bert"), seed=1)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match="config and weights are not of one checkpoint"):
        SpinForSequenceClassification.from_pretrained(folder)
    rewrite(folder, top(head_checksum=json.loads((tmp_path / "other" / "config.json").read_text())["head_checksum"]))
    rewrite(folder, nested(intermediate_size=52))
    with pytest.raises(CheckpointError, match="Config and weights of .* are not of one checkpoint"):
        SpinForSequenceClassification.from_pretrained(folder)


def test_an_index_that_climbs_out(folder):
    model = SpinForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(
        SpinForSequenceClassification.from_pretrained(folder)(**make_batch()).logits, model(**make_batch()).logits
    )
    good = index.read_text()
    for bad in ("../elsewhere.safetensors", "/etc/passwd"):
        index.write_text(re.sub(r"model-00001-of-\d+\.safetensors", bad, good))
        with pytest.raises(CheckpointError, match="not all files of the checkpoint"):
            SpinForSequenceClassification.from_pretrained(folder)
    index.write_text(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        SpinForSequenceClassification.from_pretrained(folder)


def test_a_pickle_is_not_read(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        SpinForSequenceClassification.from_pretrained(folder)


# -- saving is whole or not at all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["full", "head", "self_contained"])
@pytest.mark.parametrize("failing", ["amend_config", "Weights", "copy_code"])
def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch, form, failing):
    make_backbone("bert").save_pretrained(tmp_path / "backbone")
    old = calibrated(str(tmp_path / "backbone"))
    old.save_pretrained(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    new = calibrated(str(tmp_path / "backbone"), seed=1)

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    if failing == "copy_code" and form != "self_contained":
        pytest.skip("copies no code")
    monkeypatch.setattr(pretrained, failing, type("Fails", (), {"in_folder": fail}) if failing == "Weights" else fail)
    for folder in ("saved", "new"):
        with pytest.raises(OSError, match="No space left"):
            new.save_pretrained(tmp_path / folder, form=form)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert list((tmp_path / "new").iterdir()) == []


def test_saving_over_shards_leaves_none(tmp_path, bert_backbone):
    model = calibrated(bert_backbone)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}


def test_unknown_forms(tmp_path, bert_backbone):
    with pytest.raises(ValueError, match="form must be one of full, head, self_contained; got 'tiny'"):
        calibrated(bert_backbone).save_pretrained(tmp_path, form="tiny")


@pytest.mark.parametrize("form", ["full", "self_contained"])
@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
def test_pushing_hands_the_form_down(tmp_path, bert_backbone, monkeypatch, form, through):
    model, pushed = calibrated(bert_backbone), {}

    def upload(self, repo_id, **kwargs):  # as transformers does it
        pushed["repo_id"] = repo_id
        self.save_pretrained(tmp_path / "pushed", max_shard_size="5GB")

    monkeypatch.setattr(hf.PreTrainedModel, "push_to_hub", upload)
    if through == "push_to_hub":
        model.push_to_hub("me/mine", form=form)
    else:
        model.save_pretrained(tmp_path / "mine", form=form, push_to_hub=True, repo_id="me/mine")
    assert pushed["repo_id"] == "me/mine"
    assert ("auto_map" in json.loads((tmp_path / "pushed" / "config.json").read_text())) == (form == "self_contained")
    model.save_pretrained(tmp_path / "later")
    assert "auto_map" not in json.loads((tmp_path / "later" / "config.json").read_text())


def test_a_config_by_hand_is_checked_too():
    with pytest.raises(CheckpointError, match="no file can grant trust"):
        SpinConfig(backbone_config={**CONFIGS["bert"]().to_dict(), "trust_remote_code": True})
