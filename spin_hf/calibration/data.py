"""Labelled texts from whatever holds them, checked before any long work."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import (
    ColumnError,
    EmptyDatasetError,
    EmptyTextError,
    InvalidTextError,
    LabelTypeError,
    MissingLabelsError,
    OneClassError,
    UnknownLabelError,
)
from .sources import Role, open_table
from .task import ProblemType

# The usual names, in lower case; the first that a data set has is taken, pairs before single texts.
_PAIR_COLUMNS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
)
_TEXT_COLUMNS = (
    "text",
    "sentence",
    "content",
    "review",
    "question",
    "tweet",
    "document",
    "message",
    "comment",
    "utterance",
    "query",
)
_LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "sentiment", "emotion", "intent", "score")
_GENERIC_NAME = re.compile(r"LABEL_\d+$")


@dataclass(frozen=True)
class Rows:
    """Texts with raw labels, as they came. ``names`` are those the data set itself gives to its label ids."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[Any]
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, more: Rows) -> Rows:
        """These rows and then those; both have pairs, or neither."""
        pairs = None if self.pairs is None or more.pairs is None else self.pairs + more.pairs
        return Rows(self.texts + more.texts, pairs, self.labels + more.labels, self.names)


def read_rows(
    source: Any, role: Role, *, text_column: str | Sequence[str] | None = None, label_column: str | None = None
) -> Rows:
    """Read labelled texts.

    Args:
        source: anything that :func:`spin_hf.calibration.sources.open_table` takes.
        role: "train", "eval" or "test": chooses among splits, and says in messages which data is meant.
        text_column: the text's column, or two for sentence pairs; found by its usual names otherwise.
        label_column: the label's column, likewise.

    Raises:
        ColumnError, EmptyDatasetError, EmptyTextError, InvalidTextError, MissingLabelsError, SourceError, SplitError:
            as their names say.
    """
    if isinstance(source, tuple):
        text_column, label_column = None, None
    table = open_table(source, role)
    _demand_rows(bool(table.columns), role)
    text_names = _text_columns(table.columns, text_column, role)
    label_name = _label_column(table.columns, label_column, text_names, role)
    *columns, labels = table.read([*text_names, label_name])
    _demand_rows(any(map(len, [*columns, labels])), role)
    texts, pairs = _texts_and_pairs(columns, role)
    if len(labels) != len(texts):
        raise MissingLabelsError(f"The {role} data has {len(texts)} texts but {len(labels)} labels.")
    missing = [i for i, label in enumerate(labels) if label is None or _is_nan(label)]
    if missing:
        raise MissingLabelsError(
            f"{len(missing)} of {len(labels)} {role} rows have no label, the first at row {missing[0]}. "
            "Drop them or label them."
        )
    if not any(text.strip() for text in texts):
        raise EmptyTextError(f"All {len(texts)} texts of the {role} data are empty.")
    return Rows(texts, pairs, labels, table.class_names.get(label_name))


def read_texts(source: Any, *, text_column: str | Sequence[str] | None = None) -> tuple[list[str], list[str] | None]:
    """Only the texts (and their pairs) of a data set, for prediction. Same columns and errors as :func:`read_rows`."""
    table = open_table(source, "input")
    _demand_rows(bool(table.columns), "input")
    columns = table.read(_text_columns(table.columns, text_column, "input"))
    _demand_rows(any(map(len, columns)), "input")
    return _texts_and_pairs(columns, "input")


def label_names(rows: Rows, config_names: Sequence[str], problem_type: ProblemType) -> tuple[str, ...]:
    """The labels to use: the model's own where they were named, else the data's.

    Raises:
        LabelTypeError: for fractions, and numbers that can't be ids, such as stars from 1 to 5.
        UnknownLabelError: if the data has more labels than a model whose labels were named.
    """
    if problem_type == "regression":
        return ("value",)
    generic = all(_GENERIC_NAME.match(name) for name in config_names)
    if not generic:
        return tuple(config_names)
    if rows.names is not None:
        return rows.names
    flat = _flat(rows.labels, problem_type)
    if all(isinstance(value, str) for value in flat):
        return tuple(sorted(set(flat)))
    if problem_type == "multi_label_classification" and _are_indicators(rows.labels):
        return tuple(f"LABEL_{i}" for i in range(len(rows.labels[0])))
    whole = [int(value) for value in flat if _is_whole(value)]
    if len(whole) != len(flat):
        raise _label_type_error(flat, problem_type)
    seen = sorted(set(whole))
    if len(seen) > 1 and seen[-1] >= len(config_names) and (seen[0] > 0 or seen[-1] >= 2 * len(seen)):
        shown = ", ".join(map(str, seen[:8])) + (", ..." if len(seen) > 8 else "")
        raise LabelTypeError(
            f"The labels are the numbers {shown}, but numbers are ids and count from 0. "
            'Write them as words, such as "4 stars"; or if the data lacks some classes, say '
            "how many there are with num_labels=... in from_backbone."
        )
    return tuple(f"LABEL_{i}" for i in range(max([*whole, len(config_names) - 1]) + 1))


