"""The words of a text with what each adds to an answer, cut into parts for a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import Explanation
    from .words import Word


_STRONGEST = 6  # words for, and against, that are named


@dataclass(frozen=True)
class Part:
    """A piece of a text.

    Attributes:
        text: its characters.
        share: its contribution over the largest one of the text, from -1 to 1; 0 between words.
        told: the contribution in words; empty between words.
    """

    text: str
    share: float = 0.0
    told: str = ""


@dataclass(frozen=True)
class Heat:
    """What speaks for and against one label.

    Attributes:
        label: its name.
        texts: the parts of the text, and of the second one of a pair.
        others: what no word of the text adds: special tokens and the base value, by name, in units of the logit.
        logit: the sum of everything.
        speaking: the words that add most for the label, and those that add most against it, each with what it adds.
        truncated: whether the end of the text was not read.
    """

    label: str
    texts: tuple[tuple[Part, ...], ...]
    others: tuple[tuple[str, float], ...]
    logit: float
    speaking: tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]
    truncated: bool

    @property
    def words(self) -> float:
        """What all words add together."""
        return self.logit - sum(value for _, value in self.others)


def heat_of(explanation: Explanation, label: str | int, *, longest: int | None = None) -> Heat:
    """The heat of one label; texts beyond ``longest`` characters are cut. A tokenizer that doesn't say where its tokens
    stand has one text of words, also of a pair.

    Raises:
        CalibrationError: for a label that the classifier doesn't have.
    """
    number = explanation.reading.label(label)
    found = explanation.by("word")
    every = [(word, float(value)) for word, value in zip(found.keys, found.values[:, number], strict=True)]
    words = [(word, value) for word, value in every if not word.special]
    largest = max((abs(value) for _, value in words), default=0.0)
    texts = [explanation.text]
    if explanation.pair is not None and explanation.reading.has_offsets:
        texts.append(explanation.pair)
    name = explanation.names[number]
    parts = []
    for place, text in enumerate(texts):
        parts.append(tuple(_parts(text, [own for own in words if own[0].part == place], largest, name, longest)))
    special = sum(value for word, value in every if word.special)
    others = (("base value", float(explanation.base[number])), ("special tokens", special))
    ordered = sorted(((word.text, value) for word, value in words), key=lambda pair: -pair[1])
    speaking = (
        tuple(pair for pair in ordered[:_STRONGEST] if pair[1] > 0),
        tuple(pair for pair in ordered[::-1][:_STRONGEST] if pair[1] < 0),
    )
    return Heat(name, tuple(parts), others, float(explanation.logits[number]), speaking, explanation.truncated)


def _parts(text: str, words: list[tuple[Word, float]], largest: float, label: str, longest: int | None) -> list[Part]:
    """The words and all that stands between them; a word without offsets stands by itself."""
    parts, place = [], 0
    end = len(text) if longest is None else min(longest, len(text))
    for word, value in words:
        share = value / largest if largest else 0.0
        told = f"{value:+.3f} {'for' if value >= 0 else 'against'} {label}"
        if word.start is None or word.end is None:
            parts += [Part(word.text, share, told), Part(" ")]
            continue
        if word.start >= end:
            break
        if word.start > place:
            parts.append(Part(text[place : word.start]))
        parts.append(Part(text[word.start : min(word.end, end)], share, told))
        place = word.end
    if words and words[0][0].start is None:
        return parts
    if place < end:
        parts.append(Part(text[place:end]))
    if end < len(text):
        parts.append(Part(f"… ({len(text):,} characters)"))
    return parts
