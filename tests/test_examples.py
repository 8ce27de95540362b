"""Every example runs in its short form: the code that a user would copy, on few rows and fewer settings."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from builders import make_backbone
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, BertConfig, BertModel

import spin_hf.demo
from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import recipe

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DATA = Path(os.environ.get("SPIN_HF_DATA", ROOT.parent / "shared" / "data"))  # the public sets, where they are at hand

SMALL = replace(recipe._PRESETS["default"], Cs=3, etas=(1.0,), max_depth=2, poolings=("mean",))


def run_example(name, *options):
    """Run an example as the main program, with fewer settings; return what it printed."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.syspath_prepend(str(EXAMPLES))
        patch.syspath_prepend(str((EXAMPLES / name).parent))
        patch.setitem(recipe._PRESETS, "default", SMALL)
        patch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return shown.getvalue()


@pytest.fixture(scope="module", autouse=True)
def backbone(minilm_path, tmp_path_factory):
    """What the examples find installed: MiniLM's tokenizer and card, and a random model as small as can be."""
    folder = tmp_path_factory.mktemp("backbone") / Path(minilm_path).name
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    make_backbone("bert", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(Path(minilm_path) / "README.md", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spin_hf.demo, "backbone_folder", lambda: folder)
        yield str(folder)


@pytest.fixture
def run(backbone):
    """``run(name, *options)``; with ``data="edos"`` on a public set, if it is at hand."""

    def run(name, *options, data=None):
        if data is None:
            return run_example(name, *options)
        if not (DATA / data).is_dir():
            pytest.skip(f"{DATA / data} is missing; SPIN_HF_DATA may name the folder that holds {data}")
        return run_example(name, "--data", DATA, *options)

    return run


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d+|\d+", line)]


def lines_of(shown, start):
    found = [line for line in shown.splitlines() if line.startswith(start)]
    assert found, shown
    return found


def is_shared(folder, dataset):
    """Model, tokenizer and a card that a Hub visitor can use."""
    SpinForSequenceClassification.from_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.license == "apache-2.0"
    assert {(result.dataset_name, result.dataset_split) for result in card.data.eval_results} == {(dataset, "test")}
    assert (folder / "tokenizer.json").is_file()


def test_every_example_is_here():
    tested = set(re.findall(r'"(\w+\.(?:py|ipynb))"', Path(__file__).read_text(encoding="utf-8")))
    here = {path.name for path in EXAMPLES.glob("*.*") if path.suffix in (".py", ".ipynb")}
    assert tested >= here - {"common.py"}


@pytest.fixture(scope="module")
def classifier(backbone, tmp_path_factory):
    """What the quick start leaves."""
    out = tmp_path_factory.mktemp("quick") / "model"
    shown = run_example("quick_start.py", "--rows", 100, "--out", out)
    assert "Test, 100 texts: accuracy" in shown
    assert re.search(r"^(complaint|praise|question|suggestion) +0\.\d\d  Lovely, ", shown, re.MULTILINE)
    return out


def test_quick_start(classifier):
    is_shared(classifier, "spin_hf demo messages")


def test_trainer(run, tmp_path, minilm_path, monkeypatch):
    monkeypatch.setattr(spin_hf.demo, "backbone_folder", lambda: minilm_path)  # a random one has no neuron to prune
    shown = run("trainer.py", "--rows", 60, "--whole", 1, "--out", tmp_path / "out")
    calibrated, trained, pruned, whole = shown.splitlines()[-4:]
    assert calibrated.startswith("calibrated")
    assert numbers(pruned)[0] < numbers(trained)[0] == numbers(calibrated)[0]
    assert whole.startswith("all trained")
    SpinForSequenceClassification.from_pretrained(tmp_path / "out")


def test_lora(run, tmp_path):
    shown = run("lora.py", "--rows", 100, "--epochs", 8, "--out", tmp_path / "out")
    calibrated, adapted, merged, again = shown.splitlines()[-4:]
    assert numbers(adapted) == numbers(merged)
    assert numbers(calibrated)[1:] != numbers(merged)[1:]
    assert again.startswith("LoRA, merged, re-calibrated")
    is_shared(tmp_path / "out", "spin_hf demo messages")


def test_adaptation_table(run, tmp_path):
    methods = ("SPIN", "SPIN, head trained", "LoRA, native head")
    options = ("--rows", 40, "--seeds", 0, "--results", tmp_path / "results.jsonl")
    run("adaptation_table.py", *options, "--methods", *methods, data="sst2")
    run("adaptation_table.py", *options, "--methods", "SPIN, mean and max, folds", "--per-class", 8, data="sst2")
    lines = run("adaptation_table.py", *options, "--show").splitlines()
    table, few = lines[2 : lines.index("")], lines[lines.index("") + 3 :]
    assert [line.split(" | ")[2] for line in table] == list(methods)
    assert all(numbers(line.split(" | ")[3]) for line in table)
    assert [line.split(" | ")[2] for line in few] == ["SPIN, mean and max, folds"]
    assert numbers(few[0].split(" | ")[3])


def test_compile_benchmark():
    options = ("--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--backend", "eager", "--rounds", 2)
    found = json.loads(run_example("benchmarks/compile.py", *options, "--batch", 3, "--tokens", 9))
    assert found["blocks"] == [2, 4]
    assert found["equal_predictions"] == {"eager": True, "compiled": True, "full": True}
    assert found["largest_difference"]["full"] == 0
    assert found["size_ratio"] < 1
    assert found["compile_speedup"] > 0


def test_extraction_benchmark():
    options = ("--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--rounds", 2, "--batch", 3, "--tokens", 9)
    options += ("--batches", 2)
    rows = [json.loads(line) for line in run_example("benchmarks/extraction.py", *options).splitlines()]
    assert [row["poolings"] for row in rows] == [["attention"], ["mean", "max"]]
    for found in rows:
        assert found["taps"] == 10
        assert found["largest_relative_difference"] < 1e-3
        assert min(found["milliseconds"].values()) > 0


def test_whole_step_benchmark():
    found = json.loads(run_example("benchmarks/whole_step.py", "--shape", "tiny", "--texts", 400, "--tokens", 32))
    assert found["n"] == 400
    assert found["bare forward, s"] > 0
    stages = [found[f"of it, {stage}"] for stage in ("tokenize", "token weights", "extract", "probe", "heads", "rest")]
    assert sum(stages) == pytest.approx(found["over the forward"], abs=0.01)


def test_solver_benchmark(run):
    options = ("--set", "sst2", "--taps", "hidden.1", "--rows", 60, "--points", 2, "--rounds", 1)
    options += ("--limit", 1e4)  # nobody is stopped, however busy the machine
    lines = run("benchmarks/solver.py", *options, "--parts", "gap", "--peers", "liblinear", data="sst2").splitlines()
    rows = {row["solver"]: row for row in map(json.loads, lines)}
    assert rows.keys() >= {"spin_hf", "liblinear"}
    assert all(row["gap"] <= 1e-4 for row in rows.values())


def test_accuracy_table(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    run("accuracy_table.py", "--sets", "sst2", "--methods", "tfidf", "--results", path, data="sst2")
    (row,) = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert (row["set"], row["method"], row["rows"]) == ("sst2", "tfidf", [6920, 872, 1821])
    assert row["test"] == pytest.approx(81.2, abs=0.3)  # as the table says
    assert "| MiniLM, sst2 | 81.2 (" in run_example("accuracy_table.py", "--show", "--results", path)


def test_inference_benchmark_writes_its_section(tmp_path):
    path, into = tmp_path / "found.md", tmp_path / "RESULTS.md"
    options = ("--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--modes", "eager", "--seconds", 0)
    into.write_text("## Another\n\nkept\n\n## Inference: tiny, cpu\n\nold\n", encoding="utf-8")
    shown = run_example("benchmarks/inference.py", *options, "--tokens", 5, "--batch", 2, "--record", path)
    found = json.loads(shown)
    assert found["operations"]["native"] < found["operations"]["spin"]
    run_example("benchmarks/results.py", "merge", path, "--into", into)
    text = into.read_text(encoding="utf-8")
    assert text.count("\n## ") == 2
    assert "kept" in text
    assert "\nold\n" not in text
    assert f"| ratio | {found['ratio']:.4g} |" in text
    assert "--seconds 0 --tokens 5 --batch 2\n" in text
    assert str(tmp_path) not in text


@pytest.fixture(scope="module")
def several_gpus(tmp_path_factory):
    """The rows of each part of ``several_gpus.py``, from one and two processes on the CPU, and what it recorded."""
    folder, preset = tmp_path_factory.mktemp("several"), {"etas": (0.6,), "depths": (4,)}
    options = ("--shape", "tiny", "--processes", 1, 2, "--texts", 40, "--few", 40, "--tokens", 16, "--Cs", 2)
    options += ("--steps", 2, "--batch-tokens", 64, "--folder", folder / "kept", "--record", folder / "found.md")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES / "benchmarks"))
        import launches
        import several_gpus_worker

        def start(task, options, count, env, log, seconds):
            own = {name: value for name, value in env.items() if os.environ.get(name) != value}
            own["MASTER_PORT"] = str(launches._free_port())
            return forked.launch(count, own, preset, log.name, several_gpus_worker.main, task, options)

        patch.setattr(launches, "start", start)
        shown = run_example("benchmarks/several_gpus.py", *options)
        assert shown == run_example("benchmarks/several_gpus.py", *options)  # from what was kept
    rows = [json.loads(line) for line in shown.splitlines()]
    assert not [row for row in rows if "failed" in row]
    return {part: [row for row in rows if row["part"] == part] for part in {row["part"] for row in rows}}, folder


