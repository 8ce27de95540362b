"""Calibration learns token weights that find the tokens which carry the label."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import GOOD, NEUTRAL, make_backbone, make_sentiment_rows, make_tokenizer, random_query
from census.checks import make_model
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from spin_hf import CheckpointError, SpinConfig, SpinForSequenceClassification, SpinModel, spin_calibrate
from spin_hf.calibration import token_states, token_weights
from spin_hf.calibration.errors import (
    CalibrationError,
    DeviceMemoryError,
    NonFiniteFeaturesError,
    OutputFolderError,
)
from spin_hf.calibration.token_states import States
from spin_hf.explain import explain
from spin_hf.prediction import predict
from spin_hf.taps import Tap

HIDDEN = Tap("hidden", 1)


def calibrate(*data, backbone=None, **options):
    model = SpinForSequenceClassification.from_backbone(backbone or make_backbone("bert"))
    tokenizer = make_tokenizer()
    options = {"poolings": ["attention"], "etas": [0.8, 1.0], "Cs": 4, "progress": False, **options}
    return model, tokenizer, spin_calibrate(model, tokenizer, *data, **options)


def one_word_counts(count, seed=0):
    """Texts of neutral words, labelled by whether one word among them is "good": a mean drowns it."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.choices(NEUTRAL, k=20)
        if number % 2:
            words[draw.randrange(20)] = GOOD[0]
        rows.append((" ".join(words), number % 2))
    return {"text": [text for text, _ in rows], "label": [label for _, label in rows]}


def what_learns(tmp_path):
    """Of three texts, in a stack of two taps and one of another width: states and the model that learns from them."""
    taps, draw = [Tap("hidden", block) for block in range(3)], torch.Generator().manual_seed(0)
    starts = np.cumsum([0, 5, 1, 3])
    stacks = {
        (taps[0], taps[2]): 3 * torch.randn(2, 9, 4, generator=draw).half() + 1,
        (taps[1],): torch.randn(1, 9, 6, generator=draw).half(),
    }
    widths = {taps[0]: 4, taps[1]: 6, taps[2]: 4}
    with token_states._files(widths, 9, tmp_path / "states") as files:  # as they would be read
        assert {names: stack.shape for names, stack in files.items()} == {k: v.shape for k, v in stacks.items()}
        for names, stack in files.items():
            stack.copy_(stacks[names])
        states = States({names: stack.clone() for names, stack in files.items()}, np.arange(3), 3, starts, True)
    model = token_weights._Weighted(states, torch.tensor([0.5, -0.5]))
    for part in model.parameters():
        part.data.add_(torch.randn(part.shape, generator=draw))
    return states, model


def scores_of(states, model, own):
    return model(states, own, states.step(own, torch.device("cpu")))


def told_one_by_one(states, model, text):
    """The scores of a text by torch's operations alone, tap by tap."""
    found, own = model.bias, slice(states.starts[text], states.starts[text + 1])
    every = sum(stack.shape[0] * stack.shape[2] for stack in states.stacks.values())
    for query, weight, values in zip(model.query, model.weight, states.stacks.values(), strict=True):
        for i, mine in enumerate(values[:, own].float()):
            scale, width = values[i].float().std(0, correction=0), values.shape[2]
            tokens = (mine @ (query[i, 0] / (scale * width**0.5))).softmax(0)
            standard = (mine - values[i].float().mean(0)) / scale
            found = found + weight[i] @ (tokens @ standard) / every**0.5
    return found


def test_what_learns_weighs_each_tap_by_its_own_query_whatever_its_width(tmp_path):
    states, model = what_learns(tmp_path)
    queries = model.queries()
    for taps, scorer in zip(states.stacks, model.scorers(), strict=True):
        for i, tap in enumerate(taps):
            torch.testing.assert_close(queries[tap], scorer[i, 0].detach())
    expected = torch.stack([told_one_by_one(states, model, text) for text in range(3)])
    for own in (slice(1, 3), slice(0, 3), slice(0, 1)):  # each loads its states where the last ones were
        torch.testing.assert_close(scores_of(states, model, own), expected[own], rtol=1e-4, atol=1e-4)


