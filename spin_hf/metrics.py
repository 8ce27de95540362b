"""The metrics of calibration as modules of Hugging Face's ``evaluate``, without a download.

``load("macro_f1")`` gives one; so does ``evaluate.load(spin_hf.metrics.__file__, "macro_f1")``, since this file is
itself what ``evaluate`` calls a metric script. In ``evaluate.evaluator`` name the classifier by its folder, or give the
model and the tokenizer: ``evaluate`` 0.4 can't take a pipeline object under transformers 5, because it looks for a
TensorFlow class that is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from spin_hf.calibration.confidence import PROBABILITY_METRICS
from spin_hf.calibration.errors import CalibrationError, ConfidenceError
from spin_hf.calibration.task import METRICS

NAMES = (*METRICS, *PROBABILITY_METRICS)

_CITATION = """\
@inproceedings{guo2017calibration,
    title = "On Calibration of Modern Neural Networks",
    author = "Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.",
    booktitle = "International Conference on Machine Learning",
    year = "2017"
}"""
_ID, _TEXT, _NUMBER = (datasets.Value(kind) for kind in ("int64", "string", "float64"))


class SpinMetric(evaluate.Metric):
    """One metric; ``config_name`` says which. ``compute`` returns ``{config_name: value}``.

    Those of predictions take ``predictions`` and ``references``: class ids or names, rows of indicators for
    multi-label, or numbers for regression. Those of probabilities take ``prediction_scores``, a row of ``num_labels``
    probabilities per text, and ``references`` as class ids or rows of indicators.

    Raises:
        CalibrationError: for a name that is none of ``NAMES``.
        ConfidenceError: for scores that are no probabilities, or do not fit the references.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in NAMES:
            raise CalibrationError(
                f"There is no metric {self.config_name!r}. Choose from {', '.join(NAMES)}: "
                f'spin_hf.metrics.load("{NAMES[0]}").'
            )
        return evaluate.MetricInfo(
            description=f"{self.config_name} as spin_hf computes it.",
            citation=_CITATION if self.config_name in PROBABILITY_METRICS else "",
            inputs_description=type(self).__doc__ or "",
            features=_features(self.config_name),
        )

    def _compute(self, **columns: Sequence[Any]) -> dict[str, float]:
        references = np.asarray(columns["references"])
        if self.config_name in METRICS:
            value = METRICS[self.config_name][0](references, np.asarray(columns["predictions"]))
        else:
            probabilities = np.asarray(columns["prediction_scores"])
            _check(probabilities, references)
            value = PROBABILITY_METRICS[self.config_name](references, probabilities)
        return {self.config_name: float(value)}


def load(name: str, **options: Any) -> SpinMetric:
    """A metric by its name, one of ``NAMES``.

    Args:
        name: for instance ``"macro_f1"`` or ``"expected_calibration_error"``.
        **options: for ``evaluate.Metric``: ``keep_in_memory``, ``num_process``, ``experiment_id`` and so on.

    Raises:
        CalibrationError: for an unknown name.
    """
    return SpinMetric(config_name=name, **options)


def _features(name: str) -> list[datasets.Features]:
    """The forms of one row that a metric takes; ``evaluate`` uses the first that fits."""
    if name in PROBABILITY_METRICS:
        scores = datasets.Sequence(_NUMBER)
        return [
            datasets.Features({"prediction_scores": scores, "references": kind})
            for kind in (_ID, datasets.Sequence(_ID))
        ]
    _, problem_types = METRICS[name]
    kinds: Mapping[str, tuple[Any, ...]] = {
        "single_label_classification": (_ID, _TEXT),
        "multi_label_classification": (datasets.Sequence(_ID),),
        "regression": (_NUMBER,),
    }
    return [
        datasets.Features({"predictions": kind, "references": kind})
        for problem_type in problem_types
        for kind in kinds[problem_type]
    ]


def _check(probabilities: np.ndarray, references: np.ndarray) -> None:
    if probabilities.ndim != 2 or references.shape not in (probabilities.shape[:1], probabilities.shape):
        raise ConfidenceError(
            f"prediction_scores should be (n, num_labels) and references (n,) or (n, num_labels); got "
            f"{probabilities.shape} and {references.shape}."
        )
    if not (np.isfinite(probabilities).all() and probabilities.min() >= 0 and probabilities.max() <= 1 + 1e-6):
        raise ConfidenceError("prediction_scores should be probabilities between 0 and 1; softmax the logits first.")
    ids = probabilities.shape[1] if references.ndim == 1 else 2
    if references.min() < 0 or references.max() >= ids:
        raise ConfidenceError(f"references should lie between 0 and {ids - 1}.")
