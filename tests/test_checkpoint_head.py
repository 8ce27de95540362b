"""Head-only checkpoints: which backbone they load, share, and refuse."""

import json

import pytest
import torch
import transformers as hf
from builders import calibrated, make_backbone, make_batch, make_tokenizer
from hub_cache import COMMIT, put_in_cache
from safetensors.torch import load_file

from spin_hf import CheckpointError, SpinForSequenceClassification, SpinModel

ID = "tiny/bert"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hub cache with the backbone ``tiny/bert`` in it."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    put_in_cache(folder, ID, make_backbone("bert"))
    return folder


@pytest.fixture
def saved(cache, tmp_path):
    """A classifier on two blocks of it, and its head-only checkpoint."""
    model = calibrated(ID, depth=2)
    model.save_pretrained(tmp_path / "head", form="head")
    make_tokenizer().save_pretrained(tmp_path / "head")
    return model, tmp_path / "head"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change(folder, **values):
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **values}))


def test_what_is_saved(saved):
    model, folder = saved
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == {
        "score.weight",
        "score.bias",
        *(f"spin.standardizer.{name}" for name in ("neurons", "mean", "scale", "queries")),
    }
    assert torch.equal(weights["score.weight"], model.score.weight)
    config = config_of(folder)
    assert (config["backbone_id"], config["backbone_revision"], config["form"]) == (ID, COMMIT, "head")
    assert config["architectures"] == ["SpinForSequenceClassification"]
    assert config["dtype"] == "float32"


@pytest.mark.parametrize("auto", [SpinForSequenceClassification, hf.AutoModelForSequenceClassification])
def test_it_loads_its_backbone_by_id(saved, auto):
    model, folder = saved
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert loaded.spin.depth == 2
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.spin.backbone.parameters())
    assert torch.equal(loaded(**make_batch()).logits, model(**make_batch()).logits)


def test_the_body_and_the_pipeline(saved):
    model, folder = saved
    expected = model(**make_batch(), output_features=True)
    for auto in (hf.AutoModel, SpinModel):
        assert torch.equal(auto.from_pretrained(folder)(**make_batch()).features, expected.features)
    pipeline = hf.pipeline("text-classification", str(folder), device="cpu")
    assert torch.equal(pipeline.model(**make_batch()).logits, expected.logits)
    assert pipeline("a lovely film")[0]["label"] in model.config.label2id


def test_a_loaded_checkpoint_can_be_saved_in_each_form(saved, tmp_path):
    model, folder = saved
    loaded = SpinForSequenceClassification.from_pretrained(folder)
    for form in ("full", "head", "self_contained"):
        loaded.save_pretrained(tmp_path / "again", form=form)  # over the one before
        assert config_of(tmp_path / "again").get("form") == ("head" if form == "head" else None)
        assert ("auto_map" in config_of(tmp_path / "again")) == (form == "self_contained")
        again = SpinForSequenceClassification.from_pretrained(tmp_path / "again")
        assert torch.equal(again(**make_batch()).logits, model(**make_batch()).logits)


def test_the_body_has_a_head_form_too(saved, tmp_path):
    model, folder = saved
    SpinModel.from_pretrained(folder).save_pretrained(tmp_path / "body", form="head")
    body = hf.AutoModel.from_pretrained(tmp_path / "body")
    assert torch.equal(body(**make_batch()).features, model(**make_batch(), output_features=True).features)
    with pytest.raises(CheckpointError, match=r"should hold score.weight of shape \(2, \d+\), but has nothing"):
        SpinForSequenceClassification.from_pretrained(tmp_path / "body")


