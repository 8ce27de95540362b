import json

import pytest
import transformers as hf
from builders import CONFIGS

from spin_hf import CheckpointError, SpinConfig, SpinForSequenceClassification

FEATURES = [{"tap": "ffn.1", "pooling": "max", "count": 2}, {"tap": "hidden.2", "pooling": "mean", "count": 3}]


def config(**changes):
    values = {
        "backbone_config": CONFIGS["qwen3"](),
        "backbone_id": "someone/model",
        "backbone_revision": "abc",
        "layout": {"blocks": "layers", "ffn": "mlp.down_proj", "norm": "norm"},
        "features": FEATURES,
        "class_weights": [1.0, 2.0, 0.5],
        "max_text_tokens": 48,
        "logit_temperature": 1.75,
        "id2label": {0: "low", 1: "middle", 2: "high"},
        "label2id": {"low": 0, "middle": 1, "high": 2},
        "problem_type": "single_label_classification",
    }
    return SpinConfig(**{**values, **changes})


def test_json_round_trip(tmp_path):
    saved = config()
    saved.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert {name: values[name] for name in ("backbone_id", "features", "layout", "class_weights")} == {
        name: getattr(saved, name) for name in ("backbone_id", "features", "layout", "class_weights")
    }
    for auto in (SpinConfig, hf.AutoConfig):
        loaded = auto.from_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path / auto.__name__)
        assert json.loads((tmp_path / auto.__name__ / "config.json").read_text()) == values
        assert type(loaded) is SpinConfig
        assert loaded.id2label == {0: "low", 1: "middle", 2: "high"}
        assert loaded.label2id == {"low": 0, "middle": 1, "high": 2}
        assert loaded.logit_temperature == 1.75
        assert (loaded.num_labels, loaded.num_features, loaded.hidden_size) == (3, 5, 32)


def test_the_nested_config_is_whole(tmp_path):
    backbone = CONFIGS["qwen3"]()
    config(backbone_config=backbone).save_pretrained(tmp_path)
    nested = SpinConfig.from_pretrained(tmp_path).backbone_config
    assert type(nested) is hf.Qwen3Config
    assert nested.to_dict() == backbone.to_dict()


def test_a_dict_is_as_good_as_a_backbone_config():
    values = CONFIGS["bert"]().to_dict()
    before = json.dumps(values, sort_keys=True)
    made = config(backbone_config=values).backbone_config
    assert type(made) is hf.BertConfig
    assert made.to_dict() == CONFIGS["bert"]().to_dict()
    assert json.dumps(values, sort_keys=True) == before


def test_empty():
    empty = SpinConfig()
    assert (empty.num_features, empty.hidden_size, empty.backbone_config) == (0, None, None)
    assert SpinConfig.from_dict(empty.to_dict()).to_dict() == empty.to_dict()


@pytest.mark.parametrize(
    "entry",
    [
        {"tap": "ffn.1", "pooling": "mean"},
        {"tap": "ffn.1", "pooling": "mean", "count": 0},
        {"tap": "ffn.1", "pooling": "mean", "count": "3"},
        {"tap": "ffn.1", "pooling": "mean", "count": 3, "neurons": [1, 2, 3]},
    ],
)
def test_entries_of_features_are_checked(entry):
    with pytest.raises(CheckpointError, match="An entry of `features` should look like"):
        config(features=[entry])


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("inf"), "2", None, True])
def test_a_temperature_is_a_positive_number(value, tmp_path):
    with pytest.raises(CheckpointError, match="`logit_temperature` should be a positive, finite number"):
        config(logit_temperature=value)
    config().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "logit_temperature": value}))
    with pytest.raises(CheckpointError, match="logit_temperature"):
        SpinConfig.from_pretrained(tmp_path)


def test_a_checkpoint_from_before_temperatures_has_none():
    values = config().to_dict()
    del values["logit_temperature"]
    assert SpinConfig.from_dict(values).logit_temperature == 1.0


def test_a_newer_format():
    with pytest.raises(CheckpointError, match="has format 2, .*reads up to 1. .*pip install -U spin_hf"):
        config(spin_format=2)


def test_a_backbone_that_transformers_does_not_know():
    with pytest.raises(CheckpointError, match="model_type is 'bert9'.*Update transformers"):
        config(backbone_config={"model_type": "bert9"})


def test_a_backbone_with_remote_code_needs_the_callers_trust():
    values = {"model_type": "tiny", "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig"}}
    with pytest.raises(CheckpointError, match="trust_remote_code = True: no file can grant trust"):
        config(backbone_config=values, trust_remote_code=True)
    sealed = config(backbone_config=values)
    assert sealed.to_dict()["backbone_config"] == values
    assert SpinConfig.from_dict(sealed.to_dict()).to_dict() == sealed.to_dict()
    with pytest.raises(CheckpointError, match=r"\('tiny'\) runs code from someone/model\. .*trust_remote_code=True"):
        SpinForSequenceClassification(sealed)
    values["auto_map"]["AutoModel"] = "other/code--modeling_tiny.TinyModel"
    with pytest.raises(CheckpointError, match="runs code from other/code and someone/model"):
        SpinForSequenceClassification(config(backbone_config=values))


def test_the_backbones_shape_is_shown_but_not_read(bert_backbone, calibrated, tmp_path):
    model = calibrated(bert_backbone, depth=2)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    assert {name: values[name] for name in shape} == shape
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 7}))
    config = SpinConfig.from_pretrained(tmp_path)
    assert SpinConfig(**config.to_dict()).to_dict()["num_hidden_layers"] == 2