@pytest.mark.timeout(600)
def test_several_gpus_make_what_one_makes(several_gpus):
    rows, folder = several_gpus
    assert [row["processes"] for row in rows["scaling"]] == [1, 2]
    assert [row["device_map"] for row in rows["split"]] == ["none", "auto"]
    assert rows["split"][0]["weights_gb"].startswith("cpu ")
    assert ", disk " in rows["split"][1]["weights_gb"]
    for found in (*rows["scaling"], *rows["split"], *rows["killed"]):
        assert found["candidates"] >= found["probes"] >= 10
        assert found["deepest_block"] == 4
        assert found["unequal_values"] == 0
        assert found["logits_differ_by"] == 0 < found["largest_logit"]
    assert min(rows["scaling"][1]["speedup"].values()) > 0
    assert all(len(own.split(", ")) == 2 for own in rows["scaling"][1]["busy"].values())
    assert (folder / "found.md").read_text(encoding="utf-8").count("\n## Several GPUs, ") == 4


def test_several_gpus_go_on_after_one_was_killed(several_gpus):
    (found,) = several_gpus[0]["killed"]
    assert found["left_alive"] == 0
    assert 0 < found["kept"] == found["batches"] - found["read_again"]


def test_several_gpus_train_as_one(several_gpus):
    rows = several_gpus[0]["trainer"]
    assert [(row["trained"], row["processes"]) for row in rows] == [("head", 1), ("LoRA", 1), ("head", 2), ("LoRA", 2)]
    for found in rows:
        assert found["within"]
        assert found["equal_on_all"]
        assert found["reloaded_logits_differ_by"] == 0
    assert rows[3]["trained_tensors"] > rows[2]["trained_tensors"] == 2


