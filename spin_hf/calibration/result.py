"""What a calibration tried, what it kept, how good that is and what it cost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .confidence import Confidence
from .selection import Candidate

if TYPE_CHECKING:
    import pandas as pd

_SHOWN_OF_FRONTIER = 6  # the rest is in `frontier` and in the frame


@dataclass(frozen=True)
class CalibrationResult:
    """The record of one :func:`spin_hf.spin_calibrate`. ``print`` it for the short table.

    Attributes:
        chosen: the candidate written into the model.
        best: the winner by score, or the widest; another than ``chosen`` only with ``prefer="compact"``.
        candidates: all that were tried, highest score first.
        baselines: score of ``"last layer"`` (a dense head on the last block, after the final norm where there is one)
            and of ``"best probe"`` (within the limits on features and depth, where there is one).
        metric: name of the metric of all scores.
        kept: neurons kept by tap and pooling, as in ``SpinConfig.features``.
        data: rows, labels, texts cut to the window, and batches, with the number of those that did not fit the
            device's memory and were split.
        seconds: wall time by stage.
        bytes: disk for the features, and the model's parameters.
        convergence: worst relative duality gap of the probes, how many missed the tolerance, the final head's gap.
        probes: for each (tap, pooling) the chosen C, its score, its neurons and the score at every C.
        settings: the options that made it.
        confidence: how far the probabilities can be trusted; ``None`` for regression, and for an exit that was kept.
        skipped: how many candidates were left out, since they have more than ``max_features``.
        exits: the heads that the model keeps beside the chosen one, by their numbers; see ``exits=True``.
        intervals: of 95% for the scores of the baselines and of ``"SPIN"``, by a bootstrap over the evaluation rows;
            empty in records of earlier versions.
    """

    chosen: Candidate
    best: Candidate
    candidates: tuple[Candidate, ...]
    baselines: Mapping[str, float]
    metric: str
    kept: tuple[Mapping[str, Any], ...]
    data: Mapping[str, Any]
    seconds: Mapping[str, float]
    bytes: Mapping[str, int]
    convergence: Mapping[str, Any]
    probes: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    confidence: Confidence | None = None
    skipped: int = 0
    exits: tuple[Candidate, ...] = ()
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """Number of blocks that the model runs: those that its head needs, or the deepest exit."""
        return max(candidate.depth for candidate in (self.chosen, *self.exits))

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """Candidates that no other beats in score, features and depth at once, fewest features first."""
        front: list[Candidate] = []
        for candidate in sorted(self.candidates, key=lambda c: c.rank):
            if not any(f.num_features <= candidate.num_features and f.depth <= candidate.depth for f in front):
                front.append(candidate)
        return tuple(sorted(front, key=lambda c: (c.num_features, c.depth)))

    def __str__(self) -> str:
        rows = [(name, f"{score:.4f}", "", "") for name, score in self.baselines.items()]
        rows.append(_row("SPIN", self.chosen))
        if self.best != self.chosen:
            rows.append(_row("SPIN, winner", self.best))
        head = ("", f"{self.metric} ({self.data['evaluated']})", "features", "blocks")
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(4)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in [head, *rows]
        ]
        if self.settings["prefer"] == "compact":
            table.append("Frontier: " + "; ".join(map(_short, self.frontier[-_SHOWN_OF_FRONTIER:])) + ".")
        stages = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items() if name != "total")
        notes = [
            f"Chosen: {self.chosen.name}. {len(self.candidates)} candidates tried on {self.data['eval_rows']:,} texts "
            f"({self.data['train_rows']:,} to train on).",
            f"Seconds: {stages}; total {self.seconds['total']:.1f}. Features on disk: "
            f"{self.bytes['features'] / 1e6:,.0f} MB.",
        ]
        if self.skipped:
            notes.insert(
                1,
                f"{self.skipped:,} more were left out: they have more than max_features="
                f"{self.settings['max_features']} features.",
            )
        if self.confidence is not None:
            before, after = (
                f"{part.expected_calibration_error:.4f}" for part in (self.confidence.before, self.confidence.after)
            )
            scaled = self.confidence.temperature != 1
            notes.append(
                f"Expected calibration error: {before}"
                + (f", {after} with temperature {self.confidence.temperature:.3g}." if scaled else "; no temperature.")
            )
        if self.exits:
            notes.append(
                f"{len(self.exits)} exits: the best at each depth are {'; '.join(map(self._exit, self._best_exits()))}."
            )
            if self.blocks > self.chosen.depth:
                notes.append(
                    f"For them the model runs {self.blocks} blocks, its own head needs {self.chosen.depth}: "
                    "model.keep_exit(None) leaves that alone."
                )
        if self.data["truncated"]:
            notes.append(f"{self.data['truncated']:,} texts were cut to {self.data['max_length']} tokens.")
        if windows := self.data.get("windows"):
            notes.append(
                f"{windows['texts']:,} texts were read in windows of {windows['size']} tokens that share "
                f"{windows['overlap']} or more."
            )
        if split := self.data.get("split_batches"):
            notes.append(
                f"{split:,} of {self.data['batches']:,} batches did not fit the device's memory and were read in "
                "parts; with more room, features may differ in their last digits. A smaller batch_tokens saves time."
            )
        if self.convergence["unconverged"]:
            notes.append(
                f"{self.convergence['unconverged']} probe fits missed the tolerance; the worst relative gap is "
                f"{self.convergence['worst_gap']:.1e}."
            )
        return "\n".join([*table, *notes])

    def _best_exits(self) -> list[int]:
        """Of each depth the exit of the best score."""
        numbers = sorted(range(len(self.exits)), key=lambda i: self.exits[i].rank)
        best = {self.exits[i].depth: i for i in reversed(numbers)}
        return [best[depth] for depth in sorted(best)]

    def _exit(self, number: int) -> str:
        return f"{number} ({_short(self.exits[number])})"

    def of_exit(self, exit: int, kept: Sequence[Mapping[str, Any]]) -> CalibrationResult:
        """The record of the ordinary classifier that ``model.keep_exit(exit)`` leaves.

        Left out is what was measured of the chosen head alone: :attr:`confidence`, and its interval.

        Args:
            exit: number in :attr:`exits`.
            kept: the features of that classifier, its ``config.features``.
        """
        intervals = {name: ends for name, ends in self.intervals.items() if name != "SPIN"}
        return replace(
            self, chosen=self.exits[exit], kept=tuple(kept), exits=(), confidence=None, intervals=intervals
        )  # fmt: skip

    def to_pandas(self) -> pd.DataFrame:
        """All candidates as a frame, best first; ``on_frontier`` marks those of :attr:`frontier`.

        With exits, ``exit`` has the number of those that the model keeps as such; their heads were solved more tightly,
        so that :attr:`exits` may hold a slightly different score.
        """
        import pandas as pd

        rows = [{**_candidate_dict(c), "on_frontier": c in self.frontier} for c in self.candidates]
        frame = pd.DataFrame(rows)
        if self.exits:
            numbers = {_made(c): number for number, c in enumerate(self.exits)}
            frame["exit"] = pd.array([numbers.get(_made(c)) for c in self.candidates], dtype="Int64")
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON; predictions are left out."""
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        values["chosen"], values["best"] = _candidate_dict(self.chosen), _candidate_dict(self.best)
        values["candidates"] = [_candidate_dict(candidate) for candidate in self.candidates]
        values["exits"] = [_candidate_dict(candidate) for candidate in self.exits]
        values["confidence"] = None if self.confidence is None else self.confidence.to_dict()
        return values

    def differences(self, other: CalibrationResult) -> dict[str, tuple[Any, Any]]:
        """Every value in which the other record is not equal to this one, to the bit: the name and both values.

        A name is a path in :meth:`to_dict`, such as ``"candidates.3.score"``; a value that only one of them has stands
        beside ``None``. :attr:`seconds` are left out. The same call on the same kind of device leaves nothing, however
        many processes shared the work and however often it was stopped.
        """
        own, others = (dict(_leaves(_without_nan({**each.to_dict(), "seconds": {}}))) for each in (self, other))
        pairs = {name: (own.get(name), others.get(name)) for name in {**own, **others}}
        return {name: (one, another) for name, (one, another) in pairs.items() if one != another}

    def to_html(
        self, path: str | Path, *, model: Any = None, tokenizer: Any = None, data: Any = None, **columns: Any
    ) -> Path:
        """Write a report of one file: charts, scores and costs; with a model and labelled texts, mistakes and examples.

        Args:
            path: of the file.
            model: the classifier that came of this calibration, for ``data``.
            tokenizer: its own.
            data: labelled texts that chose nothing, in any form that :func:`spin_hf.spin_calibrate` takes.
            **columns: ``text_column`` and ``label_column`` of ``data``.

        Raises:
            ImportError: without plotly: ``pip install 'spin_hf[report]'``.
            CalibrationError: for data that can't be read or doesn't fit, or that comes without model and tokenizer.
        """
        from ..explain.report import report_of  # the one import that points upward: a result shows itself

        return report_of(self, model, tokenizer, data, **columns).save(path)

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(json.dumps(_without_nan(self.to_dict()), indent=1), encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> CalibrationResult:
        """Read what :meth:`save` wrote."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        for name in ("chosen", "best"):
            values[name] = Candidate(**values[name])
        for name in ("candidates", "exits"):
            values[name] = tuple(Candidate(**value) for value in values.get(name, ()))
        values["intervals"] = {name: (low, high) for name, (low, high) in values.get("intervals", {}).items()}
        values["kept"], values["probes"] = tuple(values["kept"]), tuple(values["probes"])
        if values.get("confidence") is not None:
            values["confidence"] = Confidence.from_dict(values["confidence"])
        return cls(**values)


def _row(name: str, candidate: Candidate) -> tuple[str, str, str, str]:
    return name, f"{candidate.score:.4f}", f"{candidate.num_features:,}", str(candidate.depth)


def _short(candidate: Candidate) -> str:
    return f"{candidate.score:.4f} by {candidate.num_features:,} features, {candidate.depth} blocks"


def _made(candidate: Candidate) -> tuple[object, ...]:
    """How a candidate was made, which tells it from all others."""
    return candidate.kind, candidate.pooling, candidate.probe, candidate.eta, candidate.depth, candidate.C


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    values = asdict(candidate)
    del values["predictions"]
    return values


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, (Mapping, list)):
        yield name, value
        return
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _without_nan(value: Any) -> Any:
    """NaN is no JSON."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else float(value)
    if isinstance(value, np.integer):
        return int(value)
    return value
