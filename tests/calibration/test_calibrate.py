"""The whole step, on a tiny random backbone whose embeddings alone tell the label."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import BAD, GOOD

from spin_hf import CalibrationResult, SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import CalibrationError, calibrate, probes, stages
from spin_hf.calibration.confidence import Reliability, to_probabilities
from spin_hf.calibration.errors import MissingLabelsError, NonFiniteFeaturesError, TextPairError
from spin_hf.calibration.heads import HeadFitter
from spin_hf.demo import load_split
from spin_hf.prediction import evaluate, predict

QUICK = {"progress": False, "validation_fraction": 0.2, "Cs": [0.05, 0.2], "etas": (0.5, 1.0), "poolings": ["mean"]}
WHOLE = {**QUICK, "Cs": 4, "poolings": ["mean", "max"]}  # two poolings, and penalties that it finds


@pytest.fixture
def rows(sentiment_rows):
    return sentiment_rows["text"], sentiment_rows["label"]


@pytest.fixture
def wrap(bert_backbone):
    def make(**options):
        return SpinForSequenceClassification.from_backbone(copy.deepcopy(bert_backbone), **options)

    return make


def split(data, at=52):
    texts, labels = data
    return (texts[:at], labels[:at]), (texts[at:], labels[at:])


def test_the_model_scores_what_the_result_says(wrap, tokenizer, rows):
    train, held_out = split(rows)
    model = wrap(labels=["bad", "good"])
    before = copy.deepcopy(model.spin.backbone.state_dict())
    result = spin_calibrate(model, tokenizer, train, held_out, **WHOLE)
    scores = evaluate(predict(model, tokenizer, held_out[0]), np.array(held_out[1]))
    assert scores["accuracy"] == pytest.approx(result.chosen.score)
    assert result.chosen.score >= result.baselines["best probe"]
    assert result.chosen.score >= 0.8
    assert result.convergence["head_gap"] <= result.convergence["tol"]
    assert 0 <= result.convergence["worst_gap"] <= 1e-3  # of a head that was tried; the chosen one is solved to tol
    assert result.convergence["unconverged"] == 0
    assert model.spin.depth == result.chosen.depth
    assert model.config.num_features == result.chosen.num_features == model.score.in_features
    for name, weight in model.spin.backbone.state_dict().items():
        assert torch.equal(weight, before[name])
    assert not any(parameter.requires_grad for parameter in model.spin.backbone.parameters())


def test_the_room_that_is_needed_is_said_before_anything_is_read(wrap, tokenizer, rows, capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "extract", stop)
    with pytest.raises(KeyboardInterrupt):
        spin_calibrate(wrap(labels=["bad", "good"]), tokenizer, rows, poolings=["mean"], progress=True)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        rf"{len(rows[0])} texts, [\d,]+ tokens, \d+ taps, 1 poolings: [\d,]+ MB of disk, [\d,]+ MB of memory", said
    )


@pytest.mark.parametrize("multiclass", ["multinomial", "ovr"])
def test_three_classes(wrap, tokenizer, rows, multiclass):
    texts, _ = rows
    labels = [("good" if set(t.split()) & set(GOOD) else "bad") if len(t.split()) > 4 else "short" for t in texts]
    model = wrap()
    result = spin_calibrate(model, tokenizer, (texts, labels), metric="macro_f1", multiclass=multiclass, **QUICK)
    assert list(model.config.id2label.values()) == ["bad", "good", "short"]
    assert result.chosen.score > 0.5
    assert model.score.out_features == 3


def test_multi_label(wrap, tokenizer, rows):
    texts, _ = rows
    labels = [[word for word in ("the", "a", "film", "good") if word in t.split()] for t in texts]
    model = wrap(problem_type="multi_label_classification")
    train, held_out = split((texts, labels))
    result = spin_calibrate(model, tokenizer, train, held_out, class_weight="balanced", **QUICK)
    prediction = predict(model, tokenizer, held_out[0])
    truth = np.array([[name in row for name in prediction.names] for row in held_out[1]]).astype(int)
    assert evaluate(prediction, truth)["micro_f1"] == pytest.approx(result.chosen.score)
    assert len(model.config.class_weights) == len(prediction.names) == 4


def test_regression(wrap, tokenizer, rows):
    texts, _ = rows
    values = [float(len(t.split())) for t in texts]
    model = wrap(problem_type="regression")
    train, held_out = split((texts, values))
    result = spin_calibrate(model, tokenizer, train, held_out, **QUICK)
    prediction = predict(model, tokenizer, held_out[0])
    assert evaluate(prediction, np.array(held_out[1]))["r2"] == pytest.approx(result.chosen.score, abs=1e-4)
    assert model.score.out_features == 1


def test_sentence_pairs(wrap, tokenizer, rows):
    texts, labels = rows
    pairs = [(a, b) for a, b in zip(texts, reversed(texts), strict=True)]
    model = wrap()
    train, held_out = split((pairs, labels))
    result = spin_calibrate(model, tokenizer, train, held_out, **QUICK)
    first, second = map(list, zip(*held_out[0], strict=True))
    scores = evaluate(predict(model, tokenizer, first, second), np.array(held_out[1]))
    with pytest.raises(TextPairError, match="pairs="):
        predict(model, tokenizer, first)
    assert scores["accuracy"] == pytest.approx(result.chosen.score)


def test_without_eval_it_splits_or_cross_validates(wrap, tokenizer, rows):
    held = spin_calibrate(wrap(), tokenizer, rows, **QUICK)
    assert (held.data["train_rows"], held.data["eval_rows"]) == (64, 16)
    folds = spin_calibrate(wrap(), tokenizer, rows, cv=3, **QUICK)
    assert (folds.data["train_rows"], folds.data["eval_rows"]) == (80, 80)
    assert "3-fold" in str(folds)
    with pytest.raises(CalibrationError, match="not both"):
        spin_calibrate(wrap(), tokenizer, rows, rows, cv=3, **QUICK)
    with pytest.raises(MissingLabelsError, match="at least 60 rows of each class"):
        spin_calibrate(wrap(), tokenizer, rows, cv=60, **QUICK)


def test_of_few_rows_the_widest_candidate_is_taken(wrap, tokenizer, rows):
    model, scored = wrap(), wrap()
    few = spin_calibrate(model, tokenizer, rows, cv=3, **QUICK)
    by_score = spin_calibrate(scored, tokenizer, rows, cv=3, prefer="score", **QUICK)
    assert (few.settings["prefer"], by_score.settings["prefer"]) == ("widest", "score")
    assert few.chosen == few.best
    most = max(by_score.candidates, key=lambda c: c.num_features)
    assert few.chosen.num_features == most.num_features == model.config.num_features
    assert {c.name for c in few.candidates if c.probe is None} == {few.chosen.name}
    assert {c.name for c in few.candidates if c.probe} == {c.name for c in by_score.candidates if c.probe}
    with_exits = spin_calibrate(wrap(), tokenizer, rows, cv=3, exits=True, **QUICK)
    assert with_exits.chosen.name == few.chosen.name
    assert len(with_exits.candidates) == len(by_score.candidates)
    limited = spin_calibrate(wrap(), tokenizer, rows, cv=3, max_features=most.num_features - 1, **QUICK)
    assert limited.settings["prefer"] == "score"
    assert len(limited.candidates) > len(few.candidates)
    assert by_score.chosen.num_features < few.chosen.num_features
    assert by_score.chosen.score >= few.chosen.score


@pytest.mark.parametrize("options", [{"etas": [0.2]}, {"etas": [0.1]}, {"etas": [0.1], "max_features": 10}])
def test_the_widest_head_is_taken_and_no_probe(wrap, tokenizer, rows, options):
    result = spin_calibrate(wrap(), tokenizer, rows, cv=3, **{**QUICK, **options})
    assert result.settings["prefer"] == "widest"
    assert [c.name for c in result.candidates if c.probe is None] == [result.chosen.name]


@pytest.mark.parametrize("options", [{"etas": []}, {"preset": "paper", "Cs": [0.5]}])
def test_a_wish_for_the_widest_that_can_not_be_met_is_told(wrap, tokenizer, rows, capsys, options):
    options = {**QUICK, **options, "progress": True}
    result = spin_calibrate(wrap(), tokenizer, rows, cv=3, prefer="widest", **options)
    assert result.settings["prefer"] == "score"
    assert "the score decides" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("options", "found"), [({"cv": 3}, "widest"), ({"validation_fraction": 0.2}, "score")])
def test_what_is_preferred_is_told(wrap, tokenizer, rows, monkeypatch, options, found):
    few = {"Cs": [0.5], "etas": [1.0], "kinds": ["hidden"], "poolings": ["mean"], "max_depth": 1, "progress": False}
    assert spin_calibrate(wrap(), tokenizer, rows, **options, **few).settings["prefer"] == found
    assert spin_calibrate(wrap(), tokenizer, rows, rows, **few).settings["prefer"] == "score"
    monkeypatch.setattr(probes, "FEW_ROWS", 80)
    assert spin_calibrate(wrap(), tokenizer, rows, **options, **few).settings["prefer"] == "score"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("two", {}),
        ("two", {"etas": []}),
        ("three", {"multiclass": "ovr"}),
        ("three", {"preset": "paper", "Cs": [1.0]}),
        ("tags", {"Cs": [0.2, 1.0]}),
    ],
)
def test_confidence_is_that_of_the_model(wrap, tokenizer, rows, kind, options):
    """What was measured on held-out rows is what the model serves there, temperature and all."""
    texts, sentiment = rows
    length = [len(t.split()) % 3 for t in texts]
    tags = [[word for word in ("the", "a", "good") if word in t.split()] for t in texts]
    labels = {"two": sentiment, "three": length, "tags": tags}[kind]
    problem_type = "multi_label_classification" if kind == "tags" else None
    model = wrap(problem_type=problem_type)
    train, held_out = split((texts, labels))
    record = spin_calibrate(model, tokenizer, train, held_out, **{**QUICK, **options}).confidence
    assert model.config.logit_temperature == record.temperature
    prediction = predict(model, tokenizer, held_out[0])
    if kind == "tags":
        truth = np.array([[name in row for name in prediction.names] for row in held_out[1]]).astype(int)
    else:
        truth = np.array(held_out[1])
    raw = to_probabilities(prediction.logits * record.temperature, multi_label=kind == "tags")
    for name in ("negative_log_likelihood", "brier_score"):
        expected = getattr(record.before, name)
        assert getattr(Reliability.of(truth, raw), name) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for point in record.curve:
        answered = predict(model, tokenizer, held_out[0], min_confidence=point.min_confidence)
        assert 1 - answered.abstained.mean() == pytest.approx(point.coverage)


@pytest.mark.parametrize("etas", [(0.5, 1.0), []])
def test_confidence_of_folds_is_out_of_fold(wrap, tokenizer, rows, etas):
    texts, labels = rows
    noisy = [label if i % 7 else 1 - label for i, label in enumerate(labels)]  # none is right on all
    result = spin_calibrate(wrap(), tokenizer, (texts, noisy), cv=3, **{**QUICK, "etas": etas})
    assert sum(b.size for b in result.confidence.before.bins) == len(texts)
    assert result.confidence.curve[-1].accuracy == pytest.approx(result.chosen.score, abs=2 / len(texts))
    assert result.chosen.score < 0.95


def test_regression_has_no_confidence(wrap, tokenizer, rows):
    texts, _ = rows
    model = wrap(problem_type="regression")
    result = spin_calibrate(model, tokenizer, (texts, [float(len(t)) for t in texts]), **QUICK)
    assert result.confidence is None
    assert model.config.logit_temperature == 1.0
    assert "calibration error" not in str(result)


def test_same_input_same_model_to_the_bit(wrap, tokenizer, rows, tmp_path):
    models = [wrap(), wrap(), wrap()]
    spin_calibrate(models[0], tokenizer, rows, **QUICK)
    spin_calibrate(models[1], tokenizer, rows, cache_dir=tmp_path, **QUICK)
    spin_calibrate(models[2], tokenizer, rows, cache_dir=tmp_path, **QUICK)  # features from the cache
    for model in models[1:]:
        assert model.config.features == models[0].config.features
        for name, value in model.state_dict().items():
            assert torch.equal(value, models[0].state_dict()[name]), name


def test_a_cache_serves_other_settings_without_another_forward(wrap, tokenizer, rows, tmp_path, monkeypatch):
    spin_calibrate(wrap(), tokenizer, rows, cache_dir=tmp_path, **QUICK)
    model = wrap()
    monkeypatch.setattr(model.spin, "run_backbone", lambda *a, **k: pytest.fail("the backbone ran again"))
    options = {**QUICK, "Cs": [0.1], "metric": "matthews"}
    spin_calibrate(model, tokenizer, rows, cache_dir=tmp_path, **options)


def test_texts_that_are_batched_otherwise_have_a_store_of_their_own(wrap, tokenizer, rows, tmp_path, monkeypatch):
    """As when a backbone's code changes, or another device can do less: the first store is neither used nor damaged."""
    first, second = wrap(), wrap()
    spin_calibrate(first, tokenizer, rows, cache_dir=tmp_path, **QUICK)
    (kept,) = tmp_path.iterdir()
    about = (kept / "store.json").read_text()
    (kept / "store.json").write_text("{")  # nothing tells what was found the first time
    files = {path: path.read_bytes() for path in kept.glob("*.f32")}
    monkeypatch.setattr(calibrate, "find_batching", lambda *arguments: "equal_length")
    spin_calibrate(second, tokenizer, rows, cache_dir=tmp_path, **QUICK)
    assert (first.config.batching, second.config.batching) == ("padded", "equal_length")
    assert len(list(tmp_path.iterdir())) == 2
    assert all(path.read_bytes() == before for path, before in files.items())
    (kept / "store.json").write_text(about)
    again = wrap()
    spin_calibrate(again, tokenizer, rows, cache_dir=tmp_path, **QUICK)
    assert again.config.batching == "equal_length"  # of what is kept the most careful
    for name, value in again.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_killed_calibration_goes_on(wrap, tokenizer, rows, tmp_path, monkeypatch):
    whole = wrap()
    spin_calibrate(whole, tokenizer, rows, batch_tokens=64, **QUICK)
    monkeypatch.setattr(calibrate, "find_batching", lambda *arguments: "padded")  # whose forwards are not counted
    model = wrap()
    run, calls = model.spin.run_backbone, []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    monkeypatch.setattr(model.spin, "run_backbone", dying)
    with pytest.raises(KeyboardInterrupt):
        spin_calibrate(model, tokenizer, rows, batch_tokens=64, cache_dir=tmp_path, **QUICK)
    again = wrap()
    run_again, later = again.spin.run_backbone, []
    monkeypatch.setattr(again.spin, "run_backbone", lambda *a, **k: (later.append(1), run_again(*a, **k)))
    spin_calibrate(again, tokenizer, rows, batch_tokens=64, cache_dir=tmp_path, **QUICK)
    batches = calibrate.plan_batches([len(ids) for ids in tokenizer(rows[0])["input_ids"]], 64)
    assert len(later) == len(batches) - 4
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


