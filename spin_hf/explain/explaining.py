"""``explain``: the contributions to every logit of some texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibration.errors import demand_whole
from ..calibration.extraction import Encoded, pad, plan_batches
from ..exits import demand_exit
from ..modeling_spin import SpinForSequenceClassification
from ..prediction import encode_for, probabilities_of
from ..taps import model_device
from .attribution import ExplanationError, Head, attribute, effective_head, starts_with_special
from .result import Explanation, Explanations, Feature, Reading
from .words import Piece, pieces_of, tokenized

TOLERANCE = 1e-4


def explain(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | Iterator[str],
    pairs: Sequence[str] | None = None,
    *,
    batch_tokens: int = 4096,
    exit: int | None = None,
) -> Explanations:
    """Split each logit of some texts into what their words, and the model's blocks and neurons, add to it.

    Nothing is approximated: the head is linear on pooled neurons, so that a logit is a base and a sum over features,
    and each feature a sum over tokens; see :mod:`spin_hf.explain.attribution`. The base is the logit of a text whose
    every feature is at its mean in training. That a token adds something says that the backbone's activations at its
    place do; these hold what the backbone took from the rest of the text.

    Args:
        model: a calibrated classifier.
        tokenizer: the one it was calibrated with. One without offsets (``tokenizer.is_fast`` is false) can't tell
            words, so that each token is one.
        texts: the texts.
        pairs: second texts, for sentence pairs.
        batch_tokens: padded tokens per batch.
        exit: split the logits of this one of ``model.config.exits``, see ``spin_calibrate(..., exits=True)``.

    Returns:
        An :class:`Explanation` for each text.

    Raises:
        CalibrationError: one of its kinds, for texts, options or a tokenizer that don't fit, before any work.
        ExitError: for an exit that there is not, likewise.
        NotCalibratedError: likewise.
        ExplanationError: for a backbone that works on other positions than its tokens, and where the parts miss a logit
            by more than 1e-4 of it, or of 1.
    """
    demand_whole("batch_tokens", batch_tokens, least=1)
    if isinstance(texts, Iterator):
        texts = list(texts)
    encoded = encode_for(model, tokenizer, texts, pairs)
    texts, pairs = list(texts), None if pairs is None else list(pairs)
    model.eval()
    reading, head = read_head(model, tokenizer, exit)
    logits = np.empty((len(encoded.lengths), len(reading.names)), dtype=np.float32)
    features = np.empty((len(logits), len(reading.features)), dtype=np.float32)
    parts: dict[int, np.ndarray] = {}
    for rows, inputs in input_batches(model, tokenizer, encoded, batch_tokens):
        read, added = attribute(model.spin, head.selection, head.weight, *inputs)
        features[rows] = read.cpu().numpy()
        with torch.no_grad():
            logits[rows] = _answer(model, read, exit).cpu().numpy()
        for row, own in zip(rows, added.cpu().double().numpy(), strict=True):
            parts[row] = _in_order(model, own, encoded.lengths[row])
    error = max(
        _error(logits, reading.base + features.astype(np.float64) @ reading.weight),
        _error(logits, reading.base + np.stack([parts[row].sum(0) for row in range(len(logits))])),
    )
    if not error <= TOLERANCE:
        raise ExplanationError(
            f"The parts of a logit miss it by {error:.1e} of its size; at most {TOLERANCE:.0e} is rounding. Are the "
            "activations finite, and is nothing of the model compiled, replaced or run at random?"
        )
    probabilities = probabilities_of(torch.from_numpy(logits), reading.problem_type).numpy()
    cut = _cut(tokenizer, encoded, texts, pairs)
    start = start_piece(model, tokenizer)
    found = []
    for row, pieces in enumerate(pieces_of(tokenizer, encoded, texts, pairs)):
        own_texts = (texts[row],) if pairs is None else (texts[row], pairs[row])
        tokens, words = tokenized(own_texts, [*start, *pieces])
        arrays = logits[row], probabilities[row], features[row]
        found.append(
            Explanation(
                texts[row], None if pairs is None else pairs[row], *arrays, tokens, parts[row], words, cut[row], reading
            )
        )
    return Explanations(tuple(found), reading, error)


def token_features(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    pair: str | None = None,
    *,
    exit: int | None = None,
) -> np.ndarray:
    """What each token of one text adds to each feature.

    Its sum over tokens is the feature vector; times ``reading.weight`` it is what a token adds to a logit through a
    feature.

    Args:
        model, tokenizer: as in :func:`explain`.
        text, pair: the text, and the second one of a pair.
        exit: the features of this exit.

    Returns:
        ``(tokens, num_features)`` in standard deviations of the feature, in the order of ``Explanation.tokens``.

    Raises:
        CalibrationError, ExitError, ExplanationError, NotCalibratedError: as :func:`explain` does.
    """
    encoded = encode_for(model, tokenizer, [text], None if pair is None else [pair])
    model.eval()
    ((_, inputs),) = input_batches(model, tokenizer, encoded, 1)
    _, added = attribute(model.spin, effective_head(model, exit).selection, None, *inputs)
    return _in_order(model, added[0].cpu().double().numpy(), encoded.lengths[0])


def read_head(
    model: SpinForSequenceClassification, tokenizer: PreTrainedTokenizerBase, exit: int | None = None
) -> tuple[Reading, Head]:
    """What all explanations of a classifier, or of one of its exits, share; and the head on the model's device."""
    head = effective_head(model, exit)
    features = tuple(
        Feature(str(group.tap), neuron, group.pooling)
        for group in head.selection.groups()
        for neuron in group.neurons.tolist()
    )
    names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    arrays = head.base.cpu().double().numpy(), features, head.weight.cpu().double().numpy()
    return Reading(names, str(model.config.problem_type), *arrays, bool(tokenizer.is_fast)), head


