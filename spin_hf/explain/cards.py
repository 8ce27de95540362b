"""What each kept neuron says: where it is high and low, which label it speaks for, and which others say the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibration.errors import CalibrationError, demand_between, demand_whole
from ..calibration.extraction import Encoded
from ..modeling_spin import SpinForSequenceClassification
from ..prediction import encode_for
from ..taps import Tap
from .attribution import Watch, attribute, starts_with_special
from .explaining import input_batches, read_head, start_piece
from .result import Neuron, Reading
from .words import Token, Word, pieces_of, tokenized

if TYPE_CHECKING:
    import pandas as pd

_AROUND = 40  # characters shown before and behind a word


@dataclass(frozen=True)
class TextExample:
    """A text where a neuron is high or low: its number, and the neuron's pooled value in standard deviations."""

    text: int
    value: float


@dataclass(frozen=True)
class WordExample:
    """A word where a neuron is high or low: the text's number, what stands around it, and the activation as it is."""

    text: int
    before: str
    word: str
    after: str
    value: float


@dataclass(frozen=True)
class NeuronCard:
    """One neuron of the classifier.

    Attributes:
        tap, neuron: which it is.
        poolings: under which it is read.
        label: the one that it speaks for where it is high.
        effects: on each label's logit, ``(labels,)``: the standard deviation over the texts of what it adds, below zero
            where a high value speaks against. For one label per text relative to the mean over labels, which no
            probability depends on.
        share: of the sizes of all neurons' effects.
        group: number of its group, see :attr:`NeuronCards.groups`.
        high_texts, low_texts: where its value, the mean over its poolings, is highest and lowest.
        high_words, low_words: where its activation is; one word of a text or window at most, and no special token.
        label_means: mean value of the texts of each label, ``(labels,)`` in standard deviations; ``None`` without
            labels, NaN for a label without texts.
    """

    tap: str
    neuron: int
    poolings: tuple[str, ...]
    label: str
    effects: tuple[float, ...]
    share: float
    group: int
    high_texts: tuple[TextExample, ...]
    low_texts: tuple[TextExample, ...]
    high_words: tuple[WordExample, ...]
    low_words: tuple[WordExample, ...]
    label_means: tuple[float, ...] | None = None

    def extremes(self, names: Sequence[str], count: int = 2) -> list[tuple[str, float]]:
        """Of :attr:`label_means` the highest and the lowest, with the labels' names."""
        known = [(name, mean) for name, mean in zip(names, self.label_means or (), strict=False) if mean == mean]
        ranked = sorted(known, key=lambda pair: -pair[1])
        return ranked if len(ranked) <= 2 * count else ranked[:count] + ranked[-count:]

    @property
    def low_words_say_something(self) -> bool:
        """Whether the words where it is low tell more than that it is not high there.

        They don't where maxima alone are read, nor where the lowest are the floor of the activation function, which
        hundreds of words share.
        """
        if set(self.poolings) == {"max"} or not self.low_words:
            return False
        lowest, span = self.low_words[0].value, self.high_words[0].value - self.low_words[0].value
        return len(self.low_words) == 1 or self.low_words[-1].value - lowest > 0.01 * span


@dataclass(frozen=True)
class NeuronCards(Sequence[NeuronCard]):
    """The cards of all neurons, the largest share first.

    Attributes:
        cards: one for each neuron.
        groups: numbers of the cards that carry the same thing: the values of any two of a group
            correlate by ``threshold`` or more in size (complete linkage). Largest share first.
        threshold: that correlation.
        overlap: of the neurons that serve two labels, ``(labels, labels)``: how many they share over how many they have
            together. The neurons of a label are the fewest that make up ``eta`` of the sizes of the effects on it. With
            two labels they are the same by construction, as one column serves both.
        eta: that share.
        names: of the labels.
        texts: how many were read.
    """

    cards: tuple[NeuronCard, ...]
    groups: tuple[tuple[int, ...], ...]
    threshold: float
    overlap: np.ndarray
    eta: float
    names: tuple[str, ...]
    texts: int

    def to_pandas(self) -> pd.DataFrame:
        """A row for each neuron, without its examples; ``effect LABEL`` are its effects."""
        import pandas as pd

        plain = ("tap", "neuron", "poolings", "label", "share", "group")
        return pd.DataFrame(
            {
                **{name: getattr(card, name) for name in plain},
                **{f"effect {name}": effect for name, effect in zip(self.names, card.effects, strict=True)},
            }
            for card in self.cards
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **{name: getattr(self, name) for name in ("threshold", "eta", "texts")},
            "names": list(self.names),
            "groups": [list(group) for group in self.groups],
            "overlap": self.overlap.tolist(),
            "cards": [asdict(card) for card in self.cards],
        }

    @overload
    def __getitem__(self, index: int) -> NeuronCard: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[NeuronCard, ...]: ...
    def __getitem__(self, index: int | slice) -> NeuronCard | tuple[NeuronCard, ...]:
        return self.cards[index]

    def __len__(self) -> int:
        return len(self.cards)

    def __iter__(self) -> Iterator[NeuronCard]:
        return iter(self.cards)


