"""What runs behind the caller's back: in order, few at a time, nothing lost, errors told."""

import threading

import numpy as np
import pytest
import torch

from spin_hf.calibration.behind import Arriving, Behind


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


def test_tensors_arrive_with_their_values():
    found = Arriving({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(0)}).arrays()
    assert np.array_equal(found["a"], [[0, 1, 2], [3, 4, 5]])
    assert found["b"].shape == (0,)
