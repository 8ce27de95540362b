"""The probe solver against scikit-learn's liblinear: same real features, same objective, same values of C, same cores.

For each tap, both solve the same grid of C. Reported: seconds for the grid, and how far, at the worst C, each solver's
objective lies above the certified lower bound (our dual value), relative to it. liblinear penalises its intercept, so
it gets ``intercept_scaling=1000``, which makes that negligible.

    python examples/benchmarks/solver.py --data DATA --taps ffn.4 hidden.4
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import results
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from spin_hf import SpinForSequenceClassification
from spin_hf.calibration.extraction import encode, extract, plan_batches
from spin_hf.calibration.losses import Logistic
from spin_hf.calibration.solver import smallest_useful_C, solve_path
from spin_hf.calibration.store import FeatureStore
from spin_hf.demo import backbone_folder
from spin_hf.taps import Tap, tap_width

sys.path.append(str(Path(__file__).parents[1]))
from accuracy_table import load


def features(taps: list[Tap], texts: list[str]) -> dict[Tap, torch.Tensor]:
    """Mean-pooled features of MiniLM, standardised."""
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    model = SpinForSequenceClassification.from_backbone(backbone_folder())
    encoded = encode(tokenizer, texts, None, 512)
    widths = {tap: tap_width(model.spin.backbone, model.spin.layout, tap) for tap in taps}
    batches = plan_batches(encoded.lengths, 4096)
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder), widths=widths, poolings=["mean"], batches=batches)
        store.create({})
        extract(model.spin, encoded, store, range(len(batches)), 0, lambda tokens: None)
        found = {tap: torch.from_numpy(store.read(tap, "mean")) for tap in taps}
    return {tap: (x - x.mean(0)) / x.std(0, correction=0) for tap, x in found.items()}


def objective(x: torch.Tensor, y: torch.Tensor, weight: np.ndarray, intercept: float, C: float) -> float:
    z = x.double() @ torch.from_numpy(weight).double() + intercept
    loss = Logistic().value(z[:, None], y.double(), torch.ones(len(y), 1, dtype=torch.float64))
    return float(loss.sum() + np.abs(weight).sum() / C)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--taps", nargs="+", default=["ffn.4", "hidden.4"])
    parser.add_argument("--points", type=int, default=7)
    arguments = parser.parse_args()
    train = load(arguments.data, "sst2")[0]
    labels = np.array([row["label"] for row in train])
    y, s = torch.from_numpy(labels).float()[:, None], torch.ones(len(labels), 1)
    rows = []
    for tap, x in features([Tap.parse(name) for name in arguments.taps], [row["text"] for row in train]).items():
        start = smallest_useful_C(x, y, s, Logistic())
        Cs = [start * 2.0 ** (i + 1) for i in range(arguments.points)]
        began = time.perf_counter()
        ours = list(solve_path(x, y, s, Logistic(), Cs))
        our_seconds = time.perf_counter() - began
        began = time.perf_counter()
        theirs = [
            LogisticRegression(
                l1_ratio=1.0, solver="liblinear", C=C, intercept_scaling=1000, tol=1e-4, max_iter=1000
            ).fit(x.numpy(), labels)
            for C in Cs
        ]
        their_seconds = time.perf_counter() - began
        gaps = []
        for point, model in zip(ours, theirs, strict=True):
            bound = point.objective * (1 - point.gap)
            value = objective(x, y, model.coef_[0], float(model.intercept_[0]), point.C)
            gaps.append((point.gap, (value - bound) / value))
        worst = [max(column) for column in zip(*gaps, strict=True)]
        rows.append(
            {
                "tap": str(tap),
                "n": len(x),
                "d": x.shape[1],
                "values_of_C": len(Cs),
                "most_neurons": max(int((point.weight != 0).sum()) for point in ours),
                "seconds": {"spin_hf": round(our_seconds, 2), "liblinear": round(their_seconds, 2)},
                "ratio": round(their_seconds / our_seconds, 1),
                "worst_gap": {"spin_hf": worst[0], "liblinear": worst[1]},
            }
        )
    results.report(arguments.record, f"Solver: MiniLM on SST-2, scikit-learn {sklearn.__version__}", rows)


if __name__ == "__main__":
    main()
