"""The solver for many problems at once against the one for a single path, whose own oracle is scikit-learn."""

import copy

import numpy as np
import pytest
import torch

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import batched, heads, paths, probes
from spin_hf.calibration.batched import solve_sparse, solve_together
from spin_hf.calibration.losses import Logistic, Multinomial, Squared
from spin_hf.calibration.paths import solve_paths
from spin_hf.calibration.penalties import L1, L2
from spin_hf.calibration.probes import Labelled, fit_probes
from spin_hf.calibration.replay import Replay
from spin_hf.calibration.ridge import solve_ridge
from spin_hf.calibration.solver import solve_path
from spin_hf.calibration.task import Task
from spin_hf.taps import Tap

LOSSES = {"logistic": Logistic(), "multinomial": Multinomial(), "squared": Squared()}
GRID = [0.01, 0.03, 0.1, 0.3, 1.0]


def problem(kind, *, taps=3, rows=120, width=40, weighted=False):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(taps, rows, width, generator=random) + torch.randn(taps, rows, 1, generator=random)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    columns = 3 if kind == "multinomial" else 1
    scores = x[0] @ torch.randn(width, columns, generator=random) / 3
    noise = torch.randn(rows, columns, generator=random)
    y = {
        "logistic": (scores + noise > 0).float(),
        "multinomial": torch.nn.functional.one_hot((scores + noise).argmax(1), 3).float(),
        "squared": scores + noise,
    }[kind]
    s = torch.rand(rows, 1, generator=random) + 0.5 if weighted else torch.ones(rows, 1)
    return x, y, s


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_paths_solved_together_are_those_solved_alone(kind, weighted):
    x, y, s = problem(kind, weighted=weighted)
    together = list(solve_paths(x, y, s, LOSSES[kind], [GRID] * 3, [len(GRID)] * 3, tol=1e-6))
    assert len(together) == len(GRID)
    for tap in range(3):
        for points, alone in zip(together, solve_path(x[tap], y, s, LOSSES[kind], GRID, tol=1e-6), strict=True):
            point = points[tap]
            assert point.C == alone.C
            assert point.converged
            assert point.gap <= 1e-6
            assert point.objective == pytest.approx(alone.objective, rel=2e-6)
            torch.testing.assert_close(point.weight, alone.weight, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", LOSSES)
def test_steps_that_a_gpu_replays_are_those_that_it_is_told_one_by_one(kind, monkeypatch):
    x, y, s = problem(kind, width=48)  # read by kernels of our own
    thresholds = torch.tensor([100.0, 30.0, 10.0, 1.0]).expand(1, x.shape[2], 4)[..., None].cuda()

    def solved():
        return solve_together(x.cuda(), y, s, LOSSES[kind], L1(thresholds), 4, tol=1e-6)

    replayed, again = solved(), solved()

    def one_by_one(batch, state, penalty, count):
        for _ in range(count):
            state = batch.step(state, penalty)
        return state

    monkeypatch.setattr(batched._Batch, "advance", one_by_one)
    told = solved()
    assert replayed.steps == told.steps
    for name in ("weight", "intercept", "objective", "gap"):
        assert torch.equal(getattr(replayed, name), getattr(again, name))
        torch.testing.assert_close(getattr(replayed, name), getattr(told, name))


@pytest.mark.parametrize("message", ["CUDA out of memory", "the device is lost"])
def test_steps_that_can_not_be_recorded_for_want_of_memory_are_taken_one_by_one(message, monkeypatch):
    x, y, s = problem("logistic")
    thresholds = torch.tensor([30.0, 10.0, 1.0]).expand(1, x.shape[2], 3)[..., None]
    expected = solve_together(x, y, s, Logistic(), L1(thresholds), 3, tol=1e-6)

    def full(step, values):
        step(values)
        raise RuntimeError(message)

    monkeypatch.setattr(batched, "can_replay", lambda values: True)
    monkeypatch.setattr(batched, "Replay", full)
    if "memory" not in message:
        with pytest.raises(RuntimeError, match=message):
            solve_together(x, y, s, Logistic(), L1(thresholds), 3, tol=1e-6)
        return
    found = solve_together(x, y, s, Logistic(), L1(thresholds), 3, tol=1e-6)
    assert torch.equal(found.weight, expected.weight)
    assert found.steps == expected.steps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_fails_while_steps_are_recorded_is_told_and_leaves_the_gpu_usable():
    start = [torch.zeros(3, device="cuda")]

    def failing(values):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        Replay(failing, start)
    replay = Replay(lambda values: [values[0] + 1], start)
    assert replay(start, 3)[0].tolist() == [3.0, 3.0, 3.0]
    assert replay(replay.values, 2)[0].tolist() == [5.0, 5.0, 5.0]
    assert start[0].tolist() == [0.0, 0.0, 0.0]


def test_factors_scale_the_penalty_of_each_feature():
    x, y, s = problem("logistic")
    factors = torch.linspace(0.2, 5.0, x.shape[2]).expand(3, -1)
    together = list(solve_paths(x, y, s, Logistic(), [GRID] * 3, [len(GRID)] * 3, factors=factors, tol=1e-6))
    for points, alone in zip(together, solve_path(x[1], y, s, Logistic(), GRID, factors=factors[1]), strict=True):
        assert points[1].objective == pytest.approx(alone.objective, rel=2e-4)


def test_a_path_that_has_ended_is_not_followed_and_an_empty_grid_has_none():
    x, y, s = problem("logistic")
    sure = [5, 5, 5]
    found = []
    for points in solve_paths(x, y, s, Logistic(), [GRID, [], GRID], sure):
        found.append([point is not None for point in points])
        sure[0] = 0
    assert found == [[True, False, True]] * 2 + [[False, False, True]] * 3  # the values of one group are solved


def test_after_the_first_values_none_is_solved_that_no_tap_is_sure_to_need(monkeypatch):
    x, y, s = problem("logistic")
    grid = [GRID[0] * 1.1**i for i in range(7)]
    solved, inner = [], paths._solve_group
    monkeypatch.setattr(paths, "_solve_group", lambda *a: (solved.append([len(Cs) for Cs in a[4]]), inner(*a))[1])
    sure = [2, 2, 2]
    for number, _ in enumerate(solve_paths(x, y, s, Logistic(), [grid] * 3, sure)):
        sure[:] = [0 if number >= 4 else 1, 1 if number >= 4 else 2, 0]
    assert solved == [[4, 4, 4], [2, 2], [1]]


@pytest.mark.parametrize("stop_early", [True, False])
def test_folds_that_are_small_enough_to_be_solved_together_beside_a_whole_that_is_not(stop_early, monkeypatch):
    """All fits of a place are solved in one way, and their paths end together."""
    x, y, _ = problem("logistic", taps=2, rows=50)
    labels, rows = y[:, 0].long().numpy(), np.arange(50)
    task = Task.make("single_label_classification", ("no", "yes"), "accuracy", "multinomial")
    folds = tuple((np.delete(rows, rows[i::5]), rows[i::5]) for i in range(5))
    data = Labelled(task, labels, task.targets(labels), torch.ones(50, 1), folds, rows)
    found = {}
    for small in (49 * 40, 50 * 40, 39 * 40):  # the folds alone, all, none
        monkeypatch.setattr(batched, "_SMALL", small)
        places = [(Tap("hidden", i), "mean") for i in range(2)]
        found[small] = fit_probes(list(x), places, data, Cs=[0.02, 0.05, 0.1, 1.0], stop_early=stop_early)
    for ranked in found.values():
        for probes_of_tap, others in zip(ranked, found[50 * 40], strict=True):
            assert {len(probe.fits) for probe in probes_of_tap} == {6}
            scores = dict(others[0].scores_by_C)
            assert dict(probes_of_tap[0].scores_by_C) == pytest.approx(scores, abs=0.05)
            assert stop_early or len(scores) == 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.0, -1.0, -3.0])
