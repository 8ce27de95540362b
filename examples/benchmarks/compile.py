"""What a finished classifier costs: eager against torch.compile, and cut to its depth against the whole backbone.

A classifier with random weights and random neurons: time and size don't depend on what they say. In one run, the
variants take turns, and the median of each is compared; predictions must be equal. The ``full`` variant is the same
classifier on a backbone that keeps all its blocks.

    python examples/benchmarks/compile.py --shape llama-1b --dtype bfloat16           # on a GPU
    python examples/benchmarks/compile.py --shape tiny --dtype float32 --backend eager --rounds 5
    python examples/benchmarks/compile.py --backbone FOLDER --depth 4 --variants eager full
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import results
import torch
from shapes import SHAPES, make, make_classifier
from transformers import AutoConfig, AutoModel

from spin_hf import SpinForSequenceClassification


def make_backbone(arguments: argparse.Namespace):
    dtype = getattr(torch, arguments.dtype)
    if not arguments.backbone:
        return make(arguments.shape, dtype=dtype, device=arguments.device, attention=arguments.attn)
    config = AutoConfig.from_pretrained(arguments.backbone)
    torch.manual_seed(0)
    with torch.device(arguments.device):
        return AutoModel.from_config(config, dtype=dtype, attn_implementation=arguments.attn)


def megabytes(model) -> float:
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6


def seconds(call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


wrap = SpinForSequenceClassification.from_backbone


@torch.no_grad()
def run(arguments: argparse.Namespace) -> dict:
    backbone = make_backbone(arguments)
    total = backbone.config.num_hidden_layers
    depth = arguments.depth or total // 2
    models = {"eager": make_classifier(wrap(copy.deepcopy(backbone)), depth, keep=depth)}
    if "full" in arguments.variants:
        models["full"] = make_classifier(wrap(backbone), depth, keep=total)
    sizes = {name: megabytes(model) for name, model in models.items()}
    if "compiled" in arguments.variants:
        options = {} if arguments.backend != "inductor" else {"mode": arguments.mode}
        models["compiled"] = torch.compile(models["eager"], fullgraph=True, backend=arguments.backend, **options)
    vocabulary = backbone.config.vocab_size
    ids = torch.randint(5, vocabulary, (arguments.batch, arguments.tokens), device=arguments.device)
    lengths = torch.linspace(arguments.tokens, arguments.tokens // 2, arguments.batch, device=arguments.device).long()
    mask = (torch.arange(arguments.tokens, device=arguments.device) < lengths[:, None]).long()
    calls = {name: lambda model=model: model(input_ids=ids, attention_mask=mask) for name, model in models.items()}
    logits = {}
    for name, call in calls.items():
        for _ in range(arguments.warmup):
            logits[name] = call().logits.clone()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.rounds):  # interleaved: whatever slows the machine down slows all of them
        for name, call in calls.items():
            times[name].append(seconds(call, arguments.device))
    median = {name: statistics.median(values) for name, values in times.items()}
    row = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "backbone": arguments.backbone or arguments.shape,
        "dtype": arguments.dtype,
        "attention": arguments.attn,
        "batch": [arguments.batch, arguments.tokens],
        "blocks": [depth, total],
        "milliseconds": {name: round(1e3 * value, 3) for name, value in median.items()},
        "megabytes": {name: round(value, 1) for name, value in sizes.items()},
        "equal_predictions": {
            name: bool((found.argmax(1) == logits["eager"].argmax(1)).all()) for name, found in logits.items()
        },
        "largest_difference": {name: float((found - logits["eager"]).abs().max()) for name, found in logits.items()},
    }
    if "compiled" in median:
        row["compile_speedup"] = round(median["eager"] / median["compiled"], 3)
    if "full" in median:
        row["latency_ratio"] = round(median["eager"] / median["full"], 3)
        row["size_ratio"] = round(sizes["eager"] / sizes["full"], 3)
    return row


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    parser = results.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--backbone", help="folder or id whose config gives the shape instead")
    parser.add_argument("--depth", type=int, help="blocks to keep; half of them by default")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--attn", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--variants", nargs="+", default=["eager", "compiled", "full"])
    parser.add_argument("--backend", default="inductor", help="of torch.compile; eager needs no compiler")
    parser.add_argument("--mode", default="default", help="of the inductor: default, reduce-overhead, max-autotune")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    chosen = parser.parse_args()
    name = f"Compile: {chosen.backbone or chosen.shape}, {chosen.mode}, {chosen.device}"
    results.report(chosen.record, name, [run(chosen)])
