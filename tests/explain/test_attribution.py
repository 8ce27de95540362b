"""The parts of a logit: they sum to it, and each is what a loop over tokens, neurons and labels gives."""

import copy

import numpy as np
import pytest
import torch
from builders import (
    CONFIGS,
    EVERY_POOLING,
    GOOD,
    SIZE,
    VOCABULARY,
    calibrated,
    make_backbone,
    make_tokenizer,
    with_exits,
)
from census.checks import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Model

from spin_hf.attention import source
from spin_hf.exits import ExitError
from spin_hf.explain import ExplanationError, explain, token_features
from spin_hf.gates import Gates
from spin_hf.modeling_spin import FeatureGroup
from spin_hf.prediction import predict
from spin_hf.windows import Windows

WORDS = VOCABULARY[4:]
TEXTS = ["good film", "the", " ".join(WORDS[:40]), "a dull plot , and an end", "witty " * 11, "bad day bad day"]


def classifier(name, **kwargs):
    if name == "both":
        return calibrated(T5Model(CONFIGS["t5"]()).eval(), stacks="both", **kwargs)
    return calibrated(make_backbone(name), **kwargs)


def values_by_token(spin, ids, windows=None):
    """For each tap the activations ``(tokens, width)`` of one text, by what token was read at each position.

    With windows, from the one where a token stands farthest from a cut; ``None`` stands for a decoder's start.
    """
    tokens, size = len(ids), len(ids) if windows is None else windows.size
    rows = {tap: [] for tap in spin.taps}
    starts, before, after = [0], 0, 0
    if tokens > size:
        starts, before, after = windows.starts(tokens), windows.before, windows.after
    bounds = [before + (one + other + windows.room) // 2 for one, other in zip(starts, starts[1:], strict=False)]
    for start, low, high in zip(starts, [0, *bounds], [*bounds, tokens], strict=True):
        piece = [start + before + i for i in range(min(size, tokens) - before - after)]
        places = [*range(before), *piece, *range(tokens - after, tokens)]
        values = {}
        row, mask = torch.tensor([[ids[place] for place in places]]), torch.ones(1, len(places), dtype=torch.long)
        with torch.no_grad(), spin.hooked(spin.taps), spin.recording(spin.taps, values.__setitem__, mask):
            spin.run_backbone(row, mask, torch.zeros_like(row))  # GPT-2 embeds token types
        for tap, found in values.items():
            shifted = spin.layout.decoder is not None and tap.block > spin.layout.own_depth(spin.backbone)
            read = [None, *places[:-1]] if shifted else places
            for column, place in enumerate(places):
                if low <= place < high:
                    rows[tap].append((place, read[column], found[0, column].double()))
    return {tap: sorted(found, key=lambda row: row[0]) for tap, found in rows.items()}


def by_hand(model, ids, windows=None):
    """What each token adds to each feature; the last row is a decoder's start token."""
    rows = values_by_token(model.spin, ids, windows)
    mean, scale = model.spin.standardizer.mean.double(), model.spin.standardizer.scale.double()
    added = torch.zeros(len(ids) + 1, len(mean), dtype=torch.float64)
    column = 0
    for group in model.spin.feature_groups():
        for neuron in group.neurons.tolist():
            values = [float(row[neuron]) for _, _, row in rows[group.tap]]
            own = {"first": [0], "last": [len(values) - 1], "mean": range(len(values))}.get(group.pooling)
            own = [i for i, value in enumerate(values) if value == max(values)] if own is None else own
            shares = {i: 1 / len(own) for i in own}
            if group.pooling == "attention":
                scores = [float(row @ group.query.double()) for _, _, row in rows[source(group.tap)]]
                shares = dict(enumerate(np.exp(scores - np.logaddexp.reduce(scores))))
            for i, share in shares.items():
                reader = rows[group.tap][i][1]
                place = len(ids) if reader is None else reader
                added[place, column] += (values[i] - float(mean[column])) / float(scale[column]) * share
            column += 1
    return added.numpy()


@pytest.mark.parametrize("windows", [None, Windows(12, 3, 1, 1), Windows(12, 0, 1, 1)])
@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3", "albert", "t5", "both"])
def test_tokens_add_what_a_loop_over_them_finds(name, windows):
    model, tokenizer = classifier(name, labels=["a", "b", "c"]), make_tokenizer()
    model.config.windows = None if windows is None else windows.to_dict()
    weight = model.score.weight.detach().double().numpy().T
    found = explain(model, tokenizer, TEXTS)
    assert found.worst_error <= 1e-5
    for text, row in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        wanted = by_hand(model, ids, windows)
        if name == "both":
            wanted = np.concatenate([wanted[-1:], wanted[:-1]])
        else:
            assert not wanted[-1].any()
            wanted = wanted[:-1]
        np.testing.assert_allclose(row.token_contributions, wanted @ weight, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(token_features(model, tokenizer, text), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("view", ["word", "token", "block", "kind", "pooling", "tap", "neuron", "feature"])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_every_view_sums_to_the_logits(problem, view, tokenizer):
    model = classifier("bert", problem_type=problem)
    model.config.logit_temperature = 1.7
    model.gates = Gates(model.config.num_features, 0.1)
    torch.nn.init.uniform_(model.gates.weight, -0.05, 0.15)
    found = explain(model, tokenizer, TEXTS)
    known = predict(model, tokenizer, TEXTS)
    np.testing.assert_allclose(found.logits, known.logits, rtol=1e-4, atol=1e-4)
    for i, row in enumerate(found):
        np.testing.assert_allclose(row.probabilities, known.probabilities[i], rtol=1e-4, atol=1e-4)
        part = row.by(view)
        np.testing.assert_allclose(row.base + part.values.sum(0), known.logits[i], rtol=1e-4, atol=1e-4)
        assert len(part.keys) == len(set(part.keys)) == len(part.values)
        np.testing.assert_allclose(part.shares.sum(0), 1)


@pytest.mark.parametrize("windows", [None, Windows(12, 3, 1, 1)])
@pytest.mark.parametrize("name", ["bert", "gpt2", "both"])
def test_an_exit_is_split_as_the_classifier_that_keeping_it_leaves(name, windows, tokenizer):
    model = with_exits(classifier(name, taps=["hidden.0", "ffn.1"]))
    model.config.windows = None if windows is None else windows.to_dict()
    last = len(model.config.exits) - 1
    for number in (last - 1, last) if name == "both" else (0, 1, last):  # both stacks can't lose the decoder
        found = explain(model, tokenizer, TEXTS, exit=number)
        np.testing.assert_allclose(found.logits, predict(model, tokenizer, TEXTS, exit=number).logits, atol=1e-5)
        alone = copy.deepcopy(model)
        alone.keep_exit(number)
        wanted = explain(alone, tokenizer, TEXTS)
        assert found.reading.features == wanted.reading.features
        for row, own in zip(found, wanted, strict=True):
            np.testing.assert_allclose(row.token_contributions, own.token_contributions, atol=1e-5)
            np.testing.assert_allclose(row.base + row.by("word").values.sum(0), row.logits, atol=1e-4)
        np.testing.assert_allclose(
            token_features(model, tokenizer, TEXTS[2], exit=number).sum(0), found[2].features, atol=1e-4
        )


def test_an_exit_that_there_is_not(tokenizer):
    for model, exit in ((classifier("bert"), 0), (with_exits(classifier("bert")), 99)):
        with pytest.raises(ExitError):
            explain(model, tokenizer, ["good"], exit=exit)
        with pytest.raises(ExitError):
            token_features(model, tokenizer, "good", exit=exit)


def test_the_base_is_the_logit_of_the_mean_text(tokenizer):
    model = classifier("bert")
    model.config.logit_temperature = 0.5
    reading = explain(model, tokenizer, ["good"]).reading
    logits = model(features=torch.zeros(1, model.config.num_features)).logits[0]
    np.testing.assert_allclose(reading.base, logits.detach().numpy(), rtol=1e-6)


def test_the_parts_of_the_model(tokenizer):
    model = classifier("bert", taps=["ffn.2", "hidden.2", "hidden.3"], poolings=["max", "mean"], count=32)
    row = explain(model, tokenizer, ["good film"])[0]
    assert row.by("block").keys == (2, 3)
    assert row.by("kind").keys == ("ffn", "hidden")
    assert row.by("tap").keys == ("ffn.2", "hidden.2", "hidden.3")
    assert row.by("pooling").keys == ("max", "mean")
    groups = model.spin.feature_groups()
    assert row.by("feature").keys[32] == ("ffn.2", int(groups[1].neurons[0]), "mean")
    both = row.by("neuron")  # all 32 neurons of hidden.2 are read twice
    assert len(both.keys) == len({(str(g.tap), int(n)) for g in groups for n in g.neurons})
    values = row.by("feature").values
    np.testing.assert_allclose(both.values[both.keys.index(("hidden.3", 5))], values[133] + values[165])
    assert row.by("feature").keys[133][:2] == row.by("feature").keys[165][:2] == ("hidden.3", 5)


def test_tokens_that_tie_share_a_maximum(tokenizer):
    """Without positions, equal words of a decoder-free embedding are equal: each repetition adds the same."""
    model = classifier("t5", taps=["hidden.0"], poolings=["max"], count=32)
    row = explain(model, tokenizer, ["bad bad film bad"])[0]
    bad = row.token_contributions[[1, 2, 4]]
    assert np.abs(bad).max() > 1e-3
    np.testing.assert_allclose(bad, bad[:1].repeat(3, 0))


@pytest.mark.parametrize("batching", ["padded", "equal_length", "single"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_company_does_not_matter(batching, batch_tokens, tokenizer):
    model = classifier("bert")
    alone = [explain(model, tokenizer, [text])[0] for text in TEXTS]
    model.config.batching = batching
    together = explain(model, tokenizer, TEXTS, batch_tokens=batch_tokens)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.token_contributions, other.token_contributions, rtol=1e-4, atol=1e-5)
        assert one.tokens == other.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("windows", [None, Windows(12, 3, 1, 1)])
@pytest.mark.parametrize("name", ["bert", "gpt2", "both"])
def test_the_parts_are_those_of_the_models_answer_to_left_padded_texts(name, windows, dtype, tokenizer):
    model = with_exits(classifier(name, taps=["hidden.0", "ffn.1"]))
    model.config.windows = None if windows is None else windows.to_dict()
    model.spin.backbone.to(dtype)
    batch = tokenizer(TEXTS, padding=True, padding_side="left", return_tensors="pt")
    for exit in (None, len(model.config.exits) - 1):
        with torch.no_grad():
            wanted = model(**batch, exit=exit).logits.numpy()
        found = explain(model, tokenizer, TEXTS, exit=exit)
        sums = np.stack([row.base + row.token_contributions.sum(0) for row in found])
        assert (np.abs(sums - wanted) / np.maximum(1, np.abs(wanted))).max() <= 1e-4


def test_a_backbone_in_bfloat16(tokenizer):
    model = calibrated(make_backbone("bert").to(torch.bfloat16))
    assert explain(model, tokenizer, TEXTS).worst_error <= 1e-5


def test_a_backbone_that_takes_no_mask():
    """FNet reads texts of one length, and its calibration says so."""
    model = calibrated(make_model("fnet"))
    model.config.batching = "equal_length"
    assert explain(model, make_tokenizer(), TEXTS).worst_error <= 1e-5


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join), min_size=1, max_size=5),
    poolings=st.sets(st.sampled_from(EVERY_POOLING), min_size=1),
    labels=st.integers(2, 5),
    count=st.integers(1, 32),
    temperature=st.floats(0.1, 10),
    size=st.none() | st.integers(4, SIZE),
    seed=st.integers(0, 100),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_any_classifier_of_any_texts(texts, poolings, labels, count, temperature, size, seed):
    model = calibrated(make_backbone("bert", seed=seed), poolings=sorted(poolings), count=count, num_labels=labels)
    model.config.logit_temperature = temperature
    model.config.windows = None if size is None else Windows(size, min(1, size - 3), 1, 1).to_dict()
    found = explain(model, make_tokenizer(), texts)
    logits = predict(model, make_tokenizer(), texts).logits
    for row, wanted in zip(found, logits, strict=True):
        room = 1e-4 * np.maximum(1, np.abs(wanted))
        for view in ("token", "word", "feature", "block"):
            assert (np.abs(row.base + row.by(view).values.sum(0) - wanted) <= room).all()


def test_parts_that_miss_the_logit_are_an_error(tokenizer):
    model = classifier("bert")
    model.score.register_forward_hook(lambda module, args, output: output + 0.01)
    with pytest.raises(ExplanationError, match="miss it by"):
        explain(model, tokenizer, ["good film"])
    model = classifier("bert")
    model.spin.standardizer.mean[0] = float("nan")
    with pytest.raises(ExplanationError, match="finite"):
        explain(model, tokenizer, ["good film"])


def test_words_of_the_head_count(tokenizer):
    """A head that only adds up one embedding column gives each word that column's value."""
    model = classifier("t5")
    tap = next(tap for tap in model.spin.taps if str(tap) == "hidden.0")
    model.spin.set_features(
        [FeatureGroup(tap, "mean", torch.tensor([7]))], torch.zeros(1), torch.ones(1), depth=model.spin.depth
    )
    model.set_head(torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
    row = explain(model, tokenizer, [" ".join(GOOD)])[0]
    column = model.get_input_embeddings().weight[:, 7].detach().numpy()
    ids = tokenizer(" ".join(GOOD))["input_ids"]
    np.testing.assert_allclose(row.by("word").values[:, 1], column[ids] / len(ids), rtol=1e-5)
