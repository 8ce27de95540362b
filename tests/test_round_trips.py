"""Invariant 3, the whole matrix: what a checkpoint holds against where it is loaded. Equal logits in every cell.

The process without this package loads what was saved as self-contained; a head-only checkpoint and those that Trainer
writes do not carry the code, so that there they can't apply.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from builders import calibrated, make_backbone, make_batch, make_sentiment_rows, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from spin_hf import SpinForSequenceClassification

CASES = ("full", "head", "self_contained", "merged", "quantised", "truncated", "trainer")
PLACES = ("same", "fresh", "without")
NEVER = {("head", "without"), ("trainer", "without")}
TEXTS = ["a lovely film", "dull plot and a dull end of it"]

LOAD = """
import json, sys
place, batch, backbone, target, *folders = sys.argv[1:]
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
    assert type(model).__module__.startswith("transformers_modules." if place == "without" else "spin_hf.")
    classify = transformers.pipeline("text-classification", folder, device="cpu", model_kwargs=extra, **options)
    assert type(classify.model) is type(model)
    assert classify(["a lovely film"])[0]["label"] in model.config.label2id
    with torch.no_grad():
        found[folder] = model(**batch).logits
        assert (classify.model(**batch).logits == found[folder]).all()
        if "quantised" not in folder:  # torchao's metadata knows the tensors by the classifier's names alone
            body = transformers.AutoModel.from_pretrained(folder, **options, **extra)
            assert (body(**batch).features == model(**batch, output_features=True).features).all()
    if place == "without":  # whoever has only the code of the checkpoint can hand it on
        model.save_pretrained(folder + "-again")
        again = transformers.AutoModelForSequenceClassification.from_pretrained(folder + "-again", **options)
        assert (again(**batch).logits == found[folder]).all()