def test_pipeline_benchmark(run):
    options = ("--reviews", 2, "--sentences", 3, "--rounds", 1, "--sizes", 2, "--device", "cpu")
    found = [json.loads(line) for line in run("benchmarks/pipeline.py", *options, data="sst2").splitlines()]
    assert [line["same_labels"] for line in found] == [True, True]


def test_precision_benchmark(run, backbone):
    options = ("--rows", 60, "--model", backbone, "--precisions", "float32", "bfloat16")
    found = [json.loads(line) for line in run("benchmarks/precision.py", *options, data="sst2").splitlines()]
    assert [line["precision"] for line in found] == ["float32", "bfloat16"]
    assert all(0.3 < line["test"] <= 1 for line in found)


def test_multi_label(run, tmp_path):
    shown = run("multi_label.py", "--rows", 150, "--out", tmp_path / "out", data="go_emotions")
    assert numbers(lines_of(shown, "Test, 150 texts")[0])
    assert len(SpinForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label) == 28
    is_shared(tmp_path / "out", "GoEmotions")


def test_sentence_pairs(run, tmp_path):
    shown = run("sentence_pairs.py", "--rows", 120, "--out", tmp_path / "out", data="mrpc")
    assert lines_of(shown, "Always 'paraphrase': accuracy")
    assert SpinForSequenceClassification.from_pretrained(tmp_path / "out").config.text_pairs
    is_shared(tmp_path / "out", "MRPC")


def test_imbalanced(run, tmp_path):
    shown = run("imbalanced.py", "--rows", 150, "--out", tmp_path / "out", data="edos")
    plain, balanced = (numbers(lines_of(shown, f"class_weight={w}, sexist")[0]) for w in (None, "balanced"))
    assert plain != balanced
    winner = re.search(r"The better one: class_weight=(\w+)", shown)[1]
    assert (winner == "balanced") == (balanced[-1] > plain[-1])
    is_shared(tmp_path / "out", "EDOS")


