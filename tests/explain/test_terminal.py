"""``spin-hf explain``: for people in colours, for programs as JSON lines; texts stay data."""

import json
import re

import numpy as np
import pytest
import torch
from builders import calibrated, make_backbone, make_tokenizer
from rich.console import Console
from typer.testing import CliRunner

from spin_hf import SpinForSequenceClassification
from spin_hf.calibration.errors import InvalidTextError
from spin_hf.cli import app
from spin_hf.explain import explain, neuron_cards
from spin_hf.explain.terminal import shown, visible
from spin_hf.prediction import predict

runner = CliRunner()


def run(*arguments, code=0, **options):
    result = runner.invoke(app, [str(argument) for argument in arguments], **options)
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("explain") / "model"
    calibrated(make_backbone("bert"), labels=["bad", "good", "[red]odd[/red]"]).save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    return out


def printed(explanation, label=None, **options):
    console = Console(width=100, record=True, force_terminal=True, color_system="truecolor", **options)
    with console.capture() as capture:
        console.print(shown(explanation, label), highlight=False)
    return capture.get()


def test_json_lines_say_what_explain_says(folder, tmp_path):
    texts = ["good film", "", "a [bold]bad[/bold] day"]
    out = run("explain", folder, "--json", *texts).stdout
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    assert run("explain", folder, "--json", "--file", file).stdout == out
    assert run("explain", folder, "--json", input="\n".join(texts)).stdout == out
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert rows[1] == {"text": "", "label": None, "reason": "no text"}
    model = SpinForSequenceClassification.from_pretrained(folder)
    found = explain(model, make_tokenizer(), [texts[0], texts[2]])
    for row, explanation in zip((rows[0], rows[2]), found, strict=True):
        assert row["label"] == max(row["scores"], key=row["scores"].get) == explanation.label
        for view in ("word", "block", "kind"):
            for name in explanation.names:
                total = row["base"][name] + sum(part["contributions"][name] for part in row[view])
                assert total == pytest.approx(row["logits"][name], abs=1e-4)
        assert [part["text"] for part in row["word"]] == [word.text for word in explanation.words]


def test_predict_and_explain_agree(folder):
    texts = ["good film", "bad day"]
    rows = [json.loads(line) for line in run("explain", folder, "--json", *texts).stdout.splitlines()]
    for row, line in zip(rows, run("predict", folder, *texts).stdout.splitlines(), strict=True):
        known = json.loads(line)
        assert row["label"] == known["label"]
        assert row["scores"] == pytest.approx(known["scores"], abs=1e-5)


def test_what_a_person_reads(folder):
    out = run("explain", folder, "a good [bold]film[/bold]", "--label", "good").stdout
    first, second, *rest = out.splitlines()
    assert first.startswith("good 0.")
    logit, *parts = map(float, re.findall(r"[+-]\d+\.\d\d", first))
    assert len(parts) == 3  # words, base value, special tokens
    assert sum(parts) == pytest.approx(logit, abs=0.02)
    assert second == "a good [bold]film[/bold]"
    assert any(line.startswith("for ") for line in rest)
    assert any(line.startswith("against ") for line in rest)
    assert sum(line.startswith("block ") for line in rest) == 4
    assert "[red]odd[/red] 0." in run("explain", folder, "good", "--label", "[red]odd[/red]").stdout


def test_a_label_that_is_none(folder):
    result = run("explain", folder, "good", "--label", "great", code=2)
    assert "--label great is not one of the labels: bad, good, [red]odd[/red]" in " ".join(result.stderr.split())


def test_words_have_the_colour_of_their_sign(tokenizer):
    model = calibrated(make_backbone("bert"))
    weight = model.score.weight[:1].detach().clone()
    model.set_head(torch.cat([-weight, weight]), torch.zeros(2))
    row = explain(model, tokenizer, ["good film"])[0]
    word, value = max(zip(row.words, row.by("word").values[:, 0], strict=True), key=lambda pair: abs(pair[1]))
    blue, orange = f"48;2;8;81;156m{word.text}", f"48;2;166;54;3m{word.text}"
    for sign, name in zip((1, -1), row.names, strict=True):
        wanted, other = (blue, orange) if sign * value > 0 else (orange, blue)
        assert wanted in printed(row, name)
        assert other not in printed(row, name)


