"""Heads by the dozen read the features that they draw on once."""

import copy
from collections import Counter

import numpy as np
import pytest

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration.shared_columns import SharedColumns
from spin_hf.calibration.store import FeatureStore
from spin_hf.taps import Tap

QUICK = {"poolings": ["mean", "max"], "validation_fraction": 0.2, "Cs": [0.05, 0.2], "etas": (0.5, 0.8, 1.0)}
TAPS = (Tap("hidden", 1), Tap("ffn", 1))


@pytest.fixture
def store(tmp_path):
    widths, batches = {TAPS[0]: 6, TAPS[1]: 20}, [[3, 0, 4], [2, 1]]
    store = FeatureStore(tmp_path, widths=widths, poolings=("mean", "max"), batches=batches)
    store.create({})
    draws = np.random.default_rng(0)
    for number, rows in enumerate(batches):
        store.write(number, {tap: draws.normal(size=(len(rows), 2, width)) for tap, width in widths.items()})
    return store


def test_it_reads_what_the_store_reads(store):
    wanted = {(TAPS[0], "mean"): np.array([1, 4]), (TAPS[1], "max"): np.arange(3, 20, 2)}
    shared = SharedColumns(store, wanted)
    some = [[], [4], [1, 4]], [[3, 19], list(range(3, 20, 2)), [4], [0, 19], [18, 19]]  # also what is not wanted
    for (tap, pooling), choices in zip([*wanted, *wanted], [*some, *some], strict=True):
        for columns in map(np.array, choices):
            columns = columns.astype(np.int64)
            np.testing.assert_array_equal(shared.read(tap, pooling, columns), store.read(tap, pooling, columns))
    np.testing.assert_array_equal(shared.read(TAPS[0], "max", np.array([0, 5])), store.read(TAPS[0], "max")[:, [0, 5]])


@pytest.mark.parametrize(
    "options", [{}, {"cv": 2, "prefer": "score"}, {"preset": "paper", "Cs": [0.1, 1.0], "etas": None}]
)
def test_a_calibration_reads_each_tap_for_its_heads_once(
    options, bert_backbone, tokenizer, sentiment_rows, monkeypatch
):
    read, reads, stage = FeatureStore.read, Counter(), []
    from spin_hf.calibration import calibrate

    def counted(store, tap, pooling, columns=None):
        if stage:
            reads[tap, pooling] += 1
        return read(store, tap, pooling, columns)

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
