"""The metrics as modules of ``evaluate``: equal to scikit-learn's, loaded without a hub, inside its evaluator."""

import datasets
import evaluate
import numpy as np
import pytest
import torch
from builders import make_sentiment_rows, make_tokenizer
from sklearn import metrics as sklearn_metrics

import spin_hf.metrics
from spin_hf.calibration.confidence import PROBABILITY_METRICS
from spin_hf.calibration.errors import CalibrationError, ConfidenceError
from spin_hf.calibration.task import METRICS

PREDICTED, TRUE = [0, 1, 1, 2, 0, 2], [0, 1, 2, 2, 1, 2]
EXPECTED = {
    "accuracy": sklearn_metrics.accuracy_score(TRUE, PREDICTED),
    "macro_f1": sklearn_metrics.f1_score(TRUE, PREDICTED, average="macro"),
    "micro_f1": sklearn_metrics.f1_score(TRUE, PREDICTED, average="micro"),
    "matthews": sklearn_metrics.matthews_corrcoef(TRUE, PREDICTED),
    "r2": sklearn_metrics.r2_score(TRUE, PREDICTED),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def by_path(name):
    return evaluate.load(spin_hf.metrics.__file__, name)


def test_every_metric_of_calibration_is_there():
    assert set(EXPECTED) == set(METRICS)
    assert set(spin_hf.metrics.NAMES) == {*METRICS, *PROBABILITY_METRICS}


@pytest.mark.parametrize("load", [spin_hf.metrics.load, by_path])
@pytest.mark.parametrize("name", EXPECTED)
def test_metrics_of_predictions(load, name):
    metric = load(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=PREDICTED, references=TRUE) == {name: pytest.approx(EXPECTED[name])}
    metric.add_batch(predictions=PREDICTED[:4], references=TRUE[:4])
    metric.add_batch(predictions=PREDICTED[4:], references=TRUE[4:])
    assert metric.compute() == {name: pytest.approx(EXPECTED[name])}


def test_names_and_indicators():
    names = np.array(["x", "y", "z"])
    found = spin_hf.metrics.load("macro_f1").compute(predictions=names[PREDICTED], references=names[TRUE])
    assert found["macro_f1"] == pytest.approx(EXPECTED["macro_f1"])
    given, true = [[1, 0], [0, 1], [1, 1]], [[1, 0], [1, 1], [0, 1]]
    found = spin_hf.metrics.load("micro_f1").compute(predictions=given, references=true)
    assert found["micro_f1"] == pytest.approx(sklearn_metrics.f1_score(true, given, average="micro"))


@pytest.mark.parametrize("load", [spin_hf.metrics.load, by_path])
@pytest.mark.parametrize("labels", [[0, 1, 1], [[1, 0], [0, 1], [1, 1]]])
def test_metrics_of_probabilities(load, labels):
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    for name, function in PROBABILITY_METRICS.items():
        found = load(name).compute(prediction_scores=scores, references=labels)
        assert found == {name: pytest.approx(function(np.array(labels), scores))}


def test_several_at_once():
    both = evaluate.combine([spin_hf.metrics.load(name) for name in ("accuracy", "matthews")])
    assert both.compute(predictions=PREDICTED, references=TRUE) == {
        name: pytest.approx(EXPECTED[name]) for name in ("accuracy", "matthews")
    }


@pytest.mark.parametrize(
    ("scores", "references", "message"),
    [
        ([[2.0, -1.0]], [0], "softmax the logits first"),
        ([[0.5, 0.5]], [2], "between 0 and 1"),
        ([[0.5, 0.5]], [[0, 1, 1]], r"\(1, 2\) and \(1, 3\)"),
    ],
)
def test_mistakes_of_probabilities(scores, references, message):
    metric = spin_hf.metrics.load("expected_calibration_error")
    with pytest.raises(ConfidenceError, match=message):
        metric.compute(prediction_scores=scores, references=references)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(CalibrationError, match=r"'f1'. Choose from accuracy, .*metrics.load\(\"accuracy\"\)"):
        spin_hf.metrics.load("f1")
    with pytest.raises(CalibrationError, match="Choose from"):
        evaluate.load(spin_hf.metrics.__file__)


def test_inside_evaluates_evaluator(bert_backbone, calibrated, tmp_path):
    """By folder, and as a model with its tokenizer; label ids with a mapping, and label names without one."""
    tokenizer = make_tokenizer()
    model = calibrated(bert_backbone, labels=["bad", "good"])
    rows = make_sentiment_rows(24)
    with torch.no_grad():
        logits = model(**tokenizer(rows["text"], return_tensors="pt", padding=True)).logits
        model.score.bias[0] -= (logits[:, 0] - logits[:, 1]).median() - 1e-3  # about as many of each
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    by_id = datasets.Dataset.from_dict(rows)
    by_name = by_id.remove_columns("label").add_column("label", [["bad", "good"][i] for i in rows["label"]])
    predicted = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in rows["text"]]
    assert len(set(predicted)) == 2
    evaluator = evaluate.evaluator("text-classification")
    for name in ("macro_f1", "matthews"):
        expected = pytest.approx(METRICS[name][0](np.array(rows["label"]), np.array(predicted)))
        metric = spin_hf.metrics.load(name)
        mapping = model.config.label2id
        folder = str(tmp_path / "model")
        assert evaluator.compute(folder, by_name, metric=metric)[name] == expected
        assert evaluator.compute(folder, by_id, metric=metric, label_mapping=mapping)[name] == expected
        given = evaluator.compute(model, by_id, metric=by_path(name), tokenizer=tokenizer, label_mapping=mapping)
        assert given[name] == expected
