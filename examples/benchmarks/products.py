"""Features times few vectors, as each step of the solver asks for: the kernels against torch.bmm.

Both products of a step, of the features and of their transpose, on random features of the shapes of MiniLM's taps and
of two of Llama 1B. Every call reads all features once, so that bytes over seconds says how near it comes to the speed
of the memory. Errors are the largest of the last tap, over its largest value in float64.

    python examples/benchmarks/products.py                                            # on a GPU
    python examples/benchmarks/products.py --shapes 2x60x48 --vectors 1 3 --device cpu
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import results
import torch
from torch import Tensor

from spin_hf.calibration.products import times, transposed_times

Product = Callable[[Tensor, Tensor], Tensor]
PRODUCTS: dict[str, tuple[Product, Product]] = {
    "features times vectors": (times, torch.bmm),
    "transposed": (transposed_times, lambda x, vectors: torch.bmm(x.mT, vectors)),
}


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of a call, the mean of some in a row."""
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(ours: Product, plain: Product, x: Tensor, vectors: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    calls = {"kernel": lambda: ours(x, vectors), "bmm": lambda: plain(x, vectors)}
    exact = plain(x[-1:].double(), vectors[-1:].double())
    errors = {key: float((call()[-1:] - exact).abs().max() / exact.abs().max()) for key, call in calls.items()}
    taken: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(arguments.rounds):  # in turns
        for key, call in calls.items():
            taken[key].append(seconds(call, arguments.repeats))
    found = {key: statistics.median(values) for key, values in taken.items()}
    return {
        "microseconds": {key: 1e6 * value for key, value in found.items()},
        "TB/s": {key: x.nbytes / value / 1e12 for key, value in found.items()},
        "ratio": found["bmm"] / found["kernel"],
        "error": errors,
    }


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    for shape in arguments.shapes:
        taps, texts, width = map(int, shape.split("x"))
        x = torch.randn(taps, texts, width, device=arguments.device)
        for count in arguments.vectors:
            for name, (ours, plain) in PRODUCTS.items():
                vectors = torch.randn(taps, texts if name == "transposed" else width, count, device=arguments.device)
                about = {"taps, rows, features": [taps, texts, width], "vectors": count, "product": name}
                yield about | compare(ours, plain, x, vectors, arguments)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["7x6920x384", "6x6920x1536", "2x20000x8192"])
    parser.add_argument("--vectors", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    results.report(arguments.record, "Few vectors at once", rows(arguments), on=arguments.device)


if __name__ == "__main__":
    main()
