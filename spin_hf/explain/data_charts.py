"""Charts of a classifier's answers on labelled texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .cards import NeuronCards
from .charts import Chart, Figure, Grid, Series
from .evaluation import REGRESSION, SINGLE, Evaluated
from .record_charts import reliability_chart

_MOST_POINTS = 2000
_MOST_PAIRS = 1600


def confusion_grid(names: Sequence[str], counts: Sequence[Sequence[int]], *, rows: int, of: str) -> Grid:
    """Counts by true and given label; zeros are gaps."""
    return Grid(
        name="confusion",
        title="Which label is taken for which",
        about=f"{rows:,} texts of {of}: a row for each true label, a column for each answer. Right answers lie on the "
        "diagonal. A click on a cell opens its texts, where the report has them.",
        x_title="answer",
        y_title="true label",
        columns=tuple(names),
        rows=tuple(names),
        values=tuple(tuple(int(count) or None for count in row) for row in counts),
        value_title="texts",
    )


def overlap_grid(cards: NeuronCards) -> Grid | None:
    """How many neurons two labels share; nothing where all share all, as two labels do that one column tells apart."""
    shares = np.where(np.eye(len(cards.names), dtype=bool), np.nan, cards.overlap)
    if not (shares < 1).any():
        return None
    if np.isfinite(shares).sum() > _MOST_PAIRS:  # twice each pair
        shares[~(shares >= np.sort(shares[np.isfinite(shares)])[-_MOST_PAIRS])] = np.nan
    return Grid(
        name="overlap",
        title="Which labels are served by the same neurons",
        about=f"Of the neurons that make up {cards.eta:.0%} of what moves either of two labels, the share that moves "
        f"both, on {cards.texts:,} texts." + (" Of many labels the largest are shown." if len(shares) > 40 else ""),
        x_title="label",
        y_title="label",
        columns=cards.names,
        rows=cards.names,
        values=tuple(tuple(round(share, 2) if share == share else None for share in row) for row in shares.tolist()),
        value_title="share of the neurons in common",
        most=1.0,
        digits=2,
    )


def mistakes(evaluated: Evaluated) -> list[Figure]:
    """What goes right and wrong: a confusion matrix, the scores of each label, or numbers against numbers."""
    if evaluated.problem_type == SINGLE:
        return [
            confusion_grid(
                evaluated.names, evaluated.matrix().tolist(), rows=len(evaluated.texts), of=evaluated.name
            )
        ]  # fmt: skip
    if evaluated.problem_type == REGRESSION:
        return [_numbers(evaluated)]
    return [_by_label(evaluated)]


def trust(evaluated: Evaluated) -> list[Figure]:
    """How far the probabilities hold on these texts; nothing for regression."""
    found = evaluated.reliability()
    if found is None:
        return []
    return [
        reliability_chart(
            [("as the model says", found)],
            name="reliability-data",
            title=f"How far they can be trusted on {evaluated.name}",
            about=f"{len(evaluated.texts):,} texts, with the temperature that is stored in the model.",
        )
    ]


def _numbers(evaluated: Evaluated) -> Chart:
    true, given = evaluated.labels, evaluated.prediction.labels
    rows = np.arange(len(true))
    if len(rows) > _MOST_POINTS:
        rows = np.sort(np.random.default_rng(0).choice(rows, _MOST_POINTS, replace=False))
    least, most = float(min(true.min(), given.min())), float(max(true.max(), given.max()))
    drawn = "" if len(rows) == len(true) else f" {len(rows):,} of them are drawn."
    return Chart(
        name="numbers",
        title="Predicted against true numbers",
        about=f"{len(true):,} texts of {evaluated.name}.{drawn} On the line both agree.",
        x_title="true",
        y_title="predicted",
        series=(
            Series("texts", tuple(true[rows].tolist()), tuple(given[rows].tolist()), draw="points"),
            Series("equal", (least, most), (least, most), colour=1, style=2),
        ),
    )


def _by_label(evaluated: Evaluated) -> Chart:
    found = [row for row in evaluated.label_rows(texts=0) if row.support]
    f1 = [2 * row.right / (row.support + row.given) for row in found]
    return Chart(
        name="by-label",
        title="How well each label is found",
        about=f"F1 of each label on {len(evaluated.texts):,} texts of {evaluated.name}, the most frequent label first.",
        x_title="label",
        y_title="F1",
        series=(
            Series(
                "F1", tuple(row.name for row in found), tuple(f1), draw="bars",
                hover=tuple(
                    f"{row.name}: F1 {value:.3f}; {row.support:,} texts have it, {row.given:,} got it, "
                    f"{row.right:,} both"
                    for row, value in zip(found, f1, strict=True)
                ),
            ),
        ),
        sideways=True,
    )  # fmt: skip
