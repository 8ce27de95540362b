"""Where data comes from: files, folders, the Hub, data sets with splits, streams and tables, all opened as a table."""

from __future__ import annotations

import gzip
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from .errors import CalibrationError, ColumnError, MissingLabelsError, SourceError, SplitError

Role = Literal["train", "eval", "test", "input"]

_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_SPLITS: dict[Role, tuple[str, ...]] = {
    "train": ("train",),
    "eval": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Table:
    """Columns by name.

    Attributes:
        columns: their names; none where there are no rows to tell them.
        read: returns the values of the named columns, as plain lists. Called once: a stream can't be read again.
        class_names: for columns of class ids, the names of the ids, where the source gives them.
    """

    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], list[list[Any]]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# -- names: files, folders and the Hub --------------------------------------------------------------------------------


def load(source: str | Path) -> Any:
    """What a name stands for: a ``datasets.Dataset``, or a ``DatasetDict`` where it has splits and none was named.

    Args:
        source: a csv, tsv, json, jsonl or parquet file, also gzipped; a folder that ``save_to_disk`` wrote or that
            holds such files; or a data set on the Hub, ``NAME``, ``NAME/CONFIG``, each with ``:SPLIT`` behind it where
            one split is meant (slices too: ``imdb:train[:2000]``).

    Raises:
        SourceError: if there is no such thing, or it can't be read.
    """
    import datasets

    name = str(source)
    if not name.strip():
        raise SourceError("The data's name is empty. Name a file, a folder, or a data set on the Hub.")
    path, split = Path(name), None
    if not path.exists():
        name, _, split = name.partition(":")
        path, split = Path(name), split or None
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says of a bad file is in the error too
    try:
        if path.is_dir():
            return _load_folder(path, split)
        suffix = Path(path.name.lower().removesuffix(".gz")).suffix
        if suffix in _READERS:
            return _load_file(path, suffix, source)
        if path.exists() or isinstance(source, Path):
            there = "has none of the endings" if path.exists() else "is neither a folder nor a file with one of"
            raise SourceError(f"{source} {there} {', '.join(_READERS)} (or one of them and .gz).")
        if name.endswith(("/", "\\")) or name.startswith((".", "/", "~")):
            raise SourceError(f"{source} is not there: no file and no folder has this name.")
        return _load_from_hub(name, split)
    except datasets.exceptions.DatasetGenerationError as error:
        raise SourceError(f"{source} can't be read: {error.__cause__ or error}") from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        if isinstance(error, CalibrationError):
            raise
        raise SourceError(f"{source} can't be read: {error}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _load_file(path: Path, suffix: str, source: str | Path) -> Any:
    if not path.is_file():
        raise SourceError(f"{source} is not a file.")
    if str(path) != str(source):
        raise SourceError(f"{source} names a split, but a file has none. Pass {str(path)!r}.")
    kind, options = _READERS[suffix], {}
    if kind == "csv":  # "None" and "NA" are texts and labels like any other; only an empty cell is missing
        options = {"sep": "\t" if suffix == ".tsv" else ",", "keep_default_na": False, "na_values": [""]}
    with tempfile.TemporaryDirectory() as scratch:
        if path.suffix.lower() == ".gz":
            unpacked = Path(scratch) / f"unpacked{suffix}"
            with gzip.open(path) as packed, unpacked.open("wb") as file:
                shutil.copyfileobj(packed, file)
            path = unpacked
        return _load_afresh(kind, data_files=str(path), split="train", **options)


def _load_folder(path: Path, split: str | None) -> Any:
    import datasets

    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        data = datasets.load_from_disk(str(path))
        if split is None:
            return data
        if not isinstance(data, Mapping) or split not in data:
            found = ", ".join(data) if isinstance(data, Mapping) else "none"
            raise SplitError(f"{path} has no split {split!r}; it has: {found}.")
        return data[split]
    try:
        return _load_afresh(str(path.resolve()), split=split)
    except FileNotFoundError:
        raise SourceError(
            f"The folder {path} holds no data: neither {', '.join(_READERS)} files nor what save_to_disk writes."
        ) from None


def _load_afresh(name: str, **options: Any) -> Any:
    """Into memory: a stale cache must not answer for a file."""
    import datasets

    with tempfile.TemporaryDirectory() as scratch:
        return datasets.load_dataset(name, cache_dir=scratch, keep_in_memory=True, **options)


def _load_from_hub(name: str, split: str | None) -> Any:
    """``a/b`` is a data set of that id, or else the configuration ``b`` of ``a``; ``a/b/c`` the configuration ``c``."""
    import datasets

    head, _, last = name.rpartition("/")
    by_slashes: dict[int, list[tuple[str, ...]]] = {0: [(name,)], 1: [(name,), (head, last)], 2: [(head, last)]}
    readings = by_slashes.get(name.count("/"))
    if readings is None or not re.fullmatch(r"[\w.\-/]+", name):
        raise SourceError(
            f"{name} is no file, no folder, and no data set's name (NAME, NAME/CONFIG, with :SPLIT behind it or not)."
        )
    failed: list[Exception] = []
    for reading in readings:
        try:
            return datasets.load_dataset(*reading, split=split)
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            failed.append(error)
    raise SourceError(f"{name} is no file or folder here, and could not be had from the Hub: {failed[0]}") from failed[
        0
    ]


# -- splits -----------------------------------------------------------------------------------------------------------


def training_splits(train: Any, eval: Any = None, *, cv: int | None = None) -> tuple[Any, Any]:
    """The rows to train on and those that choose, or ``None`` where a part of the former must.

    A ``train`` with splits brings its own validation split. Its test split is left alone.

    Raises:
        SplitError: if two things could choose, or ``train`` has no split to train on.
        SourceError: as :func:`load`.
    """
    given, train = train, _opened(train)
    if _has_splits(train):
        own = _find_split(train, "eval")
        if own is not None and (eval is not None or cv is not None):
            only = f'"{given}:SPLIT"' if isinstance(given, str) else 'data["SPLIT"]'
            raise SplitError(
                f"train brings its own validation split {own!r}, and {'eval' if cv is None else 'cv'} was given too. "
                f"Pass only the split to train on: {only}."
            )
        eval = train[own] if own is not None else eval
        train = split_of(train, "train")
    return train, None if eval is None else split_of(eval, "eval")


def split_of(source: Any, role: Role) -> Any:
    """The part of a source that its role asks for: of several splits the one that is named so, else the source itself.

    Args:
        source: anything; a string or path is opened with :func:`load`.
        role: "train" takes the split ``train``, "eval" ``validation``, ``valid``, ``val``, ``dev`` or ``eval``, "test"
            ``test``; each also with something behind it, such as ``validation_matched``, if there is only one.

    Raises:
        SplitError: for splits of which none, or more than one, has such a name.
        SourceError: as :func:`load`.
    """
    source = _opened(source)
    if not _has_splits(source):
        return source
    name = _find_split(source, role)
    if name is None:
        wanted = f", none of them named {' or '.join(_SPLITS[role])}" if role in _SPLITS else ""
        raise SplitError(
            f"The {role} data is a {type(source).__name__} with the splits {', '.join(map(str, source))}{wanted}. "
            'Pass one of them: data["SPLIT"], or of a name "NAME:SPLIT".'
        )
    return source[name]


def _opened(source: Any) -> Any:
    return load(source) if isinstance(source, (str, Path)) else source


def _has_splits(source: Any) -> bool:
    """Whether this is a ``DatasetDict``, an ``IterableDatasetDict`` or a dict of anything else with columns."""
    return isinstance(source, Mapping) and len(source) > 0 and all(map(_has_columns, source.values()))


def _has_columns(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(row, Mapping) for row in value)
    return isinstance(value, Mapping) or hasattr(value, "column_names") or hasattr(value, "columns")


def _find_split(source: Mapping[str, Any], role: Role) -> str | None:
    names = "|".join(_SPLITS.get(role, ()))
    exact = [name for name in source if re.fullmatch(names, str(name), re.IGNORECASE)]
    longer = [name for name in source if re.fullmatch(rf"({names})[^a-z].*", str(name), re.IGNORECASE)]
    found = exact or [name for name in longer if role == "test" or "test" not in str(name).lower()] if names else []
    if len(found) > 1:
        raise SplitError(f"Which split is the {role} data: {' or '.join(map(str, found))}? Pass the one that is meant.")
    return found[0] if found else None


# -- tables -----------------------------------------------------------------------------------------------------------


def open_table(source: Any, role: Role) -> Table:
    """Open whatever holds rows.

    Args:
        source: a name for :func:`load`; a ``datasets.Dataset`` or a stream of it; splits, of which ``role`` chooses
            one; a pandas frame; a dict of columns; dicts, in a list or from an iterator; or a pair (texts, labels),
            whose columns are then "text" (and "text_pair") and "label".
        role: what the rows are for; it also says so in messages.

    Raises:
        SourceError, SplitError, ColumnError, MissingLabelsError, CalibrationError: for what can't be opened.
    """
    source = split_of(source, role)
    if isinstance(source, tuple) and len(source) == 2:
        return _of_columns(_paired(source, role), role)
    if isinstance(source, Mapping):
        return _of_columns(source, role)
    if hasattr(source, "features") and hasattr(source, "column_names"):
        return _of_dataset(source, role)
    if hasattr(source, "columns") and hasattr(source, "to_dict"):
        return _of_frame(source)
    if isinstance(source, Iterable):
        return _of_rows(source, role)
    raise _no_data(source, role)


def _no_data(source: Any, role: Role) -> CalibrationError:
    return CalibrationError(
        f"The {role} data is a {type(source).__name__}. Pass a datasets.Dataset, a stream of one, a file's or data "
        "set's name, a pandas DataFrame, a dict of columns, a list of dicts, or a pair (texts, labels)."
    )


def _paired(source: tuple[Any, Any], role: Role) -> dict[str, list[Any]]:
    texts, labels = map(_plain, source)
    if not isinstance(texts, str) and any(isinstance(text, (tuple, list)) for text in texts):
        if not all(isinstance(text, (tuple, list)) and len(text) == 2 for text in texts):
            raise ColumnError(f"The texts of the {role} data should all be strings, or all pairs of strings.")
        first, second = map(list, zip(*texts, strict=True))
        return {"text": first, "text_pair": second, "label": labels}
    return {"text": texts, "label": labels}


def _of_columns(columns: Mapping[Any, Any], role: Role) -> Table:
    by_name = {str(name): _plain(values) for name, values in columns.items()}

    def read(names: Sequence[str]) -> list[list[Any]]:
        for name in names:
            if isinstance(by_name[name], (str, bytes)) or not isinstance(by_name[name], Iterable):
                raise ColumnError(
                    f"The column {name!r} of the {role} data is a single {type(by_name[name]).__name__}. Pass a list, "
                    "with a value for each row."
                )
        return [list(by_name[name]) for name in names]

    return Table(tuple(by_name), read)


def _of_frame(frame: Any) -> Table:
    by_name = {str(name): name for name in frame.columns}

    def read(names: Sequence[str]) -> list[list[Any]]:
        plain = [frame[by_name[name]].astype(object) for name in names]
        return [column.where(column.notna(), None).tolist() for column in plain]  # one kind of missing value

    return Table(tuple(by_name), read)


def _of_dataset(source: Any, role: Role) -> Table:
    named = {}
    for column, feature in (source.features or {}).items():
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
        if getattr(inner, "names", None):
            named[column] = tuple(inner.names)
    source = source.with_format(None)  # plain values, whatever a training loop wants of it
    if not hasattr(source, "__len__"):
        return _of_rows(source, role, named)

    def read(names: Sequence[str]) -> list[list[Any]]:
        rows = source.select_columns(list(dict.fromkeys(names)))[:]  # no other column is decoded
        return [rows[name] for name in names]

    return Table(tuple(source.column_names), read, named)


def _of_rows(rows: Iterable[Any], role: Role, class_names: Mapping[str, tuple[str, ...]] | None = None) -> Table:
    """Rows one after another, once; of each only the columns that are asked for are kept."""
    iterator = iter(rows)
    first = next(iterator, None)
    if isinstance(first, str):
        raise MissingLabelsError(f"The {role} data holds texts without labels. Pass a pair: (texts, labels).")
    if isinstance(first, (list, tuple)):
        raise CalibrationError(
            f"The {role} data is a list that begins with a {type(first).__name__}. Texts with their labels are a tuple "
            "of two lists: (texts, labels), or of rows like these tuple(zip(*rows))."
        )
    if first is not None and not isinstance(first, Mapping):
        raise _no_data(rows, role)

    def read(names: Sequence[str]) -> list[list[Any]]:
        kept: list[list[Any]] = [[] for _ in names]
        for number, row in enumerate(chain([first], iterator)):
            if not isinstance(row, Mapping):
                raise ColumnError(f"Row {number} of the {role} data is a {type(row).__name__}, the first a dict.")
            for values, name in zip(kept, names, strict=True):
                values.append(_plain(row.get(name)))
        return kept

    return Table(() if first is None else tuple(map(str, first)), read, class_names or {})


def _plain(value: Any) -> Any:
    """Lists and numbers for arrays and tensors of them."""
    return value.tolist() if hasattr(value, "tolist") else value
