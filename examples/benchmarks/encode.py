"""Reading all taps of MiniLM, from texts to features on disk, against ``encode`` of sentence-transformers.

The same texts through the same weights, cut at 256 tokens: ``encode`` keeps the mean of the last layer, ours every
neuron of every layer, under token weights (the default of a calibration) and under the mean. They take turns; on a CPU
seconds are those of the process. The mean of the last layer must be the same.

    python examples/benchmarks/encode.py --data DATA    # pip install sentence-transformers
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import results
import torch
from sentence_transformers import SentenceTransformer

from spin_hf import SpinForSequenceClassification
from spin_hf.attention import ATTENTION, source
from spin_hf.calibration.extraction import encode, extract, plan_batches
from spin_hf.calibration.store import FeatureStore
from spin_hf.demo import backbone_folder
from spin_hf.loading import load_tokenizer
from spin_hf.taps import tap_width

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import draw, read_split

MAX_LENGTH = 256
BATCH_TOKENS = 4096  # the default of a calibration


class Ours:
    """Texts to the features of all taps on disk."""

    def __init__(self, device: str) -> None:
        self.model = SpinForSequenceClassification.from_backbone(backbone_folder()).to(device).eval()
        self.tokenizer, spin = load_tokenizer(backbone_folder()), self.model.spin
        self.widths = {tap: tap_width(spin.backbone, spin.layout, tap) for tap in spin.taps}
        drawn = torch.Generator().manual_seed(0)
        states = {tap: torch.randn(self.widths[tap], generator=drawn) / 100 for tap in map(source, spin.taps)}
        self.queries = {tap: states[source(tap)] for tap in spin.taps}

    def read(self, texts: list[str], pooling: str) -> np.ndarray:
        """The last layer's ``(texts, width)``."""
        encoded = encode(self.tokenizer, texts, None, MAX_LENGTH)
        batches = plan_batches(encoded.lengths, BATCH_TOKENS)
        queries = self.queries if pooling == ATTENTION else None
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore(Path(folder) / "store", widths=self.widths, poolings=[pooling], batches=batches)
            store.create({})
            pad = int(self.tokenizer.pad_token_id)
            extract(self.model.spin, encoded, store, range(len(batches)), pad, lambda tokens: None, queries)
            found = store.read(list(self.widths)[-1], pooling).numpy()
            store.close()
        return found


def measure(name: str, texts: list[str], given: Any) -> dict[str, Any]:
    ours, theirs = Ours(given.device), SentenceTransformer(str(backbone_folder()), device=given.device)
    theirs.max_seq_length = MAX_LENGTH

    def encoded(size: int) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(theirs.encode(texts, batch_size=size, show_progress_bar=False))

    runs = {f"encode, batches of {size}": encoded(size) for size in given.sizes}
    runs |= {
        f"all taps, {pooling}": lambda pooling=pooling: ours.read(texts, pooling) for pooling in (ATTENTION, "mean")
    }
    clock = time.process_time if given.device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    found = {}
    for number in range(given.rounds + 1):
        for run, go in runs.items():
            began = clock()
            found[run] = go()
            if number:  # the first sets up
                seconds[run].append(clock() - began)
    mean = found["all taps, mean"] / np.linalg.norm(found["all taps, mean"], axis=1, keepdims=True)
    other = found[f"encode, batches of {given.sizes[0]}"]
    best = np.min([seconds[f"encode, batches of {size}"] for size in given.sizes], 0)
    return {
        "set": name,
        "texts": len(texts),
        "tokens": sum(encode(ours.tokenizer, texts, None, MAX_LENGTH).lengths),
        "seconds": {run: round(median(own), 3) for run, own in seconds.items()},
        "ratio to the quickest encode": {
            run: round(median(np.asarray(own) / best), 3) for run, own in seconds.items() if run.startswith("all")
        },
        "last layer differs by": float(np.abs(mean - other).max()),
        "rounds": given.rounds,
    }


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with imdb and sst2")
    parser.add_argument("--sentences", type=int, default=2000, help="of SST-2")
    parser.add_argument("--reviews", type=int, default=200, help="of IMDb")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128], help="batch sizes of encode (its own is 32)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    rows = []
    for name, count in (("sst2", given.sentences), ("imdb", given.reviews)):
        texts = [row["text"] for row in draw(read_split(given.data, name, "train"), count)]
        rows.append(measure(name, texts, given))
    results.report(given.record, "Reading against encode of sentence-transformers", rows, on=given.device)


if __name__ == "__main__":
    main()
