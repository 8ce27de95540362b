"""Small problems on a CPU: solved together, as a GPU does, against one after another.

Paths of six taps of MiniLM on so many texts, of the first so many neurons of each: the six hidden taps, or for the
widest the FFN taps. Both ways take turns; seconds are CPU time of one thread, and the median of ``--rounds`` counts.
"together" tells what ``spin_calibrate`` would do with probes of as many texts.

    python examples/benchmarks/together.py --data DATA
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import results
import torch
from solver import GAP, Case, cases, seconds_of

from spin_hf.calibration.batched import pays
from spin_hf.calibration.paths import solve_paths
from spin_hf.calibration.solver import smallest_useful_C, solve_path
from spin_hf.taps import Tap

BLOCKS = range(1, 7)
SIZES = ((50, 32), (50, 384), (50, 1536), (200, 32), (200, 384), (200, 512), (800, 32), (800, 128), (800, 384))


def compare(taps: list[Case], texts: int, width: int, points: int, rounds: int) -> dict[str, Any]:
    first = taps[0]
    kept = torch.arange(0, len(first.x), len(first.x) // texts)[:texts]
    y, s, loss = first.y[kept], first.s[kept], first.loss
    x = torch.stack([case.raw[kept, :width] for case in taps])
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True).clamp_min(1e-6)
    grids = [[smallest_useful_C(own, y, s, loss) * 2.0**i for i in range(1, points + 1)] for own in x]

    def alone() -> None:
        for own, grid in zip(x, grids, strict=True):
            list(solve_path(own, y, s, loss, grid, tol=GAP))

    def together() -> None:
        list(solve_paths(x, y, s, loss, grids, list(map(len, grids)), tol=GAP))

    seconds = [[seconds_of(alone), seconds_of(together)] for _ in range(rounds)]
    one, other = (statistics.median(each) for each in zip(*seconds, strict=True))
    return {
        **{"set": first.about["set"], "loss": first.about["loss"], "columns": y.shape[1]},
        **{"texts": texts, "neurons": width, "seconds alone": one, "seconds together": other},
        **{"ratio": one / other, "together": pays(x.device, texts, width, y.shape[1])},
    }


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=["sst2", "trec"])
    parser.add_argument("--rows", type=int, default=800, help="texts to draw the smaller ones from")
    parser.add_argument("--points", type=int, default=6, help="values of C, each twice the last")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.set:
        for kind in ("hidden", "ffn"):
            found = cases(arguments.data, name, [Tap(kind, block) for block in BLOCKS], arguments.rows)
            for loss in dict.fromkeys(case.about["loss"] for case in found):
                taps = [case for case in found if case.about["loss"] == loss]
                for texts, width in SIZES:
                    if texts <= len(taps[0].x) and (kind == "ffn") == (width > 384):
                        rows.append(compare(taps, texts, width, arguments.points, arguments.rounds))
    results.report(arguments.record, f"Small problems together: MiniLM on {' '.join(arguments.set)}", rows)


if __name__ == "__main__":
    main()
