from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import entr, expit
from sklearn.linear_model import Lasso, LogisticRegression

from spin_hf.calibration.losses import Logistic, Multinomial, Squared
from spin_hf.calibration.solver import smallest_useful_C, solve_path

# scikit-learn 1.8 renamed the option.
L1 = {"l1_ratio": 1} if getattr(LogisticRegression(), "penalty", "deprecated") == "deprecated" else {"penalty": "l1"}


def total(loss, x, y, s, weight, intercept, C, factors=None):
    """The objective by its definition, in float64."""
    x, y, s, weight, intercept = (np.asarray(part, dtype=np.float64) for part in (x, y, s, weight, intercept))
    z = x @ weight.T + intercept
    each = {
        "Logistic": lambda: np.logaddexp(0, z) - y * z,
        "Multinomial": lambda: np.logaddexp.reduce(z, 1, keepdims=True) - (y * z).sum(1, keepdims=True),
        "Squared": lambda: (y - z) ** 2 / 2,
    }[type(loss).__name__]()
    factors = np.ones(x.shape[1]) if factors is None else np.asarray(factors, dtype=np.float64)
    return (s * each).sum() + (np.abs(weight) @ factors).sum() / C


def make(loss=None, *, rows=200, columns=30, outputs=1, seed=0):
    """Correlated standardised features, targets that depend on a few of them, and row weights of one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator) @ torch.randn(5, columns, generator=generator)
    x = x + torch.randn(rows, columns, generator=generator)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    truth = torch.randn(columns, outputs, generator=generator) * (torch.arange(columns) % 4 == 0)[:, None]
    z = x @ truth + 2 * torch.randn(rows, outputs, generator=generator)
    y = (z > 0).float()
    if isinstance(loss, Multinomial):
        y = torch.nn.functional.one_hot(z.argmax(1), outputs).float()
    if isinstance(loss, Squared):
        y = z + 7
    return x, y, torch.ones(rows, 1)


def solve(x, y, s, loss, C, **options):
    return next(iter(solve_path(x, y, s, loss, [C], **options)))


def assert_equally_good(loss, problem, point, weight, intercept):
    """Neither is better than the other by more than 1e-4, and they agree on which weights matter."""
    ours = total(loss, *problem, point.weight, point.intercept, point.C)
    assert ours == pytest.approx(total(loss, *problem, weight, intercept, point.C), rel=1e-4)
    assert ours == pytest.approx(point.objective, rel=1e-5)
    large = np.abs(weight) > 0.05 * np.abs(weight).max()
    assert large.any()
    assert (np.sign(point.weight.numpy())[large] == np.sign(weight)[large]).all()


@pytest.mark.parametrize("C", [0.05, 0.3, 2.0])
def test_binary_against_liblinear(C):
    x, y, s = make()
    other = LogisticRegression(**L1, C=C, solver="liblinear", intercept_scaling=1e3, tol=1e-9, max_iter=20_000).fit(
        x.numpy(), y[:, 0].numpy()
    )
    point = solve(x, y, s, Logistic(), C)
    assert point.converged
    assert_equally_good(Logistic(), (x, y, s), point, other.coef_, other.intercept_)
    pull = x.double().T @ (y[:, 0] - torch.from_numpy(other.predict_proba(x.numpy())[:, 1]))
    idle = pull.abs() < 0.95 / C  # far from the bound at the optimum: no optimal solution has a weight there
    assert (point.weight[0, idle] == 0).all()


@pytest.mark.parametrize("column", range(3))
def test_each_class_against_the_rest_is_liblinears(column):
    x, y, s = make(Multinomial(), outputs=3, columns=12)
    other = LogisticRegression(**L1, C=0.3, solver="liblinear", intercept_scaling=1e3, tol=1e-9, max_iter=20_000)
    other.fit(x.numpy(), y[:, column].numpy())
    point = solve(x, y, s, Logistic(), 0.3)  # all three at once
    assert point.converged
    weight, intercept = point.weight[column : column + 1], point.intercept[column : column + 1]
    problem = x, y[:, column : column + 1], s
    own = replace(
        point, weight=weight, intercept=intercept, objective=total(Logistic(), *problem, weight, intercept, 0.3)
    )
    assert_equally_good(Logistic(), problem, own, other.coef_, other.intercept_)


@pytest.mark.parametrize("C", [0.05, 0.5])
def test_multinomial_against_saga(C):
    x, y, s = make(Multinomial(), outputs=3, columns=12)
    other = LogisticRegression(**L1, C=C, solver="saga", tol=1e-7, max_iter=20_000, random_state=0)
    other.fit(x.numpy().astype(np.float64), y.argmax(1).numpy())
    point = solve(x, y, s, Multinomial(), C)
    assert_equally_good(Multinomial(), (x, y, s), point, other.coef_, other.intercept_)


@pytest.mark.parametrize(("loss", "outputs"), [(Logistic(), 1), (Multinomial(), 3), (Squared(), 2)])
def test_where_it_starts_does_not_matter(loss, outputs):
    x, y, s = make(loss, outputs=outputs)
    cold = solve(x, y, s, loss, 0.3)
    for start in (cold.weight, torch.ones_like(cold.weight)):
        warm = solve(x, y, s, loss, 0.3, start=start)
        assert warm.converged
        assert warm.objective == pytest.approx(cold.objective, rel=1e-4)
    assert solve(x, y, s, loss, 0.3, start=cold.weight).steps <= cold.steps / 2


def test_weak_penalty_on_an_even_number_of_classes():
    """Half the classes up, half down: a feature's weights may shift together, and the Hessian is flat that way."""
    x, y, s = make(Multinomial(), rows=400, outputs=6, columns=20)
    points = list(solve_path(x, y, s, Multinomial(), [1.0, 30.0, 1000.0]))
    assert all(point.converged for point in points)
    shifted = points[-1].weight - points[-1].weight.median(0).values
    assert points[-1].weight.abs().sum() <= (1 + 1e-4) * shifted.abs().sum()


