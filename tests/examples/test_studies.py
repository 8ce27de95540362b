"""Every study runs in its short form, once, and is shown as tables and pictures."""

import json

import pytest
from example_runs import EXAMPLES, lines_of
from transformers import AutoTokenizer, BertConfig, BertModel


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
