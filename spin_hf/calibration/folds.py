"""The data of a calibration: all rows with their labels, and which of them train and which evaluate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split

from ..modeling_spin import SpinForSequenceClassification
from .data import Rows, encode_labels, label_names, read_rows
from .errors import CalibrationError, MissingLabelsError, demand_between, demand_whole
from .sources import training_splits

# Of fewer, folds choose better than a part held out, and the widest head is mostly better than that of the best score:
# examples/README.md, "With a few labels".
FEW_ROWS = 1000
_FOLDS, _FRACTION = 5, 0.2


@dataclass(frozen=True)
class Prepared:
    """Rows of ``train`` and then ``eval``, their encoded labels, the (train, evaluate) rows of each fold, the rows of
    the final fit, how many are those of ``train``, and in words what evaluates.
    """

    rows: Rows
    names: tuple[str, ...]
    labels: np.ndarray
    folds: tuple[tuple[np.ndarray, np.ndarray], ...]
    refit: np.ndarray
    trained: int
    evaluated: str

    @property
    def crossed(self) -> bool:
        """Whether there are folds to cross-validate with."""
        return len(self.folds) > 1


def prepare(
    model: SpinForSequenceClassification,
    train: Any,
    eval: Any,
    cv: int | None,
    validation_fraction: float | None,
    seed: int,
    *,
    may_cross: bool = True,
    **columns: Any,
) -> Prepared:
    """Read and check all data, and split off what evaluates: ``eval`` or the validation split that ``train`` brings, or
    ``cv`` folds, or a fraction of ``train``.

    Args:
        may_cross: make folds of a few rows where nothing says what evaluates.

    Raises:
        CalibrationError: one of its kinds, for data or labels that don't fit.
    """
    if validation_fraction is not None:
        demand_between("validation_fraction", validation_fraction, 0, 1)
    demand_whole("seed", seed, least=0)
    if cv is not None:
        demand_whole("cv, the number of folds,", cv, least=2)
    train, eval = training_splits(train, eval, cv=cv)
    problem_type = model.config.problem_type
    rows = read_rows(train, "train", **columns)
    names = label_names(rows, [model.config.id2label[i] for i in range(model.config.num_labels)], problem_type)
    labels = encode_labels(rows, names, problem_type, "train")
    if eval is None:
        classes = labels if problem_type == "single_label_classification" else None
        if may_cross and cv is None and validation_fraction is None and len(rows) < FEW_ROWS:
            cv = min(_FOLDS, _smallest(classes, len(rows)))
            cv = cv if cv > 1 else None
        folds = _folds(classes, len(rows), cv, _FRACTION if validation_fraction is None else validation_fraction, seed)
        refit, evaluated = (np.arange(len(rows)), f"{cv}-fold cross-validation") if cv else (folds[0][0], "held out")
        return Prepared(rows, names, labels, folds, refit, len(rows), evaluated)
    if cv is not None:
        raise CalibrationError("Give eval or cv, not both.")
    held_out = read_rows(eval, "eval", **columns)
    if (held_out.pairs is None) != (rows.pairs is None):
        raise CalibrationError("train and eval must both have sentence pairs, or neither.")
    both = np.concatenate([labels, encode_labels(held_out, names, problem_type, "eval")])
    first, rest = np.arange(len(rows)), np.arange(len(rows), len(both))
    return Prepared(rows + held_out, names, both, ((first, rest),), first, len(rows), "validation")


def _smallest(classes: np.ndarray | None, count: int) -> int:
    """Rows of the rarest class; all where there are no classes."""
    return count if classes is None else int(min(np.bincount(classes)[np.unique(classes)]))


def _folds(
    classes: np.ndarray | None, count: int, cv: int | None, validation_fraction: float, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Stratified by ``classes`` where there are any."""
    smallest = _smallest(classes, count)
    if cv is not None:
        if cv > smallest:
            raise MissingLabelsError(f"cv={cv} needs at least {cv} rows of each class; the rarest has {smallest}.")
        splitter: Any = (KFold if classes is None else StratifiedKFold)(cv, shuffle=True, random_state=seed)
        return tuple((np.sort(a), np.sort(b)) for a, b in splitter.split(np.zeros(count), classes))
    if smallest < 2:
        raise MissingLabelsError(
            "A class has a single row, so nothing of it can be held out to choose by. Add rows, or give eval."
        )
    least = 1 if classes is None else len(np.unique(classes))
    held_out = max(validation_fraction, least / count)
    if count - math.ceil(held_out * count) < least:
        raise CalibrationError(
            f"validation_fraction={validation_fraction} of {count} rows leaves less than one row of each class to "
            "train on. Give a smaller one."
        )
    kept, held = train_test_split(np.arange(count), test_size=held_out, random_state=seed, stratify=classes)
    return ((np.sort(kept), np.sort(held)),)


def check_sample_weight(given: Sequence[float] | None, trained: int, total: int) -> np.ndarray | None:
    """One weight per row: those given for the rows of ``train``, and 1 for rows that only evaluate.

    Raises:
        CalibrationError: for anything but one positive number per row of ``train``.
    """
    if given is None:
        return None
    try:
        weights = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise CalibrationError("sample_weight must be a list of positive numbers.") from None
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights <= 0).any():
        raise CalibrationError("sample_weight must be a list of positive numbers.")
    if len(weights) != trained:
        raise CalibrationError(f"sample_weight has {len(weights)} values for the {trained} rows of train.")
    return np.concatenate([weights, np.ones(total - len(weights))])