def test_attention_implementation_reaches_the_backbone(saved):
    for auto in (SpinForSequenceClassification, hf.AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(saved[1], attn_implementation="eager")
        assert loaded.spin.backbone.config._attn_implementation == "eager"


def test_hub_arguments_reach_the_backbone(saved, tmp_path, monkeypatch):
    _, folder = saved
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(OSError, match=ID):
        SpinForSequenceClassification.from_pretrained(folder)
    SpinForSequenceClassification.from_pretrained(folder, cache_dir=tmp_path / "hub", local_files_only=True)


# -- one backbone, many heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "albert", "gpt2"])
def test_heads_share_one_backbone(tmp_path, name):
    backbone = make_backbone(name)
    backbone.save_pretrained(tmp_path / "backbone")
    models, folders = [], []
    for number, depth in enumerate((2, 3)):
        models.append(calibrated(str(tmp_path / "backbone"), depth=depth, seed=number, num_labels=2 + number))
        folders.append(tmp_path / f"head{number}")
        models[-1].save_pretrained(folders[-1], form="head")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    blocks, config = len(list(backbone.modules())), backbone.config.to_dict()
    heads = [SpinForSequenceClassification.from_pretrained(folder, backbone=backbone) for folder in folders]
    heads.append(SpinForSequenceClassification.from_pretrained(folders[0], backbone=heads[1].spin.backbone))
    for head, model in zip(heads, [*models, models[0]], strict=True):
        assert torch.equal(head(**make_batch()).logits, model(**make_batch()).logits)
        own = dict(head.spin.backbone.named_parameters(remove_duplicate=False))
        given = dict(backbone.named_parameters(remove_duplicate=False))
        assert own
        assert all(value.data_ptr() == given[key].data_ptr() for key, value in own.items())
        assert all(
            buffer.data_ptr() == backbone.get_buffer(key).data_ptr()
            for key, buffer in head.spin.backbone.named_buffers()
        )
    heads[0].unfreeze_backbone()
    heads[0].to(torch.bfloat16)
    assert torch.equal(heads[1](**make_batch()).logits, models[1](**make_batch()).logits)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in backbone.parameters())
    assert (len(list(backbone.modules())), backbone.config.to_dict()) == (blocks, config)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_a_backbone_by_path(saved, tmp_path):
    model, folder = saved
    put_in_cache(tmp_path / "elsewhere", "other/name", make_backbone("bert"))
    snapshot = next((tmp_path / "elsewhere").rglob("config.json")).parent
    loaded = SpinForSequenceClassification.from_pretrained(folder, backbone=snapshot)
    assert torch.equal(loaded(**make_batch()).logits, model(**make_batch()).logits)


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("calibrated_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, "auto", torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_is_not_another_backbone(cache, tmp_path, stored, calibrated_in, asked):
    put_in_cache(cache, "tiny/other", make_backbone("llama").to(stored))
    model = calibrated("tiny/other", dtype=calibrated_in)
    model.save_pretrained(tmp_path / "head", form="head")
    model.save_pretrained(tmp_path / "full")
    options = {} if asked is None else {"dtype": asked}
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path / "head", **options)
    full = SpinForSequenceClassification.from_pretrained(tmp_path / "full", **options)
    assert loaded.dtype == full.dtype == (calibrated_in if asked in (None, "auto") else asked)
    assert loaded.score.weight.dtype == torch.float32
    assert torch.equal(loaded(**make_batch()).logits, full(**make_batch()).logits)
    if asked in (torch.float32, calibrated_in):
        given = hf.AutoModel.from_pretrained("tiny/other", dtype=asked)
        SpinForSequenceClassification.from_pretrained(tmp_path / "head", backbone=given)


# -- another backbone --------------------------------------------------------------------------------------------------


def test_another_revision_is_refused(saved, cache):
    _, folder = saved
    put_in_cache(cache, ID, make_backbone("bert", seed=1), commit="b" * 40)
    SpinForSequenceClassification.from_pretrained(folder)  # main moved on, the pinned commit did not
    change(folder, backbone_revision="b" * 40)
    with pytest.raises(CheckpointError, match=r"made for tiny/bert at b{40}, with the fingerprint \w{12} in float32"):
        SpinForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"seed": 1}, "made for tiny/bert at a{40}, with the fingerprint .* weights of BertModel have"),
        ("bert", {"num_hidden_layers": 1}, "a 'bert' of at least 2 blocks; BertModel is a 'bert' of 1 blocks"),
        ("llama", {}, "made for tiny/bert .*; LlamaModel is a 'llama' of 3 blocks"),
    ],
)
def test_another_model_is_refused(saved, name, changes, message):
    with pytest.raises(CheckpointError, match=message):
        SpinForSequenceClassification.from_pretrained(saved[1], backbone=make_backbone(name, **changes))


def test_one_changed_weight_is_noticed_where_it_matters(saved):
    _, folder = saved
    backbone = make_backbone("bert")
    with torch.no_grad():
        backbone.pooler.dense.weight.add_(1)  # read by no tap
        backbone.encoder.layer[2].output.dense.weight.add_(1)  # above the depth
    SpinForSequenceClassification.from_pretrained(folder, backbone=backbone)
    with torch.no_grad():
        backbone.encoder.layer[1].output.dense.bias[3] += 1e-3
    with pytest.raises(CheckpointError, match="fingerprint"):
        SpinForSequenceClassification.from_pretrained(folder, backbone=backbone)


def test_a_backbone_that_was_trained_is_not_saved_as_a_head(cache, tmp_path):
    model = calibrated(ID)
    with torch.no_grad():
        model.spin.backbone.embeddings.word_embeddings.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="were trained since"):
        model.save_pretrained(tmp_path / "head", form="head")
    assert not (tmp_path / "head").exists()


def test_a_backbone_that_nobody_could_find(tmp_path):
    with pytest.raises(CheckpointError, match="names no backbone_id.*form='full'"):
        calibrated(make_backbone("bert")).save_pretrained(tmp_path / "head", form="head")


@pytest.mark.parametrize("place", ["folder", "../hub/x", "/etc", "a/b/c", None])
def test_a_file_names_no_folder_to_read(saved, tmp_path, monkeypatch, place):
    _, folder = saved
    make_backbone("bert").save_pretrained(tmp_path / "folder")
    change(folder, backbone_id=str(tmp_path / "folder") if place == "folder" else place)
    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", lambda *args, **kwargs: pytest.fail("read it"))
    with pytest.raises(CheckpointError, match=r"no id.*[Pp]ass the backbone"):
        SpinForSequenceClassification.from_pretrained(folder)


def test_a_full_checkpoint_needs_no_backbone(tmp_path, bert_backbone):
    calibrated(bert_backbone).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds its own backbone"):
        SpinForSequenceClassification.from_pretrained(tmp_path, backbone=bert_backbone)


def test_quantising_on_loading_is_refused(saved):
    with pytest.raises(CheckpointError, match="can't prove a backbone that is quantised on loading"):
        SpinForSequenceClassification.from_pretrained(saved[1], quantization_config={"load_in_8bit": True})
