"""What neuron cards say, against the values themselves."""

import numpy as np
import pytest
import torch
from builders import calibrated, make_backbone, make_sentiment_rows

from spin_hf.calibration.errors import CalibrationError
from spin_hf.explain import NeuronCard, WordExample, explain, neuron_cards
from spin_hf.windows import Windows

ROWS = make_sentiment_rows(40)
TEXTS = ROWS["text"]


def activations(model, tokenizer, tap, neuron):
    """For each text the words with the values of one neuron; a word may be there twice."""
    found = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        values = {}
        with torch.no_grad(), model.spin.hooked(model.spin.taps):
            mask = torch.ones_like(ids)
            with model.spin.recording(model.spin.taps, lambda t, v, out=values: out.update({str(t): v}), mask):
                model.spin.run_backbone(ids, mask)
        found.append(list(zip(text.split(), values[tap][0, 1:-1, neuron].tolist(), strict=True)))
    return found


@pytest.mark.parametrize("labels", [2, 3])
def test_cards_against_the_values(tokenizer, labels):
    model = calibrated(make_backbone("bert"), poolings=["mean", "max"], num_labels=labels)
    cards = neuron_cards(model, tokenizer, TEXTS, labels=ROWS["label"], count=4, batch_tokens=64)
    found = explain(model, tokenizer, TEXTS)
    assert [card.share for card in cards] == sorted((card.share for card in cards), reverse=True)
    assert sum(card.share for card in cards) == pytest.approx(1)
    keys, of_feature = found.reading.group("neuron")
    assert {(card.tap, card.neuron) for card in cards} == set(keys)
    added = np.stack([row.by("neuron").values for row in found])
    added -= added.mean(2, keepdims=True)
    for card in cards[:6]:
        number = keys.index((card.tap, card.neuron))
        np.testing.assert_allclose(np.abs(card.effects), added[:, number].std(0), rtol=1e-3, atol=1e-6)
        assert card.label == found.reading.names[int(np.argmax(card.effects))]
        value = found.features[:, of_feature == number].mean(1)
        assert [e.value for e in card.high_texts] == pytest.approx(sorted(value, reverse=True)[:4], abs=1e-5)
        assert [e.value for e in card.low_texts] == pytest.approx(sorted(value)[:4], abs=1e-5)
        of_label = [value[np.array(ROWS["label"]) == label].mean() for label in (0, 1)]
        assert card.label_means[:2] == pytest.approx(of_label, abs=1e-5)
        words = activations(model, tokenizer, card.tap, card.neuron)
        highest = sorted((max(value for _, value in text) for text in words), reverse=True)[:4]
        assert [e.value for e in card.high_words] == pytest.approx(highest, rel=1e-3, abs=1e-4)
        for example in (*card.high_words, *card.low_words):
            assert example.before + example.word + example.after in TEXTS[example.text]
            own = [value for word, value in words[example.text] if word == example.word]
            assert min(abs(value - example.value) for value in own) <= 1e-3


@pytest.mark.parametrize(
    ("poolings", "low", "says"),
    [
        (("mean",), (-2.0, -1.5), True),
        (("max", "mean"), (-2.0, -1.5), True),
        (("max",), (-2.0, -1.5), False),  # no minimum is read
        (("mean",), (-0.17, -0.17), False),  # the floor of a GELU
        (("mean",), (-0.17,), True),
        (("mean",), (), False),
    ],
)
def test_low_words_that_say_something(poolings, low, says):
    high, lows = (tuple(WordExample(0, "", "word", "", value) for value in values) for values in ((3.0, 2.0), low))
    card = NeuronCard("ffn.1", 0, poolings, "good", (0.0, 1.0), 1.0, 0, (), (), high, lows)
    assert card.low_words_say_something is says


def test_no_half_words_stand_around_a_word(tokenizer):
    model = calibrated(make_backbone("bert"), poolings=["mean"])
    text = " ".join(f"{word} film" for word in TEXTS[0].split()) + " with a remarkable ending that everybody liked"
    cards = neuron_cards(model, tokenizer, [text, text.upper()], count=2)
    words = set(text.split()) | set(text.upper().split())
    for card in cards:
        for example in (*card.high_words, *card.low_words):
            assert {*example.before.split(), *example.after.split()} <= words


def test_neurons_that_say_the_same_are_one_group(tokenizer):
    model = calibrated(make_backbone("bert"), taps=["hidden.1"], poolings=["mean"], count=8)
    for threshold in (0.3, 0.95):
        cards = neuron_cards(model, tokenizer, TEXTS, threshold=threshold)
        assert sorted(card for group in cards.groups for card in group) == list(range(8))
        keys, _ = explain(model, tokenizer, TEXTS[:1]).reading.group("neuron")
        values = explain(model, tokenizer, TEXTS).features
        for number, group in enumerate(cards.groups):
            assert all(cards[card].group == number for card in group)
            columns = [keys.index((cards[card].tap, cards[card].neuron)) for card in group]
            assert np.abs(np.corrcoef(values[:, columns].T)).min() >= threshold - 1e-3
    assert len(cards.groups) > len(neuron_cards(model, tokenizer, TEXTS, threshold=0.3).groups)


def test_overlap_of_labels(tokenizer):
    model = calibrated(make_backbone("bert"), problem_type="multi_label_classification", num_labels=3)
    features = model.config.num_features
    weight = torch.zeros(3, features)
    weight[0, : features // 2], weight[1, features // 2 :], weight[2] = 1.0, 1.0, 1.0
    model.set_head(weight, torch.zeros(3))
    overlap = neuron_cards(model, tokenizer, TEXTS, eta=0.99).overlap
    np.testing.assert_allclose(np.diag(overlap), 1)
    np.testing.assert_allclose(overlap, overlap.T)
    assert overlap[0, 1] < 0.2 < overlap[0, 2]
    model = calibrated(make_backbone("bert"))
    weight = model.score.weight[:1].detach().clone()
    model.set_head(torch.cat([-weight, weight]), torch.zeros(2))
    np.testing.assert_allclose(neuron_cards(model, tokenizer, TEXTS).overlap, 1)


def test_plain_values_and_windows(tokenizer):
    model = calibrated(make_backbone("bert"))
    model.config.windows = Windows(8, 2, 1, 1).to_dict()
    cards = neuron_cards(model, tokenizer, TEXTS, count=2)
    assert len(cards.to_pandas()) == len(cards.to_dict()["cards"]) == len(cards)
    assert all(len(card.high_words) == 2 for card in cards)


def test_what_is_refused(tokenizer):
    model = calibrated(make_backbone("bert"))
    for options, message in (
        ({"labels": [0]}, "40 texts but 1 labels"),
        ({"labels": ["x"] * 40}, "'x' is not one of the labels"),
        ({"threshold": 1.5}, "threshold must be"),
        ({"count": 0}, "count must be"),
    ):
        with pytest.raises(CalibrationError, match=message):
            neuron_cards(model, tokenizer, TEXTS, **options)
    with pytest.raises(CalibrationError, match="One text says nothing"):
        neuron_cards(model, tokenizer, TEXTS[:1])
    regression = calibrated(make_backbone("bert"), problem_type="regression")
    with pytest.raises(CalibrationError, match="Regression has no labels"):
        neuron_cards(regression, tokenizer, TEXTS, labels=[0] * 40)
