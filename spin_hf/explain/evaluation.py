"""A classifier's answers on labelled texts, sorted for a reader: which label it takes for which, and for what texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..calibration.confidence import Reliability
from ..calibration.resampling import bootstrap_interval, share_interval
from ..calibration.task import METRICS, metric_title
from ..modeling_spin import SpinForSequenceClassification
from ..prediction import Prediction, evaluate
from ..scoring import predict_rows
from .cards import NeuronCard, NeuronCards, neuron_cards
from .explaining import explain
from .heat import Heat, heat_of
from .page import LONGEST

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
MOST_CARDS = 12  # that are shown; groups and overlaps are those of all neurons
_MOST_GROUPS = 12
_MOST_READ = 2000  # texts that the cards are made from
_CONTEXTS = 3  # of a neuron where it is high, and where it is low
MOST_CELLS = 400  # of a confusion matrix, whose texts are shown


@dataclass(frozen=True)
class Score:
    """One number of the headline table, with its 95% interval where there is one."""

    name: str
    rows: int
    metric: str
    value: float
    interval: tuple[float, float] | None = None
    neurons: int | None = None
    blocks: int | None = None


@dataclass(frozen=True)
class Example:
    """A text, what it is and what the classifier says; ``confidence`` is ``None`` for regression."""

    row: int
    text: str
    pair: str | None
    true: str
    predicted: str
    confidence: float | None


@dataclass(frozen=True)
class Cell:
    """Texts of one label that got this answer; of all ``count`` the surest few."""

    true: int
    predicted: int
    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class LabelRow:
    """How one of several labels fares, with texts where it was missed or wrongly given."""

    name: str
    support: int
    given: int
    right: int
    missed: tuple[Example, ...]
    wrong: tuple[Example, ...]

    @property
    def precision(self) -> float | None:
        return self.right / self.given if self.given else None

    @property
    def recall(self) -> float | None:
        return self.right / self.support if self.support else None


@dataclass(frozen=True)
class Group:
    """Neurons whose values correlate, the heaviest first, and their share of all effects."""

    number: int
    cards: tuple[NeuronCard, ...]
    share: float


@dataclass(frozen=True)
class Evaluated:
    """Labelled texts with a classifier's answers.

    Attributes:
        name: of the data, for the reader.
        texts, pairs: the texts, and the second ones of pairs.
        labels: as :mod:`spin_hf` encodes them.
        prediction: of the same rows.
        heat: of the rows that a report shows, what each word adds to the answer.
        cards: of the neurons; ``None`` for fewer than two texts.
    """

    name: str
    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    prediction: Prediction
    heat: Mapping[int, Heat] = field(default_factory=dict)
    cards: NeuronCards | None = None

    @classmethod
    def of(
        cls,
        model: SpinForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        source: Any,
        name: str,
        **columns: Any,
    ) -> Evaluated:
        """Predict labelled rows in any form that ``spin_calibrate`` takes, and explain those that a report shows.

        Raises:
            CalibrationError: for data that can't be read or doesn't fit.
        """
        rows, labels, prediction = predict_rows(model, tokenizer, source, **columns)
        plain = cls(name, rows.texts, rows.pairs, labels, prediction)
        shown = plain.shown_rows()
        texts = [rows.texts[row] for row in shown]
        pairs = None if rows.pairs is None else [rows.pairs[row] for row in shown]
        found = explain(model, tokenizer, texts, pairs)
        heat = {row: heat_of(own, own.label, longest=LONGEST) for row, own in zip(shown, found, strict=True)}
        read = slice(_MOST_READ)
        second = None if rows.pairs is None else rows.pairs[read]
        cards = None
        if len(rows.texts) > 1:
            named = None if plain.problem_type == REGRESSION else _named(labels[read])
            cards = neuron_cards(model, tokenizer, rows.texts[read], second, labels=named, count=_CONTEXTS)
        return replace(plain, heat=heat, cards=cards)

    @property
    def problem_type(self) -> str:
        return self.prediction.problem_type

    @property
    def names(self) -> tuple[str, ...]:
        return self.prediction.names

    @cached_property
    def right(self) -> np.ndarray:
        """Whether all of a text's answer is right, ``(n,)``; for regression all false."""
        if self.problem_type == REGRESSION:
            return np.zeros(len(self.texts), dtype=bool)
        same = self.prediction.labels == self.labels
        return np.asarray(same.all(1) if same.ndim == 2 else same)

    def scores(self, metric: str, *, neurons: int, blocks: int, seed: int = 0) -> list[Score]:
        """The metric that chose the classifier, with an interval, then the other usual ones, and the trivial answer."""
        usual = evaluate(self.prediction, self.labels)
        found = [
            Score(self.name, len(self.texts), metric_title(name), value, self._interval(name, value, seed),
                  neurons, blocks)
            for name, value in sorted(usual.items(), key=lambda item: item[0] != metric)
            if value == value
        ]  # fmt: skip
        if self.problem_type == SINGLE:
            counts = np.bincount(self.labels, minlength=len(self.names))
            most, n = int(counts.argmax()), len(self.labels)
            share = float(counts[most]) / n
            name = f"{self.name}, always “{self.names[most]}”"
            found.append(Score(name, n, metric_title("accuracy"), share, share_interval(share, n)))
        return found

    def _interval(self, metric: str, value: float, seed: int) -> tuple[float, float] | None:
        if metric == "accuracy":
            return share_interval(value, len(self.texts))
        if metric not in METRICS:
            return None
        return bootstrap_interval(METRICS[metric][0], self.labels, self.prediction.labels, seed=seed)

    def groups(self) -> list[Group]:
        """The neurons that say the same as others, the groups of the largest share first."""
        if self.cards is None:
            return []
        found = []
        for number, members in enumerate(self.cards.groups):
            if len(members) > 1:
                own = tuple(self.cards[i] for i in members)
                found.append(Group(number, own, sum(card.share for card in own)))
        return sorted(found, key=lambda group: -group.share)[:_MOST_GROUPS]

    def reliability(self) -> Reliability | None:
        """How far the probabilities hold on these texts; ``None`` for regression."""
        return None if self.problem_type == REGRESSION else Reliability.of(self.labels, self.prediction.probabilities)

    def cells(self, *, texts: int = 3) -> list[Cell]:
        """The cells of the confusion matrix that hold anything, mistakes first, the most frequent before others."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, pair in enumerate(zip(self.labels.tolist(), self.prediction.labels.tolist(), strict=True)):
            groups.setdefault(pair, []).append(row)
        cells = [Cell(*pair, len(rows), self._surest(rows, texts)) for pair, rows in groups.items()]
        return sorted(cells, key=lambda c: (c.true == c.predicted, -c.count, c.true, c.predicted))

    def matrix(self) -> np.ndarray:
        """Counts ``(K, K)``, a row for each true label."""
        counts = np.zeros((len(self.names),) * 2, dtype=np.int64)
        np.add.at(counts, (self.labels, self.prediction.labels), 1)
        return counts

    def label_rows(self, *, texts: int = 3) -> list[LabelRow]:
        """For several labels per text: each label by itself, the most frequent first."""
        given = self.prediction.labels
        found = []
        for i, name in enumerate(self.names):
            true, said = self.labels[:, i] == 1, given[:, i] == 1
            missed, wrong = (np.flatnonzero(mask).tolist() for mask in (true & ~said, said & ~true))
            found.append(
                LabelRow(
                    name, int(true.sum()), int(said.sum()), int((true & said).sum()),
                    self._surest(missed, texts), self._surest(wrong, texts),
                )
            )  # fmt: skip
        return sorted(found, key=lambda row: -row.support)

    def examples(self, *, each: int = 3) -> list[tuple[str, list[Example]]]:
        """A few texts of each sort: surely right, least sure, surely wrong; for regression by the size of the error."""
        if self.problem_type == REGRESSION:
            order = np.argsort(np.abs(self.prediction.labels - self.labels), kind="stable").tolist()
            return [
                ("Closest", [self.example(row) for row in order[:each]]),
                ("Farthest off", [self.example(row) for row in order[::-1][:each]]),
            ]
        confidence, right = self.prediction.confidence, self.right
        order = np.argsort(-confidence, kind="stable").tolist()
        groups = [
            ("Sure and right", [row for row in order if right[row]]),
            ("Sure and wrong", [row for row in order if not right[row]]),
            ("Least sure", order[::-1]),
        ]
        return [(name, [self.example(row) for row in rows[:each]]) for name, rows in groups if rows]

    def shown_rows(self) -> list[int]:
        """All rows among the texts that a report shows."""
        groups = [found for _, found in self.examples()]
        if self.problem_type == SINGLE:
            groups += [list(cell.examples) for cell in self.cells()[:MOST_CELLS]]
        if self.problem_type == MULTI:
            groups += [[*row.missed, *row.wrong] for row in self.label_rows()]
        return sorted({example.row for group in groups for example in group})

    def example(self, row: int) -> Example:
        """One text with its answer in words."""
        pair = None if self.pairs is None else self.pairs[row]
        true, predicted = self.labels[row], self.prediction.labels[row]
        if self.problem_type == REGRESSION:
            return Example(row, self.texts[row], pair, f"{true:.3g}", f"{predicted:.3g}", None)
        confidence = float(self.prediction.confidence[row])
        return Example(row, self.texts[row], pair, self._words(true), self._words(predicted), confidence)

    def _words(self, label: Any) -> str:
        if self.problem_type == MULTI:
            return ", ".join(self.names[i] for i in np.flatnonzero(label)) or "none"
        return self.names[int(label)]

    def _surest(self, rows: Sequence[int], count: int) -> tuple[Example, ...]:
        confidence = self.prediction.confidence
        return tuple(map(self.example, sorted(rows, key=lambda row: -confidence[row])[:count]))


def _named(labels: np.ndarray) -> list[Any]:
    """The labels of each text by their numbers."""
    return labels.tolist() if labels.ndim == 1 else [np.flatnonzero(row).tolist() for row in labels]
