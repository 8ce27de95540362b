"""Files, folders, names, splits and streams: each read as the rows that are in it, or refused in words that help."""

import gzip
import json
import logging

import datasets
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Sequence, Value

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration.data import read_rows, read_texts
from spin_hf.calibration.errors import CalibrationError, ColumnError, MissingLabelsError, SourceError, SplitError
from spin_hf.calibration.sources import load, split_of, training_splits

TEXTS = ["fine day, again", 'grim "night"', "NA", "née à Köln"]
LABELS = ["good", "None", "good", "None"]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})


def labelled(labels, texts=None):
    return Dataset.from_dict({"text": texts or ["a"] * len(labels), "label": labels}, features=FEATURES)


def write(path):
    """The rows as a file of the kind that its ending says."""
    frame, name = pd.DataFrame(ROWS), path.name.removesuffix(".gz").lower()
    if name.endswith("parquet"):
        content = frame.to_parquet(index=False)
    elif name.endswith("jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    elif name.endswith("json"):
        content = json.dumps(ROWS).encode()
    else:
        content = frame.to_csv(index=False, sep="\t" if name.endswith("tsv") else ",").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# -- files and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet", "CSV"])
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_every_file_reads_alike(tmp_path, ending, packed, kind):
    rows = read_rows(kind(write(tmp_path / f"rows.{ending}{packed}")), "train")
    assert (rows.texts, rows.labels) == (TEXTS, LABELS)  # "NA" is a text and "None" a label


def test_an_empty_cell_is_missing_and_a_number_is_no_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nfine,good\ngrim,\n")
    with pytest.raises(MissingLabelsError, match="1 of 2 train rows have no label, the first at row 1"):
        read_rows(path, "train")


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = write(tmp_path / "rows.csv")
    assert len(load(path)) == 4
    path.write_text("text,label\nfine,good\n")
    assert read_rows(path, "train").texts == ["fine"]


def test_a_folder_of_files_has_splits(tmp_path):
    for name in ("train", "validation", "test"):
        write(tmp_path / f"{name}.jsonl")
    data = load(tmp_path)
    assert set(data) == {"train", "validation", "test"}
    assert load(f"{tmp_path}:validation")["text"][:] == TEXTS
    assert read_rows(tmp_path, "test").texts == TEXTS
    with pytest.raises(SourceError, match="Unknown split"):
        load(f"{tmp_path}:dev")


def test_what_save_to_disk_wrote(tmp_path):
    data = labelled([1, 0])
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "dev": data}).save_to_disk(tmp_path / "two")
    assert read_rows(tmp_path / "one", "train").names == ("bad", "good")
    assert set(load(tmp_path / "two")) == {"train", "dev"}
    assert load(f"{tmp_path / 'two'}:dev")["label"][:] == [1, 0]
    with pytest.raises(SplitError, match="no split 'test'; it has: train, dev"):
        load(f"{tmp_path / 'two'}:test")
    with pytest.raises(SplitError, match="it has: none"):
        load(f"{tmp_path / 'one'}:train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "is not a file"),
        ("none.docx", None, "neither a folder nor a file"),
        ("rows.docx", b"PK", "none of the endings .csv"),
        ("rows.parquet", b"PAR1 but no more", "can't be read"),
        ("rows.json", b'{"text": ', "can't be read"),
        ("rows.csv", b"", "can't be read"),
        ("rows.csv", b'\x00\xff\xfe not, a\ncsv\n"', "can't be read"),
        ("rows.csv.gz", gzip.compress(b"text,label\n" * 5000, mtime=0)[:-40], "can't be read"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        load(path)


def test_a_file_has_no_splits(tmp_path):
    with pytest.raises(SourceError, match="a file has none"):
        load(f"{write(tmp_path / 'rows.csv')}:train")


def test_an_empty_folder(tmp_path):
    with pytest.raises(SourceError, match=r"holds no data: neither \.csv, .* files nor what save_to_disk writes"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["nowhere/", "./nowhere", "/nowhere/at/all"])
def test_a_path_that_is_not_there_is_no_name_on_the_hub(hub, name):
    with pytest.raises(SourceError, match="no file and no folder has this name"):
        load(name)


def test_a_bad_file_is_told_by_the_error_alone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)  # to caplog
    (tmp_path / "rows.csv").write_text("text,label\na,b\nc,d,e,f\n")
    verbosity = datasets.logging.get_verbosity()
    with pytest.raises(SourceError, match="Expected 2 fields in line 3, saw 4"):
        load(tmp_path / "rows.csv")
    assert not caplog.records
    assert datasets.logging.get_verbosity() == verbosity


# -- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub of three data sets, in place of the call that asks the real one; returns the calls."""
    known = {("imdb",), ("me/mine",), ("glue", "sst2"), ("nyu/glue", "sst2")}
    calls = []

    def load_dataset(*name, split=None):
        calls.append((*name, split))
        if name not in known:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name[0]}' doesn't exist on the Hub")
        data = DatasetDict({"train": labelled([0, 1]), "validation": labelled([1, 0]), "test": labelled([-1, -1])})
        return data if split is None else data[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("imdb", [("imdb", None)]),
        ("imdb:train", [("imdb", "train")]),
        ("me/mine:train", [("me/mine", "train")]),
        ("glue/sst2", [("glue/sst2", None), ("glue", "sst2", None)]),
        ("nyu/glue/sst2:validation", [("nyu/glue", "sst2", "validation")]),
    ],
)
def test_names_with_configuration_and_split(hub, name, asked):
    load(name)
    assert hub == asked


