"""Heads by the dozen read the features that they draw on once."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import heads, shared_columns
from spin_hf.calibration.heads import HeadFitter, head_sets
from spin_hf.calibration.probes import Labelled, fit_probes
from spin_hf.calibration.shared_columns import SharedColumns
from spin_hf.calibration.store import FeatureStore
from spin_hf.calibration.task import Task
from spin_hf.taps import Tap

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
QUICK = {"poolings": ["mean", "max"], "validation_fraction": 0.2, "Cs": [0.05, 0.2], "etas": (0.5, 0.8, 1.0)}
TAPS = (Tap("hidden", 1), Tap("ffn", 1))


def labelled(labels, folds):
    task = Task.make("single_label_classification", ("no", "yes"), "accuracy", "multinomial")
    return Labelled(task, labels, task.targets(labels), torch.ones(len(labels), 1), folds, folds[0][0])


@pytest.fixture
def store(tmp_path):
    widths = {TAPS[0]: 6, TAPS[1]: 20}
    batches = [np.array([3, 0, 4], dtype=np.int32), [2, 1]]  # as they are kept, and as they are planned
    store = FeatureStore(tmp_path, widths=widths, poolings=("mean", "max"), batches=batches)
    store.create({})
    draws = np.random.default_rng(0)
    for number, rows in enumerate(batches):
        store.write(number, {tap: draws.normal(size=(2, len(rows), width)) for tap, width in widths.items()})
    return store


@pytest.mark.parametrize("room", [0, 2**31])
@pytest.mark.parametrize("device", DEVICES)
def test_it_reads_what_the_store_reads(store, device, room, monkeypatch):
    monkeypatch.setattr(shared_columns, "_MOST_BYTES", room)
    wanted = {(TAPS[0], "mean"): np.array([1, 4]), (TAPS[1], "max"): np.arange(3, 20, 2)}
    shared = SharedColumns(store, wanted, torch.device(device))
    some = [[], [4], [1, 4]], [[3, 19], list(range(3, 20, 2)), [4], [0, 19], [18, 19]]  # also what is not wanted
    for (tap, pooling), choices in zip([*wanted, *wanted], [*some, *some], strict=True):
        for columns in map(np.array, choices):
            columns = columns.astype(np.int64)
            found = shared.read(tap, pooling, columns)
            assert torch.equal(found.cpu(), store.read(tap, pooling, columns))
    found = shared.read(TAPS[0], "max", np.array([0, 5]))
    assert torch.equal(found.cpu(), store.read(TAPS[0], "max")[:, [0, 5]])


@pytest.mark.parametrize("short_of", ["matrix", "features beside it", "solver"])
def test_heads_of_a_device_without_room_for_all_are_those_of_the_cpu(store, monkeypatch, short_of):
    device, plain, given = torch.device("cuda"), shared_columns.empty, []
    data = labelled(np.array([0, 1, 0, 1, 1]), folds=((np.array([0, 1, 2, 3]), np.array([4])),))
    places = [(TAPS[0], "mean"), (TAPS[1], "mean")]
    probes = [ranked[0] for place in places for ranked in fit_probes([store.read(*place)], [place], data, Cs=[5.0])]
    (heads_of_all,) = head_sets(probes, [1], combine=True)[-1:]

    def fit(on):
        fitter = HeadFitter(store, data, torch.device("cpu"))
        wide = fitter.sharing([heads_of_all], etas=[1.0], max_features=99).shared
        shared = SharedColumns(store, wide._wanted, on)
        return shared, replace(fitter, shared=shared).fit(heads_of_all, etas=[1.0], max_features=99)

    def full():
        given.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def empty(*shape, device=None):  # stands for the device's memory
        if short_of == "matrix" and device == torch.device("cuda"):
            full()
        return plain(*shape)

    _, (expected, _) = fit(torch.device("cpu"))
    read, solve = FeatureStore.read, heads.solve_together
    monkeypatch.setattr(shared_columns, "empty", empty)
    monkeypatch.setattr(FeatureStore, "read", lambda *asked, device=None, **options: read(*asked, **options))
    shared_read = SharedColumns.read

    def reading(shared, *asked):
        found = shared_read(shared, *asked)
        if short_of == "features beside it" and shared._device is not None:
            full()
        return found

    def solving(*asked, **options):
        if short_of == "solver" and not given:
            full()
        return solve(*asked, **options)

    monkeypatch.setattr(SharedColumns, "read", reading)
    monkeypatch.setattr(heads, "solve_together", solving)
    shared, (found, _) = fit(device)
    assert given == [1]
    assert shared._device is None
    assert [candidate.loss for candidate in found] == [candidate.loss for candidate in expected]
    assert not shared.leave_device()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("much", [0, 2**26])
def test_a_store_reads_to_the_device(store, device, much, monkeypatch):
    monkeypatch.setattr("spin_hf.calibration.store._MUCH", much)  # whether several threads read
    for tap in store.widths:
        for columns in (None, np.array([1, 4])):
            found = store.read(tap, "max", columns, device=torch.device(device))
            assert found.device.type == device
            assert torch.equal(found.cpu(), store.read(tap, "max", columns))


@pytest.mark.parametrize(
    "options", [{}, {"cv": 2, "prefer": "score"}, {"preset": "paper", "Cs": [0.1, 1.0], "etas": None}]
)
def test_a_calibration_reads_each_tap_for_its_heads_once(
    options, bert_backbone, tokenizer, sentiment_rows, monkeypatch
):
    read, reads, stage = FeatureStore.read, Counter(), []
    from spin_hf.calibration import calibrate

    def counted(store, tap, pooling, columns=None, **options):
        if stage:
            reads[tap, pooling] += 1
        return read(store, tap, pooling, columns, **options)

    def staged(*arguments, run=calibrate.try_heads, **options):
        stage.append(1)
        tried = run(*arguments, **options)
        stage.clear()
        return tried

    monkeypatch.setattr(FeatureStore, "read", counted)
    monkeypatch.setattr(calibrate, "try_heads", staged)
    model = SpinForSequenceClassification.from_backbone(copy.deepcopy(bert_backbone))
    rows = sentiment_rows["text"], sentiment_rows["label"]
    result = spin_calibrate(model, tokenizer, rows, progress=False, **{**QUICK, **options})
    assert len(result.candidates) > len(reads)
    assert set(reads.values()) == {1}
