"""Charts of a calibration's record: what each block knows, and what the choices of eta, size and depth bring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..attention import pooling_title
from ..calibration import CalibrationResult
from ..calibration.confidence import Confidence, Reliability
from ..calibration.resampling import share_interval
from ..calibration.selection import Candidate
from ..calibration.task import metric_title
from ..taps import Tap
from .charts import Chart, Grid, Level, Series

KINDS = {"hidden": "hidden state", "ffn": "FFN neurons", "norm": "after the final norm", "both": "both kinds"}
_COLOURS = {"hidden": 0, "ffn": 1, "norm": 2, "both": 3}
_STYLES = {"mean": 0, "max": 1, "first": 2, "last": 3, "all": 4, "attention": 5}


def by_block(result: CalibrationResult) -> Chart:
    """The score of every single probe over the block that it reads."""
    lines: dict[tuple[str, str], list[tuple[int, float, str]]] = {}
    for probe in result.probes:
        tap = Tap.parse(probe["tap"])
        if probe["score"] is not None:  # a metric may be undefined
            told = f"{_words(tap.kind, probe['pooling'])}, block {tap.block}: {probe['score']:.4f}"
            told += f" with {probe['num_features']:,} neurons"
            lines.setdefault((tap.kind, probe["pooling"]), []).append((tap.block, probe["score"], told))
    last = max((block for points in lines.values() for block, _, _ in points), default=0)
    depth = result.blocks
    return Chart(
        name="by-block",
        title="What one probe reads in each block",
        about="Each point is a sparse linear probe on one place of the backbone. Block 0 is the embeddings.",
        x_title="block",
        y_title=_score(result),
        series=tuple(
            Series(
                name=_words(*key), x=_column(points, 0), y=_column(points, 1), hover=_column(points, 2),
                colour=_COLOURS[key[0]], style=_STYLES[key[1]],
            )
            for key, points in ((key, sorted(points)) for key, points in lines.items())
        ),
        levels=_levels(result),
        shade=(depth + 0.5, last + 0.5, "blocks removed") if depth < last else None,
        x_whole=True,
    )  # fmt: skip


def by_eta(result: CalibrationResult) -> Chart | None:
    """The score over the share of salience kept; of all depths the best."""
    best: dict[tuple[str, str], dict[float, Candidate]] = {}
    for candidate in sorted(result.candidates, key=lambda c: c.rank):
        if candidate.eta is not None:
            best.setdefault((candidate.kind, candidate.pooling), {}).setdefault(candidate.eta, candidate)
    if len({eta for found in best.values() for eta in found}) < 2:
        return None
    return Chart(
        name="by-eta",
        title="How much of the salience is needed",
        about="Eta is the share of each layer's salience that the kept neurons hold. For every kind and pooling the "
        "best depth is shown.",
        x_title="eta",
        y_title=_score(result),
        series=tuple(
            Series(
                name=_words(*key),
                x=tuple(sorted(found)),
                y=tuple(found[eta].score for eta in sorted(found)),
                hover=tuple(_told(found[eta]) for eta in sorted(found)),
                colour=_COLOURS[key[0]],
                style=_STYLES[key[1]],
            )
            for key, found in sorted(best.items())
        ),
        levels=_levels(result)[1:],
    )


def by_size(result: CalibrationResult) -> Chart | None:
    """The score over the number of neurons, with the candidates that no other beats."""
    front = result.frontier
    every = tuple(sorted(result.candidates, key=lambda candidate: candidate.num_features))
    if not every:
        return None
    return Chart(
        name="by-size",
        title="How many neurons are needed",
        about="Every candidate that was tried. On the frontier are those that no other beats in score, neurons "
        "and depth at once.",
        series=(
            _points("tried", every, colour=5, style=0, draw="points"),
            _points("frontier", front, colour=0, style=2, draw="points"),
            _points("chosen", (result.chosen,), colour=1, style=3, draw="points"),
        ),
        levels=_levels(result)[1:],
        x_title="neurons kept",
        y_title=_score(result),
        log_x=every[-1].num_features > 20 * max(1, every[0].num_features),
    )


def by_depth(result: CalibrationResult) -> Chart | None:
    """The best score at every depth, with the share of blocks that need not run."""
    total = result.settings.get("blocks") or max((c.depth for c in result.candidates), default=0)
    whole: dict[int, Candidate] = {}
    single: dict[int, Candidate] = {}
    for candidate in sorted(result.candidates, key=lambda c: c.rank):
        (single if candidate.probe else whole).setdefault(candidate.depth, candidate)
    if not whole and not single:
        return None
    series = [
        Series(
            name=name,
            x=tuple(sorted(found)),
            y=tuple(found[depth].score for depth in sorted(found)),
            hover=tuple(
                f"{found[depth].score:.4f} with {depth} of {total} blocks, {1 - depth / total:.0%} of them saved, "
                f"by {found[depth].num_features:,} neurons"
                for depth in sorted(found)
            ),
            colour=colour,
            style=colour,
        )
        for name, found, colour in (("SPIN", whole, 0), ("best single probe", single, 1))
        if found
    ]
    return Chart(
        name="by-depth",
        title="How many blocks are needed",
        about=f"The best of all candidates that run so many of the {total} blocks. The blocks above are not run, and "
        "their share of the backbone's compute is saved.",
        x_title="blocks that run",
        y_title=_score(result),
        series=tuple(series),
        levels=_levels(result)[1:],
        x_whole=True,
    )


def kept_by_block(result: CalibrationResult) -> Grid | None:
    """How many neurons the classifier keeps in each block."""
    counts: dict[tuple[str, str], dict[int, int]] = {}
    for entry in result.kept:
        tap = Tap.parse(entry["tap"])
        row = counts.setdefault((tap.kind, entry["pooling"]), {})
        row[tap.block] = row.get(tap.block, 0) + int(entry["count"])
    if not counts:
        return None
    blocks = range(max(result.blocks, *(block for row in counts.values() for block in row)) + 1)
    return Grid(
        name="kept-neurons",
        title="Where the kept neurons are",
        about=f"Neurons that the classifier reads, {sum(int(entry['count']) for entry in result.kept):,} in all. "
        "Block 0 is the embeddings.",
        x_title="block",
        y_title="kind and pooling",
        columns=tuple(map(str, blocks)),
        rows=tuple(_words(*key) for key in counts),
        values=tuple(tuple(row.get(block) for block in blocks) for row in counts.values()),
        value_title="neurons",
    )


def reliability(confidence: Confidence, *, rows: int, evaluated: str) -> Chart:
    """The confidence that the record has, before and after its temperature."""
    shown = [("as the head says", confidence.before)]
    if confidence.temperature != 1:
        shown.append((f"with temperature {confidence.temperature:.3g}", confidence.after))
    return reliability_chart(
        shown,
        name="reliability",
        title="How far the probabilities can be trusted",
        about=f"On {rows:,} texts ({evaluated}): of the answers given with so much confidence, how many were right. "
        "On the diagonal both agree.",
    )


def reliability_chart(shown: Sequence[tuple[str, Reliability]], *, name: str, title: str, about: str) -> Chart:
    """Accuracy over confidence, a series for each that is shown."""
    intervals = [[share_interval(b.accuracy, b.size) for b in found.bins] for _, found in shown]
    return Chart(
        name=name,
        title=title,
        about=about + " The bars are intervals of 95%.",
        x_title="mean confidence",
        y_title="share right",
        series=tuple(
            Series(
                name=f"{label} (error {found.expected_calibration_error:.3f})",
                x=tuple(b.confidence for b in found.bins),
                y=tuple(b.accuracy for b in found.bins),
                hover=tuple(
                    f"confidence {b.confidence:.3f}, right {b.accuracy:.3f}, {b.size:,} decisions" for b in found.bins
                ),
                low=tuple(low for low, _ in intervals[i]),
                high=tuple(high for _, high in intervals[i]),
                colour=i,
                style=i,
            )
            for i, (label, found) in enumerate(shown)
        ),
        diagonal=True,
    )


def coverage(confidence: Confidence) -> Chart:
    """Accuracy over the share of texts that are answered."""
    curve = confidence.curve
    return Chart(
        name="coverage",
        title="What abstaining brings",
        about="Where only the surest texts are answered, so many of those answers are right.",
        x_title="share of texts answered",
        y_title="share right",
        series=(
            Series(
                name="answered",
                x=tuple(point.coverage for point in curve),
                y=tuple(point.accuracy for point in curve),
                hover=tuple(
                    f"confidence of {point.min_confidence:.3f} or more: {point.coverage:.1%} of the texts, "
                    f"{point.accuracy:.1%} right"
                    for point in curve
                ),
            ),
        ),
    )


def seconds(result: CalibrationResult) -> Chart | None:
    """Wall time by stage."""
    stages = {name: value for name, value in result.seconds.items() if name != "total"}
    if not stages:
        return None
    return Chart(
        name="seconds",
        title="What the calibration cost",
        about=f"{result.seconds.get('total', sum(stages.values())):,.1f} seconds in all.",
        x_title="stage",
        y_title="seconds",
        series=(
            Series(
                name="seconds",
                x=tuple(stages),
                y=tuple(stages.values()),
                hover=tuple(f"{name}: {value:,.1f} seconds" for name, value in stages.items()),
                draw="bars",
            ),
        ),
        sideways=True,
    )


def _points(name: str, candidates: Iterable[Candidate], *, draw: Any, colour: int, style: int) -> Series:
    found = tuple(candidates)
    return Series(
        name=name,
        x=tuple(candidate.num_features for candidate in found),
        y=tuple(candidate.score for candidate in found),
        hover=tuple(map(_told, found)),
        colour=colour,
        style=style,
        draw=draw,
    )


def _told(candidate: Candidate) -> str:
    return f"{candidate.score:.4f}: {candidate.name}; {candidate.num_features:,} neurons"


def _levels(result: CalibrationResult) -> tuple[Level, ...]:
    """The chosen candidate first, then the baseline that every classifier should beat."""
    last = [Level(name, score) for name, score in result.baselines.items() if name.startswith("last layer")]
    return (Level("SPIN", result.chosen.score, strong=True), *last)


def _score(result: CalibrationResult) -> str:
    return f"{metric_title(result.metric)}, {result.data['evaluated']} ({result.data['eval_rows']:,} texts)"


def _words(kind: str, pooling: str) -> str:
    return f"{KINDS[kind]}, {'all poolings' if pooling == 'all' else pooling_title(pooling)}"


def _column(points: Sequence[tuple[Any, ...]], index: int) -> tuple[Any, ...]:
    return tuple(point[index] for point in points)
