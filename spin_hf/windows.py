"""Texts longer than the backbone's window: cut into overlapping windows, whose poolings make up the text's.

A window is a text of its own to the backbone: a piece of the text between the special tokens that the tokenizer puts
around every text. Neighbouring windows overlap, so that a token near the end of one has its context in the other. Each
token is pooled once, in the window where it stands farther from the end of the piece; the text's first special tokens
in its first window, its last ones in its last. So the pooled values are those of one long row of activations, in which
every token of the text has its place: the mean is over all of them, special ones included, and the window's copies of
special tokens count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from .attention import ATTENTION, join
from .pooling import pool
from .trust import CheckpointError

Key = TypeVar("Key")

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Windows:
    """How long texts are cut.

    Args:
        size: tokens of a window, special ones included.
        overlap: tokens that two neighbouring windows share at least.
        before, after: special tokens that the tokenizer puts before and behind a text.
    """

    size: int
    overlap: int
    before: int = 0
    after: int = 0

    @property
    def room(self) -> int:
        """Tokens of a window that are no special ones."""
        return self.size - self.before - self.after

    def starts(self, tokens: int) -> list[int]:
        """Where in a text of so many tokens each window begins: as few windows as will do, evenly spaced."""
        spare = tokens - self.size
        if spare <= 0:
            return [0]
        steps = -(-spare // (self.room - self.overlap))
        return [number * spare // steps for number in range(steps + 1)]

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class WindowPlan:
    """The windows of a batch of texts, those of each text in order.

    Args:
        counts: windows of each text, ``(texts,)``.
        most: the largest of them.
        text: of each window, ``(windows, 1)``.
        place: in its text of each token of a window, ``(windows, tokens)``.
        mask: 1 for real tokens, ``(windows, tokens)``.
        pooled: True for the tokens that are pooled in this window, ``(windows, tokens)``.
        share: those as a part of all tokens of the text, ``(windows,)``.
    """

    counts: Tensor
    most: int
    text: Tensor
    place: Tensor
    mask: Tensor
    pooled: Tensor
    share: Tensor

    def passes(self, size: int, *, single: bool) -> list[Tensor]:
        """Numbers of the windows that run together: no more than there are texts or fit into 4096 tokens."""
        most = 1 if single else max(len(self.counts), _TOKENS_AT_ONCE // size)
        return list(torch.arange(len(self.text), device=self.text.device).split(most))

    def cut(self, given: Tensor | None, windows: Tensor) -> Tensor | None:
        """Some windows ``(windows, tokens, ...)`` of a right-padded batch ``(texts, tokens, ...)``."""
        if given is None:
            return None
        return given[self.text[windows].to(given.device), self.place[windows].to(given.device)]

    def pooled_by(
        self,
        run: Callable[..., dict[Key, list[Tensor]]],
        poolings: Mapping[Key, Sequence[str]],
        inputs: Sequence[Tensor | None],
        *,
        size: int,
        single: bool,
    ) -> dict[Key, list[Tensor]]:
        """Pooled values ``(texts, neurons)`` of whole texts, for each key and each of its poolings.

        Args:
            run: gives those of windows ``(windows, neurons)``, from the mask of their tokens, the mask of the tokens to
                pool, and their part of the inputs.
            poolings: names, for each key.
            inputs: of the texts, ``(texts, tokens, ...)``.
            size: tokens of a window.
            single: run each window alone.
        """
        passes = [
            run(self.mask[part], self.pooled[part], *(self.cut(given, part) for given in inputs))
            for part in self.passes(size, single=single)
        ]
        return {
            key: [self.merge(torch.cat([part[key][i] for part in passes]), name) for i, name in enumerate(names)]
            for key, names in poolings.items()
            if names
        }

    def merge(self, values: Tensor, pooling: str) -> Tensor:
        """Pooled values of the windows ``(windows, neurons)`` as those of the texts ``(texts, neurons)``."""
        counts = self.counts.to(values.device)
        number = torch.arange(self.most, device=values.device)
        mask = number < counts[:, None]
        windows = torch.where(mask, (counts.cumsum(0) - counts)[:, None] + number, 0)
        if pooling == ATTENTION:
            return join(values[windows], mask)
        if pooling != "mean":  # the first of the firsts, the greatest of the greatest
            return pool(values[windows], mask, [pooling])[:, 0]
        share = self.share.to(values.device)[windows].masked_fill(~mask, 0.0)
        return (values[windows] * share[..., None]).sum(1)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # or torch.compile would make a graph for each length
def plan_windows(mask: Tensor, windows: Windows) -> WindowPlan:
    """Cut the texts of a right-padded batch with this mask ``(texts, tokens)``. A short text is one window."""
    rows, counts = [], []
    for text, tokens in enumerate(mask.to(torch.bool).sum(1).tolist()):
        starts = windows.starts(tokens)
        middles = [windows.before + (one + other + windows.room) // 2 for one, other in pairwise(starts)]
        bounds = pairwise([0, *middles, tokens])
        rows += [(text, tokens, start, *bound) for start, bound in zip(starts, bounds, strict=True)]
        counts.append(len(starts))
    text, tokens, start, first, end = torch.tensor(rows, device=mask.device).T[..., None]
    length = tokens.clamp_max(windows.size)
    column = torch.arange(int(length.max().clamp_min(1)), device=mask.device)
    place = column + torch.where(column < windows.before, 0, start)
    place = torch.where(column >= length - windows.after, column + tokens - length, place)
    pooled = (first <= place) & (place < end)
    return WindowPlan(
        counts=torch.tensor(counts, device=mask.device),
        most=max(counts),
        text=text,
        place=place,
        mask=(column < length).to(mask.dtype),
        pooled=pooled,
        share=pooled.sum(1) / tokens[:, 0].clamp_min(1),
    )


def checked_windows(values: Any) -> dict[str, int] | None:
    """``SpinConfig.windows``. Raises :class:`CheckpointError` for values by which no text could be cut."""
    if values is None:
        return None
    names = {"size", "overlap", "before", "after"}
    if isinstance(values, Mapping) and set(values) == names and all(type(value) is int for value in values.values()):
        windows = Windows(**values)
        if min(values.values()) >= 0 and windows.overlap < windows.room:
            return windows.to_dict()
    raise CheckpointError(
        "`windows` should look like {'size': 512, 'overlap': 128, 'before': 1, 'after': 1}, with an overlap smaller "
        f"than what the special tokens before and after leave of the size; got {values}."
    )
