"""Labelled texts from whatever holds them, checked before any long work."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import (
    CalibrationError,
    ColumnError,
    EmptyDatasetError,
    EmptyTextError,
    LabelTypeError,
    MissingLabelsError,
    OneClassError,
    UnknownLabelError,
)
from .task import ProblemType

_TEXT_COLUMNS = ("text", "sentence", "content", "review", "question", "tweet", "document", "message", "comment")
_PAIR_COLUMNS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "score")
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
    source: Any, role: str, *, text_column: str | Sequence[str] | None = None, label_column: str | None = None
) -> Rows:
    """Read a ``datasets.Dataset``, a pandas frame, a dict of columns, a list of dicts, or a pair (texts, labels).

    Args:
        source: the data.
        role: "train" or "eval", for the messages.
        text_column: the text's column, or two for sentence pairs; found by its usual names otherwise.
        label_column: the label's column, likewise.

    Raises:
        ColumnError, EmptyDatasetError, EmptyTextError, MissingLabelsError: as their names say.
    """
    if isinstance(source, tuple) and len(source) == 2:
        columns: dict[str, Any] = {"text": _listed(source[0]), "label": _listed(source[1])}
        if any(isinstance(text, (tuple, list)) for text in columns["text"]):
            if not all(isinstance(text, (tuple, list)) and len(text) == 2 for text in columns["text"]):
                raise ColumnError(f"The texts of the {role} data should all be strings, or all pairs of strings.")
            columns["text"], columns["text_pair"] = map(list, zip(*columns["text"], strict=True))
        text_column, label_column, names = None, None, None
    else:
        columns, names = _columns(source, role)
    if not columns or not any(len(values) for values in columns.values()):
        raise EmptyDatasetError(f"The {role} data has no rows.")
    text_names = _text_columns(columns, text_column, role)
    label_name = _label_column(columns, label_column, text_names, role)
    texts = _texts(columns[text_names[0]], role)
    pairs = _texts(columns[text_names[1]], role) if len(text_names) == 2 else None
    labels = list(columns[label_name])
    if pairs is not None and len(pairs) != len(texts):
        raise ColumnError(f"The {role} data has {len(texts)} first texts but {len(pairs)} second ones.")
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
    return Rows(texts, pairs, labels, names.get(label_name) if names else None)


def read_texts(source: Any, *, text_column: str | Sequence[str] | None = None) -> tuple[list[str], list[str] | None]:
    """Only the texts (and their pairs) of a data set, for prediction. Same columns and errors as :func:`read_rows`."""
    columns, _ = _columns(source, "input")
    if not columns or not any(len(values) for values in columns.values()):
        raise EmptyDatasetError("The input data has no rows.")
    names = _text_columns(columns, text_column, "input")
    return _texts(columns[names[0]], "input"), _texts(columns[names[1]], "input") if len(names) == 2 else None


def label_names(rows: Rows, config_names: Sequence[str], problem_type: ProblemType) -> tuple[str, ...]:
    """The labels to use: the model's own where they were named, else the data's.

    Raises:
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
    return tuple(f"LABEL_{i}" for i in range(max([*whole, len(config_names) - 1]) + 1))


def encode_labels(rows: Rows, names: tuple[str, ...], problem_type: ProblemType, role: str) -> np.ndarray:
    """Labels as an array: class ids ``(n,)``, indicators ``(n, K)`` or numbers ``(n,)``.

    Raises:
        LabelTypeError: words or fractions where ids are due, words or non-finite values where numbers are.
        UnknownLabelError: a name or id outside ``names``.
        OneClassError: training rows of a single class.
    """
    if problem_type == "regression":
        return _numbers(rows.labels, role)
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
            f"All {len(array)} training rows have the label {names[int(array[0])]!r}; a classifier needs two."
        )
    return array


class _LabelEncoder:
    """One label, a name or an id, as the model's id."""

    def __init__(self, rows: Rows, names: tuple[str, ...], problem_type: ProblemType, role: str) -> None:
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
        if int(value) == -1:
            raise MissingLabelsError(
                f"The {self.role} data has the label -1, which stands for none (as in GLUE's test splits)."
            )
        if not 0 <= int(value) < len(self.names):
            raise UnknownLabelError(
                f"The {self.role} data has the label id {int(value)}; there are {len(self.names)} labels, ids 0 to "
                f"{len(self.names) - 1}. Name all of them with labels=[...] in from_backbone."
            )
        return self.ids[self.own[int(value)]] if self.own is not None else int(value)


