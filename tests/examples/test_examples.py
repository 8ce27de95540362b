"""Every example runs in its short form: the code that a user would copy, on few rows and fewer settings."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
from example_runs import EXAMPLES, SMALL, lines_of, numbers, run_example
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

import spin_hf.demo
from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import recipe


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
    assert tested >= here - {"common.py", "adaptations.py"}


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


def test_adaptation_table_tells_seeds_together(run, tmp_path):
    row = {
        "model": "tiny",
        "set": "sst2",
        "per_class": None,
        "method": "SPIN",
        "rate": 0.0,
        "seconds": 3,
        "parameters": 0,
    }
    seeds = ((80.0, "90 features, 4 blocks"), (81.0, "1000 features, 4 blocks"), (82.0, "7 features, 12 blocks"))
    other = {**row, "method": "SetFit", "validation": 1.5, "test": 2.5}
    rows = [{**row, "seed": i, "validation": 70.0, "test": test, "note": note} for i, (test, note) in enumerate(seeds)]
    rows += [{**other, "seed": i, "note": note} for i, note in enumerate(("0.5 epochs", "none", "0.5 epochs"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    shown = run("adaptation_table.py", "--show", "--results", tmp_path / "rows.jsonl").splitlines()
    assert (
        shown[2] == "| tiny | sst2 | SPIN | 81.0 ± 1.0 | 70.0 ± 0.0 | 3 | 0 |  | 7 to 1000 features, 4 to 12 blocks |"
    )
    assert shown[3].endswith("| 0.5 epochs; none |")


def test_accuracy_table(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    run("accuracy_table.py", "--sets", "sst2", "--methods", "tfidf", "--results", path, data="sst2")
    (row,) = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert (row["set"], row["method"], row["rows"]) == ("sst2", "tfidf", [6920, 872, 1821])
    assert row["test"] == pytest.approx(81.2, abs=0.3)  # as the table says
    assert "| MiniLM, sst2 | 81.2 (" in run_example("accuracy_table.py", "--show", "--results", path)


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


def test_screenshots(tmp_path):
    pytest.importorskip("gradio", reason="the page needs the extra app")
    pytest.importorskip("playwright", reason="pictures need the extra browser")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("pictures are taken where Chromium is installed")
    run_example("screenshots.py", "--out", tmp_path, "--rows", 20)
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
