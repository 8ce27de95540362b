"""What runs behind the caller's back: in order, few at a time, nothing lost, errors told."""

import threading

import numpy as np
import pytest
import torch

from spin_hf.calibration.behind import Arriving, Behind

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def test_calls_run_in_their_order_in_one_other_thread():
    ran, told = [], []

    def run(number):
        ran.append((number, threading.current_thread()))
        return 10 * number

    with Behind(run, told.append) as behind:
        for number in range(20):
            behind(number)
    assert [number for number, _ in ran] == list(range(20))
    assert told == [10 * number for number in range(20)]
    (thread,) = {thread for _, thread in ran}
    assert thread is not threading.current_thread()


def test_few_wait_at_a_time():
    go, asked = threading.Event(), []

    def ask():
        with Behind(lambda number: go.wait(60), lambda done: None) as behind:
            for number in range(6):
                behind(number)
                asked.append(number)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(0.5)
    assert asked in ([], [0])  # the second waits until the first is done
    go.set()
    thread.join(60)
    assert asked == list(range(6))


def test_what_was_asked_for_is_done_before_an_error_leaves():
    done = []

    def interrupted():
        with Behind(done.append, lambda done: None) as behind:
            behind(1)
            behind(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1, 2]


@pytest.mark.parametrize("wrong", [0, 2, 9])
def test_an_error_is_told_by_a_later_call_or_on_leaving(wrong):
    def run(number):
        if number == wrong:
            raise OSError(f"number {number}")

    asked = []

    def ask():
        with Behind(run, lambda done: None) as behind:
            for number in range(10):
                asked.append(number)
                behind(number)

    with pytest.raises(OSError, match=f"number {wrong}"):
        ask()
    assert len(asked) <= wrong + 2


@pytest.mark.parametrize("device", DEVICES)
def test_values_arrive_part_by_part(device):
    wide = torch.arange(18.0).view(3, 6)
    given = {"a": [wide[:, :2], wide[:, 3:5]], "b": [wide[:, 5:]]}
    found = Arriving({key: [part.to(device) for part in parts] for key, parts in given.items()}).arrays()
    assert set(found) == {"a", "b"}
    for key, parts in given.items():
        assert np.array_equal(found[key], np.stack([part.numpy() for part in parts]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_values_arrive_from_several_devices():
    given = {name: [torch.randn(500, 300, device=f"cuda:{i % 2}")] for i, name in enumerate("abc")}
    found = Arriving(given).arrays()
    for name, (values,) in given.items():
        assert np.array_equal(found[name][0], values.cpu().numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_may_be_written_over_once_they_are_sent():
    values = torch.zeros(1000, 1000, device="cuda")
    torch.cuda._sleep(10**8)
    values += 1
    sent = Arriving({"a": [values]})
    values += 1
    del values
    torch.zeros(2000, 1000, device="cuda")
    assert np.array_equal(sent.arrays()["a"], np.ones((1, 1000, 1000)))
