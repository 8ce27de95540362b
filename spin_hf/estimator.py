"""scikit-learn's view of the calibration: ``SpinClassifier`` and ``SpinRegressor``, estimators on texts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .backbone import load_backbone
from .calibration import CalibrationError, spin_calibrate
from .calibration.data import read_texts
from .calibration.errors import (
    ColumnError,
    EmptyDatasetError,
    LabelTypeError,
    MissingLabelsError,
    OneClassError,
    UnknownLabelError,
)
from .loading import load_tokenizer, pick_device
from .modeling_spin import SpinForSequenceClassification
from .prediction import Prediction, predict

_CALIBRATION = (  # parameters that go to spin_calibrate as they are
    "cv",
    "validation_fraction",
    "preset",
    "prefer",
    "kinds",
    "poolings",
    "Cs",
    "etas",
    "max_features",
    "max_depth",
    "max_length",
    "windows",
    "overlap",
    "exits",
    "batch_tokens",
    "cache_dir",
)


class _SpinEstimator(BaseEstimator):
    """Parameters, texts and backbone of both estimators."""

    def __init__(
        self,
        backbone: str | Path | PreTrainedModel,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        cv: int | None = None,
        validation_fraction: float | None = None,
        metric: str | Callable[[Any, Any], float] | None = None,
        class_weight: Literal["balanced"] | Mapping[Any, float] | None = None,
        preset: Literal["default", "paper"] = "default",
        prefer: Literal["score", "widest", "compact"] | None = None,
        kinds: Sequence[str] | None = None,
        poolings: Sequence[str] | None = None,
        Cs: int | Sequence[float] | None = None,
        etas: Sequence[float] | None = None,
        max_features: int | None = None,
        max_depth: int | None = None,
        max_length: int | None = None,
        windows: bool = False,
        overlap: int | None = None,
        exits: bool = False,
        batch_tokens: int = 4096,
        cache_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.cv = cv
        self.validation_fraction = validation_fraction
        self.metric = metric
        self.class_weight = class_weight
        self.preset = preset
        self.prefer = prefer
        self.kinds = kinds
        self.poolings = poolings
        self.Cs = Cs
        self.etas = etas
        self.max_features = max_features
        self.max_depth = max_depth
        self.max_length = max_length
        self.windows = windows
        self.overlap = overlap
        self.exits = exits
        self.batch_tokens = batch_tokens
        self.cache_dir = cache_dir
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, tokenizer and the record of the calibration, for ``from_pretrained``, ``pipeline`` and so on.

        Args:
            folder: made if need be.

        Raises:
            NotFittedError: before :meth:`fit`.
        """
        check_is_fitted(self)
        self.model_.save_pretrained(folder)
        self.tokenizer_.save_pretrained(folder)
        self.result_.save(Path(folder) / "calibration.json")

    def _calibrate(
        self,
        columns: dict[str, list[Any]],
        sample_weight: Any,
        *,
        problem_type: str,
        names: Sequence[str] | None = None,
        metric: Any = None,
        class_weight: Any = None,
    ) -> None:
        read_texts(columns)  # what is no text is told before a model is loaded
        if sample_weight is not None:
            sample_weight, kept = _weights(sample_weight, len(columns["text"]))
            columns = {name: [values[row] for row in kept] for name, values in columns.items()}
        given = self.random_state  # an int seeds exactly what it seeds in spin_calibrate
        seed = given if isinstance(given, int) else int(check_random_state(given).randint(np.iinfo(np.int32).max))
        tokenizer = self._load_tokenizer()
        model = SpinForSequenceClassification.from_backbone(
            self._copy_backbone(), labels=names, problem_type=problem_type
        )
        self.result_ = spin_calibrate(
            model,
            tokenizer,
            columns,
            metric=metric,
            class_weight=class_weight,
            sample_weight=sample_weight,
            seed=seed,
            progress=self.verbose,
            **{name: getattr(self, name) for name in _CALIBRATION},
        )
        self.model_, self.tokenizer_ = model, tokenizer

    def _predict(self, X: Any) -> Prediction:
        check_is_fitted(self)
        return predict(self.model_, self.tokenizer_, *read_texts(_columns(X)), batch_tokens=self.batch_tokens)

    def _copy_backbone(self) -> PreTrainedModel:
        """A model that calibration may cut and freeze, while the next fit finds the original as it was."""
        if isinstance(self.backbone, torch.nn.Module):
            if self.dtype is not None:
                raise CalibrationError(
                    "dtype is for a backbone that is loaded here, by its name. Cast the model itself."
                )
            model = copy.deepcopy(self.backbone)
            return model if self.device is None else model.to(pick_device(self.device))
        source = str(self.backbone)
        return copy.deepcopy(_load(source, self.dtype, _stamp(source))).to(pick_device(self.device))

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        source = self.tokenizer
        if source is None:
            source = self.backbone
            if isinstance(source, torch.nn.Module):
                source = getattr(source, "name_or_path", "")
        if isinstance(source, (str, Path)):
            if not str(source):
                raise CalibrationError("This backbone does not say where its tokenizer is: pass tokenizer=... too.")
            return load_tokenizer(source)
        return copy.deepcopy(source)  # calibration writes its limit of tokens to it

    def __sklearn_clone__(self) -> Any:
        """As of every estimator, but a loaded model or tokenizer is shared, not copied: fitting never changes it."""
        bare = copy.copy(self)
        bare.backbone = bare.tokenizer = None
        made = super(_SpinEstimator, bare).__sklearn_clone__()
        made.backbone, made.tokenizer = self.backbone, self.tokenizer
        return made

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags


