"""Peak memory of a calibration against training, on IMDb texts of 150 words: by number of texts, and by batch.

Each measurement has a process of its own. Calibrations have the default settings and a fifth held out, in float32;
their batch is counted in tokens. Training is that of ``adaptations.py``: ``Trainer`` with AdamW, on a GPU with
bfloat16 autocast; four steps for each size of batch, and one epoch over more texts, which takes little more.

    python examples/studies/training_memory.py --data DATA --models minilm PATH/TO/mpnet PATH/TO/SmolLM2-135M
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import memory_worker
from memory_worker import CALIBRATION, METHODS
from shared import Source, Study, parser
from tables import Rows, of, table

from spin_hf.explain.charts import Chart, Series

TEXTS = (500, 2000, 8000, 16000)
BATCHES = (8, 32, 128)
TOKENS = (1024, 4096, 16384)  # of a calibration's batch; 4096 is the default
MIDDLE = 1  # of each: the other axis keeps it
STEPS = 4
GB = 1e9


def jobs(methods: list[str], most: int) -> Iterator[dict[str, Any]]:
    """What to measure, with ``most`` texts at most."""
    for method in methods:
        if method == CALIBRATION:
            pairs = [(texts, TOKENS[MIDDLE]) for texts in TEXTS] + [(TEXTS[MIDDLE], tokens) for tokens in TOKENS]
        else:
            pairs = [(STEPS * batch, batch) for batch in BATCHES] + [(TEXTS[MIDDLE], BATCHES[MIDDLE])]
        for texts, batch in dict.fromkeys((min(texts, most), batch) for texts, batch in pairs):
            yield {"method": method, "texts": texts, "batch": batch}


def run(options: Any) -> None:
    study = Study("memory", options.results)
    for given in options.models:
        name = Source.of(given).name
        for job in jobs(options.methods, options.rows):
            if study.done(model=name, **job):
                continue
            found = memory_worker.start({**job, "model": given, "data": str(options.data), "device": options.device})
            study.add(model=name, **job, **found)


def shown(rows: Rows) -> tuple[list[str], list[Chart]]:
    """The tables and pictures of these rows."""
    place = "device" if any(row["device"] for row in rows) else "host"
    lines, charts = [], []
    for model in dict.fromkeys(row["model"] for row in rows):
        by_texts, by_batch = [], []
        for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            found = of(rows, model=model, method=method)
            for row in found:
                sizes = [f"{row[name] / GB:.2f}" if row[name] else "" for name in ("device", "host")]
                unit = "tokens" if method == "calibration" else "texts"
                lines.append([model, method, f"{row['texts']:,}", f"{row['batch']:,} {unit}", *sizes])
            if method == "calibration":
                batch = statistics.mode(row["batch"] for row in found)
                own = sorted(of(found, batch=batch), key=lambda row: row["texts"])
                by_texts.append(Series(method, tuple(r["texts"] for r in own), tuple(r[place] / GB for r in own), i, i))
                continue
            own = sorted(
                {row["batch"]: row for row in sorted(found, key=lambda r: r["texts"])}.values(),
                key=lambda row: row["batch"],
            )
            by_batch.append(Series(method, tuple(r["batch"] for r in own), tuple(r[place] / GB for r in own), i, i))
        for name, series, x in (("texts", by_texts, "texts"), ("batch", by_batch, "texts in a batch")):
            series = list(series)
            if name == "texts" and by_batch:  # what training takes, whatever the number of texts
                ends = [row["texts"] for row in of(rows, model=model, method="calibration")]
                for own in by_batch:
                    middle = len(own.y) // 2
                    told = f"{own.name}, batch {own.x[middle]}"
                    if ends:
                        x_ends, y = (min(ends), max(ends)), own.y[middle]
                        series.append(Series(told, x_ends, (y, y), own.colour, own.style))
            if series:
                charts.append(
                    Chart(
                        f"studies-memory-{model}-{name}",
                        f"Peak memory of the {place}, {model}",
                        "One run each.",
                        x,
                        "GB",
                        tuple(series),
                        log_x=True,
                    )
                )
    head = ["model", "what", "texts", "batch", "device, GB", "host, GB"]
    return [table(head, lines), *break_even(rows)], charts


def break_even(rows: Rows) -> list[str]:
    """Texts up to which a calibration takes less of the device than each training, between measured points."""
    place = "device" if any(row["device"] for row in rows) else "host"
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = of(rows, model=model, method="calibration")
        if not own:
            continue
        batch = statistics.mode(row["batch"] for row in own)
        curve = sorted((row["texts"], row[place]) for row in of(own, batch=batch))
        for row in of(rows, model=model, batch=BATCHES[MIDDLE], texts=TEXTS[MIDDLE]):
            below = [texts for texts, size in curve if size <= row[place]]
            above = [texts for texts, size in curve if size > row[place]]
            told = f"between {max(below):,} and {min(above):,}" if below and above else ""
            told = told or (f"more than {max(below):,}" if below else f"fewer than {min(above):,}")
            lines.append([model, f"{row['method']}, batch {row['batch']}", told])
    return [table(["model", "training", "a calibration takes as much at so many texts"], lines)] if lines else []


if __name__ == "__main__":
    made = parser(__doc__, sets=["imdb"], rows=TEXTS[-1])
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    run(made.parse_args())