def test_each_role_takes_its_split_of_a_name(hub):
    assert read_rows("glue/sst2", "train").labels == [0, 1]
    assert read_rows("glue/sst2", "eval").labels == [1, 0]
    train, eval = training_splits("imdb")
    assert (train["label"][:], eval["label"][:]) == ([0, 1], [1, 0])
    train, eval = training_splits("imdb:train", "imdb")
    assert (train["label"][:], eval["label"][:]) == ([0, 1], [1, 0])


@pytest.mark.parametrize("name", ["no/such", "no/such/thing", "nothing"])
def test_names_that_the_hub_does_not_know(hub, name):
    with pytest.raises(SourceError, match=rf"{name} is no file or folder here, .* doesn't exist on the Hub"):
        load(name)


@pytest.mark.parametrize("name", ["a/b/c/d", "two words", "a?b"])
def test_what_can_be_no_name(hub, name):
    with pytest.raises(SourceError, match="NAME/CONFIG"):
        load(name)
    assert not hub


def test_an_empty_name():
    with pytest.raises(SourceError, match="name is empty"):
        load("")


def test_a_hub_out_of_reach_is_said():  # for real: the tests run offline
    with pytest.raises(SourceError, match="could not be had from the Hub"):
        load("some/dataset")


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["validation", "valid", "val", "dev", "Dev", "eval", "validation_matched", "dev-small"]
)
@pytest.mark.parametrize("kind", [DatasetDict, dict])
def test_splits_are_found_by_name(name, kind):
    data = kind({"test": labelled([0]), name: labelled([1]), "train": labelled([0, 1])})
    train, eval = training_splits(data)
    assert train["label"][:] == [0, 1]
    assert eval["label"][:] == [1]
    assert split_of(data, "test")["label"][:] == [0]


def test_splits_of_anything_with_columns():
    frames = {"train": pd.DataFrame(ROWS), "test": pd.DataFrame(ROWS[:1])}
    assert read_rows(frames, "train").texts == TEXTS
    assert read_rows({"train": ROWS, "dev": ROWS[:1]}, "eval").texts == TEXTS[:1]
    assert read_rows({"train": {"text": TEXTS, "label": LABELS}}, "train").labels == LABELS