assert place != "without" or not any(name.startswith("spin_hf.") for name in sys.modules)
save_file(found, target)
"""


def fine_tuned(tmp_path):
    """A model whose head Trainer moved, and the checkpoint that Trainer wrote."""
    model = calibrated(make_backbone("bert"))
    tokenizer, rows = make_tokenizer(), make_sentiment_rows(8)
    data = [{**tokenizer(text), "labels": label} for text, label in zip(rows["text"], rows["label"], strict=True)]
    arguments = hf.TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=2,
        save_steps=2,
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = model.score.weight.detach().clone()
    hf.Trainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
    assert not torch.equal(model.score.weight, before)
    return model.eval(), tmp_path / "trainer" / "checkpoint-2"


def merged():
    peft = pytest.importorskip("peft")
    model = calibrated(make_backbone("bert"))
    before = model(**make_batch()).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    expected = adapted.eval()(**make_batch()).logits
    assert not torch.allclose(expected, before)
    plain = adapted.merge_and_unload()
    torch.testing.assert_close(plain(**make_batch()).logits, expected, rtol=1e-4, atol=1e-4)
    return plain.eval()


def quantised(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="pip install spin_hf[quantization]")
    make_backbone("bert").save_pretrained(tmp_path / "to quantise")
    config = hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = calibrated(str(tmp_path / "to quantise"), quantization_config=config, depth=2)
    weight = model.spin.backbone.encoder.layer[0].output.dense.weight
    assert type(weight).__module__.startswith("torchao.")
    assert type(model.score.weight) is torch.nn.Parameter
    return model


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, run_python):
    """Logits of each case as it was saved, and of each cell; quantised ones only where torchao is installed."""
    root = tmp_path_factory.mktemp("matrix")
    make_backbone("bert").save_pretrained(root / "backbone")
    source = calibrated(str(root / "backbone"), depth=2)
    models = {"full": source, "head": source, "self_contained": source, "merged": merged()}
    models["truncated"] = calibrated(make_backbone("llama"), depth=1)
    models["trainer"], checkpoint = fine_tuned(root)
    with contextlib.suppress(pytest.skip.Exception):
        models["quantised"] = quantised(root)
    folders = {place: {} for place in PLACES}
    for case, model in models.items():
        if case == "trainer":
            folders["fresh"][case] = checkpoint
            continue
        form = case if case in ("head", "self_contained") else "full"
        folders["fresh"][case] = folder = root / case
        model.save_pretrained(folder, form=form)
        if case != "head":
            folders["without"][case] = root / f"{case}-with-code"
            model.save_pretrained(folders["without"][case], form="self_contained")
    for folder in (*folders["fresh"].values(), *folders["without"].values()):
        make_tokenizer().save_pretrained(folder)
    save_file(make_batch(), root / "batch")
    expected = {case: model(**make_batch()).logits for case, model in models.items()}
    found = {"same": {}}
    for case, folder in folders["fresh"].items():
        extra = {"backbone": root / "backbone"} if case == "head" else {}
        found["same"][case] = SpinForSequenceClassification.from_pretrained(folder, **extra)(**make_batch()).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(root / "modules"))
        for place in ("fresh", "without"):
            run_python(LOAD, place, root / "batch", root / "backbone", root / place, *folders[place].values())
            logits = load_file(root / place)
            found[place] = {case: logits[str(folder)] for case, folder in folders[place].items()}
    return expected, found, folders


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_equal_logits(matrix, case, place):
    expected, found, _ = matrix
    if (case, place) in NEVER:
        assert case not in found[place]
        return
    if case == "quantised" and case not in expected:
        pytest.skip("torchao is not installed")
    assert torch.equal(found[place][case], expected[case])


def test_only_a_self_contained_checkpoint_carries_code(matrix):
    _, _, folders = matrix
    for folder in folders["fresh"].values():
        own = folder.name == "self_contained"
        assert ("auto_map" in json.loads((folder / "config.json").read_text())) == own
        assert bool(list(folder.glob("*.py"))) == own
    names = {path.name for path in folders["fresh"]["self_contained"].glob("*.py")}
    assert {"configuration_spin.py", "modeling_spin.py", "pretrained.py", "taps.py", "trust.py"} <= names


def test_the_first_file_names_every_other():
    first = sys.modules[SpinForSequenceClassification.__module__].__file__
    direct = {str(Path(first).parent / f"{name}.py") for name in get_relative_imports(first)}
    assert direct | {first} == {*get_relative_import_files(first), first}


BODY = """
import sys
sys.modules["spin_hf"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
save_file({"features": model(**load_file(sys.argv[2])).features}, sys.argv[3])
"""


def test_the_body_alone_carries_all_the_code_too(tmp_path, bert_backbone, run_python, monkeypatch):
    body = calibrated(bert_backbone).spin
    body.save_pretrained(tmp_path / "body", form="self_contained")
    save_file(make_batch(), tmp_path / "batch")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run_python(BODY, tmp_path / "body", tmp_path / "batch", tmp_path / "found")
    assert torch.equal(load_file(tmp_path / "found")["features"], body(**make_batch()).features)


def test_saving_it_leaves_no_trace_in_the_class(tmp_path, bert_backbone):
    model = calibrated(bert_backbone)
    model.save_pretrained(tmp_path / "one", form="self_contained")
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path / "one", trust_remote_code=True)
    assert type(loaded) is SpinForSequenceClassification
    for number, again in enumerate((model, loaded)):
        again.save_pretrained(tmp_path / f"plain{number}")
        config = json.loads((tmp_path / f"plain{number}" / "config.json").read_text())
        assert "auto_map" not in config
        assert {path.suffix for path in (tmp_path / f"plain{number}").iterdir()} == {".json", ".safetensors"}
    assert SpinForSequenceClassification._auto_class is None


REFUSED = """
import sys
sys.modules["spin_hf"] = None
import transformers
for auto in (transformers.AutoConfig, transformers.AutoModel, transformers.AutoModelForSequenceClassification):
    for options in ({}, {"trust_remote_code": False}):
        try:
            auto.from_pretrained(sys.argv[1], **options)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError("loaded without trust")
assert not any(name.startswith("transformers_modules.") for name in sys.modules)
"""


def test_nothing_of_it_runs_without_trust(tmp_path, bert_backbone, run_python, monkeypatch):
    calibrated(bert_backbone).save_pretrained(tmp_path / "one", form="self_contained")
    mark = tmp_path / "ran"
    for path in (tmp_path / "one").glob("*.py"):
        path.write_text(f"open({str(mark)!r}, 'w')\n" + path.read_text())
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run_python(REFUSED, tmp_path / "one")
    assert not mark.exists()
