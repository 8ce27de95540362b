"""Reading all taps against the bare forward: what pooling inside the hooks adds to it.

Random weights of a real shape, one batch; bare forward, pooling in plain torch and as a calibration pools take turns,
and the medians are compared. The features of the two must agree. The default of a calibration is ``attention``. On a
CPU the seconds are those of the processor; give ``OMP_NUM_THREADS=1``. ``extract`` is a calibration's whole step:
``--batches`` of these one after another, checked and written to a file for each tap, in ``TMPDIR``.

    python examples/benchmarks/extraction.py --shape llama-1b gpt2-xl            # on a GPU
    python examples/benchmarks/extraction.py --shape minilm --dtype float32 --device cpu --batch 32 --tokens 128
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import results
import torch
from shapes import SHAPES, make

from spin_hf import SpinForSequenceClassification, token_scores
from spin_hf.attention import ATTENTION, Queries, source
from spin_hf.calibration import one_pass
from spin_hf.calibration.extraction import Encoded, PooledWhole, extract
from spin_hf.calibration.store import FeatureStore
from spin_hf.spin_model import SpinModel
from spin_hf.taps import Tap, tap_width


def measure(shape: str, poolings: list[str], arguments: argparse.Namespace) -> dict:
    backbone = make(shape, dtype=getattr(torch, arguments.dtype), device=arguments.device)
    spin = SpinForSequenceClassification.from_backbone(backbone).spin
    ids = torch.randint(0, SHAPES[shape].vocab_size, (arguments.batch, arguments.tokens), device=arguments.device)
    mask = torch.ones_like(ids)
    queries = {}
    if ATTENTION in poolings:
        drawn = {
            tap: torch.randn(tap_width(backbone, spin.layout, tap)) / 100
            for tap in dict.fromkeys(map(source, spin.taps))
        }
        queries = {tap: drawn[source(tap)] for tap in spin.taps}
    here = Queries({tap: query.to(arguments.device) for tap, query in queries.items()})
    start = functools.partial(PooledWhole, one_pass.pool_prefix, poolings, here)
    found = {}

    def bare() -> None:
        spin.run_backbone(ids, mask)

    def one_go() -> None:
        by_tap = dict.fromkeys(spin.taps, poolings)
        found[one_go] = spin.read_taps(by_tap, start, mask, ids, None, windows=None)

    def plain() -> None:
        with (
            mock.patch.object(one_pass, "runs_triton", _never),
            mock.patch.object(token_scores, "runs_triton", _never),
        ):
            one_go()
        found[plain] = found.pop(one_go)

    # On the CPU what it takes of it, which other programs that run there disturb less than the time on the wall.
    clock = time.perf_counter if arguments.device.startswith("cuda") else time.process_time
    variants = {"bare": bare, "plain": plain, "one pass": one_go}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for number in range(arguments.rounds + 3):
            for name, run in variants.items():
                with spin.hooked(spin.taps if name != "bare" else []):  # once for all batches of a calibration
                    _wait(arguments.device)
                    started = clock()
                    run()
                    _wait(arguments.device)
                    if number >= 3:
                        seconds[name].append(clock() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["extract"] = extracting(spin, ids, poolings, queries, arguments, clock)
    off = max(
        float(((a - b).abs() / b.abs().clamp_min(1e-2)).max())
        for tap in spin.taps
        for a, b in zip(found[one_go][tap], found[plain][tap], strict=True)
    )
    return {
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device,
        "torch": torch.__version__,
        "shape": shape,
        "dtype": arguments.dtype,
        "batch": [arguments.batch, arguments.tokens],
        "taps": len(spin.taps),
        "poolings": poolings,
        "milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "ratio": {name: round(medians[name] / medians["bare"], 3) for name in list(medians)[1:]},
        "largest_relative_difference": off,
    }


def _never(device: torch.device) -> bool:
    """A mock would remember all that it was asked of."""
    return False


def extracting(
    spin: SpinModel,
    ids: torch.Tensor,
    poolings: list[str],
    queries: dict[Tap, torch.Tensor],
    given: argparse.Namespace,
    clock: Callable[[], float],
) -> float:
    """Seconds for a batch, of many."""
    rows, tokens = ids.shape
    plan = [range(first, first + rows) for first in range(0, given.batches * rows, rows)]
    encoded = Encoded(ids.tolist() * given.batches, None, tokens, 0)
    widths = {tap: tap_width(spin.backbone, spin.layout, tap) for tap in spin.taps}
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder) / "store", widths=widths, poolings=poolings, batches=plan)
        store.create({})
        started = clock()
        extract(spin, encoded, store, range(len(plan)), 0, lambda tokens: None, queries)
        return (clock() - started) / len(plan)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-1b", "gpt2-xl"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--poolings", nargs="+", action="append", help="default: attention, and mean and max")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=100, help="that are written: up to 20 GB for gpt2-xl")
    arguments = parser.parse_args()
    every = arguments.poolings or [[ATTENTION], ["mean", "max"]]
    rows = [measure(shape, poolings, arguments) for poolings in every for shape in arguments.shape]
    only = "".join(f", {' and '.join(poolings)}" for poolings in arguments.poolings or [])
    results.report(arguments.record, f"Extraction: {' '.join(arguments.shape)}{only}", rows, on=arguments.device)


if __name__ == "__main__":
    main()
