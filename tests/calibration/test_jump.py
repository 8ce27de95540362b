"""Second-order steps: beside others as alone, never uphill, within their signs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.calibration import jump as jumps
from spin_hf.calibration.jump import Elastic, jump, within_signs
from spin_hf.calibration.losses import Logistic, Multinomial, Squared
from spin_hf.calibration.penalties import L1, L2

LOSSES = {"logistic": Logistic(), "multinomial": Multinomial(), "squared": Squared()}
SIZES = [0, 3, 30, 12, 1]  # weights of a class that are not zero, of each problem
TAPS = [0, 1, 1, 0, 1]


def problems(kind, outputs, ridge, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 80, 30, generator=random)
    labels = (
        (x[0, :, :outputs] + torch.randn(80, outputs, generator=random)).argmax(1) if outputs > 1 else x[0, :, 0] > 0
    )
    y = torch.eye(outputs)[labels].double() if outputs > 1 else labels.double()[:, None]
    s = torch.rand(80, 1, generator=random).double() + 0.1
    weight = torch.zeros(len(SIZES), 30, outputs)
    for own, size in zip(weight, SIZES, strict=True):
        own[torch.randperm(30, generator=random)[:size]] = torch.randn(size, outputs, generator=random) / 10
    intercept = torch.randn(len(SIZES), outputs, generator=random)
    members = (weight != 0).any(2, keepdim=True).float() if ridge else None
    level = torch.full((len(SIZES), 1, 1), 0.5 if ridge else 0.0)
    threshold = torch.zeros(len(SIZES), 30, 1) if ridge else torch.rand(len(SIZES), 30, 1, generator=random) + 0.2
    return x, TAPS, y, s, LOSSES[kind], Elastic(threshold, level, members), weight, intercept


def objectives(x, taps, y, s, loss, penalty, weight, intercept):
    scores = torch.stack([x[tap].double() @ own.double() for tap, own in zip(taps, weight, strict=True)])
    fit = loss.value(scores + intercept.double()[:, None], y, s)
    return fit.sum(1) + (penalty.threshold * weight.abs() + penalty.ridge / 2 * weight.square()).sum((1, 2)).double()


@pytest.mark.parametrize("ridge", [False, True])
@pytest.mark.parametrize(("kind", "outputs"), [("logistic", 1), ("logistic", 3), ("multinomial", 3), ("squared", 2)])
@pytest.mark.parametrize("room", [2**28, 80 * 20])  # for all weights of a problem, or twenty at a time
def test_problems_jump_beside_others_as_alone(kind, outputs, ridge, room, monkeypatch):
    monkeypatch.setattr(jumps, "_MOST_VALUES", room)
    monkeypatch.setattr(jumps, "_FEW", 5)
    *rest, penalty, weight, intercept = given = problems(kind, outputs, ridge)
    x, taps, y, s, loss = rest
    before, start = objectives(*given), weight.clone()
    together = jump(*given)
    assert torch.equal(weight, start)
    after = objectives(*rest, penalty, *together)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert bool((after < before)[2:4].all())
    for i in range(len(SIZES)):
        one = torch.tensor([i])
        alone = jump(x, taps[i : i + 1], y, s, loss, penalty.take(one), weight[one], intercept[one])
        assert float(objectives(x, taps[i : i + 1], y, s, loss, penalty.take(one), *alone)) == pytest.approx(
            float(after[i]), rel=1e-3
        )
        absent = start[i].eq(0).all(1)
        assert ridge or not together[0][i][absent].any()


@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_quadratic_falls_within_its_signs_beside_others_as_alone(seed, width, bound):
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, 20, width, generator=random, dtype=torch.float64)
    hessian = rows.mT @ rows / 20 + 0.1 * torch.eye(width)
    present, down = torch.randn(2, 4, width, generator=random, dtype=torch.float64)
    signs = present.sign() * (torch.rand(4, width, generator=random) < bound)
    real = torch.rand(4, width, generator=random) < 0.8
    found = within_signs(hessian, down, present, signs, real)
    move = found - present
    value = (move * (hessian @ move[..., None])[..., 0]).sum(1) / 2 - (move * down).sum(1)
    assert bool((value <= 1e-12).all())
    assert bool((signs * found >= 0).all())
    assert torch.equal(found[~real], present[~real])
    for i in range(4):
        keep = real[i].nonzero()[:, 0]
        part = hessian[i][keep[:, None], keep][None]
        alone = within_signs(part, down[i, keep][None], present[i, keep][None], signs[i, keep][None])[0]
        torch.testing.assert_close(found[i, keep], alone, rtol=1e-8, atol=1e-10)


def test_without_signs_a_quadratic_is_solved():
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 20, 6, generator=random, dtype=torch.float64)
    present, down = torch.randn(2, 2, 6, generator=random, dtype=torch.float64)
    found = within_signs(rows.mT @ rows, down, present, torch.zeros_like(present))
    torch.testing.assert_close(found - present, torch.linalg.solve(rows.mT @ rows, down[..., None])[..., 0])


def test_a_matrix_that_is_not_positive_definite_leaves_its_problem_where_it_is():
    good, bad = torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)
    present = torch.ones(2, 3, dtype=torch.float64)
    found = within_signs(torch.stack([good, bad]), present, present, present)
    assert found.tolist() == [[2.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("seed", range(3))
def test_outputs_may_have_row_weights_of_their_own(seed):
    x, taps, y, _, loss, penalty, weight, intercept = problems("logistic", 2, False, seed)
    s = torch.rand(80, 2, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    found = jump(x, taps, y, s, loss, penalty, weight, intercept)
    for k in range(2):
        own = slice(k, k + 1)
        alone = jump(x, taps, y[:, own], s[:, own], loss, penalty, weight[..., own], intercept[:, own])
        torch.testing.assert_close(found[0][..., own], alone[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[1][:, own], alone[1], rtol=1e-3, atol=1e-4)


def test_penalties_of_some_problems_are_those_of_their_places():
    thresholds, places = torch.rand(3, 5, 4, 1), (torch.tensor([2, 0, 2]), torch.tensor([1, 3, 0]))
    for some in (thresholds, thresholds[:1], thresholds[:, :, :1]):
        found = L1(some).of(*places).threshold
        expected = some.expand_as(thresholds)
        for one, row, column in zip(found, *places, strict=True):
            assert torch.equal(one, expected[row, :, column])
    members, ridge = (torch.rand(1, 5, 4, 1) < 0.5).float(), torch.rand(1, 1, 4, 1)
    found = L2(ridge, members).of(*places)
    for members_of, ridge_of, column in zip(found.members, found.ridge, places[1], strict=True):
        assert torch.equal(members_of, members[0, :, column])
        assert float(ridge_of) == float(ridge[0, 0, column])


def test_there_is_room_for_all_that_jumps_side_by_side():
    def held(group, sizes, rows, outputs):
        most = max(sizes[i] for i in group)
        return len(group) * max(rows * (most + 72 * outputs), most * most)

    for sizes, rows, outputs in (([0] * 50, 10_000, 1), ([300] * 50, 20, 1), ([5, 900, 30, 31, 0] * 9, 400, 6)):
        groups = list(jumps._groups(sizes, rows, outputs, 2**22))
        assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
        assert all(len(group) == 1 or held(group, sizes, rows, outputs) <= 2**22 for group in groups)
        assert any(len(group) > 1 for group in groups)
