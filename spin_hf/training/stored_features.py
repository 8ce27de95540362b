"""Reading the features once, so that head and gates train without the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..calibration.data import encode_labels, read_rows
from ..modeling_spin import SpinForSequenceClassification
from ..prediction import batches, encode_for


@torch.no_grad()
def store_features(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    batch_tokens: int = 4096,
) -> datasets.Dataset:
    """Run the backbone over labelled texts once, and give ``Trainer`` a data set of features to train on.

    With a frozen backbone the features of a text never change; ``model(features=..., labels=...)`` starts from them, so
    that an epoch costs a matrix product. Needs memory for ``4 x texts x features`` bytes.

    Args:
        model: a calibrated classifier. The features are those before its gates, if it has any.
        tokenizer: its own.
        data: in any form that :func:`spin_hf.spin_calibrate` takes.
        text_column, label_column: as there.
        batch_tokens: padded tokens per batch.

    Returns:
        A ``datasets.Dataset`` with the columns ``features`` (``num_features`` float32) and ``labels``, in torch format.

    Raises:
        CalibrationError: one of its kinds, for data, labels or a tokenizer that don't fit.
        NotCalibratedError: if the model has no features.
        ValueError: if its backbone is being trained, so that features would go stale.
    """
    if any(parameter.requires_grad for parameter in model.spin.backbone.parameters()):
        raise ValueError(
            "The backbone is open to training, so that its features will change. Call model.freeze_backbone() first, "
            "or train on the texts."
        )
    rows = read_rows(data, "input", text_column=text_column, label_column=label_column)
    names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    labels = encode_labels(rows, names, model.config.problem_type, "input")
    encoded = encode_for(model, tokenizer, rows.texts, rows.pairs)
    model.eval()
    features = np.empty((len(rows), model.config.num_features), np.float32)
    for some, batch in batches(model, tokenizer, encoded, batch_tokens):
        features[some] = model.spin(**batch, return_dict=True).features.cpu().numpy()
    if model.config.problem_type != "single_label_classification":
        labels = labels.astype(np.float32)
    return datasets.Dataset.from_dict({"features": features, "labels": labels}).with_format("torch")
