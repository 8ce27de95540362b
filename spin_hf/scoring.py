"""Scoring a classifier on labelled rows, as values and as what a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from sklearn.metrics import confusion_matrix
from transformers import PreTrainedTokenizerBase

from .calibration.data import Rows, encode_labels, read_rows
from .modeling_spin import SpinForSequenceClassification
from .prediction import Prediction, evaluate, predict


def predict_rows(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    source: Any,
    *,
    min_confidence: float | None = None,
    **columns: Any,
) -> tuple[Rows, np.ndarray, Prediction]:
    """Labelled rows with their encoded labels and what a classifier says of them; arguments as :func:`score_rows`."""
    rows = read_rows(source, "test", **columns)
    names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    labels = encode_labels(rows, names, model.config.problem_type, "test")
    return rows, labels, predict(model, tokenizer, rows.texts, rows.pairs, min_confidence=min_confidence)


def score_rows(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    source: Any,
    *,
    min_confidence: float | None = None,
    **columns: Any,
) -> dict[str, Any]:
    """Metrics of a classifier on labelled rows, ready for JSON: what ``evaluation.json`` and a card hold.

    Args:
        model: a calibrated classifier.
        tokenizer: its own.
        source: labelled data in any form that ``spin_calibrate`` takes.
        min_confidence: also score with abstaining below this confidence.
        **columns: ``text_column`` and ``label_column``.

    Returns:
        ``rows``, ``truncated``, each metric (``None`` where it is no number) and, for one label per text, ``labels``
        and ``confusion_matrix`` with a row for each true label.
    """
    rows, labels, prediction = predict_rows(model, tokenizer, source, min_confidence=min_confidence, **columns)
    names = list(prediction.names)
    values: dict[str, Any] = {"rows": len(rows), "truncated": prediction.truncated}
    for name, value in evaluate(prediction, labels).items():
        values[name] = None if np.isnan(value) else value
    if model.config.problem_type == "single_label_classification":
        values["labels"] = names
        values["confusion_matrix"] = confusion_matrix(labels, prediction.labels, labels=range(len(names))).tolist()
    return values


def shown_scores(values: Mapping[str, Any]) -> Iterator[str | Table]:
    """What :func:`score_rows` found, as a line and, if there is a confusion matrix, a table."""
    metrics = {name: value for name, value in values.items() if isinstance(value, float)}
    yield f"\nTest, {values['rows']:,} texts: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    if "confusion_matrix" not in values:
        return
    table = Table(title="rows: true label, columns: predicted", title_justify="left", title_style="dim")
    table.add_column("")
    for name in values["labels"]:
        table.add_column(escape(name), justify="right")
    for i, (name, counts) in enumerate(zip(values["labels"], values["confusion_matrix"], strict=True)):
        cells = [f"[bold]{count}[/bold]" if i == j else str(count) for j, count in enumerate(counts)]
        table.add_row(escape(name), *cells)
    yield table
