"""How many labels are needed: SPIN, SetFit and full fine-tuning on so many texts of each class.

``adaptation_table.py --per-class`` measures it; this is its picture.
"""

from __future__ import annotations

from tables import Rows, mean, of, pairs, points, spread, table

from spin_hf.explain.charts import Chart, Series

SEEDS = 3  # fewer are told
METHODS = ("SPIN", "SetFit", "full fine-tuning")


def shown(rows: Rows) -> tuple[list[str], list[Chart]]:
    """The tables and pictures of the rows of ``adaptation_table.py``."""
    found = [row for row in rows if row["per_class"] is not None and row["method"] in METHODS]
    sizes = sorted({row["per_class"] for row in found})
    lines, charts = [], []
    for model, task in pairs(found):
        name, series = f"{model}, {task}", []
        for j, method in enumerate(METHODS):
            own = of(found, model=model, set=task, method=method)
            tests = {size: [row["test"] for row in of(own, per_class=size)] for size in sizes}
            cells = []
            for drawn in tests.values():
                told = points(mean(drawn) / 100, spread(drawn) / 100 if len(drawn) > 1 else None) if drawn else ""
                cells.append(told + (f" (of {len(drawn)})" if 0 < len(drawn) < SEEDS else ""))
            lines.append([name, method, *cells])
            xs = tuple(size for size, drawn in tests.items() if drawn)
            ys = tuple(mean(tests[x]) for x in xs)
            low, high = (tuple(y + side * spread(tests[x]) for x, y in zip(xs, ys, strict=True)) for side in (-1, 1))
            series.append(Series(method, xs, ys, j, j, low=low, high=high))
        charts.append(
            Chart(
                f"studies-labels-{task}" if model == "MiniLM" else f"studies-labels-{model}-{task}",
                f"Test score by the number of labels, {name}",
                "Means of the draws of texts; bars are their standard deviation.",
                "texts of each class",
                "points",
                tuple(series),
                log_x=True,
            )
        )
    return [table(["model, set", "method", *map(str, sizes)], lines)], charts