def test_it_learns_by_the_gradients_of_torch(tmp_path):
    states, model = what_learns(tmp_path)
    parts = list(model.parameters())
    expected = torch.stack([told_one_by_one(states, model, text) for text in (1, 2)]).square().sum()
    found = scores_of(states, model, slice(1, 3)).square().sum()
    for mine, theirs in zip(torch.autograd.grad(found, parts), torch.autograd.grad(expected, parts), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_forward_whose_states_are_gone_has_no_wrong_gradient(tmp_path):
    states, model = what_learns(tmp_path)
    first = scores_of(states, model, slice(0, 1)).sum()
    scores_of(states, model, slice(1, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_autocast_changes_nothing():
    rows = make_sentiment_rows(60)
    plain, _, _ = calibrate(rows, validation_fraction=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _, _ = calibrate(rows, validation_fraction=0.3)
        assert torch.is_autocast_enabled("cpu")
    mine, theirs = found.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_calibration_finds_the_word_that_counts(tmp_path):
    rows, test = one_word_counts(240), one_word_counts(200, seed=1)
    scores = {}
    for pooling in ("mean", "attention"):
        model, tokenizer, result = calibrate(rows, poolings=[pooling])
        answers = predict(model, tokenizer, test["text"]).logits.argmax(-1)
        scores[pooling] = float(np.mean(answers == np.asarray(test["label"])))
    assert scores["attention"] > 0.9
    assert scores["attention"] > scores["mean"] + 0.1
    assert {entry["pooling"] for entry in model.config.features} == {"attention"}
    # and the parts of the answer say so: the good word carries it
    text = test["text"][1]
    (found,) = explain(model, tokenizer, [text])
    by_word = found.by("word")
    strongest = by_word.keys[int(np.argmax(by_word.values[:, 1]))]
    assert GOOD[0] in str(strongest)
    model.save_pretrained(tmp_path)
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path)
    assert np.array_equal(
        predict(loaded, tokenizer, test["text"]).logits, predict(model, tokenizer, test["text"]).logits
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_beside_other_poolings_with_exits_and_windows(name):
    rows = make_sentiment_rows(60)
    model, tokenizer, result = calibrate(
        rows, backbone=make_backbone(name), poolings=["mean", "attention"], exits=True, windows=True, max_length=8
    )
    assert {candidate.pooling for candidate in result.candidates} == {"mean", "attention", "all"}
    texts = rows["text"][:8] + [" ".join(rows["text"][:3])]
    together = predict(model, tokenizer, texts).logits
    alone = np.concatenate([predict(model, tokenizer, [text]).logits for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    found = explain(model, tokenizer, texts)
    assert found.worst_error < 1e-4
    for number in range(len(model.config.exits)):
        assert explain(model, tokenizer, texts, exit=number).worst_error < 1e-4


@pytest.mark.parametrize("windows", [False, True])
def test_ffn_neurons_alone(windows):
    """Their weights come from hidden taps that nobody asked for."""
    rows = make_sentiment_rows(60)
    options = {"kinds": ["ffn"], "poolings": ["attention", "mean"], "windows": windows, "max_length": 8}
    model, tokenizer, result = calibrate(rows, **options)
    assert {Tap.parse(entry["tap"]).kind for entry in model.config.features} == {"ffn"}
    assert explain(model, tokenizer, rows["text"][:4]).worst_error < 1e-4


def test_a_second_run_learns_nothing_anew_and_ends_the_same(tmp_path, monkeypatch):
    rows = make_sentiment_rows(60)
    first, tokenizer, _ = calibrate(rows, cache_dir=tmp_path / "cache")
    other, _, _ = calibrate({**rows, "label": rows["label"][::-1]}, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*/queries.*"))) == 2  # of other labels there are others
    assert not list((tmp_path / "cache").glob("*/states"))

    def refuse(*args, **kwargs):
        raise AssertionError("learned again")

    with monkeypatch.context() as patched:
        patched.setattr(token_weights, "_train", refuse)
        again, _, _ = calibrate(rows, cache_dir=tmp_path / "cache")
    for path in (tmp_path / "cache").glob("*/queries.*"):
        path.unlink()  # as a kill just before would leave it
    anew, _, _ = calibrate(rows, cache_dir=tmp_path / "cache")
    for number, model in enumerate((first, again, anew, other)):
        model.save_pretrained(tmp_path / str(number))
    saved = [load_file(tmp_path / str(number) / "model.safetensors") for number in range(4)]
    for found in saved[1:3]:
        assert found.keys() == saved[0].keys()
        assert all(torch.equal(found[key], saved[0][key]) for key in found)
    assert not torch.equal(saved[3]["spin.standardizer.queries"][:32], saved[0]["spin.standardizer.queries"][:32])


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems(problem):
    rows = make_sentiment_rows(60)
    multi = problem == "multi_label_classification"
    labels = (
        [["good"] if label else [] for label in rows["label"]] if multi else [1000.0 + 300 * x for x in rows["label"]]
    )
    model = SpinForSequenceClassification.from_backbone(
        make_backbone("bert"), problem_type=problem, **({"labels": ["good"]} if multi else {})
    )
    tokenizer = make_tokenizer()
    options = {"poolings": ["attention"], "etas": [1.0], "Cs": 3, "progress": False}
    spin_calibrate(model, tokenizer, {"text": rows["text"], "label": labels}, **options)
    assert model.spin.standardizer.queries.any()
    assert np.isfinite(predict(model, tokenizer, rows["text"]).logits).all()


def test_few_of_the_texts_when_there_is_no_room_for_more(monkeypatch, capsys):
    _, _, whole = calibrate(make_sentiment_rows(80))
    assert whole.data["token_weights_rows"] == [64, 16]
    monkeypatch.setattr(token_states, "_MOST_BYTES", 60_000)
    _, _, result = calibrate(make_sentiment_rows(80), progress=True)
    trained, chosen = result.data["token_weights_rows"]
    assert 0 < trained < 64
    assert 0 < chosen < 16
    assert f"learned from {trained} texts and chosen on {chosen}." in capsys.readouterr().err


def test_a_rare_class_is_among_the_few():
    labels = np.array([0] * 97 + [1, 2, 2])
    rows = token_states._by_class(np.random.default_rng(0).permutation(100), labels)
    assert sorted(rows) == list(range(100))
    assert set(labels[rows[:3]]) == {0, 1, 2}


def test_damaged_weights_are_noticed_before_anything_is_learned(monkeypatch, tmp_path):
    backbone = make_backbone("bert")
    backbone.encoder.layer[1].output.dense.bias.data.fill_(torch.inf)

    def refuse(*args):
        raise AssertionError("learned")

    monkeypatch.setattr(token_weights, "_train", refuse)
    monkeypatch.setattr("spin_hf.calibration.calibrate.find_batching", lambda *args: "padded")
    with pytest.raises(NonFiniteFeaturesError, match=r"Tap hidden.2 produced NaN or infinity"):
        calibrate(make_sentiment_rows(60), backbone=backbone, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*/states"))


def test_states_in_the_devices_memory_give_the_same(monkeypatch, tmp_path):
    _, _, in_files = calibrate(one_word_counts(60), one_word_counts(30, 1), seed=0)
    monkeypatch.setattr(token_states, "_fits", lambda *size: True)
    monkeypatch.setattr(token_states.np.lib.format, "open_memmap", None)
    _, _, in_memory = calibrate(one_word_counts(60), one_word_counts(30, 1), seed=0)
    assert not in_memory.differences(in_files)


def test_memory_that_others_took_meanwhile_is_not_needed(monkeypatch):
    rows = one_word_counts(60), one_word_counts(30, 1)
    _, _, expected = calibrate(*rows, seed=0)
    empty = torch.empty

    def full(*size, **options):
        if options.get("dtype") == torch.float16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return empty(*size, **options)

    monkeypatch.setattr(token_states, "_fits", lambda *size: True)
    monkeypatch.setattr(token_states.torch, "empty", full)
    _, _, result = calibrate(*rows, seed=0)
    assert not result.differences(expected)


@pytest.mark.parametrize("where", ["reading", "learning"])
def test_out_of_memory_with_states_in_memory_goes_on_from_files(where, monkeypatch):
    rows = one_word_counts(60), one_word_counts(30, 1)
    _, _, expected = calibrate(*rows, seed=0)
    owner, name = {"reading": (token_states._Writing, "read"), "learning": (token_weights, "_train")}[where]
    work, places = getattr(owner, name), []

    def full(own, *more):
        states = own._states if where == "reading" else own
        places.append(states.in_files)
        if not states.in_files:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return work(own, *more)

    in_memory, in_files, held, gone = token_states._in_memory, token_states._files, [], []

    def holding(*size):
        made = in_memory(*size)
        held.extend(StorageWeakRef(stack.untyped_storage()) for stack in made.values())
        return made

    def filing(*size):
        gone.extend(storage.expired() for storage in held)
        return in_files(*size)

    monkeypatch.setattr(token_states, "_fits", lambda *size: True)
    monkeypatch.setattr(token_states, "_in_memory", holding)
    monkeypatch.setattr(token_states, "_files", filing)
    monkeypatch.setattr(owner, name, full)
    _, _, result = calibrate(*rows, seed=0)
    assert not places[0]
    assert places[-1]
    assert gone == [True]  # the memory is there for what reads once more
    assert not result.differences(expected)


def test_a_large_gpu_holds_more_texts_and_a_full_one_none(monkeypatch):
    gpu, gib = torch.device("cuda"), 2**30
    total, free = 16 * gib, 8 * gib
    monkeypatch.setattr(
        token_states.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total)
    )
    monkeypatch.setattr(token_states.torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(token_states.torch.cuda, "memory_reserved", lambda device: gib)
    monkeypatch.setattr(token_states.torch.cuda, "memory_allocated", lambda device: gib)
    monkeypatch.setattr(token_states, "states_widths", lambda *given: widths)
    monkeypatch.setattr(token_states, "model_device", lambda model: gpu)
    encoded, widths = SimpleNamespace(lengths=[256] * 5000, windows=None), {HIDDEN: 1024}
    of_text = 2 * 256 * 1024
    assert token_states.states_bytes(None, (), encoded) == 5000 * of_text  # all texts, whatever the card
    assert token_states.states_place(None, (), encoded) == "the memory of cuda"
    free = 5 * gib
    assert token_states.states_place(None, (), encoded) == "disk"  # nothing would be left to learn in
    widths = {HIDDEN: 20_000}
    assert token_states.states_bytes(None, (), encoded) == 4 * gib
    total = 80 * gib - 7 * 2**20
    assert token_states.states_bytes(None, (), encoded) == 1000 * 2 * 256 * 20_000
    widths = {HIDDEN: 200_000}
    assert token_states.states_bytes(None, (), encoded) == 20 * gib
    gpu = torch.device("cpu")
    assert token_states.states_bytes(None, (), encoded) == 4 * gib


def test_out_of_memory_while_learning(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(token_weights, "_train", full)
    with pytest.raises(DeviceMemoryError, match=r"from 60 texts of up to \d+ tokens does not fit the memory of cpu"):
        calibrate(make_sentiment_rows(60))


def test_what_fails_while_learning_is_not_told_as_a_full_disk(monkeypatch):
    def broken(*args):
        raise BrokenPipeError("the terminal is gone")

    monkeypatch.setattr(token_weights, "_train", broken)
    with pytest.raises(BrokenPipeError):
        calibrate(make_sentiment_rows(60))


def test_another_metric_learns_and_reads_nothing_anew(monkeypatch, tmp_path):
    rows = make_sentiment_rows(60)
    calibrate(rows, cache_dir=tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("done again")

    monkeypatch.setattr("spin_hf.calibration.calibrate.learn_queries", refuse)
    monkeypatch.setattr("spin_hf.calibration.calibrate.find_batching", refuse)
    model, _, result = calibrate(rows, cache_dir=tmp_path, metric="macro_f1")
    assert result.metric == "macro_f1"
    assert len(list(tmp_path.glob("*/store.json"))) == 1


def test_configs_that_do_not_fit():
    model, *_ = calibrate(make_sentiment_rows(60))
    values = model.config.to_dict()
    entry = values["features"][0]
    with pytest.raises(CheckpointError, match=r"lists tap \S+ under the pooling attention twice"):
        SpinConfig.from_dict({**values, "features": [entry, entry]})
    with pytest.raises(CheckpointError, match=r"has 31 values, but scores states of width 32"):
        SpinModel(SpinConfig.from_dict({**values, "features": [{**entry, "query": 31}]}))


def test_no_room_on_the_disk(monkeypatch, tmp_path):
    used = token_states.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(token_states.shutil, "disk_usage", lambda path: used._replace(free=10))
    with pytest.raises(OutputFolderError, match="states of the tokens need|the features need"):
        calibrate(make_sentiment_rows(60), cache_dir=tmp_path)


def test_folds_are_refused():
    with pytest.raises(CalibrationError, match=r"With the pooling attention give eval, or leave cv out"):
        calibrate(make_sentiment_rows(60), cv=3)


def test_queries_follow_their_neurons():
    model, *_ = calibrate(make_sentiment_rows(60))
    spin = model.spin
    groups = spin.feature_groups()
    query = random_query(spin, groups[0].tap, torch.Generator().manual_seed(0))
    mean, scale = spin.standardizer.mean, spin.standardizer.scale
    spin.set_features([groups[0]._replace(query=query), *groups[1:]], mean, scale, depth=spin.depth)
    assert torch.equal(spin.feature_groups()[0].query, query)
    assert spin.config.features[0]["query"] == len(query)


@pytest.mark.parametrize(
    ("data", "options", "poolings", "evaluated"),
    [
        ((60, 40), {}, ("attention",), "validation"),
        ((60,), {}, ("mean", "max"), "5-fold cross-validation"),
        ((60,), {"validation_fraction": 0.3}, ("attention",), "held out"),
        ((60,), {"poolings": ["attention"]}, ("attention",), "held out"),
        ((60,), {"poolings": ["max"]}, ("max",), "5-fold cross-validation"),
        ((60, 40), {"preset": "paper", "kinds": ["hidden"], "Cs": [0.1, 1.0], "poolings": ["last"]}, ("last",), None),
    ],
)
def test_what_is_tried_by_default(data, options, poolings, evaluated):
    quick = {"kinds": ["hidden"], "Cs": 2, "etas": [1.0], "max_depth": 1, "poolings": None}
    _, _, result = calibrate(*map(make_sentiment_rows, data), **{**quick, **options})
    assert tuple(result.settings["poolings"]) == poolings
    assert {kept["pooling"] for kept in result.kept} <= set(poolings)
    assert evaluated in (None, result.data["evaluated"])


def test_a_backbone_with_other_positions_than_tokens_has_mean_and_max():
    quick = {"kinds": ["hidden"], "Cs": 2, "etas": [1.0], "max_depth": 1, "poolings": None}
    backbone = make_model("canine")
    _, _, result = calibrate(make_sentiment_rows(60), make_sentiment_rows(40), backbone=backbone, **quick)
    assert result.settings["poolings"] == ("mean", "max")


def test_few_rows_have_as_many_folds_as_the_rarest_class_has_rows():
    rows = one_word_counts(30)
    kept = [row for row, label in enumerate(rows["label"]) if label == 0 or row < 6]
    rows = {name: [column[row] for row in kept] for name, column in rows.items()}
    quick = {"kinds": ["hidden"], "Cs": 2, "etas": [1.0], "max_depth": 1, "poolings": None}
    assert calibrate(rows, **quick)[2].data["evaluated"] == "3-fold cross-validation"


def test_a_step_is_recorded_once_it_was_taken_and_never_again_where_there_is_no_room(monkeypatch):
    taken, recorded = [], []

    def recording(work, device, pool):
        recorded.append(pool)
        if len(recorded) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(token_weights, "Recording", recording)
    replayed, told = token_weights._Replayed(taken.append, torch.device("cuda")), []
    for number in [0, 1, 2, 3, 3, 0, 0, 1, 2, 1, 0, 3]:
        replayed(number)
        told.append(number)
        assert taken == told
    assert recorded == ["pool"] * 3


def test_what_fails_while_a_step_is_recorded_is_told(monkeypatch):
    def failing(*given):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(token_weights, "Recording", failing)
    replayed = token_weights._Replayed(lambda number: None, torch.device("cuda"))
    replayed(0)
    with pytest.raises(RuntimeError, match="is lost"):
        replayed(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_that_a_gpu_replays_learn_what_those_told_one_by_one_do(monkeypatch):
    train, recording, learned, recorded = token_weights._train, token_weights.Recording, [], []
    monkeypatch.setattr(token_weights, "_train", lambda *given: learned.append(train(*given)) or learned[-1])
    monkeypatch.setattr(token_weights, "Recording", lambda *given: recorded.append(given) or recording(*given))
    for one_by_one in (False, True):
        if one_by_one:
            monkeypatch.setattr(token_weights, "_Replayed", lambda take, device: take)
        calibrate(one_word_counts(200), one_word_counts(60, 1), backbone=make_backbone("bert").cuda())
    assert len(recorded) > 1
    for tap, query in learned[0].items():
        torch.testing.assert_close(query, learned[1][tap], rtol=1e-2, atol=1e-2)
