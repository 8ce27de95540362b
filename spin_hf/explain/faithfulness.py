"""Whether the words that an explanation names are those that the answer rests on.

Words are taken from a text, the most important first, and the classifier answers again. If the ranking is right, the
answer's probability falls early (deletion; Petsiuk, Das and Saenko 2018), and is there early when the same words are
all that is left (insertion). ERASER (DeYoung et al. 2020, section 4) averages both over rationales of 1, 5, 10, 20 and
50 % of the words: comprehensiveness is the fall without them, better if larger; sufficiency the fall with them alone,
better if smaller. Whatever ranks words can be compared: :func:`word_scores` are the exact parts of the logit,
:func:`integrated_gradients` the usual approximation through the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibration.errors import CalibrationError, demand_between, demand_whole
from ..calibration.extraction import Encoded, pad, plan_batches
from ..modeling_spin import SpinForSequenceClassification
from ..prediction import encode_for, probabilities_of
from ..taps import model_device
from .result import Explanation, Explanations

_Values = TypeVar("_Values", np.ndarray, Tensor)

ERASER = (0.01, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Erasures:
    """The probability of each text's answer when only some of its words are read; the answer is that to the whole text.

    Attributes:
        shares: of the words, ascending, between 0 and 1; of each text rounded up to whole words.
        whole: with all words, ``(texts,)``.
        empty: with none, ``(texts,)``.
        without: all but the most important ``share``, ``(texts, shares)``.
        alone: the most important ``share`` alone, ``(texts, shares)``.
    """

    shares: tuple[float, ...]
    whole: np.ndarray
    empty: np.ndarray
    without: np.ndarray
    alone: np.ndarray

    @property
    def comprehensiveness(self) -> np.ndarray:
        """Fall of the probability without the words, the mean over the shares, ``(texts,)``. More is better."""
        return np.asarray(self.whole - self.without.mean(1))

    @property
    def sufficiency(self) -> np.ndarray:
        """Fall of the probability with these words alone, the mean over the shares, ``(texts,)``. Less is better."""
        return np.asarray(self.whole - self.alone.mean(1))

    @property
    def deletion(self) -> np.ndarray:
        """The curve from all words to none, at the shares 0, :attr:`shares` and 1, ``(texts, shares + 2)``."""
        return np.column_stack([self.whole, self.without, self.empty])

    @property
    def insertion(self) -> np.ndarray:
        """The curve from no words to all, likewise."""
        return np.column_stack([self.empty, self.alone, self.whole])

    def area(self, curve: np.ndarray) -> np.ndarray:
        """Area under a curve over the share of words, by trapezoids, ``(texts,)``."""
        width = np.diff([0, *self.shares, 1])
        return np.asarray((width * (curve[:, 1:] + curve[:, :-1]) / 2).sum(1))


class IntegratedGradients(NamedTuple):
    """Of each text what each word adds, ``(words,)``; and by how much the sum misses what it should be, ``(texts,)``.

    The sum should be the difference of the explained logit between the text and the baseline.
    """

    scores: list[np.ndarray]
    gaps: np.ndarray


def word_scores(found: Explanations) -> list[np.ndarray]:
    """The exact part of each word in its text's answer, ``(words,)`` in the order of ``Explanation.words``.

    For one label per text relative to the mean over labels: the probability knows differences of logits alone.
    """
    return [_centred(row.by("word").values, row)[:, _answer(row)] for row in found]


def erasure(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    found: Explanations,
    scores: Sequence[np.ndarray],
    *,
    shares: Sequence[float] = ERASER,
    batch_tokens: int = 4096,
) -> Erasures:
    """Answer texts again without, and with nothing but, the words of the highest scores.

    The tokens of erased words are taken out, and those behind them move up; special tokens stay.

    Args:
        model, tokenizer: that the explanations are of.
        found: explanations of the texts, of the classifier's own head.
        scores: for each text one for each of its ``words``, such as :func:`word_scores`; those of special tokens are
            not looked at. Equal scores go in the order of the text.
        shares: of the words; the usual ones of ERASER by default.
        batch_tokens: padded tokens per batch.

    Raises:
        CalibrationError: for regression, scores that don't fit the words, or shares that are no ascending parts of 1.
    """
    demand_whole("batch_tokens", batch_tokens, least=1)
    for share in shares:
        demand_between("shares", share, 0, 1)
    if list(shares) != sorted(set(shares)) or not shares:
        raise CalibrationError(f"shares must be ascending parts of the words, such as {ERASER}; got {tuple(shares)}.")
    if found.reading.problem_type == "regression":
        raise CalibrationError("Regression has no probability that could fall when words are taken away.")
    if [len(own) for own in scores] != [len(row.words) for row in found]:
        raise CalibrationError("scores must hold, for each text, one number for each of its words (found[i].words).")
    encoded = _encoded(model, tokenizer, found)
    kept: list[tuple[int, np.ndarray]] = []  # a text, and which of its tokens are read
    for row, (explanation, own) in enumerate(zip(found, scores, strict=True)):
        kept += [(row, mask) for mask in _readings(explanation, encoded.lengths[row], np.asarray(own), shares)]
    lengths = [max(1, int(mask.sum())) for _, mask in kept]
    answers = np.empty(len(kept))
    device, label = model_device(model), [_answer(row) for row in found]
    model.eval()
    for numbers in plan_batches(lengths, batch_tokens):
        batch = _batch(tokenizer, encoded, [kept[i] for i in numbers])
        with torch.no_grad():
            logits = model(**{name: value.to(device) for name, value in batch.items()}).logits.float().cpu()
        probabilities = probabilities_of(logits, found.reading.problem_type)
        answers[numbers] = probabilities[range(len(numbers)), [label[kept[i][0]] for i in numbers]].numpy()
    table = answers.reshape(len(found), 2 + 2 * len(shares))
    without, alone = np.split(table[:, 2:], 2, axis=1)
    return Erasures(tuple(map(float, shares)), table[:, 0], table[:, 1], without, alone)


def integrated_gradients(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    found: Explanations,
    *,
    steps: int = 32,
    batch_tokens: int = 4096,
) -> IntegratedGradients:
    """Attribute each text's answer to its words by gradients of the logit in the input embeddings.

    They are taken along the straight way from a baseline to the text, by the midpoint rule (Sundararajan, Taly and Yan
    2017). The baseline is a text of pad tokens between the same special ones; not zeros, from which on a model that
    begins with an RMS norm sees no change along the way. The logit is that of :func:`word_scores`, so that both explain
    one number.

    Args:
        model, tokenizer, found: as in :func:`erasure`.
        steps: points on the way; 16 to 32 are usual for texts.
        batch_tokens: tokens of a batch: the points of one text run together.

    Raises:
        CalibrationError: for a number of steps that is none.
        ValueError: for a model whose decoder reads token ids, ``stacks="both"``.
    """
    demand_whole("steps", steps, least=1)
    demand_whole("batch_tokens", batch_tokens, least=1)
    encoded = _encoded(model, tokenizer, found)
    model.eval()
    scores, gaps = [], np.empty(len(found))
    for row, explanation in enumerate(found):
        every = np.ones(len(encoded.input_ids[row]), dtype=bool)
        batch = _batch(tokenizer, encoded, [(row, every)])
        at_once = max(1, batch_tokens // len(every))
        added, gaps[row] = _along_the_way(model, batch, int(tokenizer.pad_token_id), explanation, steps, at_once)
        scores.append(np.bincount(_own(explanation, "word", len(every)), added, len(explanation.words)))
    return IntegratedGradients(scores, gaps)


def _along_the_way(
    model: SpinForSequenceClassification,
    batch: dict[str, Tensor],
    pad_id: int,
    explanation: Explanation,
    steps: int,
    at_once: int,
) -> tuple[np.ndarray, float]:
    """Of one text what each token adds, ``(tokens,)``, and the gap."""
    device = model_device(model)
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.no_grad():
        embed, ids = model.get_input_embeddings(), batch.pop("input_ids")
        end, padding = embed(ids), embed(torch.full_like(ids, pad_id))
    special = torch.from_numpy(_own(explanation, "special", end.shape[1])).to(end.device)
    start = torch.where(special[:, None], end, padding)

    def logit(embeds: Tensor) -> Tensor:
        others = {name: value.expand(len(embeds), -1) for name, value in batch.items()}
        logits: Tensor = model(inputs_embeds=embeds, **others).logits
        return _centred(logits, explanation)[:, _answer(explanation)]

    gradient = torch.zeros_like(end[0])
    for points in ((torch.arange(steps, device=end.device, dtype=end.dtype) + 0.5) / steps).split(at_once):
        embeds = (start + points[:, None, None] * (end - start)).requires_grad_()
        (found,) = torch.autograd.grad(logit(embeds).sum(), embeds)
        gradient += found.sum(0) / steps
    with torch.no_grad():
        whole = logit(torch.cat([start, end])).diff()
        added = ((end - start)[0] * gradient).sum(-1).double().cpu().numpy()
    return added, abs(float(added.sum()) - float(whole))


def _encoded(model: SpinForSequenceClassification, tokenizer: PreTrainedTokenizerBase, found: Explanations) -> Encoded:
    """The tokens that the explanations are about."""
    pairs = [row.pair for row in found if row.pair is not None]
    return encode_for(model, tokenizer, [row.text for row in found], pairs or None)


def _own(explanation: Explanation, name: str, tokens: int) -> np.ndarray:
    """An attribute of each token that the tokenizer made; a decoder's start token, in front, is not one."""
    return np.array([getattr(token, name) for token in explanation.tokens[-tokens:]])


