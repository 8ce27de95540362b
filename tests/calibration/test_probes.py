"""Paths of probes: what is judged, what is solved to the end, and what is kept."""

import numpy as np
import pytest
import torch

from spin_hf.calibration import probes
from spin_hf.calibration.probes import Labelled, fit_probes
from spin_hf.calibration.task import Task
from spin_hf.taps import Tap

PLACES = [(Tap("hidden", block), "mean") for block in range(3)]
ROWS = np.arange(150)
TASKS = {
    "binary": ("single_label_classification", ("no", "yes")),
    "multinomial": ("single_label_classification", ("a", "b", "c")),
    "multi-label": ("multi_label_classification", ("a", "b")),
    "regression": ("regression", ()),
}


def problem(kind, *, folds=1):
    random = torch.Generator().manual_seed(3)
    features = [torch.randn(len(ROWS), 40, generator=random) + 0.5 for _ in PLACES]
    hidden = features[0] @ torch.randn(40, 3, generator=random) + 3 * torch.randn(len(ROWS), 3, generator=random)
    labels = {
        "binary": (hidden[:, 0] > 0).long(),
        "multinomial": hidden.argmax(1),
        "multi-label": (hidden[:, :2] > 0).float(),
        "regression": hidden[:, 0],
    }[kind].numpy()
    problem_type, names = TASKS[kind]
    task = Task.make(problem_type, names, None, "multinomial")
    parts = tuple((np.delete(ROWS, ROWS[i::5]), ROWS[i::5]) for i in range(folds))
    refit = parts[0][0] if folds == 1 else ROWS
    return features, Labelled(task, labels, task.targets(labels), torch.ones(len(ROWS), 1), parts, refit)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("folds", [1, 5])
@pytest.mark.parametrize("kind", TASKS)
def test_paths_are_judged_by_rough_solutions_and_the_best_is_solved_to_the_end(kind, folds, together, monkeypatch):
    features, data = problem(kind, folds=folds)
    monkeypatch.setattr(probes, "pays", lambda *size: together)
    monkeypatch.setattr(probes, "_JUDGED", 0.03)
    judged = fit_probes(features, PLACES, data, Cs=8, tol=1e-6)
    exact = fit_probes(features, PLACES, data, Cs=8, tol=1e-6, stop_early=False)
    rough = 0
    for ranked, whole in zip(judged, exact, strict=True):
        best = ranked[0]
        assert best.worst_gap <= 1e-6
        assert best.score == max(score for _, score in best.scores_by_C)
        assert [probe.C for probe in ranked] == [C for C, _ in sorted(best.scores_by_C, key=lambda of: (-of[1], of[0]))]
        assert all(probe.worst_gap <= 0.03 for probe in ranked)
        rough += sum(probe.worst_gap > 1e-6 for probe in ranked)
        same = next(probe for probe in whole if pytest.approx(best.C) == probe.C)
        assert same.worst_gap <= 1e-6
        for fit, other in zip(best.fits, same.fits, strict=True):
            torch.testing.assert_close(fit.weight, other.weight, atol=5e-3, rtol=0)
            torch.testing.assert_close(fit.salience, fit.weight.square().sum(0))
        assert best.score == pytest.approx(same.score, abs=0.04)
    assert rough > 0


@pytest.mark.parametrize("together", [True, False])
def test_of_those_ahead_one_after_the_other_is_solved_to_the_end_until_none_is_better(together, monkeypatch):
    """The metric gives rough solutions more than exact ones, so that each in turn falls behind."""
    features, data = problem("binary")
    monkeypatch.setattr(probes, "pays", lambda *size: together)
    monkeypatch.setattr(probes, "_JUDGED", 0.2)
    inner, finish = Labelled.score, probes._Search.finish
    finished = []

    def score(self, scores):
        value, predictions = inner(self, scores)
        return value + (0.0 if finishing else 0.5), predictions

    def finishes(self, points):
        nonlocal finishing
        finished.append(points[0].C)
        finishing = True
        finish(self, points)
        finishing = False

    finishing = False
    monkeypatch.setattr(Labelled, "score", score)
    monkeypatch.setattr(probes._Search, "finish", finishes)
    (ranked,) = fit_probes(features[:1], PLACES[:1], data, Cs=[0.001, 0.05, 0.1, 0.2], tol=1e-6)
    assert sorted(finished) == sorted(C for C, _ in ranked[0].scores_by_C)
    assert max(probe.worst_gap for probe in ranked) <= 1e-6
    assert ranked[0].score <= 1.0


def test_where_all_values_of_C_are_wanted_all_are_solved_to_the_end():
    features, data = problem("binary")
    for ranked in fit_probes(features, PLACES, data, Cs=[0.01, 0.1, 1.0], tol=1e-6, stop_early=False):
        assert len(ranked) == 3
        assert max(probe.worst_gap for probe in ranked) <= 1e-6


@pytest.mark.parametrize("ratio", [1.05, 1.2, 2.0])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", TASKS)
def test_values_of_C_that_lie_close_end_no_path_early(kind, together, ratio, monkeypatch):
    """A rough solution may serve the next C as it stands, and would look like a path that has turned."""
    features, data = problem(kind)
    monkeypatch.setattr(probes, "pays", lambda *size: together)
    start = probes._grid(features[0] - features[0].mean(0), data.targets, data.weights, data.task.loss, 1)[0] / 2
    Cs = [start * ratio ** (i + 1) for i in range(round(np.log(64) / np.log(ratio)))]
    judged = fit_probes(features, PLACES, data, Cs=Cs)
    monkeypatch.setattr(probes, "_JUDGED", 1e-4)
    for ranked, exact in zip(judged, fit_probes(features, PLACES, data, Cs=Cs), strict=True):
        assert ranked[0].score == pytest.approx(exact[0].score, abs=0.05)
        assert len(ranked) == pytest.approx(len(exact), abs=0 if ratio < 2 else 1)


def test_values_of_C_ascend():
    features, data = problem("binary")
    with pytest.raises(ValueError, match=r"Cs must ascend.*\[1\.0, 0\.1\]"):
        fit_probes(features, PLACES, data, Cs=[1.0, 0.1])


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("together", [True, False])
def test_a_tap_without_a_path_has_no_probe_and_leaves_the_others_theirs(together, raw, monkeypatch):
    features, data = problem("binary")
    features = [torch.ones_like(features[0]), features[1] * 9, features[2] * torch.linspace(1, 3, 40)]
    monkeypatch.setattr(probes, "pays", lambda *size: together)
    none, *found = fit_probes(features, PLACES, data, Cs=5, raw=raw, tol=1e-6)
    assert none == []
    for i, ranked in enumerate(found, start=1):
        (alone,) = fit_probes(features[i : i + 1], PLACES[i : i + 1], data, Cs=5, raw=raw, tol=1e-6)
        assert pytest.approx(alone[0].C) == ranked[0].C
        torch.testing.assert_close(ranked[0].fits[0].weight, alone[0].fits[0].weight, atol=5e-3, rtol=0)
