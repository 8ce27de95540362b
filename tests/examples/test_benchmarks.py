"""Every benchmark runs in its short form, and writes what it found."""

import json
import os
from pathlib import Path

import forked
import pytest
from builders import calibrated, make_backbone, make_tokenizer
from example_runs import EXAMPLES, run_example


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


def test_encode_benchmark(run):
    pytest.importorskip("sentence_transformers")
    options = ("--sentences", 9, "--reviews", 3, "--rounds", 1, "--sizes", 4, "--device", "cpu")
    rows = list(map(json.loads, run("benchmarks/encode.py", *options, data="sst2").splitlines()))
    assert [(row["set"], row["texts"]) for row in rows] == [("sst2", 9), ("imdb", 3)]
    for row in rows:
        assert set(row["ratio to the quickest encode"]) == {"all taps, attention", "all taps, mean"}
        assert min(row["seconds"].values()) > 0


def test_solver_benchmark(run):
    options = ("--set", "sst2", "--taps", "hidden.1", "--rows", 60, "--points", 2, "--rounds", 1)
    options += ("--limit", 1e4)  # nobody is stopped, however busy the machine
    lines = run("benchmarks/solver.py", *options, "--parts", "gap", "--peers", "liblinear", data="sst2").splitlines()
    rows = {row["solver"]: row for row in map(json.loads, lines)}
    assert rows.keys() >= {"spin_hf", "liblinear"}
    assert all(row["gap"] <= 1e-4 for row in rows.values())
    options = ("--set", "sst2", "--taps", "hidden.1", "hidden.2", "--rows", 60, "--parts", "schedule", "--jobs", 2)
    (line,) = run("benchmarks/solver.py", *options, data="sst2").splitlines()
    found = json.loads(line)
    assert found["tap"] == "hidden.1 hidden.2"
    assert found["worst gap"]["spin_hf"] <= 1e-4 < found["worst gap"]["schedule"]
    assert min(found["seconds"].values()) > 0


def test_explain_benchmark(run, tmp_path):
    calibrated(make_backbone("bert")).save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    options = ("--model", tmp_path / "tiny", "--texts", 5, "--timed", 3, "--repeats", 1)
    found = json.loads(run("benchmarks/explain.py", *options, data="sst2"))
    assert (found["classifier"], found["texts"], found["timed"]) == ("tiny", 5, 3)
    assert found["worst_error"] < 1e-4
    assert found["ratio"] > 0


def test_inference_benchmark_writes_its_section(tmp_path):
    path, into = tmp_path / "found.md", tmp_path / "RESULTS.md"
    options = ("--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--modes", "eager", "--seconds", 0)
    shown = run_example("benchmarks/inference.py", *options, "--tokens", 5, "--batch", 2, "--record", path)
    found = json.loads(shown)
    (title,) = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
    assert title.startswith("## Inference: tiny, ")
    assert not title.endswith(", cpu")  # but the processor, so that another one's figures stay
    into.write_text(f"## Another\n\nkept\n\n{title}\n\nold\n", encoding="utf-8")
    assert found["operations"]["native"] < found["operations"]["spin"]
    run_example("benchmarks/results.py", "merge", path, "--into", into)
    text = into.read_text(encoding="utf-8")
    assert text.count("\n## ") == 2
    assert "kept" in text
    assert "\nold\n" not in text
    assert f"| ratio | {found['ratio']:.4g} |" in text
    assert "--seconds 0 --tokens 5 --batch 2\n" in text
    assert str(tmp_path) not in text


def command(words):
    """What ``spin-hf`` does."""
    from spin_hf.cli import app

    app(words, standalone_mode=False)


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

        def start(program, count, env, log, seconds):
            own = {name: value for name, value in env.items() if os.environ.get(name) != value}
            own["MASTER_PORT"] = str(launches._free_port())
            _, *given = program  # the worker, or python's -m
            call = (
                (several_gpus_worker.main, given[0], Path(given[1])) if given[0] != "spin_hf" else (command, given[1:])
            )
            return forked.launch(count, own, preset, log.name, *call)

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
    assert (folder / "found.md").read_text(encoding="utf-8").count("\n## Several GPUs, ") == 5


def test_several_gpus_save_what_one_saves(several_gpus):
    rows = several_gpus[0]["command"]
    assert [row["processes"] for row in rows] == [1, 2]
    assert all(row["unequal_values"] == 0 < row["tensors"] for row in rows)


def test_several_gpus_tell_what_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    from several_gpus import wrong

    good = {"unequal_values": 0, "left_alive": 0, "within": True, "equal_on_all": True, "seconds_until_all_ended": 2}
    assert not wrong(good)
    for name, value in (("unequal_values", 1), ("left_alive", 1), ("within", False), ("equal_on_all", False)):
        assert wrong({**good, name: value})
    assert wrong({**good, "seconds_until_all_ended": 61})


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


def test_products_benchmark():
    options = ("--shapes", "2x60x48", "3x70x20", "--vectors", 1, 2, "--rounds", 1, "--repeats", 2)
    found = [json.loads(line) for line in run_example("benchmarks/products.py", *options).splitlines()]
    assert [row["taps, rows, features"] for row in found] == [[2, 60, 48]] * 4 + [[3, 70, 20]] * 4
    assert max(max(row["error"].values()) for row in found) < 1e-4
    assert min(min(row["TB/s"].values()) for row in found) > 0


def test_precision_benchmark(run, backbone):
    options = ("--rows", 60, "--model", backbone, "--precisions", "float32", "bfloat16")
    found = [json.loads(line) for line in run("benchmarks/precision.py", *options, data="sst2").splitlines()]
    assert [line["precision"] for line in found] == ["float32", "bfloat16"]
    assert all(0.3 < line["test"] <= 1 for line in found)
