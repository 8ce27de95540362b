"""What is to be predicted: how labels become targets, scores become predictions, and predictions become a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn import metrics
from torch import Tensor

from .errors import CalibrationError, UnknownLabelError
from .losses import Logistic, Loss, Multinomial, Squared

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Metric = Callable[[np.ndarray, np.ndarray], float]

METRICS: dict[str, tuple[Metric, tuple[str, ...]]] = {
    "accuracy": (metrics.accuracy_score, ("single_label_classification",)),
    "macro_f1": (
        lambda y, p: metrics.f1_score(y, p, average="macro", zero_division=0.0),
        ("single_label_classification", "multi_label_classification"),
    ),
    "micro_f1": (
        lambda y, p: metrics.f1_score(y, p, average="micro", zero_division=0.0),
        ("single_label_classification", "multi_label_classification"),
    ),
    "matthews": (metrics.matthews_corrcoef, ("single_label_classification",)),
    "r2": (metrics.r2_score, ("regression",)),
}
_DEFAULT_METRIC = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "micro_f1",
    "regression": "r2",
}
_TITLES = {"macro_f1": "Macro F1", "micro_f1": "Micro F1", "matthews": "Matthews correlation", "r2": "R²"}


def metric_title(metric: str) -> str:
    """A metric's name, as a reader knows it."""
    return _TITLES.get(metric) or metric.replace("_", " ").capitalize()


@dataclass(frozen=True)
class Task:
    """Problem type, label names, loss and metric of one calibration.

    Labels are arrays: class ids ``(n,)``, indicators ``(n, num_labels)``, or numbers ``(n,)``. Scores of the solver
    have ``columns`` columns, logits of the model ``num_labels``: they differ for two classes, where one column serves.
    """

    problem_type: ProblemType
    names: tuple[str, ...]
    metric_name: str
    metric: Metric
    multiclass: Literal["multinomial", "ovr"] = "multinomial"

    @classmethod
    def make(
        cls,
        problem_type: ProblemType,
        names: tuple[str, ...],
        metric: str | Metric | None,
        multiclass: Literal["multinomial", "ovr"],
    ) -> Task:
        """Check and complete the choice of metric. Raises :class:`CalibrationError` where they do not go together."""
        if multiclass not in ("multinomial", "ovr"):
            raise CalibrationError(f"multiclass must be 'multinomial' or 'ovr'; got {multiclass!r}.")
        metric = metric or _DEFAULT_METRIC[problem_type]
        if callable(metric):
            return cls(problem_type, names, getattr(metric, "__name__", "metric"), metric, multiclass)
        fitting = [name for name, (_, problems) in METRICS.items() if problem_type in problems]
        if metric not in fitting:
            raise CalibrationError(
                f"metric={metric!r} is not one for {problem_type}. Choose from {', '.join(fitting)}, or give a "
                "function of (labels, predictions)."
            )
        return cls(problem_type, names, metric, METRICS[metric][0], multiclass)

    @property
    def binary(self) -> bool:
        return self.problem_type == "single_label_classification" and len(self.names) == 2

    @property
    def loss(self) -> Loss:
        if self.problem_type == "regression":
            return Squared()
        if self.problem_type == "multi_label_classification" or self.binary or self.multiclass == "ovr":
            return Logistic()
        return Multinomial()

    def targets(self, labels: np.ndarray) -> Tensor:
        """Labels as the solver's targets, ``(n, columns)`` float32."""
        values = torch.from_numpy(np.ascontiguousarray(labels))
        if self.problem_type == "single_label_classification" and not self.binary:
            return torch.nn.functional.one_hot(values.long(), len(self.names)).float()
        return values.float().reshape(len(values), -1)

    def predict(self, scores: Tensor) -> np.ndarray:
        """Solver scores ``(n, columns)`` as predictions of the labels' own kind."""
        if self.problem_type == "regression":
            return np.asarray(scores[:, 0].cpu().numpy())
        if self.problem_type == "multi_label_classification":
            return np.asarray((scores > 0).cpu().numpy().astype(np.int64))
        if self.binary:
            return np.asarray((scores[:, 0] > 0).cpu().numpy().astype(np.int64))
        return np.asarray(scores.argmax(1).cpu().numpy())

    def score(self, labels: np.ndarray, predictions: np.ndarray) -> float:
        """Higher is better. Raises :class:`CalibrationError` where the metric gives no finite number."""
        value = float(self.metric(labels, predictions))
        if not np.isfinite(value):
            raise CalibrationError(
                f"The metric {self.metric_name} gave {value} on {len(labels)} evaluation rows. "
                "Give more of them, with different labels (r2 needs two different values), or another metric."
            )
        return value

    def as_logits(self, weight: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
        """The model's ``score`` layer for a solution ``(columns, d)``: two classes share one column, half each."""
        if not self.binary:
            return weight, intercept
        return torch.cat([-weight, weight]) / 2, torch.cat([-intercept, intercept]) / 2

    def class_weights(self, labels: np.ndarray, spec: str | Mapping[Any, float] | None) -> list[float] | None:
        """Weight of each label: for ``"balanced"`` n / (classes x count); for multi-label absent / present rows."""
        if spec is None:
            return None
        if self.problem_type == "regression":
            raise CalibrationError("class_weight has no meaning for regression; use sample_weight.")
        multi = self.problem_type == "multi_label_classification"
        if spec == "balanced":
            counts = labels.sum(0) if multi else np.bincount(labels, minlength=len(self.names))
            if multi:
                return [float(max(len(labels) - c, 1) / max(c, 1)) for c in counts]
            return [float(len(labels) / (len(counts) * max(c, 1))) for c in counts]
        if not isinstance(spec, Mapping):
            raise CalibrationError(f"class_weight must be 'balanced' or a dict of label to weight; got {spec!r}.")
        weights = dict.fromkeys(self.names, 1.0)
        for key, value in spec.items():
            name = self.names[key] if isinstance(key, (int, np.integer)) and 0 <= key < len(self.names) else key
            if name not in weights:
                raise UnknownLabelError(f"class_weight names {key!r}; the labels are {', '.join(self.names)}.")
            if not isinstance(value, (int, float, np.integer, np.floating)) or not value > 0:
                raise CalibrationError(f"class_weight of {key!r} must be positive; got {value!r}.")
            weights[name] = float(value)
        return list(weights.values())

    def row_weights(self, labels: np.ndarray, weights: list[float] | None, sample: np.ndarray | None) -> Tensor:
        """Weights of the loss: ``(n, 1)``, or ``(n, num_labels)`` for weighted multi-label."""
        rows = torch.ones(len(labels), 1) if sample is None else torch.from_numpy(sample).float()[:, None]
        if weights is None:
            return rows
        by_label = torch.tensor(weights)
        if self.problem_type == "multi_label_classification":
            present = torch.from_numpy(labels).bool()
            return rows * torch.where(present, by_label, torch.ones_like(by_label))
        return rows * by_label[torch.from_numpy(labels).long()][:, None]
