"""How many labels are needed: SPIN, SetFit and full fine-tuning on so many texts of each class.

``adaptation_table.py --per-class`` measures it; this is its picture.
"""

from __future__ import annotations

from tables import Rows, mean, of, points, spread, table

from spin_hf.explain.charts import Chart, Series

SEEDS = 3  # fewer are told
METHODS = ("SPIN", "SetFit", "full fine-tuning")


def shown(rows: Rows) -> tuple[list[str], list[Chart]]:
    """The tables and pictures of the rows of ``adaptation_table.py``."""
    found = [row for row in rows if row["per_class"] is not None and row["method"] in METHODS]
    sizes = sorted({row["per_class"] for row in found})
    sets = list(dict.fromkeys(row["set"] for row in found))
    lines, series = [], []
    for i, name in enumerate(sets):
        for j, method in enumerate(METHODS):
            tests = {size: [r["test"] for r in of(found, set=name, method=method, per_class=size)] for size in sizes}
            cells = []
            for own in tests.values():
                told = points(mean(own) / 100, spread(own) / 100 if len(own) > 1 else None) if own else ""
                cells.append(told + (f" (of {len(own)})" if 0 < len(own) < SEEDS else ""))
            lines.append([name, method, *cells])
            xs = tuple(size for size, own in tests.items() if own)
            series.append(Series(f"{name}, {method}", xs, tuple(mean(tests[x]) for x in xs), i, j))
    chart = Chart(
        "studies-labels",
        "Test score by the number of labels",
        "Means of the draws of texts; their spread is in the table.",
        "texts of each class",
        "points",
        tuple(series),
        log_x=True,
    )
    return [table(["set", "method", *map(str, sizes)], lines)], [chart] if series else []
