"""The report: one HTML file that shows what a calibration found, how good the classifier is and where it errs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..calibration import CalibrationResult
from ..calibration.errors import CalibrationError
from ..calibration.resampling import bootstrap_interval, share_interval
from ..calibration.task import METRICS, metric_title
from ..modeling_spin import SpinForSequenceClassification
from . import record_charts as record
from .charts import Figure
from .data_charts import confusion_grid, mistakes, overlap_grid, trust
from .evaluation import MOST_CARDS, MOST_CELLS, MULTI, REGRESSION, SINGLE, Evaluated, Score
from .page import render
from .plotly_json import plotly_json

_SECTIONS = {
    "headline": "Headline",
    "layers": "Layers",
    "neurons": "Neurons",
    "mistakes": "Right and wrong",
    "trust": "Trust",
    "examples": "Examples",
    "costs": "Costs",
}


@dataclass(frozen=True)
class Row:
    """One line of the headline table."""

    on: str
    what: str
    score: Score
    strong: bool = False


@dataclass(frozen=True)
class Missing:
    """What a section lacks, and the call that brings it."""

    why: str
    how: str


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        name: of the classifier.
        result: the record of its calibration.
        evaluated: labelled texts with its answers; the first set also gives the mistakes and examples.
        test: scores on rows that chose nothing, as ``evaluation.json`` has them.
        how: the call that makes this report with data, for sections that lack some.
    """

    name: str
    result: CalibrationResult
    evaluated: tuple[Evaluated, ...] = ()
    test: Mapping[str, Any] | None = None
    how: str = "spin-hf report FOLDER --data FILE"

    def charts(self) -> list[Figure]:
        """Every chart, in the order of the page."""
        return [chart for charts in self._charts.values() for chart in charts]

    @property
    def first(self) -> Evaluated | None:
        """The labelled texts that mistakes and examples are of."""
        return self.evaluated[0] if self.evaluated else None

    def html(self) -> str:
        """The file's text.

        Raises:
            MissingExtraError: without plotly.
        """
        from .. import __version__

        cells = self.first.cells() if self.first and self.first.problem_type == SINGLE else []
        return render(
            version=__version__,
            name=self.name,
            facts=self._facts(),
            sections=[{"id": name, "title": title} for name, title in _SECTIONS.items()],
            tiles=list(self._tiles()),
            scores=list(self._rows()),
            selection_note=self._selection_note(),
            notes=self._notes(),
            layer_charts=self._charts["layers"],
            exits=self.result.exits,
            blocks=self.result.settings.get("blocks") or self.result.blocks,
            neuron_charts=self._charts["neurons"],
            mistake_charts=self._charts["mistakes"],
            trust_charts=self._charts["trust"],
            no_trust=None if self._regression else self._missing("The record has no confidences of this head."),
            cost_charts=self._charts["costs"],
            first=self.first,
            cards=self.first.cards[:MOST_CARDS] if self.first and self.first.cards else (),
            groups=self.first.groups() if self.first else [],
            no_cards=None if self.first else self._missing("Texts that excite the neurons are not in the record."),
            heat=self.first.heat if self.first else {},
            label_names=self.first.names if self.first else (),
            cells=cells[:MOST_CELLS],
            cells_left_out=max(0, len(cells) - MOST_CELLS),
            label_rows=self.first.label_rows() if self.first and self.first.problem_type == MULTI else [],
            no_mistakes=None if self.first else self._missing("The texts behind the mistakes are not in the record."),
            examples=self.first.examples() if self.first else [],
            no_examples=None if self.first else self._missing("Examples are texts, and the record keeps none."),
            costs=list(self._costs()),
            charts={chart.name: plotly_json(chart) for chart in self.charts()},
        )

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all.

        Raises:
            MissingExtraError: without plotly.
        """
        path = Path(path)
        text = self.html()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
        return path

    @cached_property
    def _charts(self) -> dict[str, list[Figure]]:
        result, first = self.result, self.first
        layers = [record.by_block(result), record.by_depth(result), record.by_eta(result), record.by_size(result)]
        wrong = mistakes(first) if first else []
        if not wrong and self.test and self.test.get("confusion_matrix"):
            names, counts = self.test["labels"], self.test["confusion_matrix"]
            wrong = [confusion_grid(names, counts, rows=self.test["rows"], of="the test")]
        believed: list[Figure] = []
        if result.confidence is not None:
            data = result.data
            believed.append(record.reliability(result.confidence, rows=data["eval_rows"], evaluated=data["evaluated"]))
        believed += trust(first) if first else []
        if result.confidence is not None:
            believed.append(record.coverage(result.confidence))
        found: dict[str, list[Figure | None]] = {
            "layers": [*layers],
            "neurons": [record.kept_by_block(result), overlap_grid(first.cards) if first and first.cards else None],
            "mistakes": [*wrong],
            "trust": [*believed],
            "costs": [record.seconds(result)],
        }
        return {name: [chart for chart in charts if chart is not None] for name, charts in found.items()}

    def _missing(self, why: str) -> Missing:
        return Missing(why + " Give labelled texts:", self.how)

    def _notes(self) -> list[Missing]:
        if self.first or self.test:
            return []
        return [self._missing("No test was made, so there is no score on texts that chose nothing.")]

    def _facts(self) -> str:
        labels = self.result.data["labels"]
        what = "It predicts a number" if self._regression else f"It knows {len(labels):,} labels"
        neurons = f"{self._neurons:,} neuron{'s' * (self._neurons != 1)}"
        return f"{what}, reads {neurons}, and runs {self.result.blocks} of the backbone's blocks."

    @property
    def _regression(self) -> bool:
        return METRICS[self.result.metric][1] == (REGRESSION,)

    @property
    def _neurons(self) -> int:
        return sum(int(entry["count"]) for entry in self.result.kept)

    def _selection_note(self) -> str:
        tried, on = len(self.result.candidates), self.result.data["evaluated"]
        if self.result.settings["prefer"] == "widest":
            return "The classifier is the head of the most neurons, whatever it scores, so its score hardly flatters."
        how = f"by {on}" if "cross-validation" in on else f"on the {on} texts"
        return (
            f"The classifier was chosen from {tried:,} candidate{'s' * (tried != 1)} {how}, so its score there "
            "flatters."
        )

    def _validation_interval(self, name: str, score: float) -> tuple[float, float] | None:
        """As the record has it; Wilson's for a share."""
        if self.result.metric == "accuracy":
            return share_interval(score, self.result.data["eval_rows"])
        return self.result.intervals.get(name)

    def _test_interval(self, metric: str, score: float) -> tuple[float, float] | None:
        """Wilson's for a share; a bootstrap over the rows, which a confusion matrix holds, for what follows from it."""
        test = self.test or {}
        if metric == "accuracy":
            return share_interval(score, test["rows"])
        if metric not in METRICS or not test.get("confusion_matrix"):
            return None
        counts = np.array(test["confusion_matrix"])
        true, given = (np.repeat(places.ravel(), counts.ravel()) for places in np.indices(counts.shape))
        return bootstrap_interval(METRICS[metric][0], true, given)

    def _rows(self) -> Iterator[Row]:
        result, chosen = self.result, self.result.chosen
        on, rows, metric = result.data["evaluated"], result.data["eval_rows"], result.metric
        for name, value in result.baselines.items():
            yield Row(on, name, Score(on, rows, metric_title(metric), value, self._validation_interval(name, value)))
        interval = self._validation_interval("SPIN", chosen.score)
        score = Score(on, rows, metric_title(metric), chosen.score, interval, self._neurons, chosen.depth)
        yield Row(on, "SPIN", score, strong=True)
        if self.test:
            for name, value in self.test.items():
                if isinstance(value, float):
                    n, interval = self.test["rows"], self._test_interval(name, value)
                    score = Score("test", n, metric_title(name), value, interval, self._neurons, chosen.depth)
                    yield Row("test", "SPIN", score, strong=name == metric)
        for evaluated in self.evaluated:
            for score in evaluated.scores(metric, neurons=self._neurons, blocks=chosen.depth):
                trivial = score.neurons is None
                what = score.name.removeprefix(f"{evaluated.name}, ") if trivial else "SPIN"
                strong = not trivial and score.metric == metric_title(metric)
                yield Row(evaluated.name, what, score, strong=strong)

    def _tiles(self) -> Iterator[dict[str, str]]:
        result, chosen = self.result, self.result.chosen
        title, on = metric_title(result.metric), result.data["evaluated"]
        rows = [row for row in self._rows() if row.strong]
        for row in rows[:3]:
            more = f"{row.score.rows:,} texts"
            if row.score.interval is not None:
                more = "{:.3f} to {:.3f}, ".format(*row.score.interval) + more
            yield {"name": f"{row.score.metric}, {row.on}", "value": f"{row.score.value:.3f}", "more": more}
        for name, value in result.baselines.items():
            if name.startswith("last layer"):
                gain = f"SPIN {chosen.score - value:+.3f}"
                yield {"name": f"{title}, {name}, {on}", "value": f"{value:.3f}", "more": gain}
        blocks = result.settings.get("blocks")
        run = result.blocks
        saved = f"{1 - run / blocks:.0%} of the blocks saved" if blocks and run < blocks else ""
        whole = f" of {blocks}" if blocks else ""
        if run > chosen.depth and result.exits:
            saved = f"the classifier needs {chosen.depth}, its exits all"
        yield {"name": "Blocks that run", "value": f"{run}{whole}", "more": saved}
        yield {"name": "Neurons", "value": f"{self._neurons:,}", "more": chosen.name}
        if result.confidence is not None:
            error = result.confidence.after.expected_calibration_error
            yield {"name": "Calibration error", "value": f"{error:.3f}", "more": f"expected, {on}"}

    def _costs(self) -> Iterator[tuple[str, str]]:
        result = self.result
        data, gaps = result.data, result.convergence
        yield "Texts to train on", f"{data['train_rows']:,}"
        yield f"Texts that choose ({data['evaluated']})", f"{data['eval_rows']:,}"
        yield "Tokens read", f"{data['tokens']:,}"
        if data["truncated"]:
            yield f"Texts cut to {data['max_length']} tokens", f"{data['truncated']:,}"
        yield "Candidates tried", f"{len(result.candidates):,}"
        for name, value in result.seconds.items():
            yield f"Seconds, {name}", f"{value:,.1f}"
        for name, size in result.bytes.items():
            yield f"Bytes, {name}", f"{size:,} ({size / 1e6:,.1f} MB)"
        if gaps.get("worst_gap") is not None:
            yield "Worst relative duality gap of a probe", f"{gaps['worst_gap']:.1e}"
        yield "Probe fits that missed the tolerance", f"{gaps['unconverged']:,}"


def report_of(
    result: CalibrationResult,
    model: SpinForSequenceClassification | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    *,
    name: str = "Classifier",
    **columns: Any,
) -> Report:
    """The report of a calibration; arguments as of :meth:`spin_hf.CalibrationResult.to_html`."""
    evaluated: tuple[Evaluated, ...] = ()
    if data is not None:
        if model is None or tokenizer is None:
            raise CalibrationError("To show answers on data, give the model and the tokenizer: model=, tokenizer=.")
        shown = Path(data).name if isinstance(data, (str, Path)) else "the given texts"
        evaluated = (Evaluated.of(model, tokenizer, data, shown, **columns),)
    how = 'result.to_html("report.html", model=model, tokenizer=tokenizer, data=test)'
    return Report(name, result, evaluated, how=how)
