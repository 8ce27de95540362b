"""An explanation in the terminal: the text with its words coloured, what speaks for and against, and the blocks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import numpy as np
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from .heat import Heat, heat_of
from .result import Explanation
from .words import Word

# Blue for, orange against: told apart with any kind of colour blindness. Three steps, the strongest last.
_FOR = tuple(map(Style.parse, ("black on #c6dbef", "black on #6baed6", "bold white on #08519c")))
_AGAINST = tuple(map(Style.parse, ("black on #fdd0a2", "black on #fd8d3c", "bold white on #a63603")))
_STEPS = (0.15, 0.4, 0.7)  # of the largest contribution
_DIM = Style(dim=True)
_BAR = 24
_LONGEST = 4000  # characters of a text that are shown


def shown(explanation: Explanation, label: str | None = None) -> RenderableType:
    """What a console prints of an explanation; every colour's meaning is in words below it.

    Args:
        explanation: of one text.
        label: to explain, by default the answer.

    Raises:
        CalibrationError: for another label.
    """
    number = explanation.reading.label(explanation.label if label is None else label)
    heat = heat_of(explanation, number)
    parts: list[RenderableType] = [_headline(explanation, number, heat), *_texts(explanation, number)]
    if explanation.truncated:
        parts.append(Text("The end of the text was cut off: the model reads no more tokens.", _DIM))
    for title, pairs in zip(("for", "against"), heat.speaking, strict=True):
        line = Text(f"{title:<9}")
        line.append(", ".join(f"{visible(word)} {value:+.2f}" for word, value in pairs) or "no word")
        parts.append(line)
    parts.append(_blocks(explanation, number))
    return Group(*parts, Text())


def visible(text: str) -> str:
    """The text with each character that steers a terminal, or turns the direction of writing, as one that shows."""
    return "".join(sign if sign == "\n" else _visible(sign) for sign in text)


def _visible(sign: str) -> str:
    number = ord(sign)
    if sign == "\t":
        return " "
    if number < 0x20:
        return chr(0x2400 + number)  # Unicode's pictures of control characters
    if number == 0x7F:
        return "\u2421"
    turns = 0x202A <= number <= 0x202E or 0x2066 <= number <= 0x2069
    return "\ufffd" if turns or unicodedata.category(sign) in ("Cc", "Cs") else sign


def _headline(explanation: Explanation, number: int, heat: Heat) -> Text:
    name, logit = visible(heat.label), heat.logit
    if explanation.reading.problem_type == "regression":
        line = Text(f"{name} {logit:.3f}", Style(bold=True))
    else:
        line = Text(f"{name} {explanation.probabilities[number]:.3f}", Style(bold=True))
    others = "".join(f", {name} {value:+.2f}" for name, value in heat.others)
    line.append(f"  logit {logit:+.2f} = words {heat.words:+.2f}{others}", _DIM)
    return line


def _texts(explanation: Explanation, number: int) -> Iterator[Text]:
    values = explanation.by("word").values[:, number]
    largest = float(np.abs(values).max(initial=0.0))
    for part, text in enumerate((explanation.text, explanation.pair)):
        if text is None:
            continue
        line = Text(visible(text[:_LONGEST]))
        for word, value in zip(explanation.words, values, strict=True):
            style = _style(float(value), largest)
            if style is not None and word.start is not None and word.part == part:
                line.stylize(style, word.start, word.end)
        if len(text) > _LONGEST:
            line.append(f" ... {len(text) - _LONGEST:,} more characters", _DIM)
        yield line
    pairs = zip(explanation.words, values, strict=True)
    if placeless := [_styled(word, float(value), largest) for word, value in pairs if word.start is None]:
        yield Text(" ").join(placeless)


def _styled(word: Word, value: float, largest: float) -> Text:
    return Text(visible(word.text), _style(value, largest) or _DIM)


def _style(value: float, largest: float) -> Style | None:
    step = sum(abs(value) >= share * largest for share in _STEPS) if largest > 0 else 0
    return None if not step else (_FOR if value > 0 else _AGAINST)[step - 1]


def _blocks(explanation: Explanation, number: int) -> Table:
    found = explanation.by("block")
    values, shares = found.values[:, number], found.shares[:, number]
    largest = float(np.abs(values).max(initial=0.0)) or 1.0
    table = Table(box=None, pad_edge=False, show_header=False)
    for block, value, share in zip(found.keys, values, shares, strict=True):
        bar = Text("\u2588" * round(_BAR * abs(value) / largest), Style(color="#6baed6" if value > 0 else "#fd8d3c"))
        table.add_row(f"block {block}", f"{value:+.2f}", f"{share:.0%}", bar)
    return table
