"""The parts of a logit, by whatever they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, overload

import numpy as np

from ..calibration.errors import CalibrationError
from .words import Token, Word

if TYPE_CHECKING:
    import pandas as pd

View = Literal["word", "token", "block", "kind", "pooling", "tap", "neuron", "feature"]
VIEWS: tuple[View, ...] = get_args(View)


class Neuron(NamedTuple):
    """One column of a tap, by the tap's name, such as ``ffn.3``."""

    tap: str
    neuron: int


class Feature(NamedTuple):
    """One neuron under one pooling."""

    tap: str
    neuron: int
    pooling: str


@dataclass(frozen=True)
class Contributions:
    """What some parts of a text or a model add to the logits. With the base they sum to these.

    Attributes:
        view: what the parts are.
        keys: the parts: :class:`Word`, :class:`Token`, :class:`Neuron`, :class:`Feature`, the number of a block, or the
            name of a tap, kind or pooling.
        values: ``(parts, labels)`` in units of the logit; above zero speaks for a label.
        names: of the labels.
    """

    view: View
    keys: tuple[Any, ...]
    values: np.ndarray
    names: tuple[str, ...]

    @property
    def shares(self) -> np.ndarray:
        """Sizes of the contributions to each label as parts of their sum, ``(parts, labels)``; zero where all are."""
        sizes = np.abs(self.values)
        total = sizes.sum(0)
        return np.asarray(np.divide(sizes, total, out=np.zeros_like(sizes), where=total > 0))

    def to_pandas(self) -> pd.DataFrame:
        """A row for each part, with what it is called and a column for each label."""
        import pandas as pd

        rows = zip(self.keys, self.values, strict=True)
        return pd.DataFrame([{**_named(self.view, key), **_by_name(self.names, row)} for key, row in rows])


@dataclass(frozen=True)
class Reading:
    """What all explanations of a classifier share: its labels, its base, and its features with their weights.

    Attributes:
        names: of the labels.
        problem_type: as in the config.
        base: the logits of a text whose every feature is at its mean in training, ``(labels,)``: the head's intercept
            over the temperature.
        features: in the order of the feature vector.
        weight: what one standard deviation of a feature adds to the logits, gates and temperature included,
            ``(features, labels)``.
        has_offsets: whether the tokenizer tells where its tokens stand. If not, each token is a word of its own.
    """

    names: tuple[str, ...]
    problem_type: str
    base: np.ndarray
    features: tuple[Feature, ...]
    weight: np.ndarray
    has_offsets: bool

    @cached_property
    def _groups(self) -> dict[str, tuple[tuple[Any, ...], np.ndarray]]:
        of: dict[str, list[Any]] = {
            "feature": list(self.features),
            "neuron": [Neuron(feature.tap, feature.neuron) for feature in self.features],
            "tap": [feature.tap for feature in self.features],
            "kind": [feature.tap.partition(".")[0] for feature in self.features],
            "block": [int(feature.tap.partition(".")[2]) for feature in self.features],
            "pooling": [feature.pooling for feature in self.features],
        }
        found = {}
        for view, keys in of.items():
            places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
            found[view] = tuple(places), np.array([places[key] for key in keys], dtype=np.int64)
        return found

    def group(self, view: View) -> tuple[tuple[Any, ...], np.ndarray]:
        """The parts of the model in a view, and of which part each feature is, ``(features,)``."""
        return self._groups[view]

    def label(self, label: str | int) -> int:
        """The number of a label that is given by name or number. Raises :class:`CalibrationError` for another."""
        if isinstance(label, str) and label in self.names:
            return self.names.index(label)
        if isinstance(label, (int, np.integer)) and not isinstance(label, bool) and 0 <= label < len(self.names):
            return int(label)
        raise CalibrationError(
            f"label={label!r} is not one of the labels: {', '.join(self.names)} (0 to {len(self.names) - 1})."
        )