@pytest.mark.parametrize("largest", [1, 25, 60])
def test_classes_too_many_for_one_hessian_move_in_turn(monkeypatch, largest):
    problem = make(Multinomial(), outputs=7, columns=40)
    whole = solve(*problem, Multinomial(), 0.3)
    monkeypatch.setattr("spin_hf.calibration.solver._LARGEST_JOINT", largest)
    parts = solve(*problem, Multinomial(), 0.3)
    assert parts.converged
    assert parts.objective == pytest.approx(whole.objective, rel=1e-4)


@pytest.mark.parametrize("C", [0.01, 0.2])
def test_squared_against_lasso(C):
    x, y, s = make(Squared())
    other = Lasso(alpha=1 / (C * len(x)), tol=1e-10, max_iter=100_000).fit(x.double().numpy(), y[:, 0].double().numpy())
    point = solve(x, y, s, Squared(), C)
    assert_equally_good(Squared(), (x, y, s), point, other.coef_[None], [other.intercept_])


@pytest.mark.parametrize("weighted", [False, True])
def test_columns_of_a_separate_loss_are_separate_problems(weighted):
    x, y, s = make(outputs=4)
    y[:, 3] = 0
    y[:2, 3] = 1  # a label this rare has its own curvature
    if weighted:
        s = torch.where(y > 0, torch.tensor([1.0, 2.0, 0.5, 20.0]), torch.ones(4))
    together = solve(x, y, s, Logistic(), 0.3)
    assert together.converged
    for k in range(4):
        own = s[:, k : k + 1] if weighted else s
        alone = solve(x, y[:, k : k + 1], own, Logistic(), 0.3, tol=1e-7)
        ours = total(Logistic(), x, y[:, k : k + 1], own, together.weight[k : k + 1], together.intercept[k], 0.3)
        assert ours == pytest.approx(alone.objective, rel=1.01e-4)


