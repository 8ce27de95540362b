"""Texts of so many words, with labels that words or deep neurons carry, and their tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from spin_hf import SpinForSequenceClassification
from spin_hf.features import FeatureGroup
from spin_hf.taps import Tap
from spin_hf.training import store_features

WORDS = 512  # every shape has so many ids
MISLABELLED = 0.05  # a label that could be read without fault would end the probes' paths at once


def make_tokenizer(tokens: int) -> hf.PreTrainedTokenizerFast:
    """One token per word and nothing else."""
    ids = {word: number for number, word in enumerate(["[PAD]", *(f"w{number}" for number in range(1, WORDS))])}
    made = Tokenizer(models.WordLevel(ids, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", model_max_length=tokens)


def make_rows(count: int, tokens: int, seed: int = 0) -> dict[str, list[Any]]:
    """Texts of so many words. Each label has 16 words that its texts have three times as often; 5% are mislabelled."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, count)
    odds = np.ones((2, WORDS - 1))
    odds[0, :16] = odds[1, 16:32] = 3
    texts = []
    for label in labels:
        words = draw.choice(WORDS - 1, size=tokens, p=odds[label] / odds[label].sum()) + 1
        texts.append(" ".join(f"w{word}" for word in words))
    return {"text": texts, "label": _mislabelled(labels, draw)}


def make_deep_rows(
    model: SpinForSequenceClassification, count: int, tokens: int, *, batch_tokens: int
) -> dict[str, list[Any]]:
    """Such texts, whose label is the sign of a sum of four neurons of this backbone; 5% are mislabelled.

    Two are FFN neurons and two hidden ones, at three quarters of its depth and in its last block, each kind once under
    the mean and once under the maximum: no single tap carries the label, and the best classifier reads the last block.
    **Changes the model in place.**
    """
    rows, draw = make_rows(count, tokens), np.random.default_rng(1)
    deep, last = 3 * model.spin.depth // 4, model.spin.depth
    places = [(Tap("ffn", deep), "max"), (Tap("hidden", deep), "mean"), (Tap("ffn", last), "mean")]
    places.append((Tap("hidden", last), "max"))
    tokenizer = make_tokenizer(tokens)
    neurons = draw.integers(0, model.spin.backbone.config.hidden_size, 4)  # no tap is narrower
    groups = [FeatureGroup(*place, torch.tensor([neuron])) for place, neuron in zip(places, neurons, strict=True)]
    model.spin.set_features(groups, torch.zeros(4), torch.ones(4), depth=last)
    model.config.pad_token_id = tokenizer.pad_token_id
    read = store_features(model, tokenizer, rows, batch_tokens=batch_tokens)["features"][:].double().numpy()
    total = ((read - read.mean(0)) / read.std(0)).sum(1)
    return {**rows, "label": _mislabelled((total > np.median(total)).astype(np.int64), draw)}


def _mislabelled(labels: np.ndarray, draw: np.random.Generator) -> list[int]:
    swapped: list[int] = np.where(draw.random(len(labels)) < MISLABELLED, 1 - labels, labels).tolist()
    return swapped