def neuron_cards(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | Iterator[str],
    pairs: Sequence[str] | None = None,
    *,
    labels: Sequence[Any] | None = None,
    count: int = 5,
    threshold: float = 0.8,
    eta: float = 0.8,
    batch_tokens: int = 4096,
) -> NeuronCards:
    """Say what each neuron of a classifier does on some texts. One pass over them.

    Held in memory are the features, 4 bytes x texts x features, and of the tokens only the best ``count`` per neuron.

    Args:
        model: a calibrated classifier.
        tokenizer: the one it was calibrated with.
        texts, pairs: a few hundred to thousands, best those that it was not calibrated on; two at least.
        labels: of each text, a name or id, or a list of them; for :attr:`NeuronCard.label_means`.
        count: examples of each kind.
        threshold: correlation of a group, between 0 and 1.
        eta: share of the effects that a label's neurons make up, see :attr:`NeuronCards.overlap`.
        batch_tokens: padded tokens per batch.

    Raises:
        CalibrationError: one of its kinds, for texts, labels, options or a tokenizer that don't fit, before any work.
        ExplanationError, NotCalibratedError: as :func:`spin_hf.explain.explain`.
    """
    demand_whole("batch_tokens", batch_tokens, least=1)
    demand_whole("count", count, least=1)
    demand_between("threshold", threshold, 0, 1)
    demand_between("eta", eta, 0, 1)
    if isinstance(texts, Iterator):
        texts = list(texts)
    encoded = encode_for(model, tokenizer, texts, pairs)
    texts, pairs = list(texts), None if pairs is None else list(pairs)
    if len(texts) < 2:
        raise CalibrationError("One text says nothing of where a neuron is high. Give a few hundred.")
    model.eval()
    reading, head = read_head(model, tokenizer)
    of_label = None if labels is None else _indicators(labels, reading, len(texts))
    neurons, of_feature = reading.group("neuron")
    features = np.empty((len(texts), len(of_feature)), dtype=np.float32)
    best = _Extremes(model, tokenizer, neurons, count)
    for rows, inputs in input_batches(model, tokenizer, encoded, batch_tokens):
        watch = best.watch(rows, *inputs[:2])
        features[rows] = attribute(model.spin, head.selection, head.weight, *inputs, watch=watch).features.cpu()
    examples = best.examples(encoded, texts, pairs)
    effects = np.stack([_effects(features, of_feature, column, len(neurons)) for column in _centred(reading).T], 1)
    sizes = np.abs(effects)
    shares = sizes.sum(1) / max(float(sizes.sum()), np.finfo(float).tiny)
    order = np.argsort(-shares, kind="stable")
    values = _sums(features, of_feature, len(neurons)) / np.bincount(of_feature)
    groups = _groups(values[:, order], threshold)
    group_of = {card: number for number, group in enumerate(groups) for card in group}
    label_means = None
    if of_label is not None:
        counts = of_label.sum(0)[:, None]
        label_means = np.divide(of_label.T.astype(values.dtype) @ values, counts, where=counts > 0,
                                out=np.full((of_label.shape[1], len(neurons)), np.nan))  # fmt: skip
    poolings: dict[int, list[str]] = defaultdict(list)
    for feature, number in zip(reading.features, of_feature.tolist(), strict=True):
        poolings[number].append(feature.pooling)
    cards = []
    for card, number in enumerate(order.tolist()):
        ranked = np.argsort(-values[:, number], kind="stable")
        high, low = (
            tuple(TextExample(int(i), float(values[i, number])) for i in part[:count])
            for part in (ranked, ranked[::-1])
        )
        means = None if label_means is None else tuple(map(float, label_means[:, number]))
        cards.append(
            NeuronCard(
                tap=neurons[number].tap,
                neuron=neurons[number].neuron,
                poolings=tuple(poolings[number]),
                label=reading.names[int(effects[number].argmax())],
                effects=tuple(map(float, effects[number])),
                share=float(shares[number]),
                group=group_of[card],
                high_texts=high,
                low_texts=low,
                high_words=examples[0][number],
                low_words=examples[1][number],
                label_means=means,
            )
        )
    overlap = _overlap(sizes, eta)
    return NeuronCards(tuple(cards), groups, threshold, overlap, eta, reading.names, len(texts))


