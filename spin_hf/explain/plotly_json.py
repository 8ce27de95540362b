"""Charts as plotly wants them. Names and texts are data: plotly reads strings as HTML, so all are escaped.

Colours are left to the page, which knows whether it is light or dark: a trace's ``meta`` holds the index of its own.
"""

from __future__ import annotations

from html import escape
from typing import Any

from .charts import MOST_MARKERS, Chart, Figure, Grid, Series, Value

SYMBOLS = ("circle", "triangle-up", "square", "diamond", "x", "cross")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_NARROW = 14  # columns of a grid that still have room for their numbers on a phone
_LONG = 22  # characters of a tick's name


def plotly_json(chart: Figure) -> dict[str, Any]:
    """``{"data": [...], "layout": {...}}`` of a chart, plain values only."""
    return _grid(chart) if isinstance(chart, Grid) else _chart(chart)


def _chart(chart: Chart) -> dict[str, Any]:
    x_axis: dict[str, Any] = {"title": _title(chart.x_title), "automargin": True}
    y_axis: dict[str, Any] = {"title": _title(chart.y_title), "automargin": True}
    if chart.log_x:
        x_axis.update(type="log", dtick=1)
    if chart.x_whole:
        x_axis.update(dtick=max(1, round(_span(chart) / 14)))
    if chart.sideways:
        y_axis.update(type="category", autorange="reversed", title={"text": ""})
        x_axis["title"] = _title(chart.y_title)
    shapes: list[dict[str, Any]] = []
    traces = [_trace(series, sideways=chart.sideways) for series in chart.series]
    traces += [_level(chart, i) for i in range(len(chart.levels))]
    if chart.diagonal:
        shapes.append({"type": "line", "x0": 0, "x1": 1, "y0": 0, "y1": 1, "line": {"width": 1, "dash": "dot"}})
        x_axis.update(range=[0, 1.02])
        y_axis.update(range=[0, 1.02])
    notes: list[dict[str, Any]] = []
    if chart.shade is not None:
        start, end, meaning = chart.shade
        shapes.append({"type": "rect", "yref": "paper", "x0": start, "x1": end, "y0": 0, "y1": 1, "line": {"width": 0}})
        notes.append(
            {
                "text": escape(meaning),
                "x": (start + end) / 2,
                "y": 1,
                "yref": "paper",
                "showarrow": False,
                "yanchor": "top",
            }
        )
    layout = {"xaxis": x_axis, "yaxis": y_axis, "shapes": shapes, "annotations": notes, "showlegend": len(traces) > 1}
    return {"data": traces, "layout": layout}


def _trace(series: Series, *, sideways: bool) -> dict[str, Any]:
    names, values = list(map(_plain, series.x)), list(series.y)
    trace: dict[str, Any] = {
        "name": escape(series.name),
        "x": values if sideways else names,
        "y": names if sideways else values,
        "meta": {"colour": series.colour},
    }
    if series.hover:
        trace.update(hovertext=list(map(escape, series.hover)), hoverinfo="text")
    if series.low:
        over = [high - y for high, y in zip(series.high, series.y, strict=True) if y is not None]
        under = [y - low for low, y in zip(series.low, series.y, strict=True) if y is not None]
        key = "error_x" if sideways else "error_y"
        trace[key] = {"type": "data", "symmetric": False, "array": over, "arrayminus": under}
    if series.draw == "bars":
        return {**trace, "type": "bar", **({"orientation": "h"} if sideways else {})}
    marked = "lines+markers" if len(series.x) <= MOST_MARKERS else "lines"
    trace.update(type="scatter", mode="markers" if series.draw == "points" else marked)
    trace["marker"] = {"symbol": SYMBOLS[series.style % len(SYMBOLS)], "size": 8}
    if series.draw == "line":
        trace["line"] = {"dash": DASHES[series.style % len(DASHES)], "width": 2}
    return trace


def _level(chart: Chart, index: int) -> dict[str, Any]:
    level = chart.levels[index]
    xs = [x for series in chart.series for x in series.x if isinstance(x, (int, float))]
    ends = [min(xs, default=0), max(xs, default=1)]
    if ends[0] == ends[1]:  # a line needs some length
        ends = [ends[0] - 0.5, ends[1] + 0.5]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"{escape(level.name)}, {level.y:.3f}",
        "x": ends,
        "y": [level.y, level.y],
        "hoverinfo": "name",
        "line": {"dash": "solid" if level.strong else "dot", "width": 2},
        "meta": {"colour": "ink" if level.strong else "muted"},
    }


def _grid(grid: Grid) -> dict[str, Any]:
    names = [[escape(_cut(name)) for name in axis] for axis in (grid.columns, grid.rows)]
    number = f"%{{z:,.{grid.digits}f}}"
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": list(range(len(grid.columns))),
        "y": list(range(len(grid.rows))),
        "z": [list(row) for row in grid.values],
        "zmin": 0,
        "zmax": grid.top,
        "hovertext": [
            [f"{escape(grid.y_title)} {row}<br>{escape(grid.x_title)} {column}" for column in names[0]]
            for row in names[1]
        ],
        "hovertemplate": f"%{{hovertext}}<br>{escape(grid.value_title)} {number}<extra></extra>",
        "hoverongaps": False,
        "meta": {"colour": "scale"},
        "xgap": 1,
        "ygap": 1,
        "showscale": False,
    }
    if len(grid.columns) * len(grid.rows) > _NARROW**2 * 4:
        trace.update(xgap=0, ygap=0, showscale=True)
        # The names stand in the page once; a hover text for every one of thousands of cells would outweigh it.
        del trace["hovertext"]
        trace.update(x=_distinct(names[0]), y=_distinct(names[1]))
        trace["hovertemplate"] = (
            f"{escape(grid.y_title)} %{{y}}<br>{escape(grid.x_title)} %{{x}}<br>{escape(grid.value_title)} {number}"
            "<extra></extra>"
        )
        x_ticks: dict[str, Any] = {"type": "category"}
        y_ticks: dict[str, Any] = {"type": "category"}
    else:
        x_ticks, y_ticks = (
            {"tickmode": "array", "tickvals": list(range(len(axis))), "ticktext": axis} for axis in names
        )
        if grid.numbered and len(grid.columns) <= _NARROW:
            trace["texttemplate"] = number
    return {
        "data": [trace],
        "layout": {
            "xaxis": {"title": _title(escape(grid.x_title)), "automargin": True, "showgrid": False, **x_ticks},
            "yaxis": {
                "title": _title(escape(grid.y_title)), "automargin": True, "autorange": "reversed", "showgrid": False,
                **y_ticks,
            },
            "showlegend": False,
        },
    }  # fmt: skip


def _title(text: str) -> dict[str, Any]:
    """Of an axis, off its names, however long these are."""
    return {"text": text, "standoff": 8}


def _distinct(names: list[str]) -> list[str]:
    """Category axes merge equal names, which long labels may have after they were cut."""
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return distinct


def _span(chart: Chart) -> float:
    xs = [float(x) for series in chart.series for x in series.x if isinstance(x, (int, float))]
    return max(xs, default=0) - min(xs, default=0)


def _plain(value: Value) -> Any:
    return escape(value) if isinstance(value, str) else value


def _cut(name: str) -> str:
    return name if len(name) <= _LONG else name[: _LONG - 1] + "…"
