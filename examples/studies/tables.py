"""What the studies show their rows with: Markdown tables, and scores in points of 100."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Rows = list[dict[str, Any]]


def points(value: float, error: float | None = None, *, sign: bool = False) -> str:
    """A score in points of 100, with its error."""
    shown = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return shown if error is None else f"{shown} ± {100 * error:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def of(rows: Rows, **key: Any) -> Rows:
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]


def pairs(rows: Rows) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["model"], row["set"]) for row in rows))


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