class SpinClassifier(ClassifierMixin, _SpinEstimator):
    """A scikit-learn classifier of texts: a frozen backbone, calibrated by :func:`spin_hf.spin_calibrate`.

    ``X`` is a list, array or Series of texts, or two columns (or a list of pairs) for sentence pairs. ``y`` holds one
    label per text, of any type that sorts, or an indicator matrix ``(n, labels)`` for several labels at once.

    Args:
        backbone: Hub id, folder, or a loaded model without a task head. ``fit`` works on a copy. A model loaded by name
            stays in memory for the next fit, one per process.
        tokenizer: Hub id, folder or loaded tokenizer; the backbone's by default.
        cv: folds of ``X`` that choose.
        validation_fraction: the part of ``X`` that is held out to choose by instead; with neither, as in
            ``spin_calibrate``.
        metric: as in ``spin_calibrate``; a function gets the labels as ``y`` has them.
        class_weight: ``"balanced"``, or weights by the labels of ``y`` (for several at once, by column or its name).
        preset, prefer, kinds, poolings, Cs, etas, max_features, max_depth, max_length, windows, overlap, exits,
            batch_tokens, cache_dir: as in ``spin_calibrate``. With ``exits``, ``model_.keep_exit(0)`` has the fitted
            estimator answer by that exit from then on. With ``cache_dir`` a grid search over what is not read from the
            backbone (Cs, etas, max_features, prefer) reads each fold's texts once.
        device: of the model; by default the best there is, or where a loaded model is.
        dtype: of the weights of a backbone that is loaded by name; as stored by default.
        random_state: seed of split, folds and bootstrap.
        verbose: show progress on standard error.

    Attributes:
        classes_: the labels, sorted; for an indicator matrix the numbers of its columns.
        model_: the fitted ``SpinForSequenceClassification``; ``id2label`` holds the labels as strings.
        tokenizer_: its tokenizer.
        result_: the :class:`CalibrationResult`.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SpinClassifier:
        """Calibrate a copy of the backbone.

        Args:
            X: texts or pairs, ``(n,)`` or ``(n, 2)``.
            y: labels ``(n,)``, or 0 and 1 ``(n, labels)``.
            sample_weight: one non-negative number per text; a text of weight 0 is left out.

        Raises:
            ValueError: for texts, labels or options that don't fit, before the work begins.
        """
        columns = _columns_to_fit(X, y)
        try:
            several = type_of_target(y, input_name="y") == "multilabel-indicator"
            if not several:
                check_classification_targets(y)
                classes, ids = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        except TypeError as error:  # they can't be sorted
            raise LabelTypeError(f"The labels in y must be of one type, with none missing: {error}.") from None
        if several:
            return self._fit_indicators(columns, y, sample_weight)
        if len(classes) < 2:
            raise OneClassError(f"y has 1 class only, {classes.tolist()[0]!r}; a classifier needs two classes.")
        self._calibrate(
            {**columns, "label": ids.tolist()},
            sample_weight,
            problem_type="single_label_classification",
            names=[str(label) for label in classes],
            metric=_on_labels(self.metric, classes) if callable(self.metric) else self.metric,
            class_weight=_by_id(self.class_weight, classes.tolist()),
        )
        self.classes_ = classes
        return self

    def _fit_indicators(self, columns: dict[str, list[Any]], y: Any, sample_weight: Any) -> SpinClassifier:
        matrix = (y.toarray() if issparse(y) else np.asarray(y)).astype(np.int64)
        names = list(map(str, y.columns)) if hasattr(y, "columns") else [f"LABEL_{i}" for i in range(matrix.shape[1])]
        self._calibrate(
            {**columns, "label": matrix.tolist()},
            sample_weight,
            problem_type="multi_label_classification",
            names=names,
            metric=self.metric,
            class_weight=self.class_weight,
        )
        self.classes_ = np.arange(len(names))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Labels of texts, ``(n,)`` as in ``y``, or 0 and 1 ``(n, labels)``."""
        prediction = self._predict(X)
        if prediction.problem_type == "multi_label_classification":
            return prediction.labels
        return np.asarray(self.classes_[prediction.labels])

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``(n, labels)`` in the order of ``classes_``; of several labels at once, each its own."""
        return self._predict(X).probabilities

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class SpinRegressor(RegressorMixin, _SpinEstimator):
    """A scikit-learn regressor of texts. Parameters and attributes are those of :class:`SpinClassifier`, without
    ``classes_``; ``class_weight`` is refused.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SpinRegressor:
        """Calibrate a copy of the backbone on numbers ``y``, ``(n,)``. See :meth:`SpinClassifier.fit`."""
        columns = _columns_to_fit(X, y)
        self._calibrate(
            {**columns, "label": column_or_1d(y, warn=True).tolist()},
            sample_weight,
            problem_type="regression",
            metric=self.metric,
            class_weight=self.class_weight,
        )
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The number of each text, ``(n,)``."""
        return self._predict(X).labels


def _columns(X: Any) -> dict[str, list[Any]]:
    """Texts, or first and second texts, as columns that the calibration's data reader knows."""
    if isinstance(X, (str, Mapping)) or not hasattr(X, "__len__") and not hasattr(X, "__iter__"):
        raise ColumnError(f"X is a {type(X).__name__}; pass a list, array or Series of texts, or of pairs of them.")
    rows = np.asarray(X, dtype=object).tolist() if hasattr(X, "columns") else list(getattr(X, "tolist", lambda: X)())
    if not rows:
        raise EmptyDatasetError("Found array with 0 sample(s) in X while a minimum of 1 is required.")
    nested = [row for row in rows if isinstance(row, (list, tuple))]
    widths = {len(row) for row in nested}
    if not nested:
        return {"text": rows}
    if len(nested) < len(rows) or widths not in ({1}, {2}):
        raise ColumnError("X should hold texts, or one or two columns of texts, the same for every row.")
    return dict(zip(("text", "text_pair"), map(list, zip(*rows, strict=True)), strict=False))


