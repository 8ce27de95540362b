"""What a chart shows, described once; plotly draws it in the report, matplotlib for papers, and a table repeats it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Value = float | int | str | None


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: in the legend.
        x, y: the values, of one length; ``None`` is a gap.
        colour: index into the palette, which is safe for colour-blind readers.
        style: index into markers and dashes, which tell series apart without any colour.
        draw: a line through the points, the points alone, or bars.
        hover: what is shown at each point, instead of its values.
        low, high: ends of an interval around each y.
    """

    name: str
    x: tuple[Value, ...]
    y: tuple[float | None, ...]
    colour: int = 0
    style: int = 0
    draw: Literal["line", "points", "bars"] = "line"
    hover: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Level:
    """A horizontal line over the whole chart: a score that others are measured against."""

    name: str
    y: float
    strong: bool = False


@dataclass(frozen=True)
class Chart:
    """Series over two axes.

    Attributes:
        name: of its files, and of its place in the page.
        title: what it shows, in a few words.
        about: how to read it, in a sentence or two.
        x_title, y_title: of the axes, with units.
        series: what is drawn.
        levels: lines over the whole width.
        shade: from, to, and what the shaded part of the x axis means.
        log_x: a logarithmic x axis.
        diagonal: the line y = x, where what is said equals what happened.
        x_whole: only whole numbers stand on the x axis.
        sideways: bars that run to the right, for long names; x and y keep their meaning (names, lengths).
    """

    name: str
    title: str
    about: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    shade: tuple[float, float, str] | None = None
    log_x: bool = False
    diagonal: bool = False
    x_whole: bool = False
    sideways: bool = False

    def table(self) -> tuple[tuple[str, ...], Iterator[tuple[Value, ...]]]:
        """Head and rows of the same facts."""
        several = len(self.series) > 1
        head = (*(("series",) if several else ()), self.x_title, self.y_title)
        if any(series.low for series in self.series):
            head = (*head, "interval")
        return head, self._rows(several, len(head))

    def _rows(self, several: bool, width: int) -> Iterator[tuple[Value, ...]]:
        for series in self.series:
            for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
                between = (f"{series.low[i]:.4g} to {series.high[i]:.4g}",) if series.low else ()
                row = (*((series.name,) if several else ()), x, y, *between)
                yield (*row, *("",) * (width - len(row)))
        for level in self.levels:
            row = (*((level.name,) if several else ()), "" if several else level.name, level.y)
            yield (*row, *("",) * (width - len(row)))


@dataclass(frozen=True)
class Grid:
    """Numbers by row and column, as shades of one colour.

    Attributes:
        name, title, about, x_title, y_title: as of a :class:`Chart`.
        columns, rows: their names, left to right and top to bottom.
        values: ``rows x columns`` numbers; ``None`` for none.
        value_title: what the numbers are.
        most: the number of the strongest shade, the largest of all by default.
        numbered: also write the numbers into the cells.
        digits: behind the point.
    """

    name: str
    title: str
    about: str
    x_title: str
    y_title: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    value_title: str
    most: float | None = None
    numbered: bool = True
    digits: int = 0

    @property
    def top(self) -> float:
        """The number of the strongest shade; that of none is 0."""
        largest = max((value for row in self.values for value in row if value is not None), default=0.0)
        return (largest if self.most is None else self.most) or 1.0

    def table(self) -> tuple[tuple[str, ...], Iterator[tuple[Value, ...]]]:
        """Head and rows of the same facts; of many columns only the cells that hold something."""
        if len(self.columns) <= _MOST_COLUMNS:
            head = (f"{self.y_title} \\ {self.x_title}", *self.columns)
            return head, ((row, *values) for row, values in zip(self.rows, self.values, strict=True))
        return (self.y_title, self.x_title, self.value_title), (
            (row, column, value)
            for row, values in zip(self.rows, self.values, strict=True)
            for column, value in zip(self.columns, values, strict=True)
            if value
        )


Figure = Chart | Grid
MOST_MARKERS = 40  # on a line; beyond, they hide it
_MOST_COLUMNS = 40