def encode_labels(rows: Rows, names: tuple[str, ...], problem_type: ProblemType, role: Role) -> np.ndarray:
    """Labels as an array: class ids ``(n,)``, indicators ``(n, K)`` or numbers ``(n,)``.

    Raises:
        LabelTypeError: words or fractions where ids are due, words or non-finite values where numbers are.
        MissingLabelsError: the id -1, which stands for no label.
        UnknownLabelError: a name or id outside ``names``.
        OneClassError: training rows of a single class.
    """
    if problem_type == "regression":
        return _numbers(rows.labels, role)
    _demand_labelled(rows, problem_type, role)
    encode = _LabelEncoder(rows, names, problem_type, role)
    if problem_type == "multi_label_classification":
        return _indicators(rows, names, encode, role)
    nested = [value for value in rows.labels if isinstance(value, (list, tuple, np.ndarray, set))]
    if nested:
        raise LabelTypeError(
            f"The {role} data has lists of labels such as {nested[0]!r}, but the model has one label per text. "
            'Use problem_type="multi_label_classification" in from_backbone.'
        )
    array = np.array([encode(value) for value in rows.labels], dtype=np.int64)
    if role == "train" and len(np.unique(array)) < 2:
        raise OneClassError(
            f"All {len(array)} training rows have the label {names[int(array[0])]!r}; a classifier needs two classes."
        )
    return array


def _demand_labelled(rows: Rows, problem_type: ProblemType, role: Role) -> None:
    unlabelled = sum(_is_number(value) and value == -1 for value in _flat(rows.labels, problem_type))
    if unlabelled:
        raise MissingLabelsError(
            f"{unlabelled} of {len(rows)} {role} rows have the label -1, which stands for none, as in GLUE's test "
            'splits. Drop them: data.filter(lambda row: row["label"] != -1). If -1 is one of your classes, give the '
            "labels as strings."
        )


class _LabelEncoder:
    """One label, a name or an id, as the model's id."""

    def __init__(self, rows: Rows, names: tuple[str, ...], problem_type: ProblemType, role: Role) -> None:
        self.names, self.problem_type, self.role = names, problem_type, role
        self.ids = {name: i for i, name in enumerate(names)}
        # The data set's own ids need not be the model's: go through the names where both have them.
        given = set(rows.names or ())
        self.own = rows.names if given and given <= set(names) else None
        if self.own is None and given & set(names):
            raise UnknownLabelError(
                f"The {role} data names its labels {', '.join(rows.names or ())}, the model {', '.join(names)}. Give "
                "all of them to from_backbone with labels=[...]."
            )

    def __call__(self, value: Any) -> int:
        if isinstance(value, str):
            if value not in self.ids:
                raise UnknownLabelError(
                    f"The {self.role} data has the label {value!r}; the labels are {', '.join(self.names)}."
                )
            return self.ids[value]
        if not _is_whole(value):
            raise _label_type_error([value], self.problem_type)
        if not 0 <= int(value) < len(self.names):
            raise UnknownLabelError(
                f"The {self.role} data has the label id {int(value)}; there are {len(self.names)} labels, ids 0 to "
                f"{len(self.names) - 1}. Name all of them with labels=[...] in from_backbone."
            )
        return self.ids[self.own[int(value)]] if self.own is not None else int(value)


def _indicators(rows: Rows, names: tuple[str, ...], encode: _LabelEncoder, role: Role) -> np.ndarray:
    flat = [value for value in rows.labels if not isinstance(value, (list, tuple, np.ndarray, set))]
    if flat:
        raise LabelTypeError(f"A multi-label row should be a list of labels; the {role} data has {flat[0]!r}.")
    if _are_indicators(rows.labels) and len(rows.labels[0]) == len(names):
        return np.array(rows.labels, dtype=np.int64)
    array = np.zeros((len(rows.labels), len(names)), dtype=np.int64)
    for i, values in enumerate(rows.labels):
        for value in values:
            array[i, encode(value)] = 1
        if array[i].sum() < len(values):
            raise LabelTypeError(
                f"Row {i} of the {role} data names a label twice: {list(values)!r}. A row is a list of different "
                f"labels, or one 0 or 1 for each of {', '.join(names)}."
            )
    if role == "train" and not array.any():
        raise OneClassError("No training row carries any label.")
    return array


