"""Predicting many texts: batches sorted by length, results in the order given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import mean_absolute_error
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .calibration.confidence import expected_calibration_error, text_confidence
from .calibration.data import read_texts
from .calibration.errors import ConfidenceError, TextPairError, demand_whole
from .calibration.extraction import Encoded, check_tokenizer, encode, pad, plan_batches, window
from .calibration.fingerprint import check_same_tokenizer
from .calibration.task import METRICS
from .exits import demand_exit
from .modeling_spin import NotCalibratedError, SpinForSequenceClassification
from .taps import model_device
from .windows import Windows

MOST_PADDING = 0.1  # of a batch, as a share of its tokens: a forward more costs less than more padding than this


@dataclass(frozen=True)
class Prediction:
    """Logits and probabilities ``(n, num_labels)`` of some texts; for regression both are the predicted numbers.

    ``truncated`` texts were cut to the model's window; none where it reads long texts in windows. Texts of a
    :attr:`confidence` below ``min_confidence`` are abstained from: their rows say so instead of naming a label. The
    arrays hold all texts.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    names: tuple[str, ...]
    problem_type: str
    truncated: int
    min_confidence: float | None = None

    @property
    def labels(self) -> np.ndarray:
        """Class ids ``(n,)``, indicators ``(n, num_labels)`` or numbers ``(n,)``, as :mod:`spin_hf` encodes labels."""
        if self.problem_type == "regression":
            return np.asarray(self.logits[:, 0])
        if self.problem_type == "multi_label_classification":
            return np.asarray((self.logits > 0).astype(np.int64))
        return np.asarray(self.logits.argmax(1))

    @property
    def confidence(self) -> np.ndarray:
        """Probability of each text's label ``(n,)``; for multi-label that of its least sure decision.

        Raises:
            ConfidenceError: for regression.
        """
        if self.problem_type == "regression":
            raise ConfidenceError("Regression predicts a number without a confidence.")
        return text_confidence(self.probabilities, multi_label=self.problem_type == "multi_label_classification")

    @property
    def abstained(self) -> np.ndarray:
        """Which texts are abstained from, booleans ``(n,)``; none without ``min_confidence``."""
        if self.min_confidence is None:
            return np.zeros(len(self.logits), dtype=bool)
        return self.confidence < self.min_confidence

    def row(self, index: int) -> dict[str, Any]:
        """One prediction as plain values: label (or labels, or value) and the probability of each name.

        With ``min_confidence`` also whether it was abstained from; if so, label or labels are ``None``.
        """
        if self.problem_type == "regression":
            return {"value": float(self.logits[index, 0])}
        scores = {name: float(p) for name, p in zip(self.names, self.probabilities[index], strict=True)}
        multi_label = self.problem_type == "multi_label_classification"
        answer: Any = (
            [self.names[i] for i in np.flatnonzero(self.labels[index])]
            if multi_label
            else self.names[int(self.labels[index])]
        )
        row = {"labels" if multi_label else "label": answer, "scores": scores}
        if self.min_confidence is None:
            return row
        abstained = bool(self.abstained[index])
        return {**row, **({next(iter(row)): None} if abstained else {}), "abstained": abstained}


def encode_for(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
) -> Encoded:
    """Tokenize as calibration did.

    Raises:
        CalibrationError: one of its kinds, for texts or a tokenizer that don't fit, before any work.
        NotCalibratedError: likewise.
    """
    if not model.calibrated:
        raise NotCalibratedError("This model was never calibrated; run spin_calibrate first.")
    if model.config.text_pairs not in (None, pairs is not None):
        wanted = "pairs of texts: give the second ones as pairs=" if pairs is None else "single texts: leave pairs out"
        raise TextPairError(f"This classifier was calibrated on {wanted}.")
    check_tokenizer(tokenizer, model)
    check_same_tokenizer(tokenizer, model.config.tokenizer)
    texts, pairs = read_texts({"text": texts} if pairs is None else {"text": texts, "text_pair": pairs})
    windows = None if model.config.windows is None else Windows(**model.config.windows)
    return encode(tokenizer, texts, pairs, model.config.max_text_tokens or window(tokenizer, model), windows)


