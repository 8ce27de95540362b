"""``kill -9`` at random points of a calibration from the command line: the same command goes on, to the same model."""

import json
import random
from collections import Counter

import pytest
from builders import make_backbone, make_sentiment_rows, make_tokenizer
from dying import STAGES, run
from launched import same


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """``command(name)`` gives its arguments, but for the cache."""
    folder = tmp_path_factory.mktemp("files")
    make_backbone("bert").save_pretrained(folder / "backbone")
    make_tokenizer().save_pretrained(folder / "backbone")
    rows = make_sentiment_rows()
    lines = [json.dumps({"text": t, "label": y}) for t, y in zip(rows["text"], rows["label"], strict=True)]
    (folder / "train.jsonl").write_text("\n".join(lines))

    def make(out, cache):
        return [
            *("calibrate", str(folder / "backbone"), "--train", str(folder / "train.jsonl"), "--out", str(out)),
            *("--cache-dir", str(cache), "--batch-tokens", "48", "--device", "cpu"),
            *("--prefer", "score"),  # many heads to be killed at
        ]

    return make


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of a model that nobody killed, and how many events each stage had."""
    folder = tmp_path_factory.mktemp("whole")
    out, log = folder / "model", folder / "log"
    assert run(command(out, folder / "cache"), out, log) == 0
    return out, Counter(log.read_text().split())


@pytest.mark.parametrize("seed", range(1))
def test_killed_again_and_again(seed, command, whole, tmp_path):
    expected, events = whole
    assert all(events[stage] > 5 for stage in STAGES), events
    choose = random.Random(seed)
    out, log, cache = tmp_path / "model", tmp_path / "log", tmp_path / "cache"
    left = dict(events)
    for stage in ("extraction", *STAGES):
        number = choose.randrange(1, left[stage])
        delay = choose.choice([0.0, choose.uniform(0, 0.003)])
        assert run(command(out, cache), out, log, stage=stage, number=number, delay=delay) == -9, (stage, number, delay)
        done = Counter(log.read_text().split())
        assert done[stage] >= number
        for earlier in STAGES[: STAGES.index(stage)]:
            assert done[earlier] == left[earlier], f"{earlier} was redone, or left out, on the way to {stage}"
            left[earlier] = 0
        if stage == "extraction":
            lines = "".join(path.read_text().rpartition("\n")[0] for path in cache.glob("*/done.0")).split("\n")
            batches = sum(map(bool, lines))  # each run begins with an empty line
            trial = events[stage] - json.loads((expected / "calibration.json").read_text())["data"]["batches"]
            left[stage] = events[stage] - batches - (trial if list(cache.glob("*/store.json")) else 0)
        elif stage != "saving":
            kept = {"probing": "probe", "selection": "heads"}[stage]
            left[stage] = events[stage] - len(list(cache.glob(f"*/fits.*/{kept}.*.safetensors")))
    assert run(command(out, cache), out, log) == 0
    again = Counter(log.read_text().split())
    assert [again[stage] for stage in STAGES[:-1]] == [0, 0, 0]
    same(out, expected)
    assert (out / "tokenizer.json").read_bytes() == (expected / "tokenizer.json").read_bytes()