def _demand_rows(found: bool, role: Role) -> None:
    if not found:
        raise EmptyDatasetError(f"The {role} data has no rows.")


def _text_columns(columns: Sequence[str], given: str | Sequence[str] | None, role: Role) -> tuple[str, ...]:
    if given is not None:
        wanted = (given,) if isinstance(given, str) else tuple(given)
        absent = [name for name in wanted if name not in columns]
        if absent or not 1 <= len(wanted) <= 2:
            raise ColumnError(
                f"text_column={given!r} should name one or two of the {role} data's columns: {', '.join(columns)}."
            )
        return wanted
    by_name = _without_case(columns)
    for names in (*_PAIR_COLUMNS, *((name,) for name in _TEXT_COLUMNS)):
        if all(name in by_name for name in names):
            return tuple(by_name[name] for name in names)
    raise ColumnError(
        f'No text column among {", ".join(columns)} of the {role} data. Name it with text_column="...", or two for '
        "sentence pairs."
    )


def _label_column(columns: Sequence[str], given: str | None, texts: Sequence[str], role: Role) -> str:
    if given is not None:
        if given not in columns:
            raise ColumnError(f"label_column={given!r} is not among the {role} data's columns: {', '.join(columns)}.")
        return given
    by_name = _without_case(columns)
    for name in _LABEL_COLUMNS:
        if name in by_name and by_name[name] not in texts:
            return by_name[name]
    raise ColumnError(
        f'No label column among {", ".join(columns)} of the {role} data. Name it with label_column="...".'
    )


def _without_case(columns: Sequence[str]) -> dict[str, str]:
    """Columns by their lower-case names; the first of two that differ in case alone."""
    return {name.lower(): name for name in reversed(columns)}


def _texts_and_pairs(columns: Sequence[list[Any]], role: Role) -> tuple[list[str], list[str] | None]:
    texts, pairs = _texts(columns[0], role), _texts(columns[1], role) if len(columns) == 2 else None
    if pairs is not None and len(pairs) != len(texts):
        raise ColumnError(f"The {role} data has {len(texts)} first texts but {len(pairs)} second ones.")
    return texts, pairs


def _texts(texts: list[Any], role: Role) -> list[str]:
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise EmptyTextError(
            f"Row {wrong} of the {role} data has no text but {texts[wrong]!r} ({type(texts[wrong]).__name__})."
        )
    for row, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidTextError(
                f"Row {row} of the {role} data is no Unicode text: character {error.start} is {text[error.start]!r}, "
                "one half of a surrogate pair, which no tokenizer reads. Replace it: "
                'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
            ) from None
    return texts


def _numbers(labels: list[Any], role: Role) -> np.ndarray:
    try:
        array = np.array([float(value) for value in labels], dtype=np.float64)
    except (TypeError, ValueError):
        wrong = next(value for value in labels if not _is_numeric(value))
        raise LabelTypeError(f"Regression needs numbers as labels; the {role} data has {wrong!r}.") from None
    if not np.isfinite(array).all():
        raise LabelTypeError(
            f"Row {int(np.argmin(np.isfinite(array)))} of the {role} data has a label that is not finite."
        )
    if role == "train" and np.ptp(array) == 0:
        raise OneClassError(f"All {len(array)} training rows have the value {array[0]}; there is nothing to learn.")
    return array


def _is_numeric(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _flat(labels: list[Any], problem_type: ProblemType) -> list[Any]:
    if problem_type == "single_label_classification":
        return labels
    return [value for row in labels if isinstance(row, (list, tuple, np.ndarray, set)) for value in row]


def _are_indicators(labels: list[Any]) -> bool:
    if not all(isinstance(row, (list, tuple, np.ndarray)) for row in labels):
        return False
    lengths = {len(row) for row in labels}
    if len(lengths) != 1 or lengths == {0} or lengths == {1}:
        return False
    return all(not isinstance(value, str) and value in (0, 1) for row in labels for value in row)


def _label_type_error(values: Sequence[Any], problem_type: str) -> LabelTypeError:
    wrong = next((value for value in values if not isinstance(value, str) and not _is_whole(value)), values[0])
    mixed = any(isinstance(value, str) for value in values) and not all(isinstance(value, str) for value in values)
    found = "a mixture of names and numbers" if mixed else repr(wrong)
    return LabelTypeError(
        f"{problem_type} needs label names or whole numbers; found {found}. "
        'For numbers with fractions use problem_type="regression" in from_backbone.'
    )


def _is_whole(value: Any) -> bool:
    return _is_number(value) and math.isfinite(float(value)) and float(value) == int(float(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating, np.bool_))


def _is_nan(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and math.isnan(float(value))