@dataclass(frozen=True)
class Explanation:
    """Why a classifier answers a text as it does.

    Attributes:
        text, pair: what was read; ``pair`` is the second text of a pair, or ``None``.
        logits, probabilities: ``(labels,)``; for regression both are the number.
        features: standardised, ``(features,)``.
        tokens: that were read, in their order. A decoder's start token stands first, if one is read.
        token_contributions: what each adds to each logit, ``(tokens, labels)``.
        words: that the tokens make up, special tokens among them.
        truncated: whether the end of the text was cut off, so that nothing speaks for it.
        reading: what the explanations of a classifier share.
    """

    text: str
    pair: str | None
    logits: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray
    tokens: tuple[Token, ...]
    token_contributions: np.ndarray
    words: tuple[Word, ...]
    truncated: bool
    reading: Reading

    @property
    def names(self) -> tuple[str, ...]:
        """Of the labels."""
        return self.reading.names

    @property
    def base(self) -> np.ndarray:
        """The logits of a text whose every feature is at its mean in training, ``(labels,)``."""
        return self.reading.base

    @property
    def label(self) -> str:
        """The label of the highest logit; of a multi-label text that is not the only one it may have."""
        return self.names[int(self.logits.argmax())]

    def by(self, view: View) -> Contributions:
        """The contributions of words, tokens, blocks, kinds, poolings, taps, neurons or features.

        Raises:
            CalibrationError: for another view.
        """
        if view not in VIEWS:
            raise CalibrationError(f"view must be one of {', '.join(VIEWS)}; got {view!r}.")
        if view == "token":
            return Contributions(view, self.tokens, self.token_contributions, self.names)
        if view == "word":
            places = np.array([token.word for token in self.tokens])
            return Contributions(view, self.words, self._summed(self.token_contributions, places), self.names)
        keys, places = self.reading.group(view)
        own = self.features[:, None].astype(np.float64) * self.reading.weight
        return Contributions(view, keys, self._summed(own, places), self.names)

    def top(
        self, label: str | int | None = None, *, count: int = 5, view: View = "word"
    ) -> tuple[list[tuple[Any, float]], list[tuple[Any, float]]]:
        """What speaks for a label and what against it, the strongest first.

        Args:
            label: name or number; by default :attr:`label`.
            count: most entries of each list.
            view: of what.

        Returns:
            Pairs of a key and its contribution, above zero in the first list, below in the second.

        Raises:
            CalibrationError: for another label or view.
        """
        found = self.by(view)
        values = found.values[:, self.reading.label(self.label if label is None else label)]
        order = np.argsort(-values, kind="stable")
        pairs = [(found.keys[i], float(values[i])) for i in order]
        against = [pair for pair in reversed(pairs) if pair[1] < 0]
        return [pair for pair in pairs if pair[1] > 0][:count], against[:count]

    def to_dict(self, views: Sequence[View] = ("word", "block", "kind")) -> dict[str, Any]:
        """Plain values, ready for JSON: the answer, the base, and under each view's name its contributions."""
        row: dict[str, Any] = {"text": self.text}
        if self.pair is not None:
            row["text_pair"] = self.pair
        if self.reading.problem_type == "regression":
            row["value"] = float(self.logits[0])
        else:
            row["label"] = self.label
            row["scores"] = _by_name(self.names, self.probabilities)
            if self.reading.problem_type == "multi_label_classification":
                row["labels"] = [self.names[i] for i in np.flatnonzero(self.logits > 0)]
                del row["label"]
        row["logits"], row["base"] = _by_name(self.names, self.logits), _by_name(self.names, self.base)
        row["truncated"] = self.truncated
        for view in views:
            found = self.by(view)
            row[view] = [
                {**_named(view, key), "contributions": _by_name(self.names, values)}
                for key, values in zip(found.keys, found.values, strict=True)
            ]
        return row

    @staticmethod
    def _summed(values: np.ndarray, places: np.ndarray) -> np.ndarray:
        out = np.zeros((int(places.max(initial=-1)) + 1, values.shape[1]))
        np.add.at(out, places, values)
        return out


@dataclass(frozen=True)
class Explanations(Sequence[Explanation]):
    """Explanations of some texts, in their order.

    Attributes:
        rows: one for each text.
        reading: what they share.
        worst_error: the largest difference of a logit and the sum of its parts, over max(1, its size).
    """

    rows: tuple[Explanation, ...]
    reading: Reading
    worst_error: float

    @property
    def truncated(self) -> int:
        """How many texts were cut."""
        return sum(row.truncated for row in self.rows)

    @property
    def logits(self) -> np.ndarray:
        """Of all texts, ``(texts, labels)``."""
        return np.stack([row.logits for row in self.rows])

    @property
    def features(self) -> np.ndarray:
        """Of all texts, ``(texts, features)``."""
        return np.stack([row.features for row in self.rows])

    def by(self, view: View) -> Contributions:
        """The mean size of the contributions over the texts, for a view of the model: block, kind, tap, neuron, ...

        Raises:
            CalibrationError: for words and tokens, which each text has of its own.
        """
        if view in ("word", "token"):
            raise CalibrationError(
                f"Each text has {view}s of its own: ask one explanation, such as found[0].by({view!r})."
            )
        parts = [row.by(view) for row in self.rows]
        sizes = np.mean([np.abs(part.values) for part in parts], 0)
        return Contributions(view, parts[0].keys, sizes, self.reading.names)

    @overload
    def __getitem__(self, index: int) -> Explanation: ...
    @overload
    def __getitem__(self, index: slice) -> Explanations: ...
    def __getitem__(self, index: int | slice) -> Explanation | Explanations:
        if isinstance(index, slice):
            return Explanations(self.rows[index], self.reading, self.worst_error)
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.rows)


def _named(view: View, key: Any) -> dict[str, Any]:
    """What a part is called, as columns."""
    if view in ("word", "token"):
        names = ("text", "part", "start", "end", "special")
        return {name: getattr(key, name) for name in names}
    if view in ("neuron", "feature"):
        return dict(key._asdict())
    return {view: key}


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}