def test_a_test_split_never_chooses():
    data = DatasetDict({"train": labelled([0, 1]), "test": labelled([0])})
    assert training_splits(data)[1] is None
    data["dev_test"] = labelled([1])
    assert training_splits(data)[1] is None
    with pytest.raises(SplitError, match="none of them named validation"):
        training_splits(labelled([0, 1]), data)


def test_two_that_could_choose():
    data = DatasetDict({"train": labelled([0, 1]), "validation": labelled([1])})
    with pytest.raises(SplitError, match=r"own validation split 'validation', and eval was given too.*data\[\"SPLIT"):
        training_splits(data, labelled([1, 0]))
    with pytest.raises(SplitError, match="cv was given too"):
        training_splits(data, cv=3)
    del data["validation"]
    assert training_splits(data, labelled([1]))[1]["label"][:] == [1]
    data["validation_matched"] = data["validation_mismatched"] = labelled([1])
    with pytest.raises(SplitError, match="validation_matched or validation_mismatched"):
        training_splits(data)


def test_no_split_to_train_on():
    with pytest.raises(SplitError, match="DatasetDict with the splits a, b, none of them named train"):
        training_splits(DatasetDict({"a": labelled([0]), "b": labelled([0])}))
    with pytest.raises(SplitError, match="Pass one of them"):
        read_texts(DatasetDict({"train": labelled([0])}))


# -- streams and data sets --------------------------------------------------------------------------------------------


class Counted:
    """Rows that count how often they were asked for, and carry a column that would fill the memory."""

    def __init__(self):
        self.begun = self.given = 0

    def __call__(self):
        self.begun += 1
        for row in ROWS * 5:
            self.given += 1
            yield {**row, "id": self.given, "image": b"x" * 1000}


def test_a_stream_is_read_once_and_only_its_texts_are_kept():
    source = Counted()
    stream = IterableDataset.from_generator(source)
    assert stream.column_names is None  # unknown until it is read, and so is its length
    rows = read_rows(stream, "train")
    assert (rows.texts, rows.labels) == (TEXTS * 5, LABELS * 5)
    assert (source.begun, source.given) == (1, 20)


def test_streams_have_class_names_and_splits():
    stream = labelled([1, 0, 1]).to_iterable_dataset()
    rows = read_rows(stream, "train")
    assert (rows.labels, rows.names) == ([1, 0, 1], ("bad", "good"))
    splits = IterableDatasetDict({"train": stream, "val": labelled([0]).to_iterable_dataset()})
    train, eval = training_splits(splits)
    assert read_rows(train.shuffle(seed=0, buffer_size=2), "train").names == ("bad", "good")
    assert read_rows(eval, "eval").labels == [0]
    assert read_texts(stream.take(2)) == (["a", "a"], None)


def test_any_iterator_of_rows():
    assert read_rows(iter(ROWS), "train").texts == TEXTS
    rows = read_rows(({"text": "a", "label": torch.tensor(i)} for i in range(2)), "train")
    assert rows.labels == [0, 1]
    with pytest.raises(ColumnError, match="Row 1 of the train data is a str, the first a dict"):
        read_rows([ROWS[0], "text"], "train")
    with pytest.raises(CalibrationError, match="is a list_iterator. Pass"):
        read_rows(iter([1, 2]), "train")


@pytest.mark.parametrize("format", ["torch", "numpy", "pandas"])
def test_a_format_for_training_does_not_matter(format):
    data = labelled([1, 0]).with_format(format, columns=["label"])
    assert read_rows(data, "train").labels == [1, 0]
    many = Dataset.from_dict(
        {"text": ["a", "b"], "labels": [[0, 2], []]},
        features=Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=["x", "y", "z"]))}),
    )
    rows = read_rows(many.with_format(format), "train")
    assert (rows.labels, rows.names) == ([[0, 2], []], ("x", "y", "z"))
    assert read_rows(many.to_iterable_dataset(), "train").names == ("x", "y", "z")


def test_only_the_wanted_columns_are_read():
    data = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0], "image": [{"bytes": b"x", "path": None}] * 2})
    data = data.cast(Features({**data.features, "image": datasets.Image()}))  # decoding these bytes would fail
    assert read_rows(data, "train").labels == [1, 0]