def test_regression(run, tmp_path):
    shown = run("regression.py", "--rows", 150, "--out", tmp_path / "out", data="go_emotions")
    assert numbers(lines_of(shown, "SPIN")[-1])
    assert SpinForSequenceClassification.from_pretrained(tmp_path / "out").config.problem_type == "regression"
    is_shared(tmp_path / "out", "GoEmotions valence")


def test_head_only(run, tmp_path):
    shown = run("head_only.py", "--rows", 100, "--out", tmp_path / "out")
    alone, together = numbers(lines_of(shown, "The backbone takes")[0])[::2]
    assert alone <= together < 1.05 * alone
    assert "Another backbone is refused: This head was made for" in shown
    sizes = [sum(file.stat().st_size for file in head.iterdir()) for head in (tmp_path / "out").iterdir()]
    assert len(sizes) == 3
    assert max(sizes) < 500_000


def test_gradio_app(classifier, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="the page needs the extra app")
    served = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda app, **options: served.append((app.title, options)))
    monkeypatch.setattr("sys.argv", ["gradio_app.py"])
    monkeypatch.setenv("SPIN_CLASSIFIER", str(classifier))  # as on a Space
    runpy.run_path(str(EXAMPLES / "gradio_app.py"), run_name="__main__")
    ((title, options),) = served
    assert title == "model: a SPIN classifier"
    assert options["server_port"] is None
    assert options["theme"] is not None  # the page's own colours


def test_screenshots(classifier, tmp_path):
    pytest.importorskip("gradio", reason="the page needs the extra app")
    pytest.importorskip("playwright", reason="pictures need the extra browser")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("pictures are taken where Chromium is installed")
    run_example("screenshots.py", classifier, "--out", tmp_path, "--rows", 20)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"report.webp", "report-phone.webp", "app.webp", "app-phone.webp"}
    assert min(sizes.values()) > 10_000


def test_notebook(minilm_path, tmp_path, monkeypatch):
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    whole = spin_hf.demo.load_split
    monkeypatch.setattr(spin_hf.demo, "backbone_folder", lambda: minilm_path)  # it asks to be right nine times of ten
    monkeypatch.setattr(spin_hf.demo, "load_split", lambda split: whole(split)[:100])
    monkeypatch.setitem(recipe._PRESETS, "default", SMALL)
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for source in sources:
        exec(compile(re.sub(r"^%.*$", "", source, flags=re.MULTILINE), "notebook.ipynb", "exec"), space)
    (axes,) = space["figure"].axes
    assert axes.get_ylabel() == "Accuracy, validation (100 texts)"
    assert [row["label"] for row in space["rows"]].count(None) == space["prediction"].abstained.sum()
    assert SpinForSequenceClassification.from_pretrained(tmp_path / "my-classifier").calibrated


