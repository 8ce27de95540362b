"""A picture of where in the backbone the label can be read: the score of every probe, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..calibration import CalibrationResult
from ..taps import Tap
from .metadata import title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours; markers and dashes tell the lines apart without any colour.
_COLOURS = {"hidden": "#0072B2", "ffn": "#D55E00", "norm": "#009E73"}
_NAMES = {"hidden": "hidden state", "ffn": "FFN neurons", "norm": "after the final norm"}
_STYLES = {"mean": ("o", "-"), "max": ("^", "--"), "first": ("s", ":"), "last": ("D", "-.")}


def layer_profile(result: CalibrationResult) -> Figure:
    """The picture, with the scores of the last layer and of SPIN as lines.

    Args:
        result: the record of a calibration.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    last = _draw_probes(axes, result)
    axes.axhline(result.chosen.score, color="black", linewidth=1.8, label=f"SPIN, {result.chosen.score:.3f}")
    for name, score in result.baselines.items():
        if name.startswith("last layer"):
            axes.axhline(score, color="#666666", linewidth=1.4, linestyle=(0, (1, 1.5)), label=f"{name}, {score:.3f}")
    if result.blocks < last:
        axes.axvspan(result.blocks + 0.5, last + 0.5, color="#BBBBBB", alpha=0.3, label="blocks removed")
    axes.set_xticks(range(0, last + 1, max(1, round((last + 1) / 16))))
    axes.set_xlim(-0.5, last + 0.5)
    axes.set_xlabel("block (0: the embeddings)")
    axes.set_ylabel(f"{title(result.metric)}, {result.data['evaluated']} ({result.data['eval_rows']:,} texts)")
    axes.set_title("What one probe reads in each layer", loc="left")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _draw_probes(axes: Axes, result: CalibrationResult) -> int:
    """One line for each kind and pooling; returns the last block."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for probe in result.probes:
        tap = Tap.parse(probe["tap"])
        if probe["score"] is not None:  # a metric may be undefined
            lines.setdefault((tap.kind, probe["pooling"]), []).append((tap.block, probe["score"]))
    for (kind, pooling), points in lines.items():
        marker, dashes = _STYLES[pooling]
        blocks, scores = zip(*sorted(points), strict=True)
        axes.plot(
            blocks, scores, color=_COLOURS[kind], marker=marker, markersize=5, linestyle=dashes, linewidth=1.4,
            label=f"{_NAMES[kind]}, {pooling}",
        )  # fmt: skip
    return max((block for points in lines.values() for block, _ in points), default=0)