@pytest.mark.parametrize(("loss", "outputs"), [(Logistic(), 2), (Multinomial(), 3), (Squared(), 1)])
def test_weights_are_repetitions(loss, outputs):
    x, y, s = make(loss, outputs=outputs, rows=80)
    times = 1 + torch.arange(80) % 3
    weighted = solve(x, y, s * times[:, None], loss, 0.2, tol=1e-7)
    repeated = [part.repeat_interleave(times, 0) for part in (x, y, s)]
    other = solve(*repeated, loss, 0.2, tol=1e-7)
    assert weighted.objective == pytest.approx(other.objective, rel=1e-6)
    torch.testing.assert_close(weighted.weight, other.weight, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize(("loss", "outputs"), [(Logistic(), 1), (Multinomial(), 3), (Squared(), 1)])
def test_factors_give_the_solution_of_raw_features(loss, outputs):
    x, y, s = make(loss, outputs=outputs)
    scale = torch.logspace(-1, 1, x.shape[1])
    raw = solve(x * scale, y, s, loss, 0.1, tol=1e-6)
    scaled = solve(x, y, s, loss, 0.1, factors=1 / scale, tol=1e-6)
    assert raw.converged
    assert scaled.converged
    assert scaled.objective == pytest.approx(raw.objective, rel=2e-6)
    weight = scaled.weight / scale
    assert total(loss, x * scale, y, s, weight, scaled.intercept, 0.1) == pytest.approx(raw.objective, rel=2e-6)
    torch.testing.assert_close(weight, raw.weight, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("positives", [0, 1, 3])
@pytest.mark.parametrize("loss", [Logistic(), Multinomial()])
def test_the_gap_bounds_what_is_left_even_for_a_rare_class(loss, positives):
    x, y, s = make(loss, outputs=3, rows=300, columns=10)
    y[:, 2] = 0
    if isinstance(loss, Multinomial):
        y[:, 0] = 1 - y[:, 1]
        y[:positives, :2] = 0
    y[:positives, 2] = 1
    C = 4 * smallest_useful_C(x, y, s, loss)
    rough = solve(x, y, s, loss, C, tol=0.05)
    exact = solve(x, y, s, loss, C, tol=1e-6)
    assert exact.converged
    assert exact.objective >= rough.objective * (1 - rough.gap) - 1e-6
    # Multinomial or not, the best intercepts predict each class as often as it occurs.
    z = x.double() @ exact.weight.T.double() + exact.intercept
    p = z.softmax(1) if isinstance(loss, Multinomial) else z.sigmoid()
    torch.testing.assert_close(p.sum(0), y.double().sum(0), atol=1e-3, rtol=0)


def test_an_unfinished_point_says_so_and_its_gap_holds():
    x, y, s = make(rows=100, columns=60)
    C = 2.0
    rough, exact = solve(x, y, s, Logistic(), C, max_steps=2), solve(x, y, s, Logistic(), C)
    assert not rough.converged
    assert rough.gap > 1e-4
    assert rough.objective * (1 - rough.gap) <= exact.objective < rough.objective


def test_correlated_columns_in_float32():
    """The gap, taken again in float64 and for the float32 weights, is as small as was promised."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator) @ torch.randn(4, 200, generator=generator)
    x = x + 1e-2 * torch.randn(300, 200, generator=generator)  # condition number near 1e4
    x = (x - x.mean(0)) / x.std(0, correction=0)
    y = (x[:, :1] - x[:, 1:2] + 0.1 * torch.randn(300, 1, generator=generator) > 0).float()
    for point in solve_path(x, y, torch.ones(300, 1), Logistic(), [0.1, 1.0, 10.0]):
        assert point.converged
        scores = x.double().numpy() @ point.weight[0].double().numpy()
        target = y[:, 0].double().numpy()
        intercept = brentq(lambda b, z=scores: expit(z + b).sum() - float(y.sum()), -50, 50, xtol=1e-14)
        residual = target - expit(scores + intercept)
        residual *= min(1.0, 1 / (point.C * np.abs(x.double().numpy().T @ residual).max()))
        dual = (entr(target - residual) + entr(1 - target + residual)).sum()
        primal = total(Logistic(), x, y, np.ones((300, 1)), point.weight, [intercept], point.C)
        assert (primal - dual) / primal < 1.2e-4


def test_weak_penalties_on_ill_conditioned_features():
    random = torch.Generator().manual_seed(1)
    x = torch.randn(200, 40, generator=random) + torch.randn(200, 1, generator=random)
    mixing = torch.linalg.qr(torch.randn(40, 40, generator=random)).Q
    x = x @ (mixing * torch.logspace(0, -2.5, 40)) @ mixing.T
    x = (x - x.mean(0)) / x.std(0)
    scores = x @ torch.randn(40, 3, generator=random) / 3 + torch.randn(200, 3, generator=random)
    y = torch.nn.functional.one_hot(scores.argmax(1), 3).float()
    for point in solve_path(x, y, torch.ones(200, 1), Multinomial(), [10.0, 33.0], max_steps=120):
        assert point.gap <= 1e-4


def test_descending_path_is_refused():
    x, y, s = make()
    with pytest.raises(ValueError, match="ascend"):
        next(iter(solve_path(x, y, s, Logistic(), [1.0, 0.1])))


@st.composite
def problems(draw):
    """Small problems, ugly ones among them: (loss, x, y, s)."""
    rows, columns, outputs = draw(st.integers(10, 60)), draw(st.integers(1, 30)), draw(st.integers(1, 4))
    loss = draw(st.sampled_from([Logistic(), Multinomial(), Squared()]))
    outputs = max(outputs, 2) if isinstance(loss, Multinomial) else outputs
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, columns, generator=generator)
    for ugliness in draw(st.sets(st.sampled_from(["duplicates", "constants", "scales", "separable"]))):
        if ugliness == "duplicates":
            x[:, columns // 2 :] = x[:, : columns - columns // 2]
        elif ugliness == "constants":
            x[:, :: draw(st.integers(1, 3))] = 0.0
        elif ugliness == "scales":
            x = x * 10.0 ** torch.empty(columns).uniform_(-3, 3, generator=generator)
    z = x @ torch.randn(columns, outputs, generator=generator) if draw(st.booleans()) else x[:, :1].expand(-1, outputs)
    z = z + draw(st.sampled_from([0.0, 1.0])) * torch.randn(rows, outputs, generator=generator)
    if isinstance(loss, Multinomial):
        y = torch.nn.functional.one_hot(z.argmax(1), outputs).float()
    else:
        y = z.clone() if isinstance(loss, Squared) else (z > 0).float()
    s = torch.ones(rows, 1)
    if draw(st.booleans()):
        s = torch.rand(rows, 1 if loss.coupled else outputs, generator=generator) * 3 + 0.1
    return loss, x, y, s


@given(problems())
@settings(deadline=None, max_examples=60)
def test_path_laws(problem):
    loss, *data = problem
    start = smallest_useful_C(*data, loss)
    Cs = [start * factor for factor in (0.5, 2, 8, 32)] if np.isfinite(start) else [1.0]
    points = list(solve_path(*data, loss, Cs))
    values = np.array([[total(loss, *data, p.weight, p.intercept, C) for p in points] for C in Cs])
    noise = 2e-6 * np.abs(values).max() + 1e-12
    assert not points[0].weight.any()
    for i, point in enumerate(points):
        assert point.weight.isfinite().all()
        assert point.intercept.isfinite().all()
        assert point.gap >= 0
        assert point.converged == (point.gap <= 1e-4)
        assert values[i, i] == pytest.approx(point.objective, rel=1e-5, abs=noise)
        # No other point may beat the certificate, for coupled columns or for each alone.
        assert (values[i] >= values[i, i] * (1 - point.gap) - noise).all()
    # Weaker penalties: the least objective falls, and, up to the gaps, the norm of the weights grows.
    left = [value * point.gap + noise for value, point in zip(values.diagonal(), points, strict=True)]
    norms = [float(point.weight.abs().sum()) for point in points]
    for i in range(len(points) - 1):
        assert values[i + 1, i + 1] <= values[i, i] + left[i + 1]
        assert norms[i] <= norms[i + 1] + (left[i] + left[i + 1]) / (1 / Cs[i] - 1 / Cs[i + 1])
