"""Labelled texts in every shape that is taken, and one error type for each thing that can be wrong with them."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from spin_hf.calibration.data import encode_labels, label_names, read_rows, read_texts
from spin_hf.calibration.errors import (
    CalibrationError,
    ColumnError,
    EmptyDatasetError,
    EmptyTextError,
    InvalidTextError,
    LabelTypeError,
    MissingLabelsError,
    OneClassError,
    UnknownLabelError,
)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
TEXTS, LABELS = ["fine day", "grim day", "fine night"], ["good", "bad", "good"]
GENERIC = ["LABEL_0", "LABEL_1"]


def read(labels, problem_type=SINGLE, names=GENERIC, role="train", texts=None):
    rows = read_rows((texts or ["a"] * len(labels), labels), role)
    chosen = label_names(rows, names, problem_type)
    return chosen, encode_labels(rows, chosen, problem_type, role)


@pytest.mark.parametrize(
    "source",
    [
        (TEXTS, LABELS),
        {"text": TEXTS, "label": LABELS},
        pd.DataFrame({"text": TEXTS, "label": LABELS}),
        [{"text": t, "label": y} for t, y in zip(TEXTS, LABELS, strict=True)],
        Dataset.from_dict({"sentence": TEXTS, "label": LABELS}),
        Dataset.from_dict({"label": LABELS, "review": TEXTS, "other": [1, 2, 3]}),
        (np.array(TEXTS), np.array(LABELS)),
        (pd.Series(TEXTS), pd.Series(LABELS)),
    ],
)
def test_every_shape_reads_alike(source):
    rows = read_rows(source, "train")
    assert rows.texts == TEXTS
    assert rows.labels == LABELS
    assert rows.pairs is None
    assert read_texts({"text": TEXTS}) == (TEXTS, None)


@pytest.mark.parametrize(
    "source",
    [
        {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 1]},
        {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]},
        ([("a", "c"), ("b", "d")], [0, 1]),
    ],
)
def test_pairs_are_found(source):
    rows = read_rows(source, "train")
    assert (rows.texts, rows.pairs) == (["a", "b"], ["c", "d"])


def test_columns_can_be_named():
    source = {"left": ["a"], "right": ["b"], "text": ["x"], "y": [1], "label": [0]}
    rows = read_rows(source, "train", text_column=["left", "right"], label_column="y")
    assert (rows.texts, rows.pairs, rows.labels) == (["a"], ["b"], [1])


def test_names_come_from_the_model_then_the_data_set_then_the_labels():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    data = Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1]}, features=features)
    rows = read_rows(data, "train")
    assert label_names(rows, GENERIC, SINGLE) == ("bad", "good")
    assert encode_labels(rows, ("bad", "good"), SINGLE, "train").tolist() == [1, 0, 1]
    # the model's order wins, and the data set's ids go through their names
    assert label_names(rows, ["good", "bad"], SINGLE) == ("good", "bad")
    assert encode_labels(rows, ("good", "bad"), SINGLE, "train").tolist() == [0, 1, 0]
    assert read(LABELS)[0] == ("bad", "good")
    assert read([0, 2, 1])[0] == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_multi_label_by_names_ids_and_indicators():
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    names, encoded = read([["a", "c"], [], ["b"]], MULTI)
    assert names == ("a", "b", "c")
    assert encoded.tolist() == expected
    assert read([[0, 2], [], [1]], MULTI)[1].tolist() == expected
    assert read(expected, MULTI)[1].tolist() == expected
    assert read([{0, 2}, set(), {1}], MULTI)[1].tolist() == expected
    assert read(torch.tensor(expected), MULTI)[1].tolist() == expected
    features = Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=["a", "b", "c"]))})
    data = Dataset.from_dict({"text": TEXTS, "labels": [[0, 2], [], [1]]}, features=features)
    rows = read_rows(data, "train")
    assert label_names(rows, GENERIC, MULTI) == ("a", "b", "c")
    assert encode_labels(rows, ("a", "b", "c"), MULTI, "train").tolist() == expected


def test_regression_takes_any_finite_numbers():
    assert read([1, 2.5, np.float32(3)], REGRESSION)[1].tolist() == [1.0, 2.5, 3.0]
    assert read(torch.tensor([1.0, 2.5]), REGRESSION)[1].tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    "empty", [([], []), [], {"text": [], "label": []}, Dataset.from_dict({"text": [], "label": []})]
)
def test_no_rows(empty):
    with pytest.raises(EmptyDatasetError, match="no rows"):
        read_rows(empty, "train")


@pytest.mark.parametrize("label", [None, float("nan"), np.float32("nan")])
def test_missing_labels_name_the_first_row(label):
    with pytest.raises(MissingLabelsError, match=r"1 of 3 eval rows have no label, the first at row 1"):
        read_rows((TEXTS, ["good", label, "bad"]), "eval")


def test_missing_labels_of_a_frame_and_of_a_test_split():
    frame = pd.DataFrame({"text": TEXTS, "label": pd.array([1, None, 0], dtype="Int64")})
    with pytest.raises(MissingLabelsError, match="row 1"):
        read_rows(frame, "eval")
    with pytest.raises(MissingLabelsError, match="-1, which stands for none"):
        read([0, -1], names=["bad", "good"], role="eval")


@pytest.mark.parametrize(
    "source",
    [
        ([("a", "x"), "by"], [0, 1]),
        ([("a", "x", "1"), ("b", "y", "2")], [0, 1]),
        {"text": ["a", "b"], "text_pair": ["x"], "label": [0, 1]},
    ],
)
def test_pairs_that_are_none(source):
    with pytest.raises(ColumnError, match="all pairs|1 second"):
        read_rows(source, "train")


@pytest.mark.parametrize("source", [None, 3, [1, 2]])
def test_what_is_no_data_set(source):
    with pytest.raises(CalibrationError, match=rf"is a {type(source).__name__}\. Pass"):
        read_rows(source, "train")


@pytest.mark.parametrize("source", [[TEXTS, LABELS], [("a film", 1), ("a plot", 0)]])
def test_lists_of_lists_say_how_to_make_a_pair(source):
    with pytest.raises(CalibrationError, match=r"begins with a \w+\. .* a tuple of two lists: \(texts, labels\)"):
        read_rows(source, "train")


@pytest.mark.parametrize(
    "source", [("abc", [0, 1, 1]), {"text": "abc", "label": LABELS}, {"text": TEXTS, "label": 1}, (TEXTS, 1)]
)
def test_a_single_value_is_no_column(source):
    """Not taken for a list of its letters."""
    with pytest.raises(ColumnError, match=r"The column '(text|label)' of the train data is a single (str|int)\. Pass"):
        read_rows(source, "train")


def test_texts_without_labels():
    with pytest.raises(MissingLabelsError, match="texts, labels"):
        read_rows(TEXTS, "train")
    with pytest.raises(MissingLabelsError, match="3 texts but 2 labels"):
        read_rows((TEXTS, [0, 1]), "train")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"words": TEXTS, "label": LABELS}, {}, 'text_column="'),
        ({"text": TEXTS, "mood": LABELS}, {}, 'label_column="'),
        ({"text": TEXTS, "label": LABELS}, {"text_column": "body"}, "body"),
        ({"text": TEXTS, "label": LABELS}, {"label_column": "mood"}, "mood"),
    ],
)
def test_columns_that_are_not_there(source, options, message):
    with pytest.raises(ColumnError, match=message):
        read_rows(source, "train", **options)


def test_half_a_surrogate_pair_is_no_text():
    whole = "good \U0001f600 film"
    assert read_texts({"text": [whole]})[0] == [whole]
    for source in ({"text": ["good", "a \ud83d"]}, {"text": ["a", "b"], "text_pair": ["good", "a \ud83d"]}):
        with pytest.raises(InvalidTextError, match=r"Row 1 of the input data .* character 2 is '\\ud83d'"):
            read_texts(source)
        with pytest.raises(InvalidTextError, match="Row 1 of the train data"):
            read_rows({**source, "label": [0, 1]}, "train")


@pytest.mark.parametrize(
    ("texts", "message"), [(["", " ", "\n"], "empty"), (["a", None, "b"], "Row 1"), ([1, 2, 3], "1")]
)
def test_texts_that_are_none(texts, message):
    with pytest.raises(EmptyTextError, match=message):
        read_rows((texts, LABELS), "train")


def test_one_class():
    for labels in (["good"] * 3, [1, 1]):
        with pytest.raises(OneClassError, match="needs two"):
            read(labels, names=["bad", "good"])
    with pytest.raises(OneClassError):
        read([[], []], MULTI, names=["a", "b"])
    with pytest.raises(OneClassError, match="nothing to learn"):
        read([2.0, 2.0], REGRESSION)
    read(["good"] * 3, names=["bad", "good"], role="eval")  # one class to evaluate on is allowed


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        ([0, 0.5, 1], SINGLE),
        (["good", 1, "bad"], SINGLE),
        ([["a"], ["b"]], SINGLE),
        ([0, 1], MULTI),
        ([1.0, float("inf")], REGRESSION),
        ([1.0, "two"], REGRESSION),
    ],
)
def test_labels_that_do_not_fit_the_problem(labels, problem_type):
    with pytest.raises(LabelTypeError):
        read(labels, problem_type)


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [(["good", "odd"], SINGLE), ([0, 2], SINGLE), ([0, -2], SINGLE), ([["good"], ["odd"]], MULTI)],
)
def test_labels_that_the_model_does_not_have(labels, problem_type):
    with pytest.raises(UnknownLabelError):
        read(labels, problem_type, names=["bad", "good"])


def test_indicators_for_other_labels():
    with pytest.raises(LabelTypeError, match="names a label twice.*one 0 or 1 for each of bad, good"):
        read([[1, 0, 1], [0, 1, 1]], MULTI, names=["bad", "good"])


def test_a_row_that_is_no_list_among_lists():
    with pytest.raises(LabelTypeError, match="should be a list"):
        read([[0, 1], 3], MULTI)


def test_names_that_only_partly_match_the_model_are_refused():
    """By id, "positive" would silently become "negative"."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["positive", "negative", "mixed"])})
    rows = read_rows(Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0]}, features=features), "train")
    with pytest.raises(UnknownLabelError, match="mixed"):
        encode_labels(rows, ("negative", "positive"), SINGLE, "train")


@pytest.mark.parametrize("given", [[1, 2, 4, 3], [0, 100_000, 0, 7], [2, 1]])
def test_numbers_that_count_from_elsewhere_are_refused(given):
    rows = read_rows((["text"] * len(given), given), "train")
    with pytest.raises(LabelTypeError, match=f"the numbers {min(given)}, .* count from 0"):
        label_names(rows, ["LABEL_0", "LABEL_1"], "single_label_classification")


def test_ids_stay_ids_where_a_class_is_missing():
    rows = read_rows((["text"] * 3, [0, 2, 3]), "train")
    assert len(label_names(rows, ["LABEL_0", "LABEL_1"], "single_label_classification")) == 4
    given = [f"LABEL_{i}" for i in range(5)]
    rows = read_rows((["text"] * 2, [1, 4]), "train")
    assert label_names(rows, given, "single_label_classification") == tuple(given)


def test_the_word_among_numbers_is_named():
    with pytest.raises(LabelTypeError, match="'two'"):
        encode_labels(read_rows((["a", "b"], ["1", "two"]), "train"), ("value",), "regression", "train")