def test_nothing_in_a_text_steers_the_terminal(tokenizer):
    text = "good \x1b[2J\x07\x9b31m \u202ebad\u2066 \r\n [link=file:///etc]day[/link] \ud83d"
    row = explain(calibrated(make_backbone("bert")), tokenizer, [text.replace("\ud83d", "")])[0]
    plain = Console(width=300, color_system=None)
    with plain.capture() as capture:
        plain.print(shown(row), highlight=False)
    out = capture.get()
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e", "\u2066"} & set(out)
    assert "[link=file:///etc]day[/link]" in out
    assert "␛[2J␇" in out
    assert len(visible(text)) == len(text)


def test_half_a_surrogate_pair_is_refused(tokenizer, tmp_path):
    model = calibrated(make_backbone("bert"))
    for answer in (explain, predict, neuron_cards):
        with pytest.raises(InvalidTextError, match=r"Row 1 .*'\\ud800'"):
            answer(model, tokenizer, ["good", "\ud800"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for command in ("explain", "predict"):
        result = run(command, tmp_path, "\ud800", code=2)
        assert "Row 0 of the input data is no Unicode text" in result.stderr
        assert result.stderr.strip().endswith("Replace it.")


def test_long_texts_are_cut_in_print_and_it_is_said(tokenizer):
    out = printed(explain(calibrated(make_backbone("bert")), tokenizer, ["good bad " * 2000])[0])
    assert "14,000 more characters" in out
    assert "The end of the text was cut off" in out


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems(problem, tokenizer):
    row = explain(calibrated(make_backbone("bert"), problem_type=problem), tokenizer, ["good film"])[0]
    assert printed(row).startswith("\x1b[1m" + row.label)
    values = row.to_dict()
    assert ("value" in values) == (problem == "regression")
    assert ("labels" in values) == (problem == "multi_label_classification")
    assert "label" not in values


def test_pairs_from_a_file(tmp_path):
    model = calibrated(make_backbone("bert"))
    model.config.text_pairs = True
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2\ngood film,bad day\n", encoding="utf-8")
    out = run("explain", tmp_path / "model", "--file", tmp_path / "pairs.csv").stdout.splitlines()
    assert out[1:3] == ["good film", "bad day"]
    (row,) = run("explain", tmp_path / "model", "--file", tmp_path / "pairs.csv", "--json").stdout.splitlines()
    assert json.loads(row)["text_pair"] == "bad day"


def test_views_as_frames_and_tops(tokenizer):
    row = explain(calibrated(make_backbone("bert")), tokenizer, ["good film bad"])[0]
    frame = row.by("feature").to_pandas()
    assert list(frame) == ["tap", "neuron", "pooling", *row.names]
    assert list(row.by("word").to_pandas()["text"]) == [word.text for word in row.words]
    assert list(row.by("block").to_pandas()["block"]) == [0, 1, 2, 3]
    speaks_for, against = row.top(0, count=100)
    assert len(speaks_for) + len(against) == len(row.words)
    assert [value for _, value in speaks_for] == sorted((value for _, value in speaks_for), reverse=True)
    assert all(value < 0 for _, value in against)
    assert row.top()[0] == row.top(row.label)[0]
    found = explain(calibrated(make_backbone("bert")), tokenizer, ["good film bad", "a day"])
    sizes = [np.abs(one.by("neuron").values) for one in found]
    np.testing.assert_allclose(found.by("neuron").values, np.mean(sizes, 0))
    with pytest.raises(ValueError, match="of its own"):
        found.by("word")
    with pytest.raises(ValueError, match="view must be one of"):
        row.by("words")
    with pytest.raises(ValueError, match="is not one of the labels"):
        row.top(2)
    assert [one.text for one in found[1:]] == ["a day"]
