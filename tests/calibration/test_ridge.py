import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from spin_hf.calibration.losses import Logistic, Multinomial, Squared
from spin_hf.calibration.ridge import curvature_gram, solve_ridge

CS = (0.01, 0.1, 1.0)


def make(loss, *, rows=150, columns=20, outputs=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    z = x @ torch.randn(columns, outputs, generator=generator) + torch.randn(rows, outputs, generator=generator)
    y = (z > 0.5).float()
    if isinstance(loss, Multinomial):
        y = torch.nn.functional.one_hot(z.argmax(1), outputs).float()
    if isinstance(loss, Squared):
        y = 3 * z - 5
    return x, y, torch.rand(rows, 1, generator=generator) + 0.5


def solutions(x, y, s, loss, **options):
    points = list(solve_ridge(x, y, s, loss, CS, **options))
    assert all(point.converged for point in points)
    return points


@pytest.mark.parametrize("columns", [20, 300])
@pytest.mark.parametrize(("loss", "outputs"), [(Logistic(), 1), (Multinomial(), 3), (Squared(), 1)])
def test_against_sklearn(loss, outputs, columns):
    """More columns than rows take another way to the same solution."""
    x, y, s = make(loss, outputs=outputs, columns=columns)
    for point in solutions(x, y, s, loss, tol=1e-7):  # about as far as float32 gets
        if isinstance(loss, Squared):
            other = Ridge(alpha=1 / point.C, tol=1e-12)
        else:
            other = LogisticRegression(C=point.C, tol=1e-10, max_iter=100_000)
        target = y.argmax(1) if isinstance(loss, Multinomial) else y[:, 0]
        other.fit(x.double().numpy(), target.double().numpy(), sample_weight=s[:, 0].double().numpy())
        weight = np.atleast_2d(other.coef_)
        np.testing.assert_allclose(point.weight, weight, atol=2e-3 * np.abs(weight).max())
        scores = x.double().numpy() @ weight.T + other.intercept_
        ours = x @ point.weight.T + point.intercept
        shift = (ours.double().numpy() - scores).mean(1, keepdims=True) if isinstance(loss, Multinomial) else 0.0
        np.testing.assert_allclose(ours.double().numpy() - shift, scores, atol=2e-3 * np.abs(scores).max())


@pytest.mark.parametrize(("loss", "outputs"), [(Logistic(), 4), (Multinomial(), 4), (Squared(), 1)])
def test_a_gram_from_elsewhere_changes_the_way_not_the_solution(loss, outputs):
    x, y, s = make(loss, outputs=outputs)
    without = solutions(x, y, s, loss, tol=1e-6)
    scores = (x @ without[1].weight.T + without[1].intercept).double()
    wide = curvature_gram(torch.cat([x, x.flip(1)], 1), loss.curvature(scores, s.double()))
    for one, other in zip(without, solutions(x, y, s, loss, tol=1e-6, gram=wide[:20, :20]), strict=True):
        assert one.objective == pytest.approx(other.objective, rel=2e-6)
        torch.testing.assert_close(one.weight, other.weight, atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("columns", [20, 300])
@pytest.mark.parametrize("loss", [Logistic(), Multinomial(), Squared()])
def test_the_gap_bounds_what_is_left(loss, columns):
    x, y, s = make(loss, outputs=3, columns=columns)
    if not isinstance(loss, Squared):
        y[:, 0] += y[:, 2] * isinstance(loss, Multinomial)
        y[:, 2] = 0
        y[0] = torch.eye(3)[2]  # a class of a single row
    for rough, exact in zip(solutions(x, y, s, loss, tol=0.05), solutions(x, y, s, loss, tol=1e-7), strict=True):
        z = x.double() @ rough.weight.T.double() + rough.intercept
        value = loss.value(z, y.double(), s.double()).sum() + rough.weight.square().sum() / (2 * rough.C)
        assert float(value) == pytest.approx(rough.objective, rel=1e-5)
        assert rough.objective * (1 - rough.gap) - 1e-6 <= exact.objective <= rough.objective * (1 + 1e-6)


def test_steps_that_run_out_are_admitted():
    x, y, s = make(Logistic(), columns=30)
    (point,) = solve_ridge(x, y, s, Logistic(), [10.0], tol=1e-6, max_steps=1)
    assert not point.converged
    assert point.gap > 1e-6