def test_the_notebook_shows_what_a_kernel_printed():
    """Its outputs are kept, since the Hub and GitHub show them, but they are small, whole and of no one machine."""
    text = (EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert len(text) < 200_000
    assert not re.search(r"/(home|usr|tmp|root)/", text)


def test_faithfulness(run, tmp_path, backbone):
    model = SpinForSequenceClassification.from_backbone(backbone, labels=["negative", "positive"])
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    rows = [row for row in spin_hf.demo.load_split("train") if row["label"] in ("complaint", "praise")]
    data = [row["text"] for row in rows], [int(row["label"] == "praise") for row in rows]
    options = {
        "poolings": ["mean"],
        "Cs": 3,
        "etas": [1.0],
        "depths": [2, 3],
        "exits": True,
        "validation_fraction": 0.2,
    }
    spin_calibrate(model, tokenizer, data, progress=False, **options)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    small = [
        "--texts",
        "4",
        "--ablated",
        "6",
        "--train",
        "20",
        "--steps",
        "2",
        "--orders",
        "1",
        "--neurons",
        "1",
        "2",
        "--draws",
        "1",
    ]
    shown = run("faithfulness.py", tmp_path / "model", "--out", tmp_path / "out", *small, data="sst2")
    found = json.loads((tmp_path / "out" / "faithfulness-minilm-sst2.json").read_text())
    measures = found["words"]["measures"]["spin"]
    assert numbers(lines_of(shown, "| SPIN's parts")[0])[0] == round(100 * measures["comprehensiveness"][0], 1)
    assert [(row["count"], row["kind"]) for row in found["neurons"]["rows"]] == [
        (count, kind) for count in (1, 2) for kind in ("salient", "random", "active")
    ]
    for chart in ("deletion", "insertion", "neurons"):
        assert (tmp_path / "out" / f"faithfulness-minilm-sst2-{chart}.png").stat().st_size > 10_000


def test_findings_are_the_tables_of_their_results():
    """Every row of the page is in what ``--show`` prints of the stored results, but for its first cell."""
    page = (EXAMPLES / "findings" / "faithfulness.md").read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        tables = runpy.run_path(str(EXAMPLES / "faithfulness.py"))["tables"]
    stored = "".join(tables(json.loads(path.read_text())) for path in (EXAMPLES / "findings").glob("*.json"))
    rows = [line.partition("|")[2].partition("|")[2] for line in page.splitlines() if "±" in line and line[0] == "|"]
    assert len(rows) > 15
    assert [row for row in rows if row not in stored] == []


@pytest.fixture(scope="module")
def tiny(minilm_path, tmp_path_factory):
    """A random encoder of three blocks with the tokenizer of MiniLM."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def study(run, tiny, tmp_path):
    """``study(name, *options)``: the rows that a study of ``studies/`` measures on a few texts, and its tables."""

    def study(name, *options, data="sst2"):
        path = tmp_path / "results.jsonl"
        options = ("--models", tiny, "--sets", data, "--test-rows", 40, "--device", "cpu", *options, "--results", path)
        run(f"studies/{name}.py", *options, data=data)
        rows = path.read_text(encoding="utf-8")
        run(f"studies/{name}.py", *options, data=data)
        assert path.read_text(encoding="utf-8") == rows  # nothing is measured twice
        shown = run("studies/show.py", "--results", path, "--out", tmp_path)
        assert list(tmp_path.glob("studies-*.png"))
        return [json.loads(row) for row in rows.splitlines()], shown

    return study


def test_study_of_sensitivity(study):
    rows, shown = study("sensitivity", "--rows", 50, "--values", 2)
    assert [row["C"] for row in rows] == ["chosen", "2x", "4x", "C=0.01", "C=0.03", "C=0.1", "C=0.3"]
    assert max(head["gain"] for head in rows[0]["heads"]) == 0
    assert len(lines_of(shown, "| tiny, sst2")) == 2


def test_study_of_poolings(study, tmp_path):
    rows, shown = study(
        "poolings", "--rows", 50, "--poolings", "attention", "--seeds", 1, "--cache", tmp_path / "cache"
    )
    assert [(row["pooling"], row["seed"]) for row in rows] == [("mean", 0), ("attention", 1)]
    assert rows[0]["gain"] == 0
    assert lines_of(shown, "| tiny, sst2")


def test_study_of_memory(study, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "studies"))
    import memory_worker

    monkeypatch.setattr(memory_worker, "start", memory_worker.measure)  # without the start of a process
    rows, shown = study("training_memory", "--rows", 8, "--methods", "calibration", "full fine-tuning", data="imdb")
    assert {row["method"] for row in rows} == {"calibration", "full fine-tuning"}
    assert all(row["host"] > 0 and row["device"] is None for row in rows)
    assert lines_of(shown, "| tiny | full fine-tuning")


def test_study_of_linear_probes(study):
    rows, shown = study("linear_enough", "--rows", 50)
    assert [row["tap"] for row in rows][0::8] == ["head", "end"]
    assert all(0 <= share <= 1 for row in rows[1:-1] for share in row["overlap"].values() if share == share)
    assert len(lines_of(shown, "| tiny, sst2")) == 3


def test_study_of_architectures(study):
    ((row,), shown) = study("architectures", "--rows", 50)
    assert row["blocks"] == len(row["parameters"]) == 3
    assert row["interval"][0] <= row["test"] <= row["interval"][1]
    assert lines_of(shown, "| sst2 | tiny")


def test_study_of_weighted_texts(study):
    rows, shown = study("weighted_texts", "--rows", 50, "--counts", 20, "--seeds", 0)
    assert [(row["asked"], row["learned"] < 60) for row in rows] == [("all", False), (20, True)]
    assert len(lines_of(shown, "| tiny, sst2")) == 2
