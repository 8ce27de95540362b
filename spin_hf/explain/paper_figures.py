"""The same charts for papers: PNG and SVG by matplotlib, which needs no browser and no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .charts import MOST_MARKERS, Chart, Figure, Grid, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

# Okabe and Ito's colours, which colour-blind readers tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "^", "s", "D", "X", "P")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (8, 3)), (0, (8, 2, 2, 2)))
_DPI = 200  # of files for papers
_MOST_TICKS = 24
_FEW = 8  # values on a logarithmic axis that are each told, but for those that stand too close
_APART = 1.25
_GROUP = 0.6  # of the room of a name, what its points take


def save_figures(charts: Iterable[Figure], folder: str | Path) -> list[Path]:
    """Write every chart as ``NAME.png`` (200 dots per inch) and ``NAME.svg``, and return the paths.

    Raises:
        ImportError: without matplotlib.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        picture = draw(chart)
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            path = folder / (chart.name + suffix)
            picture.savefig(path, metadata=metadata, dpi=_DPI)
            written.append(path)
    return written


def draw(chart: Figure) -> Picture:
    """One chart as a matplotlib figure.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = picture.add_subplot()
    axes.set_title(_text(chart.title), loc="left")
    if isinstance(chart, Grid):
        _draw_grid(picture, axes, chart)
    else:
        _draw_chart(picture, axes, chart)
    return picture


def _draw_chart(picture: Picture, axes: Axes, chart: Chart) -> None:
    names = _names(chart)
    for i, series in enumerate(chart.series):
        aside = _GROUP * ((i + 0.5) / len(chart.series) - 0.5) if names else 0.0
        _draw_series(axes, series, sideways=chart.sideways, places={name: j + aside for j, name in enumerate(names)})
    if names:
        axes.set_xticks(range(len(names)), [_text(name) for name in names])
    for level in chart.levels:
        look: dict[str, Any] = {"color": "black", "linewidth": 1.8}
        if not level.strong:
            look = {"color": "#666666", "linewidth": 1.4, "linestyle": (0, (1, 1.5))}
        axes.axhline(level.y, label=f"{_text(level.name)}, {level.y:.3f}", **look)
    if chart.shade is not None:
        start, end, meaning = chart.shade
        axes.axvspan(start, end, color="#BBBBBB", alpha=0.3, label=_text(meaning))
    if chart.diagonal:
        axes.plot([0, 1], [0, 1], color="#666666", linewidth=1, linestyle=(0, (1, 1.5)))
    if chart.log_x:
        axes.set_xscale("log")
        places = sorted({float(x) for series in chart.series for x in series.x if isinstance(x, (int, float))})
        if len(places) <= _FEW:
            told: list[float] = []
            for x in places:
                if not told or x >= _APART * told[-1]:
                    told.append(x)
            axes.set_xticks(told, [f"{x:,.10g}" for x in told])
            axes.set_xticks([], minor=True)
    if chart.x_whole:
        ends = [float(x) for series in chart.series for x in series.x if isinstance(x, (int, float))]
        first, last = int(min(ends, default=0)), int(max(ends, default=0))
        axes.set_xticks(range(first, last + 1, max(1, round((last - first + 1) / 16))))
        axes.set_xlim(first - 0.5, last + 0.5)
    axes.set_xlabel(_text(chart.y_title if chart.sideways else chart.x_title))
    axes.set_ylabel("" if chart.sideways else _text(chart.y_title))
    axes.grid(axis="x" if chart.sideways else "y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.sideways:
        axes.invert_yaxis()
    if len(chart.series) + len(chart.levels) > 1:
        picture.legend(loc="outside right upper", frameon=False, fontsize=9)


def _names(chart: Chart) -> list[str]:
    """The names on the x axis of several series of points, which stand beside each other over each name."""
    if len(chart.series) < 2 or any(series.draw != "points" for series in chart.series):
        return []
    return list(dict.fromkeys(x for series in chart.series for x in series.x if isinstance(x, str)))


def _draw_series(axes: Axes, series: Series, *, sideways: bool, places: Mapping[str, float]) -> None:
    """``places``: of names on the x axis, where they have one for this series."""
    colour = PALETTE[series.colour % len(PALETTE)]
    label = _text(series.name)
    xs: Any = [places.get(x, _text(x)) if isinstance(x, str) else x for x in series.x]
    ys: Any = [float("nan") if y is None else y for y in series.y]
    if series.draw == "bars":
        (axes.barh if sideways else axes.bar)(xs, ys, color=colour, label=label)
        return
    if series.low:
        below, above = ([abs(y - end) for y, end in zip(ys, ends, strict=True)] for ends in (series.low, series.high))
        axes.errorbar(xs, ys, [below, above], fmt="none", ecolor=colour, elinewidth=1)
    lined = series.draw == "line"
    axes.plot(
        xs, ys, color=colour, label=label, markersize=5, linewidth=1.4,
        marker=_MARKERS[series.style % len(_MARKERS)] if not lined or len(xs) <= MOST_MARKERS else None,
        linestyle=_DASHES[series.style % len(_DASHES)] if lined else "none",
    )  # fmt: skip


def _draw_grid(picture: Picture, axes: Axes, grid: Grid) -> None:
    values = [[float("nan") if value is None else float(value) for value in row] for row in grid.values]
    image = axes.imshow(values, cmap="Blues", aspect="auto", vmin=0, vmax=grid.top)
    for axis, names in ((axes.xaxis, grid.columns), (axes.yaxis, grid.rows)):
        step = max(1, -(-len(names) // _MOST_TICKS))
        axis.set_ticks(range(0, len(names), step), [_text(name) for name in names[::step]])
    if sum(map(len, grid.columns[:_MOST_TICKS])) > 60:
        axes.tick_params("x", rotation=90)
    axes.set_xlabel(_text(grid.x_title))
    axes.set_ylabel(_text(grid.y_title))
    picture.colorbar(image, label=_text(grid.value_title))
    if grid.numbered and max(len(grid.columns), len(grid.rows)) <= _MOST_TICKS:
        middle = 0.6 * grid.top  # of these blues, those beyond are dark
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value == value:  # no number in a gap
                    colour = "white" if value > middle else "black"
                    axes.text(j, i, f"{value:,.{grid.digits}f}", ha="center", va="center", color=colour, fontsize=8)


def _text(text: str) -> str:
    """Text as it stands: dollar signs are no formula to matplotlib, and a line is a line."""
    return " ".join(text.split()).replace("$", r"\$")