@pytest.mark.parametrize(
    ("stage", "together"),
    [("fit_probes", 1), ("fit_probes", 16), ("HeadFitter.fit", 16), ("HeadFitter.fit_final", 16)],
)
def test_a_calibration_killed_after_the_extraction_goes_on(
    stage, together, wrap, tokenizer, rows, tmp_path, monkeypatch
):
    options = WHOLE if stage.endswith("final") else QUICK  # a head of several taps must win
    monkeypatch.setattr(probes, "_MOST_TOGETHER", together)  # of a large model one tap comes after another
    whole = wrap()
    expected = spin_calibrate(whole, tokenizer, rows, **options)
    owner, name = (HeadFitter, stage.split(".")[1]) if "." in stage else (stages, stage)
    work, calls = getattr(owner, name), []
    groups = {1: 7, 16: 2}[together]  # of the taps: those of a width
    stop_at = {"fit_probes": groups // 2 + 1, "fit": 4, "fit_final": 1}[name]

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return work(*arguments, **options)

    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(KeyboardInterrupt):
        spin_calibrate(wrap(), tokenizer, rows, cache_dir=tmp_path, **options)
    monkeypatch.setattr(owner, name, work)
    kept = sorted(tmp_path.rglob("*.safetensors"))
    damaged = bytearray(kept[-1].read_bytes())
    damaged[-3] ^= 1
    kept[-1].write_bytes(damaged)  # one of them is not to be trusted
    later = []
    for where, called in ((stages, "fit_probes"), (HeadFitter, "fit")):
        run = getattr(where, called)
        monkeypatch.setattr(
            where, called, lambda *a, run=run, called=called, **k: (later.append(called), run(*a, **k))[1]
        )
    model = wrap()
    result = spin_calibrate(model, tokenizer, rows, cache_dir=tmp_path, **options)
    heads = 3 * 3  # kinds x depths, both of the kinds included
    left = {"fit_probes": (groups - stop_at + 1, heads), "fit": (0, heads - 3), "fit_final": (0, 0)}[name]
    assert (later.count("fit_probes"), later.count("fit")) == (left[0] + 1, left[1])
    for key, value in model.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key
    assert {**result.to_dict(), "seconds": 0} == {**expected.to_dict(), "seconds": 0}


def test_evaluation_labels_choose_but_do_not_train(wrap, tokenizer, rows):
    train, held_out = split(rows)
    flipped = (held_out[0], [1 - label for label in held_out[1]])
    options = {**QUICK, "Cs": [0.5], "etas": [], "kinds": ["hidden"], "poolings": ["mean"], "max_depth": 1}
    models = [wrap(), wrap()]
    results = [
        spin_calibrate(m, tokenizer, train, e, **options) for m, e in zip(models, (held_out, flipped), strict=True)
    ]
    fitted = [{(p["tap"], p["C"]): p["num_features"] for p in result.probes} for result in results]
    assert fitted[0] == fitted[1]
    assert results[0].baselines != results[1].baselines


def test_limits_hold_and_compact_is_smaller(wrap, tokenizer, rows):
    train, held_out = split(rows)
    free = spin_calibrate(wrap(), tokenizer, train, held_out, **QUICK)
    small = spin_calibrate(wrap(), tokenizer, train, held_out, max_features=6, max_depth=2, **QUICK)
    assert all(c.num_features <= 6 and c.depth <= 2 for c in small.candidates)
    compact = spin_calibrate(wrap(), tokenizer, train, held_out, prefer="compact", **QUICK)
    assert compact.best.score == free.chosen.score
    assert compact.chosen.num_features <= compact.best.num_features
    assert f"Frontier: {compact.frontier[0].score:.4f} by" in str(compact)
    marked = compact.to_pandas().query("on_frontier")
    assert list(marked["score"]) == sorted((c.score for c in compact.frontier), reverse=True)
    scores = [c.score for c in free.frontier]
    assert scores == sorted(scores)
    options = {**QUICK, "Cs": [50.0], "kinds": ["hidden"], "max_depth": 1}
    with pytest.raises(CalibrationError, match="max_features"):
        spin_calibrate(wrap(), tokenizer, train, held_out, max_features=1, **options)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_candidates_with_too_many_features_are_counted(wrap, tokenizer, rows, preset):
    options = {"preset": preset, "prefer": "score", "kinds": ["hidden"], "poolings": ["mean"], "Cs": [0.1, 1.0]}
    options["progress"] = False
    every = spin_calibrate(wrap(), tokenizer, rows, **options)
    assert every.skipped == 0
    assert "left out" not in str(every)
    limit = sorted({c.num_features for c in every.candidates})[len(every.candidates) // 3]
    some = spin_calibrate(wrap(), tokenizer, rows, max_features=limit, **options)
    assert 0 < some.skipped == sum(c.num_features > limit for c in every.candidates)
    assert len(some.candidates) + some.skipped == len(every.candidates)
    assert f"{some.skipped} more were left out: they have more than max_features={limit} features." in str(some)


def test_weights_of_rows_and_classes_matter(wrap, tokenizer, rows):
    texts, labels = rows
    rare = [i for i, y in enumerate(labels) if y == 0 or i % 8 == 1]
    data = ([texts[i] for i in rare], [labels[i] for i in rare])
    plain, balanced, dictionary, rowwise = (wrap() for _ in range(4))
    options = {**QUICK, "kinds": ["hidden"], "poolings": ["mean"], "Cs": [0.3], "etas": [1.0], "depths": [3]}
    spin_calibrate(plain, tokenizer, data, rows, **options)
    spin_calibrate(balanced, tokenizer, data, rows, class_weight="balanced", **options)
    weights = balanced.config.class_weights
    assert weights[1] > weights[0]
    spin_calibrate(dictionary, tokenizer, data, rows, class_weight=dict(enumerate(weights)), **options)
    spin_calibrate(rowwise, tokenizer, data, rows, sample_weight=[weights[y] for y in data[1]], **options)
    assert torch.equal(balanced.score.weight, dictionary.score.weight)
    assert not torch.equal(balanced.score.bias, plain.score.bias)
    assert rowwise.config.class_weights is None
    assert predict(balanced, tokenizer, texts).labels.sum() > predict(plain, tokenizer, texts).labels.sum()


def test_paper_preset_keeps_its_rules(wrap, tokenizer, rows):
    result = spin_calibrate(
        wrap(),
        tokenizer,
        rows,
        preset="paper",
        Cs=[1.0, 10.0],
        etas=[0.3, 1.0],
        poolings=["mean", "max"],
        progress=False,
    )
    assert {c.kind for c in result.candidates} <= {"hidden", "ffn"}
    assert {c.pooling for c in result.candidates} <= {"mean", "max"}
    assert {c.C for c in result.candidates} <= {1.0, 10.0}
    assert {c.depth for c in result.candidates} == {3}
    assert all(c.probe is None for c in result.candidates)


def test_a_metric_without_a_number_is_refused(wrap, tokenizer, rows):
    def broken(truth, predictions):
        return float("nan")

    train, held_out = split(rows)
    with pytest.raises(CalibrationError, match="broken gave nan on 8 evaluation rows"):
        spin_calibrate(wrap(), tokenizer, train, (held_out[0][:8], held_out[1][:8]), metric=broken, **QUICK)


def test_grids_may_be_arrays(wrap, tokenizer, rows):
    options = {**QUICK, "Cs": np.array([0.05, 0.5]), "etas": np.linspace(0.5, 1, 2), "depths": np.array([3])}
    result = spin_calibrate(wrap(), tokenizer, rows, **options)
    assert {c.eta for c in result.candidates if c.probe is None} <= {0.5, 1.0}


def test_result_reads_back(wrap, tokenizer, rows, tmp_path):
    result = spin_calibrate(wrap(), tokenizer, rows, **QUICK)
    result.save(tmp_path / "calibration.json")
    again = CalibrationResult.load(tmp_path / "calibration.json")
    assert str(again) == str(result)
    assert again.chosen == result.chosen
    assert again.confidence == result.confidence
    assert again.differences(result) == {}
    other = replace(again, candidates=again.candidates[:1], metric="r2", seconds={})
    told = other.differences(again)
    assert told["metric"] == ("r2", "accuracy")
    assert told["candidates.1.score"] == (None, again.candidates[1].score)
    assert not [name for name in told if not name.startswith(("metric", "candidates."))]
    older = json.loads((tmp_path / "calibration.json").read_text())
    del older["confidence"]
    (tmp_path / "calibration.json").write_text(json.dumps(older))
    assert CalibrationResult.load(tmp_path / "calibration.json").confidence is None
    frame = result.to_pandas()
    assert len(frame) == len(result.candidates)
    assert frame["score"].is_monotonic_decreasing
    for stage in ("tokenize", "extract", "probe", "heads", "total"):
        assert result.seconds[stage] >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["attention"]}, "kinds"),
        ({"Cs": ["a"]}, "Cs must be numbers"),
        ({"max_features": "9"}, "max_features must be a whole number"),
        ({"preset": "paper", "etas": []}, "give it etas"),
        ({"poolings": []}, "poolings"),
        ({"etas": [0.0]}, "eta"),
        ({"Cs": [-1.0]}, "Cs"),
        ({"depths": [9]}, "3 blocks"),
        ({"metric": "r2"}, "r2"),
        ({"preset": "best"}, "preset"),
        ({"prefer": "small"}, "prefer"),
        ({"class_weight": {"odd": 2.0}}, "odd"),
        ({"sample_weight": [1.0]}, "sample_weight"),
        ({"multiclass": "pairs"}, "multiclass"),
        ({"depths": [1.5]}, "whole numbers"),
        ({"etas": 0.5}, "etas must be a list"),
        ({"Cs": 0.5}, "Cs must be a list"),
        ({"class_weight": {1: "x"}}, "positive"),
        ({"sample_weight": ["a"] * 80}, "positive numbers"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"batch_tokens": "4096"}, "batch_tokens must be a whole number"),
        ({"max_features": 0}, "max_features must be at least 1"),
        ({"tol": -1.0}, "tol must be a number between 0 and 1"),
        ({"tol": 0}, "tol must be a number between 0 and 1"),
        ({"cv": 2.5}, "cv, the number of folds, must be a whole number; got 2.5"),
        ({"cv": True}, "cv, the number of folds, must be a whole number; got True"),
        ({"cv": 1}, "cv, the number of folds, must be at least 2"),
        ({"validation_fraction": "0.2"}, "validation_fraction must be a number between 0 and 1"),
        ({"validation_fraction": 1.0}, "validation_fraction must be a number between 0 and 1"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"max_length": "32"}, "max_length must be a whole number"),
        ({"max_length": 0}, "more than the 2 special tokens"),
        ({"max_length": 2}, "more than the 2 special tokens"),
        ({"max_length": 65}, "at most 64"),
    ],
)
def test_options_are_checked_before_the_work(wrap, tokenizer, rows, monkeypatch, options, message):
    monkeypatch.setattr(calibrate, "extract", lambda *a: pytest.fail("work began"))
    with pytest.raises(CalibrationError, match=message):
        spin_calibrate(wrap(), tokenizer, rows, progress=False, **options)


