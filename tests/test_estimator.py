"""The estimators as users of scikit-learn use them: searched, cloned, pickled, piped, and checked by its own checks."""

import unittest
import warnings

import builders
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_is_fitted
from transformers import pipeline

from spin_hf import SpinClassifier, SpinForSequenceClassification, SpinRegressor, spin_calibrate
from spin_hf.calibration.errors import CalibrationError, LabelTypeError, OneClassError, UnknownLabelError
from spin_hf.demo import load_split
from spin_hf.prediction import predict

QUICK = {"kinds": ["hidden"], "poolings": ["mean"], "Cs": 3, "etas": [1.0], "validation_fraction": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny backbone with its tokenizer."""
    path = tmp_path_factory.mktemp("backbone")
    builders.make_backbone("bert").save_pretrained(path)
    builders.make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data():
    rows = builders.make_sentiment_rows(60)
    return rows["text"], np.array(["bad", "good"])[rows["label"]]


@pytest.fixture
def make(folder):
    return lambda kind=SpinClassifier, **options: kind(folder, **{**QUICK, **options})


def upper_score(truth, found):
    """A metric that can only be reckoned on the labels themselves."""
    return float(np.mean(np.char.upper(truth) == np.char.upper(found)))


# -- fitting and predicting -------------------------------------------------------------------------------------------


def test_it_is_the_calibration(make, folder, data):
    X, y = data
    fitted = make(cv=3, random_state=5, class_weight="balanced").fit(X, y)
    model = SpinForSequenceClassification.from_backbone(folder, labels=["bad", "good"])
    rows = {"text": X, "label": y.tolist()}
    options = {**QUICK, "cv": 3, "seed": 5, "class_weight": "balanced", "progress": False}
    result = spin_calibrate(model, builders.make_tokenizer(), rows, **options)
    assert fitted.result_.chosen == result.chosen
    assert torch.equal(fitted.model_.score.weight, model.score.weight)
    assert fitted.model_.config.id2label == {0: "bad", 1: "good"}


def test_an_exit_can_be_kept(make, data):
    X, y = data
    fitted = make(exits=True, etas=[0.5, 1.0]).fit(X, y)
    assert len(fitted.model_.config.exits) > 1
    assert clone(fitted).exits is True
    wanted = predict(fitted.model_, fitted.tokenizer_, X, exit=0).probabilities
    fitted.model_.keep_exit(0)
    np.testing.assert_array_equal(fitted.predict_proba(X), wanted)


def test_predictions_agree_with_each_other(make, data):
    X, y = data
    fitted = make().fit(X, y)
    proba = fitted.predict_proba(X)
    assert proba.shape == (60, 2)
    np.testing.assert_allclose(proba.sum(1), 1, atol=1e-6)
    assert fitted.classes_.tolist() == ["bad", "good"]
    assert (fitted.predict(X) == fitted.classes_[proba.argmax(1)]).all()
    assert fitted.score(X, y) == np.mean(fitted.predict(X) == y) > 0.8


@pytest.mark.parametrize(
    "y",
    [
        lambda y: y.tolist(),
        lambda y: pd.Series(y, index=range(100, 160)),
        lambda y: pd.Series(y, dtype="category"),
        lambda y: y == "good",
        lambda y: np.where(y == "good", 1, -1),
        lambda y: np.where(y == "good", 70, 3).tolist(),
    ],
)
def test_labels_of_any_type_come_back(make, data, y):
    X, words = data
    given = y(words)
    fitted = make().fit(X, given)
    assert fitted.classes_.tolist() == sorted(set(given))
    predicted = fitted.predict(X)
    assert predicted.dtype == np.asarray(given).dtype or predicted.dtype.kind in "UOT"
    expected = make().fit(X, words).predict(X) == "good"
    assert (predicted == fitted.classes_[1]).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "kind", [tuple, np.array, lambda X: np.array(X, dtype=object), pd.Series, lambda X: pd.DataFrame({"text": X})]
)
def test_texts_in_any_container(make, data, kind):
    X, y = data
    expected = make().fit(X, y)
    fitted = make().fit(kind(X), y)
    assert torch.equal(fitted.model_.score.weight, expected.model_.score.weight)
    np.testing.assert_array_equal(fitted.predict_proba(kind(X[:5])), expected.predict_proba(X[:5]))


@pytest.mark.parametrize("kind", [list, np.array, lambda X: pd.DataFrame(X, columns=["a", "b"])])
def test_pairs_in_any_container(make, folder, data, kind):
    X, y = data
    pairs = [(text, other) for text, other in zip(X, X[1:] + X[:1], strict=True)]
    fitted = make().fit(kind(pairs), y)
    model = SpinForSequenceClassification.from_backbone(folder, labels=["bad", "good"])
    spin_calibrate(model, builders.make_tokenizer(), (pairs, y), progress=False, **QUICK)
    assert torch.equal(fitted.model_.score.weight, model.score.weight)
    assert len(fitted.predict(kind(pairs[:3]))) == 3


def test_multi_label(make, data):
    X, y = data
    matrix = np.stack([y == "good", y == "bad", [text.startswith("t") for text in X]], 1).astype(int)
    fitted = make().fit(X, pd.DataFrame(matrix, columns=["good", "bad", "t"]))
    assert fitted.model_.config.id2label == {0: "good", 1: "bad", 2: "t"}
    predicted, proba = fitted.predict(X), fitted.predict_proba(X)
    assert predicted.shape == proba.shape == (60, 3)
    assert ((proba > 0.5) == predicted).all()
    assert (predicted[:, 0] == matrix[:, 0]).mean() > 0.65
    assert fitted.classes_.tolist() == [0, 1, 2]
    sparse = make().fit(X, csr_matrix(matrix))
    np.testing.assert_array_equal(sparse.predict_proba(X), proba)
    assert cross_val_predict(make(), X, matrix, cv=2, method="predict_proba").shape == (60, 3)


def test_regression(make, data):
    X, y = data
    numbers = (y == "good") * 2.5 + np.linspace(0, 0.1, 60)
    fitted = make(SpinRegressor).fit(X, numbers)
    assert fitted.score(X, numbers) > 0.2
    assert fitted.predict(X).shape == (60,)
    with pytest.raises(CalibrationError, match="class_weight has no meaning"):
        make(SpinRegressor, class_weight="balanced").fit(X, numbers)


def test_weights(make, data):
    X, y = data
    dropped = np.r_[np.ones(50), np.zeros(10)]
    zeros, short = make().fit(X, y, sample_weight=dropped), make().fit(X[:50], y[:50], sample_weight=np.ones(50))
    assert torch.equal(zeros.model_.score.weight, short.model_.score.weight)
    tilted = make(class_weight={"good": 50.0, "bad": 1.0}).fit(X, y)
    assert tilted.predict_proba(X)[:, 1].mean() > make().fit(X, y).predict_proba(X)[:, 1].mean()
    assert tilted.model_.config.class_weights == [1.0, 50.0]
    assert make(class_weight={70: 2.0}).fit(X, np.where(y == "good", 70, 3)).model_.config.class_weights == [1.0, 2.0]


def test_a_metric_gets_the_labels(make, data):
    fitted = make(metric=upper_score).fit(*data)
    assert fitted.result_.metric == "upper_score"
    assert fitted.result_.chosen.score == make().fit(*data).result_.chosen.score


# -- the backbone -----------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_not_changed(data):
    backbone = builders.make_backbone("bert").train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    make = lambda: SpinClassifier(backbone, tokenizer=builders.make_tokenizer(), max_depth=1, **QUICK)  # noqa: E731
    first, second = make().fit(*data), make().fit(*data)
    assert torch.equal(first.model_.score.weight, second.model_.score.weight)
    assert first.model_.spin.depth == 1
    assert backbone.config.num_hidden_layers == len(backbone.encoder.layer) == 3
    assert backbone.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    first.model_.unfreeze_backbone()
    with torch.no_grad():
        for parameter in first.model_.parameters():
            parameter.zero_()  # as a training step would
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_clones_share_a_loaded_model_and_nothing_else(data):
    backbone, tokenizer, kinds = builders.make_backbone("bert"), builders.make_tokenizer(), ["hidden"]
    original = SpinClassifier(backbone, tokenizer=tokenizer, kinds=kinds, Cs=3)
    copied = clone(original.fit(*data))
    assert copied.backbone is backbone
    assert copied.tokenizer is tokenizer
    assert copied.kinds == kinds
    assert copied.kinds is not kinds
    assert copied.get_params() == original.get_params()
    assert not hasattr(copied, "model_")
    assert copied.set_params(Cs=5).get_params()["Cs"] == 5
    assert original.Cs == 3


def test_a_named_backbone_is_loaded_once_until_its_files_change(make, folder, data, monkeypatch, tmp_path):
    import shutil

    from spin_hf import estimator

    moved, loaded = tmp_path / "backbone", []
    shutil.copytree(folder, moved)
    whole = estimator.load_backbone
    monkeypatch.setattr(estimator, "load_backbone", lambda *a: loaded.append(a) or whole(*a))
    cross_val_score(SpinClassifier(moved, **QUICK), *data, cv=3)
    assert len(loaded) == 1
    first = SpinClassifier(moved, **QUICK).fit(*data)
    builders.make_backbone("bert", seed=1).save_pretrained(moved)
    second = SpinClassifier(moved, **QUICK).fit(*data)
    assert len(loaded) == 2
    assert (first.predict_proba(data[0]) != second.predict_proba(data[0])).any()


def test_dtype_and_device(make, data):
    fitted = make(dtype="bfloat16", device="cpu").fit(*data)
    assert fitted.model_.spin.backbone.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="Device 'warp' can't be used"):
        make(device="warp").fit(*data)
    with pytest.raises(CalibrationError, match="Cast the model itself"):
        SpinClassifier(builders.make_backbone("bert"), dtype="bfloat16", tokenizer=builders.make_tokenizer()).fit(*data)


def test_a_loaded_model_without_a_name_needs_a_tokenizer(data):
    with pytest.raises(CalibrationError, match="tokenizer="):
        SpinClassifier(builders.make_backbone("bert")).fit(*data)


# -- with the tools of scikit-learn -----------------------------------------------------------------------------------


def test_cross_validation(make, data):
    X, y = data
    assert cross_val_score(make(), X, y, cv=3).mean() > 0.6
    proba = cross_val_predict(make(), X, y, cv=3, method="predict_proba")
    assert ((proba[:, 1] > 0.5) == (y == "good")).mean() > 0.6
    assert cross_val_score(make(), X, y, cv=2, scoring="roc_auc").mean() > 0.6
    weights = np.where(y == "good", 20.0, 1.0)
    search = GridSearchCV(make(), {"Cs": [2]}, cv=2, error_score="raise").fit(X, y, sample_weight=weights)
    expected = make(Cs=2).fit(X, y, sample_weight=weights)
    np.testing.assert_array_equal(search.predict_proba(X), expected.predict_proba(X))


def test_several_processes_give_the_same(make, data):
    alone = cross_validate(make(), *data, cv=2, return_estimator=True)
    shared = cross_validate(make(), *data, cv=2, return_estimator=True, n_jobs=2)
    assert alone["test_score"].tolist() == shared["test_score"].tolist()
    for one, other in zip(alone["estimator"], shared["estimator"], strict=True):
        np.testing.assert_array_equal(one.predict_proba(data[0]), other.predict_proba(data[0]))


def test_grid_search_in_a_pipeline_reads_each_fold_once(make, data, tmp_path, monkeypatch):
    X, y = data
    shouted = [text.upper() for text in X]  # no word of the vocabulary
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    search = GridSearchCV(
        make_pipeline(lower, make(cache_dir=tmp_path)),
        {"spinclassifier__etas": [[0.5], [1.0]], "spinclassifier__prefer": ["score", "compact"]},
        cv=2,
        error_score="raise",
    ).fit(shouted, y)
    assert len(list(tmp_path.iterdir())) == 3  # two folds and all of it
    assert search.score(shouted, y) > 0.7
    best = search.best_estimator_[-1]
    assert best.result_.settings["etas"] == tuple(search.best_params_["spinclassifier__etas"])


def test_saved_it_is_a_model_like_any_other(make, data, tmp_path):
    fitted = make().fit(*data)
    fitted.save_pretrained(tmp_path / "out")
    classify = pipeline("text-classification", str(tmp_path / "out"))
    assert [row["label"] for row in classify(data[0])] == fitted.predict(data[0]).tolist()
    assert (tmp_path / "out" / "calibration.json").exists()


def test_before_fit(make, tmp_path):
    unfitted = make()
    for call in (
        lambda: unfitted.predict(["a"]),
        lambda: unfitted.predict_proba(["a"]),
        lambda: check_is_fitted(unfitted),
        lambda: unfitted.save_pretrained(tmp_path / "out"),
    ):
        with pytest.raises(NotFittedError):
            call()
    assert not (tmp_path / "out").exists()


def test_real_model_in_cross_validation(minilm_path):
    rows = load_split("train")[:80]
    X, y = [row["text"] for row in rows], [row["label"] for row in rows]
    estimator = SpinClassifier(minilm_path, kinds=["ffn"], poolings=["mean"], max_depth=2)
    scores = cross_val_score(estimator, X, y, cv=2, scoring="f1_macro")
    assert scores.mean() > 0.4  # four labels: by chance 0.25


# -- its own checks ---------------------------------------------------------------------------------------------------

WORDS = np.array(builders.GOOD + builders.BAD + builders.NEUTRAL)


class OnNumbers:
    """scikit-learn checks an estimator with matrices of numbers: here each row becomes a text, a word for each number.

    What scikit-learn demands of numbers themselves is met by its own ``validate_data``.
    """

    def fit(self, X, y, sample_weight=None):
        return super().fit(self.texts(X, reset=True), y, sample_weight)

    def predict(self, X):
        check_is_fitted(self)
        return super().predict(self.texts(X))

    def texts(self, X, reset=False):
        from sklearn.utils.validation import validate_data

        steps = np.round(validate_data(self, X, reset=reset)).astype(int) % 5
        return [" ".join(WORDS[(5 * np.arange(len(row)) + row) % len(WORDS)]) for row in steps]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string, tags.input_tags.one_d_array = True, False, False
        return tags


class ClassifierOnNumbers(OnNumbers, SpinClassifier):
    def predict_proba(self, X):
        check_is_fitted(self)
        return super().predict_proba(self.texts(X))


class RegressorOnNumbers(OnNumbers, SpinRegressor):
    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # a random backbone hardly tells one number of ten
        return tags


def check(estimator, skipped):
    """Run scikit-learn's checks but those that do not apply; returns how many passed."""
    from sklearn.utils.estimator_checks import estimator_checks_generator

    passed = 0
    for subject, run in estimator_checks_generator(estimator, expected_failed_checks=skipped, mark="skip"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(subject)
            passed += 1
        except unittest.SkipTest:
            continue
    return passed


old = pytest.mark.skipif(
    tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 6), reason="scikit-learn before 1.6 has no tags"
)
EITHER = {
    "check_sample_weight_equivalence_on_dense_data": "cv is a number of folds here; the check sets it to splits",
    "check_methods_sample_order_invariance": "demands 1e-9; a float32 forward in other batches agrees to 1e-4",
    "check_methods_subset_invariance": "demands 1e-7; the same",
}


@old
@pytest.mark.parametrize("kind", [SpinClassifier, SpinRegressor])
def test_scikit_learn_checks_what_it_can_of_text_estimators(make, kind):
    assert check(make(kind), {}) >= 1  # of estimators that take no numbers it checks little
    tags = make(kind).__sklearn_tags__()
    assert tags.input_tags.string
    assert tags.target_tags.required
    assert not tags.input_tags.two_d_array


@old
def test_scikit_learn_checks_the_classifier(folder):
    skipped = {
        **EITHER,
        "check_class_weight_classifiers": "weights of 1000 to 0.0001 leave a single class to predict, which is refused",
    }
    assert check(ClassifierOnNumbers(folder, **{**QUICK, "Cs": 2, "etas": [], "max_depth": 1}), skipped) > 55


@old
def test_scikit_learn_checks_the_regressor(folder):
    assert check(RegressorOnNumbers(folder, **{**QUICK, "Cs": 2, "etas": [], "max_depth": 1}), EITHER) > 45


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("X", "error"),
    [
        ("a single text", "X is a str"),
        ({"text": ["a", "b"]}, "X is a dict"),
        (["a"] * 59 + [None], "Row 59 of the input data has no text but None"),
        ([1.5] * 60, "Row 0 of the input data has no text but 1.5"),
        ([("a", "b", "c")] * 60, "one or two columns"),
        ([("a", "b")] * 59 + ["a"], "one or two columns"),
        (np.zeros((60, 4)), "one or two columns"),
        ([""] * 60, "texts of the train data are empty"),
        (["a"] * 59, "inconsistent numbers of samples"),
        (["a"], "n_samples = 1"),
        ([], "0 sample"),
    ],
)
def test_texts_that_do_not_fit(make, data, monkeypatch, X, error):
    monkeypatch.setattr("spin_hf.calibration.calibrate.extract", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises((ValueError, TypeError), match=error):
        make().fit(X, data[1][:1] if len(X) == 1 else data[1])


@pytest.mark.parametrize(
    ("y", "kind", "error"),
    [
        (["a"] * 60, OneClassError, "1 class only, 'a'"),
        (np.linspace(0, 1, 60), ValueError, "Unknown label type: continuous"),
        (np.arange(120).reshape(60, 2), ValueError, "1d array"),
        (["a", None] * 30, LabelTypeError, "of one type, with none missing"),
        (None, ValueError, "y to be passed"),
        ([float("nan"), 1.0] * 30, ValueError, "NaN"),
    ],
)
def test_labels_that_do_not_fit(make, data, y, kind, error):
    with pytest.raises(kind, match=error):
        make().fit(data[0], y)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"class_weight": {"fair": 2.0}}, UnknownLabelError),
        ({"cv": [([0], [1])]}, CalibrationError),
        ({"validation_fraction": 2}, CalibrationError),
        ({"kinds": ["magic"]}, CalibrationError),
        ({"metric": "magic"}, CalibrationError),
    ],
)
def test_options_that_do_not_fit(make, data, options, error):
    with pytest.raises(error):
        make(**options).fit(*data)


@pytest.mark.parametrize("weights", [[1.0] * 59, [0.0] * 60, [-1.0] * 60, [float("nan")] * 60, np.ones((60, 1))])
def test_weights_that_do_not_fit(make, data, weights):
    with pytest.raises(ValueError, match=r"[Ss]ample.weight"):
        make().fit(*data, sample_weight=weights)
