"""A finished classifier as one graph: torch.compile, torch.export and ONNX give the logits of the model."""

import copy
import io

import pytest
import torch
from builders import CONFIGS, calibrated, make_backbone, make_batch
from census.checks import make_model
from transformers import T5Model

from spin_hf import NotCalibratedError, SpinForSequenceClassification, TapError
from spin_hf.export import ExportError, export_onnx, export_program

# What the exporter says of its own insides turns into a failure of its own where it is an error.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def classifier(name):
    return calibrated(make_backbone(name), taps=["ffn.1", "hidden.2"], depth=2)


@pytest.fixture(scope="module", params=["bert", "llama"])
def model(request):
    return classifier(request.param)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def left_padded(batch):
    return {name: value.flip(1) for name, value in batch.items()}


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


# Other sizes than those a graph was made with, padded on the other side, and one row alone.
BATCHES = [
    make_batch(rows=3, tokens=7),
    left_padded(make_batch(rows=5, tokens=11, seed=1)),
    left_padded({name: value[3:4] for name, value in make_batch(rows=5, tokens=11, seed=2).items()}),
]


def assert_same_logits(found, model, *, atol=1e-5):
    for batch in BATCHES:
        with torch.no_grad():
            torch.testing.assert_close(found(**batch), model(**batch).logits, rtol=0, atol=atol)


# -- torch.compile -----------------------------------------------------------------------------------------------------


def test_compiles_without_graph_breaks(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in BATCHES[:2]:
        with torch.no_grad():
            assert torch.equal(compiled(**batch).logits, model(**batch).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the same for another batch and length


def test_copies_compile_to_their_own_weights():
    model = classifier("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.score.weight.mul_(2)
    for each in (model, other):
        compiled = torch.compile(each, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(**BATCHES[0]).logits, each(**BATCHES[0]).logits)


@pytest.mark.parametrize("part", ["backbone", "block"])
def test_a_part_of_the_backbone_may_be_compiled_alone(model, part):
    """Its graph breaks where a tap is read, since what records it lies outside; hooks must be guarded on."""
    other = copy.deepcopy(model)
    spin = other.spin
    module = spin.backbone if part == "backbone" else spin.layout.module(spin.backbone, 2)
    module.compile(backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False), torch.no_grad():
        assert torch.equal(other(**BATCHES[0]).logits, model(**BATCHES[0]).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_hooks_that_a_compiled_part_forgot_are_an_error():
    """Code of one block is run for the next, which has other hooks: torch doesn't look at them by default."""
    model = calibrated(make_backbone("bert"), taps=["hidden.1", "ffn.2", "hidden.2"], depth=2)
    other = copy.deepcopy(model)
    other.spin.backbone.compile(backend="eager")
    with pytest.raises(TapError, match="skip_nnmodule_hook_guards = False"), torch.no_grad():
        other(**BATCHES[0])


def test_a_compiled_model_learns_as_without():
    labels = torch.tensor([0, 1, 1])
    plain = classifier("llama")
    plain.unfreeze_backbone()
    other = copy.deepcopy(plain)
    plain(**BATCHES[0], labels=labels).loss.backward()
    torch.compile(other, fullgraph=True, backend="aot_eager")(**BATCHES[0], labels=labels).loss.backward()
    learnt = 0
    for (name, expected), found in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
            learnt += bool(expected.grad.any())
    assert learnt > 10


# -- torch.export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "strict"), [("bert", False), ("llama", True)])
def test_exports_with_any_batch_and_length(name, strict):
    model = classifier(name)
    program = export_program(model, strict=strict)
    assert_same_logits(lambda **batch: program.module()(**batch).logits, model)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "both"])
def test_other_kinds_of_backbones_export(name):
    """With learnt positions, with sliding windows, and both stacks of an encoder-decoder."""
    if name == "both":
        model = calibrated(T5Model(CONFIGS["t5"]()).eval(), taps=["ffn.2", "hidden.4"], depth=4, stacks="both")
    else:
        model = classifier(name)
    program = export_program(model)
    assert_same_logits(lambda **batch: program.module()(**batch).logits, model)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), compiled_in_place])
