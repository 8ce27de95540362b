"""Which texts may share a batch with a backbone, and the batches that follow from it.

Most backbones take a text's real tokens by the attention mask, so that any texts may be padded to one length. Some
ignore the mask, or work on windows or hashes of the padded sequence: their batches must be of one length. Some mix the
examples of a batch, as experts of a fixed capacity do: they take one text at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from torch import Tensor

Batching = Literal["padded", "equal_length", "single"]
BATCHINGS: tuple[Batching, ...] = get_args(Batching)


def split_rows(mask: Tensor, batching: str) -> Iterator[tuple[Tensor, int]]:
    """Numbers of the rows that may run together, and their length (at least 1).

    Args:
        mask: of a right-padded batch ``(batch, tokens)``, 1 for real tokens.
        batching: ``"equal_length"`` or ``"single"``.
    """
    lengths = mask.sum(1).clamp_min(1)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        for part in rows.split(1) if batching == "single" else [rows]:
            yield part, int(length)
