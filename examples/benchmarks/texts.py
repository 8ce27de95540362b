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
DRAWN = 64  # neurons at each place
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
    """Texts with four labels: whether an FFN neuron of the last block is above its median, and whether a hidden one
    at three quarters of the depth is, both on average over the tokens; 5% are mislabelled.

    One tap carries half of a label: the best classifier should read both. Of the neurons drawn at each place it is
    the one that goes with the others least: much of a random backbone's states goes together. **Changes the model.**
    """
    rows, draw = make_rows(count, tokens), np.random.default_rng(1)
    last = model.spin.depth
    places = [(Tap("hidden", 3 * last // 4), "mean"), (Tap("ffn", last), "mean")]
    tokenizer = make_tokenizer(tokens)
    width = model.spin.backbone.config.hidden_size  # no tap is narrower
    drawn = [np.sort(draw.permutation(width)[:DRAWN]) for _ in places]
    groups = [FeatureGroup(*place, torch.from_numpy(own)) for place, own in zip(places, drawn, strict=True)]
    size = sum(map(len, drawn))
    model.spin.set_features(groups, torch.zeros(size), torch.ones(size), depth=last)
    model.config.pad_token_id = tokenizer.pad_token_id
    read = store_features(model, tokenizer, rows, batch_tokens=batch_tokens)["features"][:].double().numpy()
    standard = (read - read.mean(0)) / read.std(0).clip(1e-12)
    together = np.square(standard.T @ standard / count).mean(1)
    together[read.std(0) < 1e-12] = np.inf
    labels = np.zeros(count, dtype=np.int64)
    for values, own in zip(np.split(standard, 2, 1), np.split(together, 2), strict=True):
        column = values[:, own.argmin()]
        labels = 2 * labels + (column > np.median(column))
    return {**rows, "label": _mislabelled(labels, draw, 4)}


def _mislabelled(labels: np.ndarray, draw: np.random.Generator, classes: int = 2) -> list[int]:
    given: list[int] = np.where(draw.random(len(labels)) < MISLABELLED, (labels + 1) % classes, labels).tolist()
    return given
