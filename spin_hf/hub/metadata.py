"""The card's YAML head, in the Hub's own vocabulary: what its page shows and its search finds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..calibration import CalibrationResult
from ..calibration.task import metric_title
from .folder import Checkpoint

PAPER = "2311.15983"
FROZEN = "frozen-backbone"
TAGS = ["spin_hf", "text-classification", FROZEN, f"arxiv:{PAPER}"]
UNNAMED = "unknown"  # data, where a person named none: the Hub wants a name
# Fields that are written anew with each card; all others are a person's.
WRITTEN = ("library_name", "pipeline_tag", "metrics", "model-index", "base_model_relation", "tags")

# Our metrics: the Hub's name, and the Hub's arguments.
_METRICS: dict[str, tuple[str, dict[str, str] | None]] = {
    "accuracy": ("accuracy", None),
    "macro_f1": ("f1", {"average": "macro"}),
    "micro_f1": ("f1", {"average": "micro"}),
    "matthews": ("matthews_correlation", None),
    "r2": ("r_squared", None),
    "mean_absolute_error": ("mae", None),
}


def base_model_of(checkpoint: Checkpoint, told: Mapping[str, Any]) -> str | None:
    """Hub id of the backbone, as a person said or as the config has it."""
    named = told.get("base_model")
    return (named[0] if isinstance(named, list) and named else named) or checkpoint.backbone_hub_id


def metadata(
    checkpoint: Checkpoint,
    result: CalibrationResult,
    told: Mapping[str, Any],
    test: Mapping[str, Any] | None,
    name: str,
) -> ModelCardData:
    """The head of a card.

    Args:
        checkpoint: of the folder.
        result: the record of the calibration.
        told: what only a person knows; see :func:`spin_hf.hub.write_card`.
        test: scores on rows that chose nothing, if any.
        name: of the model.
    """
    kept = {key: value for key, value in told.items() if key not in ("more_tags", "dataset_name", "dataset_type")}
    base_model = base_model_of(checkpoint, told)
    known = [_METRICS[key][0] for key in [result.metric, *(key for key, _ in scores(test))] if key in _METRICS]
    return ModelCardData(
        **{
            **kept,
            "base_model": base_model,
            # The Hub takes a model for a fine-tuned one unless it is told; these are the backbone's own weights.
            "base_model_relation": "adapter" if base_model and checkpoint.form == "head" else None,
            # The Hub shows how to load by this name; transformers alone can only load the self-contained form.
            "library_name": "transformers" if checkpoint.form == "self_contained" else "spin_hf",
            "pipeline_tag": "text-classification",
            "tags": [*(tag for tag in TAGS if tag != FROZEN or not was_trained(result)), *told.get("more_tags", [])],
            "metrics": list(dict.fromkeys(known)),
            "model_name": name,
            "eval_results": _eval_results(result, told, test),
        }
    )


def _eval_results(
    result: CalibrationResult, told: Mapping[str, Any], test: Mapping[str, Any] | None
) -> list[EvalResult]:
    """The test's scores; without a test the one that chose the model, named as such."""
    if test is not None:
        found = [("test", key, value, "") for key, value in scores(test)]
    else:
        found = [("validation", result.metric, result.chosen.score, " on the rows that chose the model")]
    results = []
    for split, key, value, remark in found:
        kind, arguments = _METRICS.get(key, (key, None))
        results.append(
            EvalResult(
                task_type="text-classification",
                task_name="Text Classification",
                dataset_type=told.get("dataset_type", UNNAMED),
                dataset_name=told.get("dataset_name", UNNAMED),
                dataset_split=split,
                metric_type=kind,
                metric_name=metric_title(key) + remark,
                metric_value=None if value is None else round(value, 4),
                metric_args=arguments,
            )
        )
    return results


def was_trained(result: CalibrationResult) -> bool:
    """Whether the calibration was one of a backbone that had been trained or adapted before."""
    return bool(result.settings.get("recalibrate"))


def scores(test: Mapping[str, Any] | None) -> list[tuple[str, float]]:
    """The metrics among the values of a test."""
    return [(key, value) for key, value in (test or {}).items() if isinstance(value, float)]


def standard_error(metric: str, score: float | None, rows: int) -> float | None:
    """Of an accuracy, which is a binomial share; ``None`` for other metrics."""
    return math.sqrt(score * (1 - score) / rows) if metric == "accuracy" and score is not None else None
