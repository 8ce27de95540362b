"""Predicting many texts: batches sorted by length, results in the order given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn import metrics
from transformers import PreTrainedTokenizerBase

from .calibration.extraction import check_tokenizer, encode, pad, plan_batches, window
from .calibration.fingerprint import check_same_tokenizer
from .modeling_spin import NotCalibratedError, SpinForSequenceClassification
from .taps import model_device


@dataclass(frozen=True)
class Prediction:
    """Logits and probabilities ``(n, num_labels)`` of some texts; for regression both are the predicted numbers.

    ``truncated`` texts were cut to the model's window.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    names: tuple[str, ...]
    problem_type: str
    truncated: int

    @property
    def labels(self) -> np.ndarray:
        """Class ids ``(n,)``, indicators ``(n, num_labels)`` or numbers ``(n,)``, as :mod:`spin_hf` encodes labels."""
        if self.problem_type == "regression":
            return np.asarray(self.logits[:, 0])
        if self.problem_type == "multi_label_classification":
            return np.asarray((self.logits > 0).astype(np.int64))
        return np.asarray(self.logits.argmax(1))

    def row(self, index: int) -> dict[str, Any]:
        """One prediction as plain values: label (or labels, or value) and the probability of each name."""
        if self.problem_type == "regression":
            return {"value": float(self.logits[index, 0])}
        scores = {name: float(p) for name, p in zip(self.names, self.probabilities[index], strict=True)}
        if self.problem_type == "multi_label_classification":
            return {"labels": [self.names[i] for i in np.flatnonzero(self.labels[index])], "scores": scores}
        return {"label": self.names[int(self.labels[index])], "scores": scores}


@torch.no_grad()
def predict(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    batch_tokens: int = 4096,
) -> Prediction:
    """Predict texts (or sentence pairs) with a calibrated model.

    Raises:
        NotCalibratedError, PadTokenError, TokenizerMismatchError: before any work.
    """
    if not model.calibrated:
        raise NotCalibratedError("This model was never calibrated; run spin_calibrate first.")
    check_tokenizer(tokenizer, model)
    check_same_tokenizer(tokenizer, model.config.tokenizer)
    limit = model.config.max_text_tokens or window(tokenizer, model)
    encoded = encode(tokenizer, list(texts), None if pairs is None else list(pairs), limit)
    model.eval()
    device = model_device(model)
    logits = torch.empty(len(encoded.input_ids), model.config.num_labels)
    for rows in plan_batches(encoded.lengths, batch_tokens):
        batch = {
            "input_ids": pad([encoded.input_ids[row] for row in rows], int(tokenizer.pad_token_id)),
            "attention_mask": pad([[1] * encoded.lengths[row] for row in rows], 0),
        }
        if encoded.token_type_ids is not None:
            batch["token_type_ids"] = pad([encoded.token_type_ids[row] for row in rows], 0)
        logits[rows] = model(**{name: value.to(device) for name, value in batch.items()}).logits.cpu()
    problem_type = model.config.problem_type
    if problem_type == "regression":
        probabilities = logits
    elif problem_type == "multi_label_classification":
        probabilities = logits.sigmoid()
    else:
        probabilities = logits.softmax(-1)
    names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    return Prediction(logits.numpy(), probabilities.numpy(), names, problem_type, encoded.truncated)


def evaluate(prediction: Prediction, labels: np.ndarray) -> dict[str, float]:
    """The usual metrics of a problem type."""
    predicted = prediction.labels
    if prediction.problem_type == "regression":
        return {
            "r2": float(metrics.r2_score(labels, predicted)),
            "mean_absolute_error": float(metrics.mean_absolute_error(labels, predicted)),
        }
    scores = {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "macro_f1": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "micro_f1": float(metrics.f1_score(labels, predicted, average="micro", zero_division=0.0)),
    }
    if prediction.problem_type == "single_label_classification":
        scores["matthews"] = float(metrics.matthews_corrcoef(labels, predicted))
    return scores
