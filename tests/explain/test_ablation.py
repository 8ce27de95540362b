"""Neurons that are switched off are zero where they arise, and everything after them sees that."""

import numpy as np
import pytest
from builders import calibrated, make_backbone, with_exits

from spin_hf.calibration.errors import CalibrationError
from spin_hf.explain import ExplanationError, Neuron, ablated, explain, random_neurons, salient_neurons, tap_means
from spin_hf.prediction import predict
from spin_hf.taps import TapError

TEXTS = ["good film", "a dull plot and an end", "the witty actor was bad in this town", "night"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("tap", ["hidden.0", "ffn.2", "hidden.2"])
def test_a_neuron_is_zero_and_only_what_comes_later_changes(name, tap, tokenizer):
    model = calibrated(make_backbone(name))
    taps = [str(each) for each in model.spin.taps]
    before = tap_means(model, tokenizer, TEXTS, taps)
    with ablated(model, [Neuron(tap, 3), Neuron(tap, 7)]):
        during = tap_means(model, tokenizer, TEXTS, taps)
        sizes = tap_means(model, tokenizer, TEXTS, [tap], sizes=True)[tap]
    after = tap_means(model, tokenizer, TEXTS, taps)
    assert not sizes[:, [3, 7]].any()
    others = np.delete(np.arange(before[tap].shape[1]), [3, 7])
    np.testing.assert_allclose(during[tap][:, others], before[tap][:, others], atol=1e-6)
    for number, each in enumerate(taps):
        np.testing.assert_array_equal(after[each], before[each])
        same = np.allclose(during[each], before[each], atol=1e-6)
        assert same == (number < taps.index(tap))


def test_the_head_sees_it(tokenizer):
    """Off is a raw zero: each of the neuron's features stands at minus its mean over its scale."""
    model = with_exits(calibrated(make_backbone("bert"), taps=["ffn.3"], poolings=["mean"], count=8))
    neuron = Neuron("ffn.3", int(model.spin.feature_groups()[0].neurons[2]))
    plain = explain(model, tokenizer, TEXTS).features
    with ablated(model, [neuron]):
        cut = explain(model, tokenizer, TEXTS).features
        last = predict(model, tokenizer, TEXTS, exit=len(model.exits) - 1).logits
    standard = model.spin.standardizer
    np.testing.assert_allclose(cut[:, 2], float(-standard.mean[2] / standard.scale[2]), atol=1e-6)
    np.testing.assert_allclose(np.delete(cut, 2, 1), np.delete(plain, 2, 1), atol=1e-6)
    assert not np.allclose(last, predict(model, tokenizer, TEXTS, exit=len(model.exits) - 1).logits)


def test_salient_neurons_are_those_of_the_largest_weights(tokenizer):
    model = calibrated(make_backbone("bert"), taps=["ffn.1", "ffn.2"], poolings=["max", "mean"], count=48)
    weight = (model.score.weight.detach().double() ** 2).sum(0).reshape(2, 2, 48)  # tap, pooling, neuron
    order = weight.sum(1).flatten().argsort(descending=True)
    wanted = [Neuron(f"ffn.{1 + i // 48}", i % 48) for i in order.tolist()]
    assert salient_neurons(model, tokenizer, 10) == wanted[:10]
    assert len(salient_neurons(model, tokenizer, 10_000)) == 96


def test_random_neurons_are_others_of_the_same_taps():
    model = calibrated(make_backbone("bert"))
    like = [Neuron("ffn.1", 4), Neuron("hidden.2", 9), Neuron("ffn.1", 40)]
    sizes = {"ffn.1": np.arange(48.0), "hidden.2": np.arange(32.0)}
    for options in ({}, {"sizes": sizes}):
        drawn = [random_neurons(model, like, seed, **options) for seed in range(30)]
        assert drawn[0] == random_neurons(model, like, 0, **options)
        assert len(set(map(tuple, drawn))) > 20
        for found in drawn:
            assert not set(found) & set(like)
            assert len(set(found)) == 3
            assert [tap for tap, _ in found].count("ffn.1") == 2
    near = {neuron for found in drawn for tap, neuron in found if tap == "hidden.2"}
    assert near <= set(range(21))
    with pytest.raises(CalibrationError, match="too few others"):
        random_neurons(model, [Neuron("ffn.1", i) for i in range(30)], 0)


def test_what_is_refused_leaves_the_model_as_it_was(tokenizer):
    model = calibrated(make_backbone("bert"))
    plain = predict(model, tokenizer, TEXTS).logits
    with pytest.raises(TapError, match=r"no ffn\.9"), ablated(model, [Neuron("ffn.1", 0), Neuron("ffn.9", 0)]):
        pass
    with pytest.raises(TapError, match=r"no ffn\.9"):
        tap_means(model, tokenizer, TEXTS, ["ffn.9"])
    np.testing.assert_array_equal(predict(model, tokenizer, TEXTS).logits, plain)
    shared = calibrated(make_backbone("albert"))
    with pytest.raises(ExplanationError, match="serves several blocks"), ablated(shared, [Neuron("ffn.2", 0)]):
        pass
    with pytest.raises(CalibrationError, match="count must"):
        salient_neurons(model, tokenizer, 0)
