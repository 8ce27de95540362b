"""What an explanation costs, and how exactly its parts sum to the logits.

The time of ``explain`` over that of the same model's forward on the same batches, both in CPU seconds of this process
and the least of some repetitions; and the largest difference of a logit and the sum of its parts, over max(1, the
logit's size).

    python examples/benchmarks/explain.py --model FOLDER [FOLDER ...] --data DATA --set sst2
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import results
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import read_split

from spin_hf.attention import pooling_title
from spin_hf.explain import explain
from spin_hf.loading import load_classifier
from spin_hf.prediction import batches, encode_for


def seconds(work: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def measure(folder: str, texts: list[str], timed: int, repeats: int) -> dict[str, object]:
    """One classifier: the time of its explanations, and the worst of their sums."""
    model, tokenizer = load_classifier(folder, "cpu", False)
    few = texts[:timed]
    prepared = list(batches(model, tokenizer, encode_for(model, tokenizer, few, None), 4096))

    def forward() -> None:
        with torch.no_grad():
            for _, batch in prepared:
                model(**batch)

    forward()  # warm
    plain = seconds(forward, repeats)
    explained = seconds(lambda: explain(model, tokenizer, few), repeats)
    return {
        "classifier": Path(folder).name,
        "poolings": ", ".join(dict.fromkeys(pooling_title(entry["pooling"]) for entry in model.config.features)),
        "features": model.config.num_features,
        "blocks": model.spin.depth,
        "texts": len(texts),
        "worst_error": explain(model, tokenizer, texts).worst_error,
        "timed": len(few),
        "seconds": {"forward": round(plain, 2), "explain": round(explained, 2)},
        "ratio": round(explained / plain, 3),
    }


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--model", nargs="+", required=True, help="folders of classifiers")
    parser.add_argument("--data", type=Path, required=True, help="folder with NAME/test.jsonl.gz")
    parser.add_argument("--set", default="sst2")
    parser.add_argument("--texts", type=int, default=1000, help="whose sums are checked")
    parser.add_argument("--timed", type=int, default=200, help="of them that are timed")
    parser.add_argument("--repeats", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    texts = [row["text"] for row in read_split(chosen.data, chosen.set, "test")[: chosen.texts]]
    rows = [measure(folder, texts, chosen.timed, chosen.repeats) for folder in chosen.model]
    results.report(chosen.record, f"Explanations: {chosen.set}", rows)


if __name__ == "__main__":
    main()