def _indicators(rows: Rows, names: tuple[str, ...], encode: _LabelEncoder, role: str) -> np.ndarray:
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


def _columns(source: Any, role: str) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    if isinstance(getattr(source, "column_names", None), Mapping):
        raise ColumnError(
            f"The {role} data is a {type(source).__name__} with splits {', '.join(source.column_names)}. Pass one of "
            "them."
        )
    if all(hasattr(source, name) for name in ("features", "column_names", "__len__")):  # datasets.Dataset
        names = {}
        for column, feature in source.features.items():
            inner = getattr(feature, "feature", feature)
            if getattr(inner, "names", None):
                names[column] = tuple(inner.names)
        return {column: source[column][:] for column in source.column_names}, names
    if hasattr(source, "columns") and hasattr(source, "to_dict"):  # pandas
        plain = source.astype(object)
        plain = plain.where(plain.notna(), None)  # one kind of missing value
        return {str(column): plain[column].tolist() for column in plain.columns}, {}
    if isinstance(source, Mapping):
        return {str(name): _listed(values) for name, values in source.items()}, {}
    if isinstance(source, Sequence) and not isinstance(source, str):
        if not source:
            return {}, {}
        if all(isinstance(row, Mapping) for row in source):
            return {str(name): [row.get(name) for row in source] for name in source[0]}, {}
        if all(isinstance(row, str) for row in source):
            raise MissingLabelsError(f"The {role} data holds texts without labels. Pass a pair: (texts, labels).")
    raise CalibrationError(
        f"The {role} data is a {type(source).__name__}. Pass a datasets.Dataset, a pandas DataFrame, a dict of "
        "columns, a list of dicts, or a pair (texts, labels). Of a stream, take a part: list(stream.take(10_000))."
    )


def _text_columns(columns: Mapping[str, Any], given: str | Sequence[str] | None, role: str) -> tuple[str, ...]:
    if given is not None:
        wanted = (given,) if isinstance(given, str) else tuple(given)
        absent = [name for name in wanted if name not in columns]
        if absent or not 1 <= len(wanted) <= 2:
            raise ColumnError(
                f"text_column={given!r} should name one or two of the {role} data's columns: {', '.join(columns)}."
            )
        return wanted
    for pair in _PAIR_COLUMNS:
        if all(name in columns for name in pair):
            return pair
    for name in _TEXT_COLUMNS:
        if name in columns:
            return (name,)
    raise ColumnError(
        f'No text column among {", ".join(columns)} of the {role} data. Name it with text_column="...", or two for '
        "sentence pairs."
    )


def _label_column(columns: Mapping[str, Any], given: str | None, texts: Sequence[str], role: str) -> str:
    if given is not None:
        if given not in columns:
            raise ColumnError(f"label_column={given!r} is not among the {role} data's columns: {', '.join(columns)}.")
        return given
    for name in _LABEL_COLUMNS:
        if name in columns and name not in texts:
            return name
    raise ColumnError(
        f'No label column among {", ".join(columns)} of the {role} data. Name it with label_column="...".'
    )


def _texts(values: Any, role: str) -> list[str]:
    texts = list(values)
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise EmptyTextError(
            f"Row {wrong} of the {role} data has no text but {texts[wrong]!r} ({type(texts[wrong]).__name__})."
        )
    return texts


def _numbers(labels: list[Any], role: str) -> np.ndarray:
    try:
        array = np.array([float(value) for value in labels], dtype=np.float64)
    except (TypeError, ValueError):
        wrong = next(value for value in labels if not _is_number(value))
        raise LabelTypeError(f"Regression needs numbers as labels; the {role} data has {wrong!r}.") from None
    if not np.isfinite(array).all():
        raise LabelTypeError(
            f"Row {int(np.argmin(np.isfinite(array)))} of the {role} data has a label that is not finite."
        )
    if role == "train" and np.ptp(array) == 0:
        raise OneClassError(f"All {len(array)} training rows have the value {array[0]}; there is nothing to learn.")
    return array


def _listed(values: Any) -> list[Any]:
    """A list of plain values, from an array or tensor too."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


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
