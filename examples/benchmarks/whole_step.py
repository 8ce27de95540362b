"""The whole step against the bare forward: what ``spin_calibrate`` costs over reading its texts once, by stage.

The bare forward runs the very batches that the calibration reads, half of them just before it reads and half just
after, so that a machine that slows down slows both. With ``--every 4`` it runs every fourth of them, which stand for
all by their tokens: the batches are sorted by length. ``over the forward`` is the calibration without that, less one
forward, divided by the forward; the stages are divided by it likewise. On a CPU all times are CPU time of the process.

    python examples/benchmarks/whole_step.py --data DATA --set sst2 imdb --record
    python examples/benchmarks/whole_step.py --data DATA --set sst2 imdb --model PATH/TO/SmolLM2-135M --rows 1000
    python examples/benchmarks/whole_step.py --shape llama-1b --device cuda --texts 25000 --tokens 256 --record
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import results
import torch
from shapes import SHAPES, make
from texts import make_rows, make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import calibrate as step
from spin_hf.calibration import progress
from spin_hf.calibration.extraction import Encoded, pad
from spin_hf.calibration.store import FeatureStore
from spin_hf.spin_model import SpinModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import load

from spin_hf.demo import backbone_folder

SETS = ("sst2", "imdb")
IMDB_ROWS = 5000  # in all, as the target says
STAGES = ("tokenize", "token weights", "extract", "probe", "heads")


class Bare:
    """Stands in for ``extract`` and runs the bare forward of the same batches around it."""

    def __init__(self, now: Callable[[], float], every: int) -> None:
        self.now, self.extract, self.every = now, step.extract, every
        self.spent, self.share = 0.0, 1.0  # seconds, and the share of all padded tokens that they took
        self.first, self.texts, self.tokens = 0.0, 0, 0

    @property
    def seconds(self) -> float:
        """Of the forward of all batches."""
        return self.spent / self.share

    def __call__(
        self,
        model: SpinModel,
        encoded: Encoded,
        store: FeatureStore,
        numbers: Sequence[int],
        pad_token_id: int,
        *more: Any,
    ) -> None:
        numbers = list(numbers)
        some = numbers[(self.every - 1) // 2 :: self.every] or numbers[:1]
        model.eval()
        started = self.now()
        forward(model, encoded, store, numbers[:1], pad_token_id)  # what a first call sets up
        self.first = self.now() - started
        self.texts, self.tokens = len(encoded.lengths), sum(encoded.lengths)
        self.read(model, encoded, store, some[::2], pad_token_id)
        self.extract(model, encoded, store, numbers, pad_token_id, *more)
        self.read(model, encoded, store, some[1::2], pad_token_id)
        padded = [len(rows) * max(encoded.lengths[row] for row in rows) for rows in store.batches]
        self.share = sum(padded[number] for number in some) / sum(padded[number] for number in numbers)

    def read(self, *given: Any) -> None:
        started = self.now()
        forward(*given)
        self.spent += self.now() - started


@torch.no_grad()
def forward(model: SpinModel, encoded: Encoded, store: FeatureStore, numbers: Sequence[int], pad_token_id: int) -> None:
    """The backbone alone over some batches of the store's plan."""
    device = next(model.backbone.parameters()).device
    for number in numbers:
        rows = store.batches[number].tolist()
        ids = pad([encoded.input_ids[row] for row in rows], pad_token_id).to(device)
        mask = pad([[1] * encoded.lengths[row] for row in rows], 0).to(device)
        model.run_backbone(ids, mask)


