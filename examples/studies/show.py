"""The tables and pictures of the studies, from the rows measured so far: what stands in ``findings/studies.md``.

python examples/studies/show.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shared import RESULTS, read_results

from spin_hf.explain.charts import Chart, Series
from spin_hf.explain.paper_figures import save_figures

Rows = list[dict[str, Any]]
GB = 1e9


def points(value: float, error: float | None = None, *, sign: bool = False) -> str:
    """A score in points of 100, with its error."""
    shown = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return shown if error is None else f"{shown} ± {100 * error:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def of(rows: Rows, **key: Any) -> Rows:
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]


def pairs(rows: Rows) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["model"], row["set"]) for row in rows))


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


# -- C and eta ---------------------------------------------------------------------------------------------------------


def sensitivity(rows: Rows) -> tuple[list[str], list[Chart]]:
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


# -- pooling -----------------------------------------------------------------------------------------------------------


def poolings(rows: Rows) -> tuple[list[str], list[Chart]]:
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


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(rows: Rows) -> tuple[list[str], list[Chart]]:
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
                {row["batch"]: row for row in sorted(found, key=lambda r: -r["texts"])}.values(),
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
    return [table(["model", "what", "texts", "batch", "device, GB", "host, GB"], lines)], charts


def break_even(rows: Rows) -> str:
    """Rows up to which a calibration takes less of the device than each training, between measured points."""
    place = "device" if any(row["device"] for row in rows) else "host"
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = of(rows, model=model, method="calibration")
        if not own:
            continue
        batch = statistics.mode(row["batch"] for row in own)
        curve = sorted((row["texts"], row[place]) for row in of(own, batch=batch))
        for row in of(rows, model=model):
            if row["method"] == "calibration":
                continue
            below = [texts for texts, size in curve if size <= row[place]]
            above = [texts for texts, size in curve if size > row[place]]
            told = f"between {max(below):,} and {min(above):,}" if below and above else ""
            told = told or (f"more than {max(below):,}" if below else f"fewer than {min(above):,}")
            lines.append([model, row["method"], f"{row['batch']}", f"{row['texts']:,}", told])
    return table(["model", "training", "batch", "of texts", "a calibration takes as much at so many texts"], lines)


# -- linear ------------------------------------------------------------------------------------------------------------


def linear(rows: Rows) -> tuple[list[str], list[Chart]]:
    taps = [row for row in rows if row["tap"] not in ("head", "end")]
    between = ("L1, L1", "L2, L2", "MLP, MLP", "L1, MLP", "L2, MLP", "MLP, another seed", "chance")
    by_tap, charts = [], []
    for kind in ("hidden", "ffn"):
        series = []
        for i, (model, name) in enumerate(pairs(taps)):
            own = [
                row for row in of(taps, model=model, set=name) if (row["tap"].split(".")[0] == "ffn") == (kind == "ffn")
            ]
            if not own:
                continue
            gains, over = [row["gain"] for row in own], [row["gain over l1"] for row in own]
            clear = (
                sum(row["gain"] > 2 * row["error"] for row in own),
                sum(row["gain"] < -2 * row["error"] for row in own),
            )
            seeds = mean([spread(row["mlp"]) for row in own])
            by_tap.append(
                [
                    f"{model}, {name}, {kind}",
                    str(len(own)),
                    points(mean(gains), mean([row["error"] for row in own]), sign=True),
                    points(mean(over), mean([row["error over l1"] for row in own]), sign=True),
                    points(seeds),
                    f"{clear[0]} / {clear[1]}",
                    *(
                        f"{mean([value for r in own if (value := r['overlap'][b]) == value] or [0]):.2f}"
                        for b in between
                    ),
                ]
            )
            blocks = [row for row in own if row["tap"].split(".")[0] == kind]
            xs = tuple(int(row["tap"].split(".")[1]) for row in blocks)
            ys, errors = [100 * row["gain"] for row in blocks], [100 * row["error"] for row in blocks]
            low, high = (tuple(y + s * e for y, e in zip(ys, errors, strict=True)) for s in (-1, 1))
            series.append(Series(f"{model}, {name}", xs, tuple(ys), i, i, low=low, high=high))
        charts.append(
            Chart(
                f"studies-mlp-{kind}",
                f"An MLP's accuracy over a dense linear probe's, {kind} taps",
                "Bars are paired standard errors over texts.",
                "block",
                "points",
                tuple(series),
                x_whole=True,
            )
        )
    heads = [
        [
            f"{row['model']}, {row['set']}",
            f"{row['features']:,}",
            points(row["validation"]["linear"]),
            points(mean(row["validation"]["mlp"]), spread(row["validation"]["mlp"])),
            points(row["linear"]),
            points(mean(row["mlp"]), spread(row["mlp"])),
            points(mean(row["mlp"]) - row["linear"], row["error"], sign=True),
        ]
        for row in of(rows, tap="head")
    ]
    head = ["model, set, kind", "taps", "over L2", "over L1", "spread of seeds", "taps beyond two errors, + / -"]
    own = ["model, set", "features", "validation, linear", "validation, MLP", "test, linear", "test, MLP", "difference"]
    return [table([*head, *between], by_tap), table(own, heads)], charts


# -- architectures -----------------------------------------------------------------------------------------------------


def architectures(rows: Rows) -> tuple[list[str], list[Chart]]:
    lines, series = [], []
    models, sets = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "set"))
    for row in sorted(rows, key=lambda row: (sets.index(row["set"]), models.index(row["model"]))):
        low, high = row["interval"]
        run = sum(row["parameters"][: row["depth"]])
        lines.append(
            [
                row["set"],
                row["model"],
                points(row["test"], (high - low) / 2 / 1.96),
                points(row["validation"]),
                f"{row['features']:,}",
                f"{row['depth']} of {row['blocks']}",
                f"{run / 1e6:.1f} of {sum(row['parameters']) / 1e6:.1f}",
                " / ".join(f"{row['seconds'][stage]:.0f}" for stage in ("extract", "probe", "heads", "total")),
            ]
        )
    for i, model in enumerate(models):
        own = sorted(of(rows, model=model), key=lambda row: sets.index(row["set"]))
        low, high = (tuple(100 * row["interval"][side] for row in own) for side in (0, 1))
        tests = tuple(100 * row["test"] for row in own)
        series.append(Series(model, tuple(row["set"] for row in own), tests, i, i, "points", low=low, high=high))
    chart = Chart(
        "studies-architectures",
        "Test score of each model",
        "Bars are intervals of 95% over texts.",
        "data set",
        "points",
        tuple(series),
    )
    head = ["set", "model", "test", "validation", "features", "blocks", "million parameters in them"]
    return [table([*head, "extract / probe / heads / total, s"], lines)], [chart]


PARTS = {
    "sensitivity": sensitivity,
    "poolings": poolings,
    "memory": memory,
    "linear": linear,
    "architectures": architectures,
}


def show(path: Path, out: Path) -> str:
    """All tables as Markdown; the pictures go to a folder."""
    rows, text = read_results(path), []
    for name, make in PARTS.items():
        if own := [row for row in rows if row["study"] == name]:
            tables, charts = make(own)
            if name == "memory":
                tables.append(break_even(own))
            save_figures([chart for chart in charts if chart.series], out)
            text += [f"## {name}", *tables]
    return "\n\n".join(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="folder for the pictures")
    chosen = parser.parse_args()
    print(show(chosen.results, chosen.out))
