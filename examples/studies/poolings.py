"""Which pooling serves which task: each alone, and all of them to choose from, each calibrated and tested.

Mean, max, first and last are deterministic; token weights (``attention``) are learned with a seed, so that they, and
all poolings together, are calibrated with three. Gains over mean come with their paired standard error over test texts.

    python examples/studies/poolings.py --data DATA --sets sst2 trec edos mrpc go_emotions --cache CACHE
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from shared import METRICS, SEEDS, Source, Study, calibrated, load, parser, sizes
from tables import Rows, mean, of, pairs, points, spread, table

from spin_hf.attention import ATTENTION
from spin_hf.calibration.resampling import paired_error
from spin_hf.calibration.task import METRICS as FUNCTIONS
from spin_hf.explain.charts import Chart, Series
from spin_hf.pooling import POOLINGS
from spin_hf.scoring import predict_rows

ALL = "all"
NAMES = (*POOLINGS, ATTENTION, ALL)
TASKS = ("sst2", "trec", "edos", "mrpc", "go_emotions")
# 28 labels are 28 problems to solve.
FEWER: dict[str, dict[str, Any]] = {"go_emotions": {"kinds": ["ffn"], "Cs": 6, "etas": [0.6, 0.9]}}


def runs(options: Any) -> list[tuple[str, int]]:
    """Mean first, which the others are compared with; what is learned with every seed."""
    drawn = (ATTENTION, ALL)
    ordered = sorted({"mean", *options.poolings}, key=lambda pooling: (pooling != "mean", NAMES.index(pooling)))
    return [(pooling, seed) for pooling in ordered for seed in (options.seeds if pooling in drawn else [SEEDS[0]])]


def run(options: Any) -> None:
    study = Study("poolings", options.results)
    options.cache.mkdir(parents=True, exist_ok=True)
    for given in options.models:
        source = Source.of(given)
        for name in options.sets:
            parts = load(options, name)
            test = parts[2]
            mean = options.cache / f"{source.name}-{name}-{'-'.join(map(str, sizes(parts)))}-mean.npy"
            for pooling, seed in runs(options):
                again = pooling == "mean" and not mean.exists()
                if study.done(model=source.name, set=name, pooling=pooling, seed=seed) and not again:
                    continue
                tried = [*POOLINGS, ATTENTION] if pooling == ALL else [pooling]
                choices = {"poolings": tried, "seed": seed, **FEWER.get(name, {})}
                model, tokenizer, result = calibrated(source, parts, METRICS[name], options.device, **choices)
                _, labels, prediction = predict_rows(model, tokenizer, test)
                own, metric = prediction.labels, FUNCTIONS[METRICS[name]][0]
                if pooling == "mean":
                    np.save(mean, own)
                    if study.done(model=source.name, set=name, pooling=pooling, seed=seed):
                        continue
                other = np.load(mean)
                study.add(
                    model=source.name,
                    set=name,
                    pooling=pooling,
                    seed=seed,
                    rows=sizes(parts),
                    metric=METRICS[name],
                    validation=result.chosen.score,
                    test=metric(labels, own),
                    gain=metric(labels, own) - metric(labels, other),
                    error=paired_error(metric, labels, own, other),
                    chosen=result.chosen.name,
                    features=result.chosen.num_features,
                    seconds=result.seconds["total"],
                )


def shown(rows: Rows) -> tuple[list[str], list[Chart]]:
    """The tables and pictures of these rows."""
    names = list(dict.fromkeys(row["pooling"] for row in rows))
    lines, series = [], []
    for i, pooling in enumerate(names):
        xs, ys, low, high = [], [], [], []
        for model, task in pairs(rows):
            if found := of(rows, model=model, set=task, pooling=pooling):
                gain, error = mean([row["gain"] for row in found]), mean([row["error"] for row in found])
                xs.append(task if len({m for m, _ in pairs(rows)}) == 1 else f"{model}, {task}")
                ys.append(100 * gain)
                low.append(100 * (gain - error))
                high.append(100 * (gain + error))
        series.append(Series(pooling, tuple(xs), tuple(ys), i, i, "points", low=tuple(low), high=tuple(high)))
    for model, task in pairs(rows):
        cells, by_validation = [], {}
        for pooling in names:
            found = of(rows, model=model, set=task, pooling=pooling)
            if not found:
                cells.append("")
                continue
            tests, gains = [row["test"] for row in found], [row["gain"] for row in found]
            cell = points(mean(tests), spread(tests) if len(tests) > 1 else None)
            if pooling != "mean":
                cell += f" ({points(mean(gains), mean([row['error'] for row in found]), sign=True)})"
            cells.append(cell)
            if pooling != "all":
                by_validation[pooling] = mean([row["validation"] for row in found])
        lines.append([f"{model}, {task}", *cells, max(by_validation, key=by_validation.__getitem__)])
    chart = Chart(
        "studies-poolings",
        "Test score under each pooling, over mean",
        "Bars are paired standard errors over texts.",
        "task",
        "points over mean pooling",
        tuple(series),
    )
    return [table(["model, task", *names, "best single one on validation"], lines)], [chart]


if __name__ == "__main__":
    made = parser(__doc__, sets=TASKS, rows=4000)
    made.add_argument("--cache", type=Path, default=Path("studies-cache"), help="predictions under mean are kept here")
    made.add_argument("--poolings", nargs="+", choices=NAMES, default=list(NAMES))
    made.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    run(made.parse_args())