def _columns_to_fit(X: Any, y: Any) -> dict[str, list[Any]]:
    """The same, of at least two texts with as many labels."""
    columns = _columns(X)
    if y is None:
        raise MissingLabelsError("The estimator requires y to be passed, but the target y is None.")
    check_consistent_length(columns["text"], y)
    if len(columns["text"]) < 2:
        raise MissingLabelsError("A single text was given, n_samples = 1: there is nothing to learn from it.")
    return columns


def _weights(given: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the rows whose weight is not 0, and the numbers of these rows."""
    weights = np.full(rows, given, dtype=np.float64) if np.isscalar(given) else np.asarray(given, dtype=np.float64)
    if weights.shape != (rows,):
        raise ValueError(f"sample_weight.shape == {weights.shape}, expected {(rows,)}!")
    kept = np.flatnonzero(weights)
    if not len(kept):
        raise ValueError("Sample weights must contain at least one non-zero number.")
    return weights[kept], kept


def _on_labels(metric: Callable[[Any, Any], float], classes: np.ndarray) -> Callable[[Any, Any], float]:
    """A metric of ids from one of labels."""

    @functools.wraps(metric)
    def of_ids(truth: np.ndarray, predicted: np.ndarray) -> float:
        return metric(classes[truth], classes[predicted])

    return of_ids


def _by_id(spec: Any, classes: list[Any]) -> Any:
    """Class weights by id instead of by label."""
    if not isinstance(spec, Mapping):
        return spec
    unknown = [label for label in spec if label not in classes]
    if unknown:
        raise UnknownLabelError(f"class_weight names {unknown[0]!r}; the labels are {', '.join(map(repr, classes))}.")
    return {classes.index(label): weight for label, weight in spec.items()}


@functools.lru_cache(maxsize=1)
def _load(source: str, dtype: Any, stamp: tuple[Any, ...]) -> PreTrainedModel:
    """The backbone of this name, once for all fits of a search. On the CPU: only its copies take a device's room."""
    return load_backbone(source, {} if dtype is None else {"dtype": dtype})


def _stamp(source: str) -> tuple[Any, ...]:
    """What changes when the files of a folder do."""
    files = sorted(path for path in Path(source).glob("*") if path.is_file())
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
