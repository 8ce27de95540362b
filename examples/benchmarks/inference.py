"""A SPIN classifier against the native head of the same backbone, cut to the same depth, on the same weights.

Both are called with what a tokenizer gives (ids and mask). They take turns, and the median of the paired ratios is
shown, beside the operations that launch work in one forward of each. On a GPU both are also compiled with CUDA graphs.

    python examples/benchmarks/inference.py --model CLASSIFIER          # a calibrated one
    python examples/benchmarks/inference.py --shape llama-1b gpt2-xl --dtype bfloat16    # random neurons of each tap
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import results
import torch
from shapes import SHAPES, make, make_classifier
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification

from spin_hf import SpinForSequenceClassification


class _Operations(TorchDispatchMode):
    """Counts those that compute: views launch nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(call) -> int:
    with _Operations() as counter:
        call()
    return counter.count


def classifiers(arguments: argparse.Namespace):
    """(name, a SPIN classifier) for each that is asked for."""
    dtype = getattr(torch, arguments.dtype)
    for folder in arguments.model:
        yield (
            folder.rstrip("/").rpartition("/")[2],
            SpinForSequenceClassification.from_pretrained(folder, dtype=dtype).to(arguments.device).eval(),
        )
    for shape in arguments.shape:
        model = SpinForSequenceClassification.from_backbone(make(shape, dtype=dtype, device=arguments.device))
        depth = arguments.depth or model.spin.depth // 2
        options = {"poolings": arguments.poolings, "kinds": arguments.kinds, "count": arguments.count}
        yield shape, make_classifier(model, depth, keep=depth, **options)


def native(model: SpinForSequenceClassification, device: str):
    """The native classifier on the weights of a SPIN one's backbone, with a random head."""
    backbone = model.spin.backbone
    with torch.device(device):
        made = AutoModelForSequenceClassification.from_config(
            backbone.config, dtype=backbone.dtype, attn_implementation=backbone.config._attn_implementation
        )
    missing = made.base_model.load_state_dict(backbone.state_dict(), strict=False, assign=True)
    assert not missing.unexpected_keys, missing
    made.config.pad_token_id = made.config.get_text_config().pad_token_id = 0
    return made.eval()


def batch_of(size: int, tokens: int, model, device: str) -> dict[str, torch.Tensor]:
    """Random ids; the shortest text is half as long as the longest, right-padded."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.spin.backbone.config.get_text_config().vocab_size
    ids = torch.randint(5, vocabulary, (size, tokens), generator=draw)
    lengths = torch.linspace(tokens, tokens // 2, size).long()
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def compare(ours, theirs, *, device: str, seconds: float, least: int = 20) -> dict[str, Any]:
    """Median milliseconds of two calls that take turns, and of the ratios of neighbours."""

    def timed(call) -> float:
        _wait(device)
        began = clock()
        call()
        _wait(device)
        return clock() - began

    # On the CPU what both take of it, which other programs that run there disturb less than the time on the wall.
    clock = time.perf_counter if device.startswith("cuda") else time.process_time

    for _ in range(5):
        timed(ours), timed(theirs)
    pairs, until = [], time.perf_counter() + seconds
    while len(pairs) < least or time.perf_counter() < until:
        first = len(pairs) % 2  # who goes first alternates
        found = [timed(call) for call in ((ours, theirs), (theirs, ours))[first]]
        pairs.append(found[::-1] if first else found)
    ratios = [spin / other for spin, other in pairs]
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "milliseconds": {
            name: round(1e3 * statistics.median(column), 3)
            for name, column in zip(("spin", "native"), zip(*pairs, strict=True), strict=True)
        },
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": f"{quarters[0]:.3f} to {quarters[2]:.3f}",
        "pairs": len(pairs),
    }


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, model in classifiers(arguments):
        head = native(model, arguments.device)
        for mode, size, tokens in product(arguments.modes, arguments.batch, arguments.tokens):
            batch = batch_of(size, tokens, model, arguments.device)
            calls = [
                each if mode == "eager" else torch.compile(each, fullgraph=True, mode="reduce-overhead")
                for each in (model, head)
            ]
            runs = [lambda call=call, batch=batch: call(**batch).logits for call in calls]
            count = [operations(run) for run in runs] if mode == "eager" else ["", ""]
            yield {
                "backbone": name,
                "blocks": model.spin.depth,
                "features": model.config.num_features,
                "taps": len(model.spin.groups),
                "dtype": arguments.dtype,
                "batch": [size, tokens],
                "mode": mode,
                **compare(*runs, device=arguments.device, seconds=arguments.seconds),
                "operations": dict(zip(("spin", "native"), count, strict=True)),
            }


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = results.parser(__doc__)
    parser.add_argument("--model", nargs="*", default=[], help="folders of calibrated classifiers")
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=[])
    parser.add_argument("--depth", type=int, help="blocks of a shape to keep; half of them by default")
    parser.add_argument("--count", type=int, default=50, help="neurons of each tap and pooling of a shape")
    parser.add_argument("--poolings", nargs="+", default=["max", "mean"], help="of a shape")
    parser.add_argument("--kinds", nargs="+", default=["ffn", "hidden"], help="of a shape")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256] if on_gpu else [32, 128])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"] if on_gpu else ["eager"])
    parser.add_argument("--seconds", type=float, default=20, help="for each row")
    arguments = parser.parse_args()
    if not arguments.model and not arguments.shape:
        arguments.shape = ["llama-1b", "gpt2-xl"] if on_gpu else ["minilm", "tiny"]
    names = " ".join([*(folder.rstrip("/").rpartition("/")[2] for folder in arguments.model), *arguments.shape])
    pooled = ", token weights" if arguments.shape and "attention" in arguments.poolings else ""
    results.report(arguments.record, f"Inference: {names}{pooled}", measure(arguments), on=arguments.device)


if __name__ == "__main__":
    main()