def test_the_bound_is_hardly_more_than_the_largest_curvature(spread, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 60, 30, generator=random) * torch.logspace(0, spread, 30) + seed
    s = torch.rand(60, 1, generator=random) + 0.1
    batch = batched._Batch(x, torch.ones(60, 1), s, Logistic())
    rows = torch.cat([x, torch.ones(3, 60, 1)], 2).double()
    largest = Logistic.bound * torch.linalg.eigvalsh(rows.mT @ (s.double() * rows))[:, -1]
    ratio = batch.bound[:, 0, 0, 0].double() / largest
    assert float(ratio.min()) >= 1.0
    assert float(ratio.max()) <= 1.3


@pytest.mark.parametrize("kind", LOSSES)
def test_jumps_take_no_more_time_than_they_are_given(kind, monkeypatch):
    monkeypatch.setattr(batched, "_JUMP", 1e-8)
    x, y, s = problem(kind)
    penalty = L1(torch.ones(1, 40, 2, 1))
    batch = batched._Batch(x, y, s, LOSSES[kind])
    weight = torch.randn(3, 40, 2, y.shape[1], generator=torch.Generator().manual_seed(1))
    state = batched._State.begin(weight, torch.zeros(3, 1, 2, y.shape[1]))
    costs = batch.jump_seconds(state)
    gaps = torch.tensor([[0.1, 0.0], [0.3, 0.2], [0.0, 0.4]])
    worst = [(2, 1), (1, 0), (1, 1), (0, 0)]
    jumped = []
    batch.jump = lambda *given: jumped.extend(zip(given[3].tolist(), given[4].tolist(), strict=True))
    for count in range(5):
        jumped.clear()
        given = batched._JUMP * (count > 0) + sum(float(costs[spot]) for spot in worst[:count])
        assert batch.jump_worst(state, penalty, state.intercept[:, 0], gaps, given * 1.001) == pytest.approx(given)
        assert jumped == worst[:count]