def input_batches(
    model: SpinForSequenceClassification, tokenizer: PreTrainedTokenizerBase, encoded: Encoded, batch_tokens: int
) -> Iterator[tuple[list[int], tuple[Tensor, Tensor, Tensor | None]]]:
    """The rows that may run together, and their mask, ids and token types on the model's device."""
    device = model_device(model)
    for rows in plan_batches(encoded.lengths, batch_tokens, model.config.batching):
        mask = pad([[1] * encoded.lengths[row] for row in rows], 0).to(device)
        ids = pad([encoded.input_ids[row] for row in rows], int(tokenizer.pad_token_id)).to(device)
        types = encoded.token_type_ids
        yield rows, (mask, ids, None if types is None else pad([types[row] for row in rows], 0).to(device))


def _answer(model: SpinForSequenceClassification, features: Tensor, exit: int | None) -> Tensor:
    """The logits by the model's own code, which the parts are measured against."""
    if exit is None:
        logits: Tensor = model(features=features).logits
        return logits
    head = demand_exit(model.exits, exit).head(exit)
    return head.forward(features)


def _in_order(model: SpinForSequenceClassification, added: np.ndarray, length: int) -> np.ndarray:
    """Of one text, without padding, and a decoder's start token in front."""
    start = [len(added) - 1] if starts_with_special(model.spin) else []
    return added[[*start, *range(length)]]


def start_piece(model: SpinForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A decoder's start token, where one is read: it stands in front of a text's own."""
    if not starts_with_special(model.spin):
        return []
    name = tokenizer.convert_ids_to_tokens(int(model.spin.backbone.config.decoder_start_token_id))
    return [Piece(str(name), 0, None, True)]


def _error(logits: np.ndarray, sums: np.ndarray) -> float:
    """The largest difference, over max(1, the logit's size); NaN where there is one."""
    return float((np.abs(sums - logits) / np.maximum(1, np.abs(logits))).max())


def _cut(
    tokenizer: PreTrainedTokenizerBase, encoded: Encoded, texts: Sequence[str], pairs: Sequence[str] | None
) -> list[bool]:
    """Which texts were cut."""
    if not encoded.truncated:
        return [False] * len(texts)
    whole = tokenizer(list(texts), None if pairs is None else list(pairs), truncation=False, verbose=False)
    return [len(ids) > (encoded.max_length or len(ids)) for ids in whole["input_ids"]]
