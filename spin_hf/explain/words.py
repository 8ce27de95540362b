"""The pieces of a text that contributions belong to: its tokens, and the words that these make up."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..calibration.extraction import Encoded

_JOINERS = "\u200c\u200d"  # zero-width: inside Persian words, and between emoji that make one picture
_APOSTROPHES = "'\u2019"
# Han, kana, Thai, Lao, Myanmar, Khmer: written without spaces, so that a run of letters is no word.
_SPACELESS = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF)),
    *((0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)


@dataclass(frozen=True)
class Token:
    """One token that the backbone read.

    Attributes:
        text: the characters that it stands for, or its own name where that is unknown.
        part: 0 in the text, 1 in the second text of a pair.
        start, end: where in that text; ``None`` for special tokens, and for all of a tokenizer without offsets.
        special: whether the tokenizer put it there, or a decoder's start did.
        word: number of the word that it belongs to.
    """

    text: str
    part: int
    start: int | None
    end: int | None
    special: bool
    word: int


@dataclass(frozen=True)
class Word:
    """A word, a punctuation mark, or a special token. Attributes as those of :class:`Token`; ``tokens`` are its own."""

    text: str
    part: int
    start: int | None
    end: int | None
    special: bool
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A token before it has a word."""

    name: str
    part: int
    place: tuple[int, int] | None
    special: bool


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where the words and the other signs of a text are; white space belongs to none.

    Letters, digits and their marks make words, in scripts without spaces each letter one. Apostrophes inside a word and
    points inside a number belong to it. A sign that is repeated is one.
    """
    spans: list[tuple[int, int]] = []
    for i, sign in enumerate(text):
        if sign.isspace():
            continue
        if spans and spans[-1][1] == i and _joined(text, i):
            spans[-1] = (spans[-1][0], i + 1)
        else:
            spans.append((i, i + 1))
    return spans


def _joined(text: str, i: int) -> bool:
    """Whether the sign at ``i`` goes on with what stands before it."""
    before, sign = text[i - 1], text[i]
    if sign in _JOINERS or before in _JOINERS or unicodedata.category(sign)[0] == "M" or _is_skin_tone(sign):
        return True
    if _is_letter(before) and _is_letter(sign):
        return not (_is_spaceless(before) or _is_spaceless(sign))
    for joint, kind in ((_APOSTROPHES, str.isalpha), (".,", str.isdigit)):
        if sign in joint and kind(before) and kind(text[i + 1 : i + 2]):
            return True
        if before in joint and kind(sign) and kind(text[max(0, i - 2) : i - 1]):
            return True
    return before == sign and not _is_letter(sign)


def _is_letter(sign: str) -> bool:
    return sign == "_" or unicodedata.category(sign)[0] in "LMN"


def _is_spaceless(sign: str) -> bool:
    number = ord(sign)
    return number >= _SPACELESS[0][0] and any(first <= number <= last for first, last in _SPACELESS)


def _is_skin_tone(sign: str) -> bool:
    return "\U0001f3fb" <= sign <= "\U0001f3ff"


def tokenized(texts: Sequence[str], pieces: Sequence[Piece]) -> tuple[tuple[Token, ...], tuple[Word, ...]]:
    """Put the tokens of one text into words: those that stand for parts of one word, and those that share a sign.

    Args:
        texts: the text, and its pair if there is one.
        pieces: its tokens. One without characters belongs to its neighbour.
    """
    signs = [word_spans(text) for text in texts]
    starts, ends = ([[span[side] for span in spans] for spans in signs] for side in (0, 1))
    bounds: list[tuple[int, int] | None] = []  # of each word; None for special tokens
    word_of: list[int] = []
    before: Piece | None = None
    for piece, place in zip(pieces, _places(pieces), strict=True):
        if place is None:
            bounds.append(None)
            before = None
        else:
            start, end = _without_space(texts[piece.part], *place)
            spans = signs[piece.part]
            first, last = bisect_right(ends[piece.part], start), bisect_left(starts[piece.part], end)
            if first < last:
                start, end = min(start, spans[first][0]), max(end, spans[last - 1][1])
            known = bounds[-1] if before is not None and before.part == piece.part else None
            if known is not None and start < known[1]:
                bounds[-1] = min(known[0], start), max(known[1], end)
            else:
                bounds.append((start, end))
            before = piece
        word_of.append(len(bounds) - 1)
    members: list[list[int]] = [[] for _ in bounds]
    for number, word in enumerate(word_of):
        members[word].append(number)
    return (
        tuple(_token(texts, piece, word) for piece, word in zip(pieces, word_of, strict=True)),
        tuple(_word(texts, pieces[own[0]], span, own) for own, span in zip(members, bounds, strict=True)),
    )


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, encoded: Encoded, texts: Sequence[str], pairs: Sequence[str] | None
) -> Iterator[list[Piece]]:
    """The tokens of each text as they were read; of a tokenizer without offsets all without a place.

    Args:
        tokenizer: that read them.
        encoded: what it read.
        texts, pairs: what it read from.
    """
    if not tokenizer.is_fast:
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        for ids in encoded.input_ids:
            names = tokenizer.convert_ids_to_tokens(ids)
            yield [Piece(name, 0, None, id in special) for name, id in zip(names, ids, strict=True)]
        return
    cut: dict[str, Any] = {"truncation": False}
    if encoded.truncated:
        cut = {"truncation": True, "max_length": encoded.max_length}
    again = tokenizer(list(texts), None if pairs is None else list(pairs), verbose=False, **cut)
    for ids, found in zip(encoded.input_ids, again.encodings, strict=True):
        if found.ids != ids:  # a text without tokens, which was given a pad token
            yield [Piece(str(name), 0, None, True) for name in tokenizer.convert_ids_to_tokens(ids)]
            continue
        rows = zip(found.tokens, found.sequence_ids, found.offsets, strict=True)
        yield [Piece(name, part or 0, None if part is None else place, part is None) for name, part, place in rows]


def _places(pieces: Sequence[Piece]) -> list[tuple[int, int] | None]:
    """Where each token stands; one without characters where its neighbour does, the next rather than the last."""
    places = [piece.place for piece in pieces]
    for order in (range(len(pieces) - 2, -1, -1), range(1, len(pieces))):
        step = -1 if order.step > 0 else 1
        for number in order:
            place, beside = places[number], places[number + step]
            if place is not None and place[0] >= place[1] and pieces[number + step].part == pieces[number].part:
                places[number] = beside or place
    return [place if place is not None and place[0] < place[1] else None for place in places]


def _without_space(text: str, start: int, end: int) -> tuple[int, int]:
    """The token's characters without white space around them, but for one that is white space alone."""
    inside = text[start:end]
    if not inside.strip():
        return start, end
    return start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())


def _token(texts: Sequence[str], piece: Piece, word: int) -> Token:
    start, end = piece.place or (None, None)
    text = piece.name if piece.place is None else texts[piece.part][start:end] or piece.name
    return Token(text, piece.part, start, end, piece.special, word)


def _word(texts: Sequence[str], piece: Piece, span: tuple[int, int] | None, own: Sequence[int]) -> Word:
    start, end = span or (None, None)
    text = piece.name if span is None else texts[piece.part][start:end]
    return Word(text, piece.part, start, end, piece.special, tuple(own))