@pytest.mark.parametrize(
    ("kind", "parts", "squares"),  # of four weights of a class and six of another, five at a time
    [("logistic", 2, 4 * 4 + 6 * 5), ("multinomial", 1, 10 * 5)],
)
def test_the_time_of_a_jump_beside_others_is_that_of_its_parts(kind, parts, squares, monkeypatch):
    monkeypatch.setattr("spin_hf.calibration.jump._MOST_WEIGHTS", 5)
    monkeypatch.setattr(batched, "_JUMPING", 1000.0)
    monkeypatch.setattr(batched, "_OPERATION", 1.0)
    weight = torch.zeros(1, 40, 1, 2)
    weight[0, :4, 0, 0] = weight[0, :6, 0, 1] = -1.0
    batch = batched._Batch(torch.ones(1, 7, 40), torch.ones(7, 2), torch.ones(7, 1), LOSSES[kind])
    found = batch.jump_seconds(batched._State.begin(weight, torch.zeros(1, 1, 1, 2)))
    assert found.tolist() == [[1000.0 * parts + 2 * 7 * squares]]


@pytest.mark.parametrize(("wide", "most_read"), [(10, 2**25), (2048, 1000)])
@pytest.mark.parametrize("most_working", [0.75, 1.0])
@pytest.mark.parametrize("kind", LOSSES)
def test_wide_features_are_solved_by_working_sets(kind, most_working, wide, most_read, monkeypatch):
    monkeypatch.setattr(batched, "_MOST_WORKING", most_working)  # and above it, at last, on all features
    x, y, s = problem(kind, width=90)
    thresholds = (1 / torch.tensor(GRID)).reshape(1, 1, -1, 1).expand(1, 90, -1, 1)
    start = x.new_zeros(3, len(GRID), y.shape[1], 90)
    whole = solve_sparse(x, y, s, LOSSES[kind], thresholds, start, None, 1e-3)
    monkeypatch.setattr(batched, "_NARROW", 10)
    monkeypatch.setattr(batched, "_WIDE", wide)
    monkeypatch.setattr(batched, "_MOST_READ", most_read)
    monkeypatch.setattr(batched, "_LEAST_WORKING", 20)
    widths, solve = [], batched.solve_together

    def solving(part, *more, **options):
        widths.append(part.shape[2])
        return solve(part, *more, **options)

    monkeypatch.setattr(batched, "solve_together", solving)
    parts = solve_sparse(x, y, s, LOSSES[kind], thresholds, start, None, 1e-3)
    assert widths[0] == 20
    assert most_working == 1.0 or widths[-1] == 90
    assert most_working < 1.0 or sum(20 < width < 90 for width in widths) > 0
    assert float(parts.gap.max()) <= 1e-3
    torch.testing.assert_close(parts.objective, whole.objective, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_ridge_heads_on_parts_of_the_columns_are_those_solved_alone(kind):
    x, y, s = problem(kind, taps=1)
    members = torch.zeros(1, 40, 4, 1)
    members[:, :10, :2] = 1.0
    members[:, :, 2:] = 1.0
    Cs = [0.01, 0.5, 0.01, 0.5]
    ridge = (1 / torch.tensor(Cs)).reshape(1, 1, 4, 1)
    found = solve_together(x, y, s, LOSSES[kind], L2(ridge, members), 4, tol=1e-6)
    assert float(found.gap.max()) <= 1e-6
    for column, C in enumerate(Cs):
        width = int(members[0, :, column].sum())
        (alone,) = solve_ridge(x[0, :, :width], y, s, LOSSES[kind], [C], tol=1e-6)
        assert found.objective[0, column].item() == pytest.approx(alone.objective, rel=2e-6)
        torch.testing.assert_close(found.weight[0, column, :, :width], alone.weight, atol=1e-3, rtol=1e-2)
        assert not found.weight[0, column, :, width:].any()


def test_l1_heads_may_be_kept_from_columns():
    x, y, s = problem("logistic", taps=1)
    thresholds = torch.full((1, 40, 1, 1), 2.0)
    thresholds[:, 10:] = torch.finfo(torch.float32).max
    found = solve_together(x, y, s, Logistic(), L1(thresholds), 1, tol=1e-6)
    (alone,) = solve_path(x[0, :, :10], y, s, Logistic(), [0.5], tol=1e-6)
    assert found.objective.item() == pytest.approx(alone.objective, rel=2e-6)
    assert not found.weight[..., 10:].any()


@pytest.mark.parametrize("kind", LOSSES)
def test_weak_penalties_on_ill_conditioned_features_are_certified_by_jumps(kind):
    x, y, s = problem(kind, rows=200)
    mixing = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1))).Q
    x = x @ (mixing * torch.logspace(0, -1.5, 40)) @ mixing.T
    x = x / x.std(1, keepdim=True)
    thresholds = torch.tensor([1.0, 0.3, 0.1]).reshape(1, 1, 3, 1)
    found = solve_together(x, y, s, LOSSES[kind], L1(thresholds.expand(1, 40, -1, -1)), 3, tol=3e-4)
    assert float(found.gap.max()) <= 3e-4
    assert found.steps <= 1000
    for column, C in enumerate((1.0, 1 / 0.3, 10.0)):
        (alone,) = solve_path(x[1], y, s, LOSSES[kind], [C])
        assert found.objective[1, column].item() == pytest.approx(alone.objective, rel=4e-4)