@pytest.mark.parametrize(("given", "found"), [(None, "None"), ("bert-base-uncased", "a str")])
def test_a_tokenizer_that_is_none(wrap, rows, given, found):
    with pytest.raises(CalibrationError, match=rf"tokenizer is {found}\. Pass the backbone's own: AutoTokenizer"):
        spin_calibrate(wrap(), given, rows, **QUICK)


def test_a_second_calibration_is_refused(wrap, tokenizer, rows):
    model = wrap()
    spin_calibrate(model, tokenizer, rows, **QUICK)
    with pytest.raises(CalibrationError, match="calibrated already"):
        spin_calibrate(model, tokenizer, rows, **QUICK)


def test_damaged_weights_are_named_by_tap(wrap, tokenizer, rows):
    model = wrap()
    with torch.no_grad():
        model.spin.layout.module(model.spin.backbone, 2).output.dense.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteFeaturesError, match=r"Tap hidden\.2"):
        spin_calibrate(model, tokenizer, rows, **QUICK)


def test_long_texts_are_cut_and_counted(wrap, tokenizer, rows):
    texts, labels = rows
    texts = [f"{text} {' '.join(['film'] * 90)}" if i < 3 else text for i, text in enumerate(texts)]
    model = wrap()
    result = spin_calibrate(model, tokenizer, (texts, labels), **QUICK)
    assert (result.data["truncated"], result.data["max_length"]) == (3, 64)
    assert "3 texts were cut to 64 tokens" in str(result)
    assert predict(model, tokenizer, texts).truncated == 3