@pytest.mark.parametrize(
    "names", [("Sentence1", "Sentence2"), ("premise", "hypothesis"), ("question", "passage"), ("text", "text_pair")]
)
def test_pairs_are_found_by_common_names(names):
    first, second = names
    data = Dataset.from_dict({second: ["c", "d"], "idx": [0, 1], first: ["a", "b"], "Label": [0, 1]})
    for source in (data, data.to_iterable_dataset(), data.to_pandas()):
        rows = read_rows(source, "train")
        assert (rows.texts, rows.pairs, rows.labels) == (["a", "b"], ["c", "d"], [0, 1])


# -- into the calibration ---------------------------------------------------------------------------------------------


@pytest.fixture
def calibrate(make_backbone, tokenizer):
    def run(*data, problem_type=None, **options):
        model = SpinForSequenceClassification.from_backbone(make_backbone("bert"), problem_type=problem_type)
        small = {
            "kinds": ["hidden"],
            "poolings": ["mean"],
            "Cs": [0.05, 0.2],
            "etas": [1.0],
            "validation_fraction": 0.2,
        }
        options = {**small, "progress": False, **options}
        return model, spin_calibrate(model, tokenizer, *data, **options)

    return run


def sentiment(sentiment_rows, rows):
    return labelled([sentiment_rows["label"][i] for i in rows], [sentiment_rows["text"][i] for i in rows])


def test_class_names_and_splits_reach_the_model(calibrate, sentiment_rows):
    splits = {"train": range(50), "dev": range(50, 70), "test": range(70, 80)}
    data = DatasetDict({name: sentiment(sentiment_rows, rows) for name, rows in splits.items()})
    model, result = calibrate(data)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert (result.data["train_rows"], result.data["eval_rows"]) == (50, 20)
    assert result.data["evaluated"] == "validation"


def test_streams_and_files_give_the_model_of_the_data_set(calibrate, sentiment_rows, tmp_path):
    data = sentiment(sentiment_rows, range(60))
    named = data.to_pandas().assign(label=[("bad", "good")[label] for label in data["label"][:]])
    named.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    results = []
    for source in (data, data.to_iterable_dataset(), str(tmp_path / "rows.jsonl")):
        model, result = calibrate(source, validation_fraction=0.3)
        assert model.config.id2label == {0: "bad", 1: "good"}
        assert (result.data["eval_rows"], result.data["evaluated"]) == (18, "held out")
        results.append((result.chosen, model.score.weight))
    for chosen, weight in results[1:]:
        assert chosen == results[0][0]
        assert torch.equal(weight, results[0][1])


def test_multi_label_class_names_reach_the_model(calibrate, sentiment_rows):
    features = Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=["neither", "bad", "good"]))})
    rows = {"text": sentiment_rows["text"], "labels": [[label + 1] for label in sentiment_rows["label"]]}
    rows["labels"][3] = [0, 1]
    model, _ = calibrate(Dataset.from_dict(rows, features=features), problem_type="multi_label_classification")
    assert model.config.id2label == {0: "neither", 1: "bad", 2: "good"}


def test_unlabelled_splits_and_fractions_are_refused_before_the_work(calibrate, sentiment_rows, monkeypatch):
    monkeypatch.setattr("spin_hf.calibration.calibrate.extract", lambda *a, **k: pytest.fail("work began"))
    data = sentiment(sentiment_rows, range(60))
    unlabelled = labelled([-1, -1, 1])
    with pytest.raises(MissingLabelsError, match="2 of 3 eval rows have the label -1, which stands for none"):
        calibrate(data, unlabelled)
    for fraction in (0, 1, -0.5):
        with pytest.raises(CalibrationError, match="between 0 and 1"):
            calibrate(data, validation_fraction=fraction)
    with pytest.raises(CalibrationError, match="less than one row of each class"):
        calibrate(data, validation_fraction=0.99)
