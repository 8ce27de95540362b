"""Host memory of a whole calibration against the number of texts: it should not grow.

Each number of texts gets a fresh process: a tiny random BERT, texts of 4 to 12 words in a memory-mapped
``datasets.Dataset``, and ``spin_calibrate`` (tokens, features, probes, heads, confidence). Reported is the peak of the
process's own memory (``RssAnon`` of Linux: what the system can't take back, so without pages of files) over what the
process had before the call, in all and by stage; and the disk that the features took.

    python examples/benchmarks/memory.py --texts 10000 100000 1000000 --record
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import results

WORDS = 2000
STAGES = {
    "read_rows": "data",
    "encode": "tokenize",
    "fingerprint": "tokenize",
    "plan_batches": "tokenize",
    "extract": "extract",
    "probe_all": "probe",
    "try_heads": "heads",
    "conclude": "choice",
}


def own_memory() -> int:
    """Bytes of this process that are no pages of files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class Watch(threading.Thread):
    """Peak of the process's own memory for each stage that the main thread is in."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes, self.peaks, self.done = own_memory(), dict.fromkeys(STAGES.values(), 0), threading.Event()

    def run(self) -> None:
        main = threading.main_thread().ident
        stage = "data"
        while not self.done.wait(0.01):
            frame = sys._current_frames()[main]
            while frame is not None:
                if frame.f_code.co_name in STAGES and "calibration" in frame.f_code.co_filename:
                    stage = STAGES[frame.f_code.co_name]
                frame = frame.f_back
            self.peaks[stage] = max(self.peaks[stage], own_memory() - self.start_bytes)


def rows(count: int) -> Iterator[dict[str, object]]:
    """Texts whose label shows in some of their words."""
    choose = random.Random(0)
    for row in range(count):
        label = row % 2
        words = [f"w{int(WORDS * choose.random() ** (1.2 if label else 1.0))}" for _ in range(choose.randint(4, 12))]
        yield {"text": " ".join(words), "label": label}


def measure(count: int) -> None:
    """Calibrate on so many texts and print what it took, as JSON."""
    import datasets
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from spin_hf import SpinForSequenceClassification, spin_calibrate

    datasets.disable_progress_bars()
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS))])}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=len(ids),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    backbone = hf.BertModel(config)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    with tempfile.TemporaryDirectory() as folder:
        data = datasets.Dataset.from_generator(
            rows, gen_kwargs={"count": count}, cache_dir=folder, keep_in_memory=False
        )
        warm = SpinForSequenceClassification.from_backbone(hf.BertModel(config))
        spin_calibrate(warm, tokenizer, data.select(range(1000)), progress=False)  # what loads once is loaded
        model = SpinForSequenceClassification.from_backbone(backbone)
        watch, began = Watch(), time.perf_counter()
        watch.start()
        result = spin_calibrate(model, tokenizer, data, progress=False, cache_dir=Path(folder) / "cache")
        watch.done.set()
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "texts": count,
                "disk": result.bytes["features"],
                "seconds": seconds,
                "score": result.chosen.score,
                "peaks": watch.peaks,
            }
        )
    )


def main() -> None:
    made = results.parser(__doc__)
    made.add_argument("--texts", type=int, nargs="+", default=[10_000, 100_000])
    made.add_argument("--one", type=int, help=argparse.SUPPRESS)
    chosen = made.parse_args()
    if chosen.one is not None:
        measure(chosen.one)
        return
    rows, last = [], None
    for count in chosen.texts:
        command = [sys.executable, __file__, "--one", str(count)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        peak = max(found["peaks"].values())
        row = {"texts": count, "features on disk, MB": found["disk"] / 1e6, "seconds": found["seconds"]}
        row |= {"peak, MB": peak / 1e6, **{f"{stage}, MB": size / 1e6 for stage, size in found["peaks"].items()}}
        row["bytes for each text more"] = (peak - last[1]) / (count - last[0]) if last else "-"
        last = count, peak
        rows.append(row)
        print(json.dumps(row), flush=True)
    results.write_section(chosen.record, "Memory: host memory against the number of texts", rows)


if __name__ == "__main__":
    main()
