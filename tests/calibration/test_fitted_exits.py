"""``spin_calibrate(..., exits=True)``: which exits there are, how good they are, and that nothing else changes."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from builders import make_backbone, make_batch, make_sentiment_rows, make_tokenizer

from spin_hf import CalibrationResult, SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import CalibrationError
from spin_hf.calibration import exits as stage
from spin_hf.prediction import evaluate, predict

QUICK = {"progress": False, "poolings": ["mean", "max"], "validation_fraction": 0.2, "Cs": 4, "etas": (0.5, 0.8, 1.0)}


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


@pytest.fixture(scope="module")
def both():
    """Models and results of one calibration with exits and one without."""
    found = []
    for exits in (True, False):
        model = SpinForSequenceClassification.from_backbone(make_backbone("bert"))
        data = make_sentiment_rows()
        rows = split((data["text"], data["label"]))
        found.append((model, spin_calibrate(model, make_tokenizer(), *rows, exits=exits, **QUICK)))
    return found


@pytest.fixture
def made(both):
    return copy.deepcopy(both[0][0]), both[0][1]


@pytest.fixture
def plain(both):
    return copy.deepcopy(both[1][0]), both[1][1]


def test_the_chosen_head_is_what_it_would_be(made, plain):
    (model, result), (plain, expected) = made, plain
    assert (result.chosen, result.candidates, result.kept) == (expected.chosen, expected.candidates, expected.kept)
    own, whole = plain.state_dict(), model.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in own.items())
    assert {name.split(".")[0] for name in whole.keys() - own.keys()} == {"exits", "spin"}
    assert torch.equal(model(**make_batch()).logits, plain(**make_batch()).logits)
    assert (result.blocks, model.spin.depth, expected.blocks) == (3, 3, plain.spin.depth)
    assert plain.spin.depth < 3  # so that it does cost blocks here
    model.keep_exit(None)
    assert model.spin.depth == plain.spin.depth
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == plain.config.to_dict()


def test_an_exit_for_each_depth_and_eta(made):
    model, result = made
    entries = model.config.exits
    assert [(e["depth"], e["eta"]) for e in entries] == [(d, eta) for d in (1, 2, 3) for eta in (0.5, 0.8, 1.0)]
    for entry, candidate in zip(entries, result.exits, strict=True):
        assert (candidate.kind, candidate.pooling) == (result.chosen.kind, result.chosen.pooling)
        for name in ("depth", "eta", "num_features", "score"):
            assert entry[name] == getattr(candidate, name)
    assert result.convergence["exits_gap"] <= result.convergence["tol"]
    columns = [set(head.columns.tolist()) for head in model.exits.heads]
    for small, first in zip(entries, columns, strict=True):
        for large, second in zip(entries, columns, strict=True):
            if small["depth"] <= large["depth"] and small["eta"] <= large["eta"]:
                assert first <= second
    assert set.union(*columns) == set(range(sum(entry["count"] for entry in model.config.exit_features)))


def test_the_chosen_head_is_one_of_them(made):
    model, result = made
    number = next(i for i, e in enumerate(result.exits) if (e.depth, e.eta) == (result.chosen.depth, result.chosen.eta))
    assert torch.equal(model(**make_batch(), exit=number).logits, model(**make_batch()).logits)


def truth(names, labels):
    """As ``evaluate`` takes them."""
    if isinstance(labels[0], list):
        return np.array([[name in row for name in names] for row in labels]).astype(int)
    return np.array(labels if isinstance(labels[0], float) else [list(names).index(str(label)) for label in labels])


@pytest.mark.parametrize(
    ("kind", "options", "metric"),
    [
        ("two", {}, "accuracy"),
        ("two", {"cv": 3}, "accuracy"),
        ("two", {"prefer": "compact"}, "accuracy"),
        ("three", {"multiclass": "ovr"}, "accuracy"),
        ("three", {"preset": "paper", "Cs": [0.5, 1.0]}, "accuracy"),
        ("tags", {"class_weight": "balanced"}, "micro_f1"),
        ("numbers", {}, "r2"),
        ("pairs", {}, "accuracy"),
        ("windows", {"windows": True, "max_length": 8}, "accuracy"),
    ],
)
def test_scores_are_those_of_the_exits(kind, options, metric, wrap, tokenizer, rows):
    """For every task and way to validate; and each exit, kept, is the classifier that answers alike."""
    texts, sentiment = rows
    labels = {
        "three": [str(len(text.split()) % 3) for text in texts],
        "tags": [[word for word in ("the", "a", "film", "good") if word in text.split()] for text in texts],
        "numbers": [float(len(text.split())) for text in texts],
    }.get(kind, sentiment)
    problem = {"tags": "multi_label_classification", "numbers": "regression"}.get(kind)
    given = list(zip(texts, reversed(texts), strict=True)) if kind == "pairs" else texts
    model = wrap(problem_type=problem, **({} if kind in ("tags", "numbers", "three") else {"labels": ["0", "1"]}))
    train, held_out = split((given, labels))
    data = [(given, labels)] if "cv" in options else [train, held_out]
    result = spin_calibrate(model, tokenizer, *data, exits=True, **{**QUICK, "poolings": ["max"], **options})
    assert len(result.exits) >= 3
    first, second = map(list, zip(*held_out[0], strict=True)) if kind == "pairs" else (held_out[0], None)
    for number, (entry, candidate) in enumerate(zip(model.config.exits, result.exits, strict=True)):
        found = predict(model, tokenizer, first, second, exit=number)
        if "cv" not in options:
            scores = evaluate(found, truth(found.names, held_out[1]))
            assert scores[metric] == pytest.approx(candidate.score, abs=1e-4)
        if number % 3 == 0:
            one = copy.deepcopy(model)
            one.keep_exit(number)
            assert one.config.logit_temperature == entry["temperature"]
            assert (one.spin.depth, one.config.num_features) == (candidate.depth, candidate.num_features)
            assert np.array_equal(predict(one, tokenizer, first, second).logits, found.logits)
    if kind == "numbers":
        assert {entry["temperature"] for entry in model.config.exits} == {1.0}
    elif result.chosen.depth in {e.depth for e in result.exits if e.eta == result.chosen.eta}:
        number = next(
            i for i, e in enumerate(result.exits) if (e.depth, e.eta) == (result.chosen.depth, result.chosen.eta)
        )
        assert model.config.exits[number]["temperature"] == result.confidence.temperature


def test_a_single_probe_was_chosen(wrap, tokenizer, rows, monkeypatch):
    """Its kind and pooling have heads, too, which become the exits; or else those of the best head do."""
    from spin_hf.calibration import stages

    choose = stages.winner
    monkeypatch.setattr(
        stages, "winner", lambda candidates, *a, **k: choose([c for c in candidates if c.probe], *a, **k)
    )
    model = wrap()
    result = spin_calibrate(model, tokenizer, *split(rows), exits=True, **QUICK)
    assert result.chosen.eta is None
    assert {(e.kind, e.pooling) for e in result.exits} == {(result.chosen.kind, result.chosen.pooling)}
    assert all(e.eta for e in result.exits)
    model(**make_batch(), output_exits=True)
    model.keep_exit(None)
    assert model.spin.depth <= result.chosen.depth


def test_the_limits_hold_for_exits(wrap, tokenizer, rows):
    model = wrap()
    result = spin_calibrate(
        model, tokenizer, *split(rows), exits=True, max_features=6, max_depth=2, kinds=["hidden"], **QUICK
    )
    assert {e.depth for e in result.exits} <= {1, 2}
    assert max(e.num_features for e in result.exits) <= 6
    assert {e.kind for e in result.exits} == {"hidden"}
    assert model.spin.depth == max(e.depth for e in (result.chosen, *result.exits))


def test_recalibrating_makes_them_anew(made, tokenizer, rows, tmp_path):
    model, result = made
    model.save_pretrained(tmp_path)
    again = SpinForSequenceClassification.from_pretrained(tmp_path)
    found = spin_calibrate(again, tokenizer, *split(rows), exits=True, recalibrate=True, **QUICK)
    assert (found.exits, again.config.exits) == (result.exits, model.config.exits)
    batch = make_batch()
    expected = model(**batch, output_exits=True).exit_logits
    torch.testing.assert_close(again(**batch, output_exits=True).exit_logits, expected, rtol=1e-5, atol=1e-5)
    without = spin_calibrate(again, tokenizer, *split(rows), recalibrate=True, **QUICK)
    assert (without.exits, again.config.exits, again.exits) == ((), [], None)
    assert again.spin.depth == without.chosen.depth


def test_the_cache_keeps_them(wrap, tokenizer, rows, tmp_path, monkeypatch):
    models = [wrap() for _ in range(2)]
    first = spin_calibrate(models[0], tokenizer, *split(rows), exits=True, cache_dir=tmp_path, **QUICK)
    monkeypatch.setattr(stage, "finish", lambda *a, **k: pytest.fail("an exit was fitted again"))
    second = spin_calibrate(models[1], tokenizer, *split(rows), exits=True, cache_dir=tmp_path, **QUICK)
    assert first.exits == second.exits
    own = models[0].state_dict()
    assert all(torch.equal(value, own[name]) for name, value in models[1].state_dict().items())


# -- the record --------------------------------------------------------------------------------------------------------


def test_the_result_lists_them(made, tmp_path):
    model, result = made
    text = str(result)
    best = max(range(3), key=lambda number: (result.exits[number].score, -result.exits[number].num_features))
    candidate = result.exits[best]
    line = f"{best} ({candidate.score:.4f} by {candidate.num_features} features, 1 blocks); "
    assert f"9 exits: the best at each depth are {line}" in text
    assert f"the model runs 3 blocks, its own head needs {result.chosen.depth}" in text
    assert "exits" in result.seconds
    result.save(tmp_path / "result.json")
    loaded = CalibrationResult.load(tmp_path / "result.json")
    assert loaded.exits == result.exits
    assert str(loaded) == text
    frame = result.to_pandas()
    numbered = frame[frame["exit"].notna()].sort_values("exit")
    assert numbered["exit"].tolist() == list(range(9))
    wanted = [(e.depth, e.eta, e.num_features) for e in result.exits]
    assert list(numbered[["depth", "eta", "num_features"]].itertuples(index=False, name=None)) == wanted
    assert len(frame) == len(result.candidates)
    assert pd.DataFrame(model.config.exits)["score"].tolist() == [e.score for e in result.exits]


def test_a_result_without_them_says_nothing(plain, tmp_path):
    _, result = plain
    assert "exits" not in str(result)
    assert "exit" not in result.to_pandas()
    assert not result.exits
    assert result.blocks == result.chosen.depth
    result.save(tmp_path / "result.json")
    values = json.loads((tmp_path / "result.json").read_text())
    del values["exits"]  # a record from before there were any
    (tmp_path / "result.json").write_text(json.dumps(values))
    assert CalibrationResult.load(tmp_path / "result.json").exits == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": "all"}, r"exits must be True or False; got 'all'\. .* depths= and etas="),
        ({"exits": 3}, "exits must be True or False; got 3"),
        ({"exits": True, "etas": []}, "etas names none"),
    ],
)
def test_options_that_do_not_fit(options, message, wrap, tokenizer, rows, monkeypatch):
    model = wrap()
    monkeypatch.setattr(model.spin, "run_backbone", lambda *a, **k: pytest.fail("long work began"))
    with pytest.raises(CalibrationError, match=message):
        spin_calibrate(model, tokenizer, rows, **{**QUICK, **options})


def test_no_head_is_small_enough(wrap, tokenizer, rows):
    """Single probes are, and one of them would have been chosen."""
    model, options = wrap(), {**QUICK, "etas": [1.0], "depths": [3], "poolings": ["max"]}
    tried = spin_calibrate(wrap(), tokenizer, rows, **options).candidates
    least = min(candidate.num_features for candidate in tried if candidate.probe)
    assert all(candidate.num_features > least for candidate in tried if candidate.eta)
    with pytest.raises(CalibrationError, match="none has at most max_features=.* Raise max_features"):
        spin_calibrate(model, tokenizer, rows, exits=True, max_features=least, **options)
    assert (model.calibrated, model.spin.depth) == (False, 3)