def test_what_is_not_solved_in_time_says_its_gap():
    x, y, s = problem("logistic", rows=60)
    found = solve_together(x, y, s, Logistic(), L1(torch.full((1, 40, 1, 1), 1e-4)), 1, max_steps=25)
    assert found.steps == 25
    assert 1e-4 < float(found.gap.min()) < 1.0


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_calibration_that_solves_together_chooses_as_one_that_does_not(
    preset, bert_backbone, tokenizer, sentiment_rows, monkeypatch
):
    texts, labels = sentiment_rows["text"], sentiment_rows["label"]
    options = {"Cs": 4} if preset == "default" else {"Cs": [0.1, 1.0], "poolings": ["mean"]}

    def calibrate():
        model = SpinForSequenceClassification.from_backbone(copy.deepcopy(bert_backbone))
        data = (texts[:52], labels[:52]), (texts[52:], labels[52:])
        return spin_calibrate(model, tokenizer, *data, preset=preset, etas=(0.5, 1.0), progress=False, **options)

    for module in (probes, heads):
        monkeypatch.setattr(module, "pays", lambda *size: False)
    alone = calibrate()
    for module in (probes, heads):
        monkeypatch.setattr(module, "pays", lambda *size: True)
    calls = []
    monkeypatch.setattr(paths, "solve_paths", lambda *a, **k: (calls.append(1), solve_paths(*a, **k))[1])
    together = calibrate()
    assert calls
    assert together.convergence["unconverged"] == 0
    assert len(together.candidates) == pytest.approx(len(alone.candidates), abs=2)
    assert [probe["tap"] for probe in together.probes] == [probe["tap"] for probe in alone.probes]
    for one, other in zip(together.probes, alone.probes, strict=True):
        assert dict(one["scores_by_C"]) == pytest.approx(dict(other["scores_by_C"]), abs=0.1)
    assert together.chosen.score == pytest.approx(alone.chosen.score, abs=0.1)
