"""Data on which a solver may run for ever or fall over: a right answer within its steps, or a clear error."""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration.errors import MissingLabelsError
from spin_hf.calibration.losses import Logistic, Multinomial, Squared
from spin_hf.calibration.solver import solve_path
from spin_hf.prediction import predict

QUICK = {"progress": False, "poolings": ["mean", "max"], "validation_fraction": 0.2, "Cs": 4, "etas": (0.5, 1.0)}


@pytest.fixture
def wrap(bert_backbone):
    def make(change=lambda backbone: None, **options):
        backbone = copy.deepcopy(bert_backbone)
        with torch.no_grad():
            change(backbone)
        return SpinForSequenceClassification.from_backbone(backbone, **options)

    return make


def finite(model):
    return all(bool(value.isfinite().all()) for value in (model.score.weight, model.score.bias, *model.buffers()))


def test_neurons_that_never_move_are_not_kept(wrap, tokenizer, sentiment_rows):
    def silence(backbone):
        for layer in backbone.encoder.layer:  # a third of the neurons is constant, at zero or elsewhere
            layer.intermediate.dense.weight[::3] = 0.0
            layer.intermediate.dense.bias[::6] = 5.0

    model = wrap(silence)
    result = spin_calibrate(model, tokenizer, sentiment_rows, kinds=["ffn"], **{**QUICK, "Cs": [0.1, 1.0, 10.0]})
    assert result.convergence["unconverged"] == 0
    assert finite(model)
    assert all(int(i) % 3 for group in model.spin.feature_groups() for i in group.neurons)


def test_twins_of_neurons_change_nothing_but_which_is_kept(wrap, tokenizer, sentiment_rows):
    def double(backbone):
        for layer in backbone.encoder.layer:
            for weight in (layer.intermediate.dense.weight, layer.intermediate.dense.bias):
                weight[24:] = weight[:24].clone()

    model = wrap(double)
    result = spin_calibrate(model, tokenizer, sentiment_rows, kinds=["ffn"], **QUICK)
    assert result.convergence["unconverged"] == 0
    assert result.convergence["head_gap"] <= 1e-4
    assert finite(model)


def test_labels_that_one_neuron_tells_perfectly(wrap, tokenizer, sentiment_rows):
    """Without a penalty the weights would be infinite; with the weakest that is allowed they are large, and found."""
    pairs = zip(*sentiment_rows.values(), strict=True)
    texts = [f"good {text}" if label else text.replace("good", "film") for text, label in pairs]
    model = wrap()
    options = {**QUICK, "Cs": [1e3, 1e6], "kinds": ["hidden"], "poolings": ["mean"], "etas": []}
    result = spin_calibrate(model, tokenizer, (texts, sentiment_rows["label"]), **options)
    assert finite(model)
    assert result.convergence["unconverged"] == 0
    assert (predict(model, tokenizer, texts).labels == np.array(sentiment_rows["label"])).mean() > 0.95


@pytest.mark.parametrize("loss", [Logistic(), Multinomial(), Squared()])
@pytest.mark.parametrize("C", [1e2, 1e8])
def test_a_penalty_so_weak_that_the_weights_run_away(loss, C):
    """Separable, more columns than rows, twins among them: the steps are bounded, and the gap is what it says."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 60, generator=generator)
    x[:, 30:] = x[:, :30]
    K = 3 if isinstance(loss, Multinomial) else 1
    truth = (x[:, :3] * 2)[:, :K]
    y = torch.nn.functional.one_hot(truth.argmax(1), 3).float() if K == 3 else (truth > 0).float()
    y = truth if isinstance(loss, Squared) else y
    (point,) = solve_path(x, y, torch.ones(40, 1), loss, [C])
    assert point.steps <= 200
    if isinstance(loss, Logistic):
        assert point.converged
    assert point.weight.isfinite().all()
    assert point.converged == (point.gap <= 1e-4)
    scores = x @ point.weight.T + point.intercept
    if isinstance(loss, Squared):
        assert float((scores - y).square().mean()) < 1e-3
    elif K == 3:
        assert (scores.argmax(1) == truth.argmax(1)).all()
    else:
        assert ((scores > 0) == (y > 0)).all()
    if C == 1e2 and isinstance(loss, Logistic):
        reference = LogisticRegression(C=C, solver="liblinear", intercept_scaling=1000, tol=1e-8, max_iter=10_000)
        reference.set_params(**({"l1_ratio": 1} if "deprecated" in str(reference.penalty) else {"penalty": "l1"}))
        reference.fit(x.numpy(), y[:, 0].numpy())
        z = x.numpy() @ reference.coef_[0] + reference.intercept_
        theirs = np.logaddexp(0, -np.where(y[:, 0] > 0, z, -z)).sum() + np.abs(reference.coef_).sum() / C
        assert point.objective <= theirs * (1 + 1e-3)


def test_a_class_of_one(wrap, tokenizer, sentiment_rows):
    texts, labels = [*sentiment_rows["text"], "river town"], [*sentiment_rows["label"], 2]
    with pytest.raises(MissingLabelsError, match="single row.*give eval"):
        spin_calibrate(wrap(), tokenizer, (texts, labels), **QUICK)
    with pytest.raises(MissingLabelsError, match="at least 2 rows of each class"):
        spin_calibrate(wrap(), tokenizer, (texts, labels), cv=2, **QUICK)
    model = wrap()
    options = {**QUICK, "class_weight": "balanced", "kinds": ["hidden"], "poolings": ["mean"]}
    result = spin_calibrate(model, tokenizer, (texts, labels), sentiment_rows, **options)
    assert result.convergence["unconverged"] == 0
    assert finite(model)
    assert model.score.out_features == 3


def test_raw_features_of_all_scales_under_a_weak_penalty():
    # A few neurons of a decoder are a thousand times as wide as the others: raw, they cost next to nothing. Here all
    # are much alike besides, so that what the classes share matters down to the last digits.
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 8, generator=draw)
    features = shared @ torch.randn(8, 60, generator=draw) + 0.05 * torch.randn(400, 60, generator=draw)
    labels = (shared @ torch.randn(8, 6, generator=draw) + torch.randn(400, 6, generator=draw)).argmax(1)
    y, s = torch.nn.functional.one_hot(labels, 6).double(), torch.ones(400, 1, dtype=torch.float64)
    x, factors = (features - features.mean(0)) / features.std(0), 1 / torch.logspace(-1, 3, 60)
    points = list(solve_path(x, y, s, Multinomial(), [0.01, 0.1, 1.0, 10.0], factors=factors))
    assert all(point.converged for point in points)
    for point in points:  # what the gap certifies holds for the float32 weights that are returned
        scores = x.double() @ point.weight.double().T + point.intercept.double()
        loss = -(torch.log_softmax(scores, 1) * y).sum()
        value = float(loss + (factors.double() * point.weight.double().abs()).sum() / point.C)
        assert value - point.objective * (1 - point.gap) < 1.1e-4 * value