def test_real_model_beats_its_last_layer(minilm_path):
    from transformers import AutoTokenizer

    train, held_out = load_split("train")[:160], load_split("validation")[:100]
    model = SpinForSequenceClassification.from_backbone(minilm_path)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    options = {"poolings": ["mean"], "kinds": ["hidden"], "Cs": [0.05, 0.1], "etas": [0.6]}
    result = spin_calibrate(model, tokenizer, train, held_out, progress=False, **options)
    assert result.chosen.score > result.baselines["last layer (mean)"]
    assert set(BAD).isdisjoint(model.config.id2label.values())


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    "places",
    [
        {"embeddings": "cpu", "encoder.layer.0": "disk", "encoder.layer.1": "cpu", "encoder.layer.2": "disk"},
        {"embeddings": "disk", "encoder": "disk"},
    ],
)
def test_a_backbone_spread_by_a_device_map(places, wrap, tokenizer, rows, bert_backbone, tmp_path):
    """On the CPU "disk" stands for all places where weights are not at hand between their uses."""
    plain = wrap()
    expected = spin_calibrate(plain, tokenizer, rows, cache_dir=tmp_path / "plain", **QUICK)
    bert_backbone.save_pretrained(tmp_path / "backbone")
    model = SpinForSequenceClassification.from_backbone(
        tmp_path / "backbone", device_map={**places, "pooler": "cpu"}, offload_folder=str(tmp_path / "offload")
    )
    assert any(weight.is_meta for weight in model.parameters())
    result = spin_calibrate(model, tokenizer, rows, cache_dir=tmp_path / "spread", **QUICK)
    stores = [next((tmp_path / name).iterdir()) for name in ("plain", "spread")]
    assert stores[0].name == stores[1].name  # one fingerprint, wherever the weights are
    for path in stores[0].glob("*.f32"):
        assert path.read_bytes() == (stores[1] / path.name).read_bytes(), path.name
    assert result.candidates == expected.candidates
    batch = tokenizer(rows[0][:8], padding=True, return_tensors="pt")
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    for each, name in ((plain, "saved"), (model, "saved spread")):
        each.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "saved spread")]
    assert files[0] == files[1]
