"""A folder is a whole classifier, or it is refused with the reason."""

import json

import pytest

from spin_hf import CheckpointError
from spin_hf.hub.folder import Checkpoint, hub_id


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no saved model"),
    "bad config": (lambda folder: (folder / "config.json").write_text("{"), "no saved model"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "not a SPIN checkpoint"),
    "other model": (lambda folder: edit(folder, model_type="bert"), "not a SPIN checkpoint"),
    "newer": (lambda folder: edit(folder, spin_format=99), "format 99"),
    "uncalibrated": (lambda folder: edit(folder, features=[]), "never calibrated"),
    "strange features": (lambda folder: edit(folder, features=[{"tap": 1}]), "`features`"),
    "other count": (lambda folder: edit(folder, features=[{"count": 1}]), "has the shape"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "cut off": (cut, "damaged or cut off"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_whole_is_refused(classifier, case):
    breaking, message = BROKEN[case]
    breaking(classifier)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.read(classifier)


def test_shards_must_be_there(classifier):
    from spin_hf import SpinForSequenceClassification

    model = SpinForSequenceClassification.from_pretrained(classifier)
    (classifier / "model.safetensors").unlink()
    model.save_pretrained(classifier, max_shard_size="40KB")
    shards = sorted(classifier.glob("*.safetensors"))
    assert len(shards) > 1
    assert Checkpoint.read(classifier).weights == tuple(shard.name for shard in shards)
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=shards[0].name):
        Checkpoint.read(classifier)


def test_only_the_models_own_files_go_up(classifier):
    checkpoint = Checkpoint.read(classifier)
    expected = {path.name for path in classifier.iterdir()}
    for name in ("optimizer.pt", "training_args.bin", "weights.pkl", ".env", "run.py", "trainer_state.json", "x.tmp"):
        (classifier / name).write_text("no")
    (classifier / "model-00001-of-00002.safetensors").write_text("an earlier save's")
    (classifier / "checkpoint-7").mkdir()
    (classifier / "checkpoint-7" / "config.json").write_text("{}")
    assert set(checkpoint.uploads()) == expected
    (classifier / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.save_pretrained"):
        checkpoint.uploads()


def test_the_form_is_seen(classifier):
    assert Checkpoint.read(classifier).form == "full"
    edit(classifier, auto_map={"AutoConfig": "configuration_spin.SpinConfig"})
    (classifier / "modeling_spin.py").write_text("")
    checkpoint = Checkpoint.read(classifier)
    assert checkpoint.form == "self_contained"
    assert "modeling_spin.py" in checkpoint.uploads()


def test_a_head_is_told_by_its_tensors(classifier):
    from safetensors.torch import load_file, save_file

    path = classifier / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if ".backbone." not in name}
    save_file(tensors, path, {"format": "pt"})
    assert Checkpoint.read(classifier).form == "head"


def test_hub_ids_and_paths_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "bert").mkdir(parents=True)
    assert hub_id("someone/bert") == "someone/bert"
    assert hub_id("gpt2") == "gpt2"
    assert hub_id("/cache/models--someone--bert/snapshots/0a1b2c") == "someone/bert"
    for path in ("/home/me/bert", "./bert", "out/bert", "a/b/c", "~/bert", "C:\\models\\bert", "", None):
        assert hub_id(path) is None