def batches(
    model: SpinForSequenceClassification, tokenizer: PreTrainedTokenizerBase, encoded: Encoded, batch_tokens: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """The rows of each batch, and its inputs on the model's device."""
    device = model_device(model)
    for rows in plan_batches(encoded.lengths, batch_tokens, most_padding=MOST_PADDING):
        batch = {
            "input_ids": pad([encoded.input_ids[row] for row in rows], int(tokenizer.pad_token_id)),
            "attention_mask": pad([[1] * encoded.lengths[row] for row in rows], 0),
        }
        if encoded.token_type_ids is not None:
            batch["token_type_ids"] = pad([encoded.token_type_ids[row] for row in rows], 0)
        yield rows, {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def predict(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    batch_tokens: int = 4096,
    min_confidence: float | None = None,
    exit: int | None = None,
) -> Prediction:
    """Predict texts (or sentence pairs) with a calibrated model.

    Args:
        model: a calibrated classifier.
        tokenizer: the one it was calibrated with.
        texts: the texts.
        pairs: second texts, for sentence pairs.
        batch_tokens: padded tokens per batch.
        min_confidence: abstain from texts of a lower confidence, between 0 and 1.
            ``result.confidence.threshold_for(accuracy=0.95)`` says which one reaches an accuracy.
        exit: answer with this one of ``model.config.exits``, see ``spin_calibrate(..., exits=True)``.

    Raises:
        CalibrationError: one of its kinds, for texts, options or a tokenizer that don't fit, before any work.
        ExitError: for an exit that there is not, likewise.
        NotCalibratedError: likewise.
    """
    _check_min_confidence(min_confidence, model.config.problem_type)
    demand_whole("batch_tokens", batch_tokens, least=1)
    encoded = encode_for(model, tokenizer, texts, pairs)
    if exit is not None:
        demand_exit(model.exits, exit)
    model.eval()
    logits = torch.empty(len(encoded.input_ids), model.config.num_labels)
    for rows, batch in batches(model, tokenizer, encoded, batch_tokens):
        logits[rows] = model(**batch, exit=exit).logits.cpu()
    problem_type = model.config.problem_type
    probabilities = probabilities_of(logits, problem_type)
    names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    return Prediction(logits.numpy(), probabilities.numpy(), names, problem_type, encoded.truncated, min_confidence)


def probabilities_of(logits: Tensor, problem_type: str) -> Tensor:
    """Probabilities ``(n, num_labels)`` of logits; for regression the numbers themselves."""
    if problem_type == "regression":
        return logits
    return logits.sigmoid() if problem_type == "multi_label_classification" else logits.softmax(-1)


def evaluate(prediction: Prediction, labels: np.ndarray) -> dict[str, float]:
    """The usual metrics of a problem type, over all texts.

    With ``min_confidence`` also ``coverage``, the share of texts answered, and ``selective_accuracy``, the accuracy on
    those (NaN where none was; for multi-label the share of texts whose labels are all right).
    """
    predicted = prediction.labels
    scores = {name: float(METRICS[name][0](labels, predicted)) for name in _REPORTED[prediction.problem_type]}
    if prediction.problem_type == "regression":
        return {**scores, "mean_absolute_error": float(mean_absolute_error(labels, predicted))}
    scores["expected_calibration_error"] = expected_calibration_error(labels, prediction.probabilities)
    if prediction.min_confidence is not None:
        kept = ~prediction.abstained
        accuracy, _ = METRICS["accuracy"]
        scores["coverage"] = float(kept.mean())
        scores["selective_accuracy"] = float(accuracy(labels[kept], predicted[kept])) if kept.any() else float("nan")
    return scores


_REPORTED = {
    "single_label_classification": ("accuracy", "macro_f1", "micro_f1", "matthews"),
    "multi_label_classification": ("accuracy", "macro_f1", "micro_f1"),
    "regression": ("r2",),
}


def _check_min_confidence(value: float | None, problem_type: str) -> None:
    if value is None:
        return
    if problem_type == "regression":
        raise ConfidenceError("Regression predicts a number without a confidence; leave min_confidence out.")
    if not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise ConfidenceError(f"min_confidence must be a probability, between 0 and 1; got {value!r}.")