class Disk(threading.Thread):
    """How far the used space of a folder's file system grows; open files without a name count."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.before, self.peak = folder, shutil.disk_usage(folder).used, 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            self.peak = max(self.peak, shutil.disk_usage(self.folder).used - self.before)


def measure(
    name: str,
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    train: Any,
    given: argparse.Namespace,
    **evaluation: Any,
) -> dict[str, Any]:
    """One calibration, and what it cost."""
    cuda = given.device.startswith("cuda")

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.process_time()

    bare = Bare(now, given.every)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        disk = Disk(Path(folder))
        disk.start()
        with (
            mock.patch.object(step, "extract", bare),
            mock.patch.object(progress, "time", SimpleNamespace(perf_counter=now)),
            mock.patch.object(tempfile, "tempdir", folder),
        ):
            started = now()
            result = spin_calibrate(
                model,
                tokenizer,
                train,
                batch_tokens=given.batch_tokens,
                cache_dir=Path(folder) / "cache",
                progress=False,
                **evaluation,
            )
            total = now() - started
        disk.done.set()
        disk.join()
    stages = {stage: result.seconds.get(stage, 0.0) for stage in STAGES}
    stages["extract"] -= bare.spent + bare.first
    total -= bare.spent + bare.first
    over = {stage: stages[stage] - (bare.seconds if stage == "extract" else 0) for stage in STAGES}
    over["rest"] = total - sum(stages.values())
    return {
        "backbone": name,
        "n": bare.texts,
        "tokens": bare.tokens,
        "bare forward, s": round(bare.seconds, 2),
        "calibration, s": round(total, 2),
        "over the forward": round((total - bare.seconds) / bare.seconds, 3),
        **{f"of it, {stage}": round(value / bare.seconds, 3) for stage, value in over.items()},
        "score": result.chosen.score,
        "features": result.chosen.num_features,
        "blocks": result.chosen.depth,
        "features on disk, GB": result.bytes["features"] / 1e9,
        "peak of the disk, GB": disk.peak / 1e9,
        **({"peak of the GPU, GB": torch.cuda.max_memory_allocated() / 1e9} if cuda else {}),
    }


def real(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """A public set through a real backbone."""
    train, validation, _ = load(given.data, name)
    total = given.rows or (IMDB_ROWS if name == "imdb" else None)
    if total is not None and total < len(train) + len(validation):
        draw = random.Random(0)
        share = total * len(train) // (len(train) + len(validation))
        train, validation = draw.sample(train, share), draw.sample(validation, total - share)
    folder = given.model or backbone_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = SpinForSequenceClassification.from_backbone(
        str(folder), num_labels=2, dtype=getattr(torch, given.dtype), device_map=given.device
    )
    shown = given.model.name if given.model else "MiniLM"
    return {"set": name, **measure(shown, model, tokenizer, train, given, eval=validation)}


def made(shape: str, given: argparse.Namespace) -> dict[str, Any]:
    """Random weights of a real shape, and texts of random tokens with a label that shows in some of them."""
    backbone = make(shape, dtype=getattr(torch, given.dtype), device=given.device)
    model = SpinForSequenceClassification.from_backbone(backbone, num_labels=2)
    rows = make_rows(given.texts, given.tokens)
    return {
        "set": f"{given.texts} x {given.tokens}",
        **measure(shape, model, make_tokenizer(given.tokens), rows, given),
    }


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder with NAME/{train,validation,test}.jsonl.gz")
    parser.add_argument("--set", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--model", type=Path, help="folder of a backbone (default: MiniLM)")
    parser.add_argument("--rows", type=int, help=f"texts of each set in all (default: all; {IMDB_ROWS} of imdb)")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="random weights instead of a real backbone")
    parser.add_argument("--texts", type=int, default=25000, help="of a shape")
    parser.add_argument("--tokens", type=int, default=256, help="of each of these texts")
    parser.add_argument("--every", type=int, default=1, help="run the bare forward on every so many batches only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--batch-tokens", type=int, help="default: 16384 on a GPU, 4096 on a CPU")
    parser.add_argument("--folder", type=Path, help="where features and temporary files lie (default: a temporary)")
    given = parser.parse_args()
    cuda = given.device.startswith("cuda")
    given.dtype = given.dtype or ("bfloat16" if cuda else "float32")
    given.batch_tokens = given.batch_tokens or (16384 if cuda else 4096)
    if not given.shape and given.data is None:
        parser.error("give --data with the data sets, or --shape for random weights")
    if given.every < 1:
        parser.error("--every counts batches: 1 or more")
    names = " ".join(given.shape or [given.model.name if given.model else "MiniLM", "on", *given.set])
    found = (made(each, given) if given.shape else real(each, given) for each in given.shape or given.set)
    rows = ({**row, "dtype": given.dtype, "batch tokens": given.batch_tokens} for row in found)
    results.report(given.record, f"Whole step: {names}", rows, on=given.device)


if __name__ == "__main__":
    main()
