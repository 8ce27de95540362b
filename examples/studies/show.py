"""The tables and pictures of the studies, from the rows measured so far: what stands in ``findings/studies.md``.

python examples/studies/show.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import architectures
import few_labels
import linear_enough
import poolings
import sensitivity
import training_memory
import weighted_texts
from shared import RESULTS, read_results

from spin_hf.explain.paper_figures import save_figures

STUDIES: dict[str, Any] = {
    "sensitivity": sensitivity,
    "poolings": poolings,
    "memory": training_memory,
    "linear": linear_enough,
    "architectures": architectures,
    "weighted texts": weighted_texts,
}
ADAPTATION = Path(__file__).parents[1] / "adaptation_table.jsonl"


def show(path: Path, adaptation: Path, out: Path) -> str:
    """All tables as Markdown; the pictures go to a folder."""
    rows = read_results(path)
    found = {name: [row for row in rows if row["study"] == name] for name in STUDIES}
    parts = [(name, STUDIES[name].shown(own)) for name, own in found.items() if own]
    if few := read_results(adaptation):
        parts.append(("labels", few_labels.shown(few)))
    text = []
    for name, (tables, charts) in parts:
        save_figures([chart for chart in charts if chart.series], out)
        text += [f"## {name}", *tables]
    return "\n\n".join(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--adaptation", type=Path, default=ADAPTATION, help="rows of adaptation_table.py")
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="folder for the pictures")
    chosen = parser.parse_args()
    print(show(chosen.results, chosen.adaptation, chosen.out))
