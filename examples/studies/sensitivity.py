"""How much the choice of C and eta matters, on validation; test is not read.

Every tap (mean pooling, both kinds, full depth) gets its whole path: C is 2, 4, 8 ... times the tap's own smallest
useful one. Heads are fitted for every eta with the C that each tap chooses on validation (the default rule), with the
same multiple of the smallest useful C in all taps, and with the same C in all taps (the nearest of each path).
Everything is deterministic; differences to the best head under chosen C's come with their paired standard error over
texts.

    python examples/studies/sensitivity.py --data DATA --models minilm PATH/TO/SmolLM2-135M --sets sst2 trec edos imdb
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from shared import METRICS, SINGLE, Features, Source, Study, extracted, load, parser, sizes
from tables import Rows, of, pairs, points, table

from spin_hf.calibration.heads import HeadFitter, HeadSet
from spin_hf.calibration.probes import Probe
from spin_hf.calibration.resampling import paired_error
from spin_hf.calibration.selection import Candidate, Columns
from spin_hf.explain.charts import Chart, Series

FIXED = (0.01, 0.03, 0.1, 0.3)
ETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
MOST = 3072  # features of a head, as in a calibration
TOL = 1e-3


def grids(paths: list[list[Probe]], values: int) -> dict[str, list[Probe]]:
    """The probes under each rule for C, empty ones left out."""
    found = {"chosen": [path[0] for path in paths]}
    ordered = [sorted(path, key=lambda probe: probe.C) for path in paths]
    for step in range(values):
        found[f"{2 ** (step + 1)}x"] = [path[step] for path in ordered if step < len(path)]
    for C in FIXED:
        found[f"C={C:g}"] = [min(path, key=lambda probe: abs(math.log(probe.C / C))) for path in paths]
    return {name: kept for name, probes in found.items() if (kept := [p for p in probes if p.num_features])}


def measure(features: Features, probes: list[Probe]) -> tuple[list[Candidate], dict[float, int]]:
    """A head for each eta that keeps at most ``MOST`` features; and how many features every eta keeps."""
    depth = max(tap.block for tap in features.taps)
    fitter = HeadFitter(features.store, features.data, features.device)
    heads, _ = fitter.fit(HeadSet("both", "all", depth, probes), etas=ETAS, max_features=MOST)
    columns = Columns.of(probes, -1)
    return heads, {eta: int(columns.kept(eta, depth).sum()) for eta in ETAS}


def run(options: Any) -> None:
    study = Study("sensitivity", options.results)
    for given in options.models:
        source = Source.of(given)
        for name in options.sets:
            if study.done(model=source.name, set=name, C=f"C={FIXED[-1]:g}"):
                continue
            parts = load(options, name)
            with extracted(source, parts, METRICS[name], options.device) as features:
                paths = features.probes(Cs=options.values, stop_early=False, tol=TOL)
                paths = [path for path in paths if path and path[0].num_features]
                smallest = [min(probe.C for probe in path) / 2 for path in paths]
                task = features.data.task
                labels = features.data.labels[features.data.eval_rows]
                best: Candidate | None = None
                for rule, probes in grids(paths, options.values).items():
                    there = study.done(model=source.name, set=name, C=rule)
                    if there and best is not None:
                        continue
                    heads, counts = measure(features, probes)
                    best = best or max(heads, key=lambda head: head.score)
                    if there:
                        continue
                    tried = [
                        {
                            "eta": head.eta,
                            "features": head.num_features,
                            "score": head.score,
                            "gain": head.score - best.score,
                            "error": paired_error(task.metric, labels, head.predictions, best.predictions),
                        }
                        for head in heads
                    ]
                    study.add(
                        model=source.name,
                        set=name,
                        C=rule,
                        rows=sizes(parts)[:2],
                        metric=task.metric_name,
                        probe=max(probe.score for probe in probes),
                        smallest_C=[float(np.quantile(smallest, q)) for q in (0, 0.5, 1)],
                        counts=counts,
                        heads=tried,
                    )


def shown(rows: Rows) -> tuple[list[str], list[Chart]]:
    """The tables and pictures of these rows."""
    rules = list(dict.fromkeys(row["C"] for row in rows))
    by_C, by_eta, charts = [], [], []
    lines: dict[str, list[Series]] = {"C": [], "eta": []}
    etas = list(dict.fromkeys(eta for row in rows for eta in row["counts"]))
    models, sets = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "set"))
    for model, name in pairs(rows):
        found = {row["C"]: row for row in of(rows, model=model, set=name)}
        best = {rule: max(row["heads"], key=lambda head: head["score"]) for rule, row in found.items() if row["heads"]}
        if "chosen" not in best:
            continue
        cells = [points(best["chosen"]["score"])]
        cells += [points(best[r]["gain"], best[r]["error"], sign=True) if r in best else "" for r in rules[1:]]
        low, middle, high = found["chosen"]["smallest_C"]
        by_C.append([f"{model}, {name}", *cells, f"{low:.2g} to {high:.2g} ({middle:.2g})"])
        heads = {f"{head['eta']:g}": head for head in found["chosen"]["heads"]}
        counts = {f"{float(eta):g}": count for eta, count in found["chosen"]["counts"].items()}
        by_eta.append(
            [
                f"{model}, {name}",
                *(
                    f"{counts[eta]:,}: {points(heads[eta]['gain'], heads[eta]['error'], sign=True)}"
                    if eta in heads
                    else f"{counts.get(eta, 0):,}"
                    for eta in (f"{float(each):g}" for each in etas)
                ),
            ]
        )
        look = {"colour": sets.index(name), "style": models.index(model)}
        steps = [rule for rule in rules if rule.endswith("x") and rule in best]
        gains = [100 * best[rule]["gain"] for rule in steps]
        lines["C"].append(Series(f"{model}, {name}", tuple(float(r[:-1]) for r in steps), tuple(gains), **look))
        own = found["chosen"]["heads"]
        lines["eta"].append(
            Series(
                f"{model}, {name}",
                tuple(head["features"] for head in own),
                tuple(100 * head["gain"] for head in own),
                **look,
            )
        )
    y = "points over the best head of chosen C's"
    about = "Validation; paired standard errors are in the table."
    charts.append(
        Chart(
            "studies-C",
            "One multiple of the smallest useful C in all taps",
            about,
            "times the smallest useful C",
            y,
            tuple(lines["C"]),
            log_x=True,
        )
    )
    charts.append(
        Chart(
            "studies-eta",
            "Share of salience: features against accuracy",
            about,
            "features kept",
            y,
            tuple(lines["eta"]),
            log_x=True,
        )
    )
    head = ["model, set", *rules, "smallest useful C of the taps (median)"]
    return [table(head, by_C), table(["model, set", *(f"eta {float(eta):g}" for eta in etas)], by_eta)], charts


if __name__ == "__main__":
    made = parser(__doc__, sets=list(SINGLE), rows=3000)
    made.add_argument("--values", type=int, default=8, help="of C: the last of 8 is 256 times the smallest useful one")
    run(made.parse_args())
