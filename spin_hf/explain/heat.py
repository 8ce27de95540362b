"""The words of a text with what each adds to an answer, cut into parts for a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import Explanation
    from .words import Word


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
    """

    label: str
    texts: tuple[tuple[Part, ...], ...]
    others: tuple[tuple[str, float], ...]
    logit: float


def heat_of(explanation: Explanation, label: str | int, *, longest: int | None = None) -> Heat:
    """The heat of one label; texts beyond ``longest`` characters are cut.

    Raises:
        CalibrationError: for a label that the classifier doesn't have.
    """
    number = explanation.reading.label(label)
    found = explanation.by("word")
    values = [float(value) for value in found.values[:, number]]
    largest = max((abs(v) for word, v in zip(found.keys, values, strict=True) if not word.special), default=0.0)
    texts = [explanation.text] if explanation.pair is None else [explanation.text, explanation.pair]
    name = explanation.names[number]
    parts = []
    for place, text in enumerate(texts):
        own = [(word, v) for word, v in zip(found.keys, values, strict=True) if word.part == place and not word.special]
        parts.append(tuple(_parts(text, own, largest, name, longest)))
    special = sum(v for word, v in zip(found.keys, values, strict=True) if word.special)
    others = (("base value", float(explanation.base[number])), ("special tokens", special))
    return Heat(name, tuple(parts), others, float(explanation.logits[number]))


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
        parts.append(Part(text[word.start : word.end], share, told))
        place = word.end
    if words and words[0][0].start is None:
        return parts
    if place < end:
        parts.append(Part(text[place:end]))
    if end < len(text):
        parts.append(Part(f"… ({len(text):,} characters)"))
    return parts
