"""Several processes end with what one makes, whatever happens to one of them."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import torch
from builders import make_backbone, make_sentiment_rows, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from launched import same
from safetensors.torch import load_file

from spin_hf.calibration import ranks as ranks_module
from spin_hf.calibration.errors import CalibrationError
from spin_hf.calibration.ranks import Ranks, _balanced

pytestmark = pytest.mark.timeout(600)  # each launch imports everything several times

HERE = Path(launched.__file__).parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a model that one process made."""
    folder = tmp_path_factory.mktemp("alone")
    launched.calibrate(folder, "model")
    return folder / "model"


def environment(**more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MASTER_PORT": port, **more}


def launch(task, folder, count=2, **more):
    """Run a task of ``launched.py`` in so many processes and return their exit codes; all end when one is killed."""
    shared = environment(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", **more)
    command = [sys.executable, str(HERE / "launched.py"), task, str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    if "KILL_AT" in more:
        processes[1].wait()
        processes[0].kill()
    try:
        errors = [process.communicate()[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert "KILL_AT" in more or codes == [0] * count, errors
    return codes


def test_killed_and_gone_on_with_two_processes_or_with_one(alone, tmp_path):
    batch = random.randint(2, 5)
    killed = tmp_path / "killed"
    assert launch("calibrate", killed, KILL_AT=str(batch))[1] == -9, batch
    records = [line for path in killed.glob("cache/*/done.1") for line in path.read_text().split("\n") if line]
    assert batch - 3 <= len(records) < batch  # the last ones may not have been written yet
    shutil.copytree(killed, tmp_path / "again")
    launch("calibrate", tmp_path / "again")
    for rank in range(2):
        same(tmp_path / "again" / f"rank{rank}", alone)
    launched.calibrate(killed, "alone", cache_dir=killed / "cache")
    same(killed / "alone", alone)


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """The folder in which two processes failed, trained a head and fine-tuned a sharded model, in one launch."""
    folder = tmp_path_factory.mktemp("worked")
    launch("fail", folder)
    return folder


def test_an_error_of_one_ends_all(worked):
    told = [json.loads((worked / f"told.{rank}.json").read_text()) for rank in range(2)]
    assert told[0]["extraction"] == "RankError: Process 1 of 2 failed with RuntimeError: the device is lost"
    assert told[1]["extraction"] == "RuntimeError: the device is lost"
    assert told[0]["batches"] <= 4  # of dozens: it did not go on to its own end
    for name in ("data", "options"):
        assert told[0][name] == told[1][name]
        assert "don't hold the same backbone, texts, labels and options" in told[0][name]


def test_processes_that_joined_before_wait_as_long_as_a_calibration_takes(tmp_path):
    launch("wait", tmp_path)
    told = [(tmp_path / f"waited.{rank}").read_text() for rank in range(2)]
    assert told == ["made [0, 1] [1, 1] RankError", "made [0, 1] [1, 1] EmptyDatasetError"]


@pytest.mark.parametrize(
    ("devices", "other", "problem"),
    [
        (["cpu"], "cuda:0", r"Processes \[1\] of 2 have the backbone on the CPU, and their GPUs are idle. Put it"),
        (["cuda:0"], "cuda:0", r"Processes \[0, 1\] have their backbones on one GPU of \S+. Put it"),
        (["cuda:1"], "cuda:0", None),
        (["cuda:1"], "cpu", r"Processes \[0\] of 2 have the backbone on the CPU"),  # another's fault ends all
        (["cuda:0", "cuda:1"], "cuda:0", None),  # too large for one
    ],
)
def test_each_process_has_a_gpu_of_its_own(monkeypatch, devices, other, problem):
    ranks = Ranks(1, 2, torch.device("cuda:1"))
    monkeypatch.setattr(ranks_module, "_hardware", str)
    told = (other == "cpu", None if other == "cpu" else (socket.gethostname(), other))
    monkeypatch.setattr(ranks, "gather", lambda own: [told, own])
    places = {torch.device(device) for device in devices}
    if problem is None:
        ranks.check_place(places)
    else:
        with pytest.raises(CalibrationError, match=problem):
            ranks.check_place(places)


def test_trainer_makes_the_head_of_a_double_batch(worked, tmp_path):
    together = [load_file(worked / f"trained.{rank}.safetensors") for rank in range(2)]
    single = launched.train(tmp_path, batch=8)
    for name in ("weight", "bias"):
        trained = together[0][name]
        assert torch.equal(trained, together[1][name])
        torch.testing.assert_close(trained, single.score.get_parameter(name).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not launched.SHARDS, reason="needs a gloo that scatters sums")
def test_a_sharded_model_is_fine_tuned_as_a_whole_one(worked):
    single = launched.finetune()
    for rank in range(2):
        sharded = load_file(worked / f"sharded.{rank}.safetensors")
        assert set(sharded) == set(single)
        for name, weight in single.items():
            torch.testing.assert_close(sharded[name], weight, atol=1e-5, rtol=1e-4, msg=name)


def test_accelerate_launch_writes_once_what_one_process_writes(tmp_path):
    backbone, rows = tmp_path / "backbone", make_sentiment_rows()
    make_backbone("bert").save_pretrained(backbone)
    make_tokenizer().save_pretrained(backbone)
    with (tmp_path / "train.jsonl").open("w") as file:
        for text, label in zip(rows["text"], rows["label"], strict=True):
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    options = ["calibrate", str(backbone), "--train", str(tmp_path / "train.jsonl"), "--batch-tokens", "64"]
    options += ["--kind", "hidden", "--pooling", "mean"]
    # Without a GPU `--multi_gpu` too starts processes on the CPU; `--cpu` would start a single one.
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "spin_hf"]
    outputs = {}
    for name, start in {"alone": [sys.executable, "-m", "spin_hf"], "together": accelerate}.items():
        env = {**environment(), "ACCELERATE_USE_CPU": "true"}
        if name == "together":
            start[6:6] = ["--main_process_port", env.pop("MASTER_PORT")]
        done = subprocess.run(
            [*start, *options, "--out", str(tmp_path / name), "--cache-dir", str(tmp_path / f"cache-{name}")],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        outputs[name] = done.stdout
        assert done.stderr.count("texts,") == 1
    assert outputs["together"].count("Saved to") == 1
    for name, count in {"alone": 1, "together": 2}.items():  # each process keeps a record of its batches
        assert len(list((tmp_path / f"cache-{name}").glob("*/done.*"))) == count
    same(tmp_path / "together", tmp_path / "alone")


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(1, 5))
def test_work_is_spread_evenly(costs, parts):
    spread = _balanced(costs, parts)
    assert sorted(i for part in spread for i in part) == list(range(len(costs)))
    loads = [sum(costs[i] for i in part) for part in spread]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_one_process_makes_no_group():
    ranks = Ranks.here()
    assert (ranks.count, ranks.main, ranks.device) == (1, True, None)
    assert ranks.map(["a", "b"], str.upper, cost=len) == ["A", "B"]
    assert ranks.on_main(lambda: ranks.gather(3)) == [3]
    assert not torch.distributed.is_initialized()
