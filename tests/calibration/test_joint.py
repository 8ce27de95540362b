"""Neurons that one probe of all taps chooses: what each tap adds, from training rows alone, within bounds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import make_backbone, make_sentiment_rows

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import joint
from spin_hf.calibration.errors import CalibrationError
from spin_hf.calibration.heads import HeadFitter
from spin_hf.calibration.joint import _screen, select_jointly
from spin_hf.calibration.probes import Labelled
from spin_hf.calibration.selection import Candidate, Columns
from spin_hf.calibration.task import Task
from spin_hf.taps import Tap

A, B = (Tap("hidden", 1), "mean"), (Tap("ffn", 2), "mean")
QUICK = {"progress": False, "validation_fraction": 0.2, "Cs": 4, "etas": (0.5, 1.0), "poolings": ["mean"]}


@pytest.fixture
def values():
    """Each tap says one half of the label, the second also much of the first's; and a neuron that never changes."""
    draw = np.random.default_rng(0)
    u, v = draw.normal(size=(2, 400, 1))
    noisy = [u + 0.3 * draw.normal(size=(400, 8)) for _ in range(2)]
    other = draw.normal(size=(400, 6))
    found = {A: np.hstack([noisy[0], other]), B: np.hstack([noisy[1], v, np.ones((400, 1))])}
    return {place: array.astype(np.float32) for place, array in found.items()}, (u + v > 0)[:, 0].astype(int)


def fitter(values, labels, folds=None):
    store = SimpleNamespace(
        rows=len(labels),
        read=lambda tap, pooling, columns=None: values[tap, pooling][:, slice(None) if columns is None else columns],
        widths={tap: array.shape[1] for (tap, _), array in values.items()},
    )
    task = Task.make("single_label_classification", ("0", "1"), "accuracy", "multinomial")
    rows = np.arange(len(labels))
    folds = folds or ((rows[:300], rows[300:]),)
    refit = rows if len(folds) > 1 else folds[0][0]
    data = Labelled(task, labels, task.targets(labels), torch.ones(len(labels), 1), tuple(folds), refit)
    return HeadFitter(store, data, torch.device("cpu"))


def chosen_by(heads, most=100):
    best = Candidate("both", "mean", 0.5, 2, 1.0, 3, 0.9)
    return select_jointly(heads, [A, B], best, max_features=most, tol=1e-4)


def test_it_keeps_what_each_tap_adds(values):
    arrays, labels = values
    candidate, probes = chosen_by(fitter(arrays, labels))
    assert (candidate.joint, candidate.kind, candidate.pooling, candidate.depth) == (True, "both", "mean", 2)
    assert candidate.score > 0.9  # either half alone gives 0.75
    kept = {(probe.tap, probe.pooling): probe.fits[-1].salience.nonzero()[:, 0].tolist() for probe in probes}
    assert 8 in kept[B]
    assert 9 not in kept[B]
    assert kept[A]
    assert candidate.num_features == sum(map(len, kept.values()))


@pytest.mark.parametrize("most", [1, 3, 6])
def test_no_more_than_may_be(values, most):
    found = chosen_by(fitter(*values), most)
    assert found is None or found[0].num_features <= most
    assert found is not None or most == 1


def test_it_chooses_among_the_features_that_go_most_with_the_label(values, monkeypatch):
    arrays, labels = values
    monkeypatch.setattr(joint, "_MOST_READ", 5)
    (screened,) = _screen(fitter(arrays, labels), [A, B])
    every = {(place, i): array[:300, i] for place, array in arrays.items() for i in range(array.shape[1])}
    goes = {key: abs(np.corrcoef(x, labels[:300])[0, 1]) for key, x in every.items() if x.std() > 0}
    wanted = set(sorted(goes, key=goes.get)[-5:])
    assert {(place, i) for place, neurons in screened.neurons.items() for i in neurons.tolist()} == wanted


def test_a_fold_knows_nothing_of_what_it_holds_out(values):
    arrays, labels = values
    rows = np.arange(400)
    folds = ((rows[200:], rows[:200]), (rows[:200], rows[200:]))
    told = np.random.default_rng(1).normal(size=400).astype(np.float32)
    told[:200] = labels[:200]  # random where the first fold trains
    arrays = {**arrays, A: np.hstack([arrays[A], told[:, None]])}
    _, probes = chosen_by(fitter(arrays, labels, folds))
    columns = [Columns.of(probes, fit) for fit in range(3)]
    last = [any(g.tap == A[0] and 14 in g.neurons for g in each.groups()) for each in columns]
    assert last == [False, True, True]


def test_a_calibration_tries_it_when_it_is_asked(tokenizer):
    def calibrate(**options):
        model = SpinForSequenceClassification.from_backbone(make_backbone("bert"))
        return spin_calibrate(model, tokenizer, make_sentiment_rows(120), **{**QUICK, **options})

    plain, result = calibrate(), calibrate(joint=True)
    assert not any(candidate.joint for candidate in plain.candidates)
    (own,) = [candidate for candidate in result.candidates if candidate.joint]
    best = min((c for c in plain.candidates if c.probe is None), key=lambda c: c.rank)
    assert own.name == f"both, mean, jointly, {best.depth} blocks"
    alone = calibrate(joint=True, kinds=["ffn"])
    assert [candidate.kind for candidate in alone.candidates if candidate.joint] == ["ffn"]
    others = [c for c in result.candidates if not c.joint]
    assert [c.name for c in others] == [c.name for c in plain.candidates]
    with pytest.raises(CalibrationError, match="has a probe for each tap"):
        calibrate(joint=True, preset="paper", etas=None, Cs=None, poolings=None)
    with pytest.raises(CalibrationError, match="without etas there is none"):
        calibrate(joint=True, etas=[])