class _Extremes:
    """Where each neuron's activation was highest and lowest so far, in one row that the backbone read at most once."""

    def __init__(
        self,
        model: SpinForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        neurons: Sequence[Neuron],
        count: int,
    ) -> None:
        self.model, self.tokenizer, self.count = model, tokenizer, count
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self.special = torch.tensor(sorted(special), dtype=torch.long)
        self.columns: dict[str, list[int]] = defaultdict(list)
        for number, (tap, _) in enumerate(neurons):
            self.columns[tap].append(number)
        self.neurons = neurons
        self.values = torch.full((2, count, len(neurons)), -torch.inf)
        self.text = torch.zeros(2, count, len(neurons), dtype=torch.long)
        self.place = torch.zeros_like(self.text)

    def watch(self, rows: Sequence[int], mask: Tensor, ids: Tensor) -> Watch:
        """What looks at the activations of a batch."""
        aside = torch.isin(ids, self.special.to(ids.device)) | (mask == 0)
        if starts_with_special(self.model.spin):
            aside = torch.cat([aside, torch.ones_like(aside[:, :1])], 1)
        places, texts = aside.shape[1], torch.tensor(rows)

        def look(tap: Tap, values: Tensor, pooled: Tensor, whose: Tensor) -> None:
            numbers = self.columns[str(tap)]
            chosen = torch.tensor([self.neurons[number].neuron for number in numbers], device=values.device)
            whose = whose.to(values.device)
            counts = pooled & ~aside.to(values.device).flatten()[whose]
            kept = values.index_select(-1, chosen).float()
            for side, sign in enumerate((1, -1)):
                value, position = (sign * kept).masked_fill(~counts[..., None], -torch.inf).max(1)
                found = whose.gather(1, position).cpu()
                self._merge(side, numbers, value.cpu(), texts[found // places], found % places)

        return look

    def _merge(self, side: int, numbers: list[int], value: Tensor, text: Tensor, place: Tensor) -> None:
        joined = torch.cat([self.values[side][:, numbers], value])
        self.values[side][:, numbers], order = joined.topk(self.count, 0)
        for known, new in ((self.text, text), (self.place, place)):
            known[side][:, numbers] = torch.cat([known[side][:, numbers], new]).gather(0, order)

    def examples(
        self, encoded: Encoded, texts: Sequence[str], pairs: Sequence[str] | None
    ) -> list[list[tuple[WordExample, ...]]]:
        """For high and low, the examples of each neuron."""
        wanted: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for side, rank, number in torch.isfinite(self.values).nonzero().tolist():
            wanted[int(self.text[side, rank, number])].append((side, rank, number))
        start = start_piece(self.model, self.tokenizer)
        found: dict[tuple[int, int, int], WordExample] = {}
        for row, pieces in enumerate(pieces_of(self.tokenizer, encoded, texts, pairs)):
            if row not in wanted:
                continue
            own = (texts[row],) if pairs is None else (texts[row], pairs[row])
            tokens, words = tokenized(own, [*start, *pieces])
            for side, rank, number in wanted[row]:
                place = int(self.place[side, rank, number]) + len(start)  # a decoder's start token stands in front
                value = float(self.values[side, rank, number]) * (1, -1)[side]
                found[side, rank, number] = WordExample(row, *_context(own, tokens, words, place), value)
        return [
            [
                tuple(found[side, rank, n] for rank in range(self.count) if (side, rank, n) in found)
                for n in range(len(self.neurons))
            ]
            for side in (0, 1)
        ]


def _context(texts: Sequence[str], tokens: Sequence[Token], words: Sequence[Word], place: int) -> tuple[str, str, str]:
    """What stands before a token's word, the word, and what stands behind it."""
    word = words[tokens[place].word]
    if word.start is None or word.end is None:
        before, after = (
            " ".join(t.text for t in part) for part in (tokens[max(0, place - 5) : place], tokens[place + 1 :][:5])
        )
        return before, word.text, after
    text = texts[word.part]
    before, after = text[: word.start][-_AROUND:], text[word.end :][:_AROUND]
    if len(before) < word.start and " " in before:  # no half a word
        before = before[before.index(" ") + 1 :]
    if word.end + len(after) < len(text) and " " in after:
        after = after[: after.rindex(" ")]
    return before, word.text, after


def _centred(reading: Reading) -> np.ndarray:
    """The head's weight; for one label per text relative to the mean over labels, which softmax doesn't see."""
    if reading.problem_type != "single_label_classification":
        return reading.weight
    return np.asarray(reading.weight - reading.weight.mean(1, keepdims=True))


def _sums(values: np.ndarray, of_feature: np.ndarray, neurons: int) -> np.ndarray:
    """Columns of features added up by neuron, ``(texts, neurons)``."""
    out = np.zeros((len(values), neurons), dtype=np.float32)
    np.add.at(out.T, of_feature, values.T)
    return out


def _effects(features: np.ndarray, of_feature: np.ndarray, weight: np.ndarray, neurons: int) -> np.ndarray:
    """Standard deviation of what each neuron adds to a label, with the sign of its covariance with the neuron."""
    added = _sums(features * weight.astype(np.float32), of_feature, neurons)
    value = _sums(features, of_feature, neurons)
    covariance = ((added - added.mean(0)) * (value - value.mean(0))).mean(0)
    return np.asarray(np.copysign(added.std(0), covariance), dtype=np.float64)


def _groups(values: np.ndarray, threshold: float) -> tuple[tuple[int, ...], ...]:
    """Columns of which any two correlate by the threshold or more, in size."""
    centred = values - values.mean(0)
    size = np.linalg.norm(centred, axis=0)
    unit = np.divide(centred, size, out=np.zeros_like(centred), where=size > 0)
    if unit.shape[1] < 2:
        return ((0,),)
    distance = 1 - np.abs(unit.T @ unit).clip(0, 1)
    np.fill_diagonal(distance, 0)
    found = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="complete", distance_threshold=1 - threshold
    ).fit_predict(distance)
    members: dict[int, list[int]] = defaultdict(list)
    for card, group in enumerate(found.tolist()):
        members[group].append(card)
    return tuple(tuple(group) for group in members.values())


def _overlap(sizes: np.ndarray, eta: float) -> np.ndarray:
    """Shared over all of the neurons of any two labels."""
    served = np.zeros(sizes.shape, dtype=bool)
    for label, column in enumerate(sizes.T):
        order = np.argsort(-column, kind="stable")
        reached = np.cumsum(column[order])
        served[order[: int(np.searchsorted(reached, eta * reached[-1])) + 1], label] = True
    counts = served.astype(np.int64)
    both = counts.T @ counts
    own = np.diag(both)
    return np.asarray(both / (own[:, None] + own - both))


def _indicators(labels: Sequence[Any], reading: Reading, texts: int) -> np.ndarray:
    """Which texts have which label, ``(texts, labels)``."""
    if reading.problem_type == "regression":
        raise CalibrationError("Regression has no labels whose texts could be compared; leave labels out.")
    if len(labels) != texts:
        raise CalibrationError(f"There are {texts} texts but {len(labels)} labels.")
    out = np.zeros((texts, len(reading.names)), dtype=bool)
    for row, given in enumerate(labels):
        for label in given if isinstance(given, (list, tuple, set, np.ndarray)) else [given]:
            out[row, reading.label(label)] = True
    return out