def _readings(
    explanation: Explanation, tokens: int, scores: np.ndarray, shares: Sequence[float]
) -> Iterator[np.ndarray]:
    """Which tokens are read: all, none but the special ones, without the best of each share, with these alone."""
    word_of, special = (_own(explanation, name, tokens) for name in ("word", "special"))
    words = np.array([i for i, word in enumerate(explanation.words) if not word.special], dtype=np.int64)
    best = words[np.argsort(-scores[words], kind="stable")]
    picked = [np.isin(word_of, best[: math.ceil(share * len(words))]) for share in shares]
    yield np.ones(len(word_of), dtype=bool)
    yield special
    yield from (special | ~own for own in picked)
    yield from (special | own for own in picked)


def _batch(
    tokenizer: PreTrainedTokenizerBase, encoded: Encoded, kept: Sequence[tuple[int, np.ndarray]]
) -> dict[str, Tensor]:
    """Inputs of texts of which some tokens are read; one of which none is left is a pad token, as an empty text is."""
    columns = {"input_ids": (encoded.input_ids, int(tokenizer.pad_token_id))}
    if encoded.token_type_ids is not None:
        columns["token_type_ids"] = (encoded.token_type_ids, 0)
    batch = {
        name: pad([[values[row][i] for i in np.flatnonzero(mask)] or [fill] for row, mask in kept], fill)
        for name, (values, fill) in columns.items()
    }
    return {**batch, "attention_mask": pad([[1] * max(1, int(mask.sum())) for _, mask in kept], 0)}


def _answer(explanation: Explanation) -> int:
    return int(explanation.logits.argmax())


def _centred(values: _Values, explanation: Explanation) -> _Values:
    """Logits, or parts of them, ``(n, labels)``; for one label per text relative to the mean over labels."""
    if explanation.reading.problem_type != "single_label_classification":
        return values
    centred: _Values = values - values.mean(1)[:, None]
    return centred