def test_a_compiled_classifier_exports_as_it_is(wrap):
    model = classifier("bert")
    program = export_program(wrap(copy.deepcopy(model)))
    assert_same_logits(lambda **batch: program.module()(**batch).logits, model)


def test_an_exported_program_is_saved_and_loaded():
    model = classifier("bert")
    file = io.BytesIO()
    torch.export.save(export_program(model), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert_same_logits(lambda **batch: loaded(**batch).logits, model)


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_onnx():
    """``run_onnx(path)``: the file as a function, and the names of its inputs."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="ONNX needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX needs the extra onnx")

    def load(path):
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def run(**batch):
            return torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in batch.items()})[0])

        return run, {given.name: given.shape for given in session.get_inputs()}

    return load


def test_onnx_has_the_logits_of_the_model(run_onnx, tmp_path):
    model = classifier("llama")
    run, inputs = run_onnx(export_onnx(model, tmp_path / "model.onnx"))
    assert inputs == {name: ["batch", "tokens"] for name in ("input_ids", "attention_mask")}
    assert_same_logits(run, model, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_onnx_of_text_pairs_takes_token_types(run_onnx, tmp_path):
    model = classifier("bert")
    model.config.text_pairs = True
    run, inputs = run_onnx(export_onnx(model, tmp_path / "model.onnx"))
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    batch = {**BATCHES[0], "token_type_ids": BATCHES[0]["input_ids"] % 2}
    with torch.no_grad():
        expected, otherwise = model(**batch).logits, model(**BATCHES[0]).logits
    torch.testing.assert_close(run(**batch), expected, rtol=0, atol=1e-4)
    assert (expected - otherwise).abs().max() > 1e-3


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_cant_be_exported_is_refused(monkeypatch):
    with pytest.raises(NotCalibratedError, match="run spin_calibrate before exporting"):
        export_program(SpinForSequenceClassification.from_backbone(make_backbone("bert")))
    model = classifier("llama")
    with pytest.raises(ExportError, match="LlamaModel takes no token_type_ids"):
        export_program(model, token_type_ids=True)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "windows", {"size": 16, "overlap": 4, "before": 0, "after": 0})
        with pytest.raises(ExportError, match="reads long texts in windows"):
            export_program(model)
    monkeypatch.setattr(model.config, "batching", "equal_length")
    with pytest.raises(ExportError, match="batches that are equal length"):
        export_program(model)


def test_a_backbone_that_can_be_no_one_graph_is_named():
    with pytest.raises(ExportError, match="MambaModel could not be made one graph.*Serve the model itself"):
        export_program(calibrated(make_model("mamba"), taps=["hidden.1"], poolings=["mean"], depth=1))


def test_onnx_files_that_nobody_could_read_are_not_written(run_onnx, tmp_path):
    with pytest.raises(NotADirectoryError, match="none is no folder, so model.onnx can't be written there"):
        export_onnx(classifier("bert"), tmp_path / "none" / "model.onnx")
    with pytest.raises(ExportError, match=r"could not load the file.*export_onnx\(model.float\(\), ...\)"):
        export_onnx(classifier("bert").bfloat16(), tmp_path / "model.onnx")


def test_onnx_in_half_precision(run_onnx, tmp_path):
    model = classifier("bert")
    run, _ = run_onnx(export_onnx(copy.deepcopy(model).half(), tmp_path / "model.onnx"))
    assert_same_logits(run, model, atol=0.1)


def test_onnx_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'onnx and onnxscript is missing. Run: pip install "spin_hf\[onnx\]"'):
        export_onnx(classifier("bert"), tmp_path / "model.onnx")
