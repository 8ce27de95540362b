"""From how many texts token weights should be learned: what fewer of them save, and what that costs.

Learning reads the texts a first time, which is most of what a calibration takes beside the forward. Everything is on
validation; the other steps have all texts.

    python examples/studies/weighted_texts.py --data DATA --sets sst2 trec --rows 10000
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from shared import METRICS, SEEDS, Source, Study, calibrated, load, parser, sizes
from tables import Rows, mean, of, pairs, points, spread, table

from spin_hf.attention import ATTENTION
from spin_hf.calibration import token_states
from spin_hf.explain.charts import Chart, Series

COUNTS = (500, 1000, 2000)


def run(options: Any) -> None:
    study = Study("weighted texts", options.results)
    for given in options.models:
        source = Source.of(given)
        for name in options.sets:
            parts = load(options, name)
            for seed in options.seeds:
                for count in [None, *(count for count in options.counts if count < len(parts[0]) + len(parts[1]))]:
                    key = {"model": source.name, "set": name, "seed": seed, "asked": count or "all"}
                    if study.done(**key):
                        continue
                    choices = {"poolings": [ATTENTION], "seed": seed}
                    with mock.patch.object(token_states, "states_bytes", _Some(count)):
                        *_, result = calibrated(source, parts, METRICS[name], options.device, **choices)
                    study.add(
                        **key,
                        rows=sizes(parts),
                        learned=sum(result.data["token_weights_rows"]),
                        validation=result.chosen.score,
                        loss=min(each.loss for each in result.candidates if each.loss is not None),
                        seconds=result.seconds,
                    )


class _Some:
    """Room for the states of so many texts, of the average length, or of as many as there would be room for."""

    def __init__(self, count: int | None) -> None:
        self.count, self.all = count, token_states.states_bytes

    def __call__(self, model: Any, taps: Any, encoded: Any) -> int:
        room, widths = self.all(model, taps, encoded), token_states.states_widths(model, taps)
        texts = len(encoded.lengths)
        return min(room, 2 * sum(widths.values()) * sum(encoded.lengths) * (self.count or texts) // texts)


def shown(rows: Rows) -> tuple[list[str], list[Chart]]:
    """The tables and pictures of these rows."""
    lines, series = [], []
    for i, (model, name) in enumerate(pairs(rows)):
        own = of(rows, model=model, set=name)
        places = []
        for asked in sorted({row["asked"] for row in own}, key=lambda asked: (asked == "all", asked)):
            found = of(own, asked=asked)
            learned, loss = (mean([row[name] for row in found]) for name in ("learned", "loss"))
            scores = [row["validation"] for row in found]
            seconds = [mean([row["seconds"][stage] for row in found]) for stage in ("token weights", "total")]
            places.append((learned, loss))
            lines.append(
                [
                    f"{model}, {name}",
                    f"{asked:,}" if asked != "all" else "all",
                    f"{learned:,.0f}",
                    points(mean(scores), spread(scores)),
                    f"{loss:.3f}",
                    " / ".join(f"{value:.0f}" for value in seconds),
                ]
            )
        series.append(Series(f"{model}, {name}", *zip(*sorted(places), strict=True), i, i))
    chart = Chart(
        "studies-weighted-texts",
        "Token weights by the texts that they are learned from",
        "The least loss on validation of all heads, mean over seeds.",
        "texts",
        "loss",
        tuple(series),
        log_x=True,
    )
    head = ["model, set", "asked for", "texts", "validation", "least loss", "token weights / total, s"]
    return [table(head, lines)], [chart]


if __name__ == "__main__":
    made = parser(__doc__, sets=["sst2", "trec"], rows=10_000)
    made.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="texts to learn token weights from")
    made.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    run(made.parse_args())
