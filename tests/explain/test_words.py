"""Tokens and words of a text: nothing is lost, words are what a reader takes for one."""

import numpy as np
import pytest
from builders import SIZE, calibrated, make_backbone, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spin_hf import NotCalibratedError, SpinForSequenceClassification
from spin_hf.calibration.errors import CalibrationError, EmptyTextError, TextPairError, TokenizerMismatchError
from spin_hf.explain import explain
from spin_hf.explain.heat import heat_of
from spin_hf.explain.words import Piece, tokenized, word_spans
from spin_hf.windows import Windows

ODD = {
    "html": "<b>good</b> &amp; <script>alert('bad')</script>",
    "control": "good\x00 \x1b[31mbad\x1b[0m\x07\r\n\ttown",
    "emoji": "good 👩‍👩‍👧 day 👍🏽 ❤️ 🇩🇪!",
    "right to left": "فيلم \u202eجيد جداً\u202c והסרט טוב",
    "no spaces": "这部电影很好看。とても良い映画",
    "marks": "का है नमस्ते, cafe\u0301",
    "a token": "good",
    "a space": " \u2003 ",
}


def byte_tokenizer(size=SIZE):
    """Every byte is a token, so that a sign has several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({sign: number for number, sign in enumerate(["[PAD]", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", model_max_length=size)


def words_of(text):
    return [text[start:end] for start, end in word_spans(text)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's well-made, isn't it?!", ["It's", "well", "-", "made", ",", "isn't", "it", "?", "!"]),
        ("'quoted' words'", ["'", "quoted", "'", "words", "'"]),
        ("3.5 of 1,000 ...", ["3.5", "of", "1,000", "..."]),
        ("a_name x2", ["a_name", "x2"]),
        ("很好 ok", ["很", "好", "ok"]),
        ("नमस्ते cafe\u0301", ["नमस्ते", "cafe\u0301"]),
        ("👩‍👩‍👧👍🏽❤️", ["👩‍👩‍👧", "👍🏽", "❤️"]),
        ("طيّب می\u200cروم", ["طيّب", "می\u200cروم"]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_what_a_reader_takes_for_a_word(text, words):
    assert words_of(text) == words


@given(st.text())
@settings(derandomize=True, max_examples=300)
def test_words_hold_every_sign_but_space(text):
    spans = word_spans(text)
    assert all(start < end for start, end in spans)
    assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False))
    covered = {i for start, end in spans for i in range(start, end)}
    assert covered == {i for i, sign in enumerate(text) if not sign.isspace()}


@st.composite
def cuts(draw):
    """A text and pieces of it: in order, perhaps overlapping, without a sign, or special."""
    text = draw(st.text(max_size=30))
    starts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [Piece("x", 0, (start, min(len(text), start + draw(st.integers(0, 4)))), False) for start in starts]
    return text, [Piece("[CLS]", 0, None, True), *pieces, Piece("[SEP]", 0, None, True)]


@given(cuts())
@settings(derandomize=True, max_examples=300)
def test_every_token_belongs_to_one_word(case):
    text, pieces = case
    tokens, words = tokenized([text], pieces)
    assert len(tokens) == len(pieces)
    assert [number for word in words for number in word.tokens] == list(range(len(tokens)))
    for number, word in enumerate(words):
        assert all(tokens[token].word == number for token in word.tokens)
        if word.start is not None:
            assert word.text == text[word.start : word.end]
            for token in (tokens[i] for i in word.tokens if tokens[i].text.strip()):
                assert token.start >= token.end or (token.end > word.start and token.start < word.end)


def test_a_token_without_signs_goes_to_its_neighbour():
    place = [(0, 0), (0, 4), (5, 5), (5, 8)]
    tokens, words = tokenized(["good day"], [Piece("\u2581", 0, where, False) for where in place])
    assert [word.text for word in words] == ["good", "day"]
    assert [token.word for token in tokens] == [0, 0, 1, 1]
    _, words = tokenized(["x "], [Piece("x", 0, (0, 1), False), Piece("\u2581", 0, (2, 2), False)])
    assert [word.tokens for word in words] == [(0, 1)]


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
@pytest.mark.parametrize("make", [make_tokenizer, byte_tokenizer])
def test_texts_of_every_kind(text, make):
    model, tokenizer = calibrated(make_backbone("bert", vocab_size=300)), make()
    row = explain(model, tokenizer, [text, "the"])[0]
    assert row.text == text
    np.testing.assert_allclose(row.base + row.by("word").values.sum(0), row.logits, atol=1e-4)
    for word in row.words:
        assert word.special or word.text == text[word.start : word.end]
    if make is byte_tokenizer:  # all signs were read
        read = {i for word in row.words for i in range(word.start, word.end)}
        assert read >= {i for i, sign in enumerate(text) if not sign.isspace()}


@pytest.mark.parametrize("text", ["Unbelievably  good,\nisn't it? 👍🏽", "naïve café — “ok”", "x" * 300])
def test_words_of_a_real_tokenizer(minilm_path, text):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    tokenizer.model_max_length = SIZE
    row = explain(calibrated(make_backbone("bert", vocab_size=len(tokenizer))), tokenizer, [text])[0]
    assert [word.text for word in row.words if not word.special] == words_of(text)
    assert [word.text for word in row.words if word.special] == ["[CLS]", "[SEP]"]


def test_pairs_keep_their_places(tokenizer):
    row = explain(calibrated(make_backbone("bert")), tokenizer, ["good film"], ["bad day"])[0]
    found = [(word.text, word.part, word.start) for word in row.words]
    assert found[1:3] == [("good", 0, 0), ("film", 0, 5)]
    assert found[4:6] == [("bad", 1, 0), ("day", 1, 4)]
    assert [word.special for word in row.words] == [True, False, False, True, False, False, True]
    assert row.pair == "bad day"


def test_a_tokenizer_without_offsets(tokenizer):
    class Slow(type(tokenizer)):
        is_fast = False

    slow = make_tokenizer()
    slow.__class__ = Slow
    found = explain(calibrated(make_backbone("bert")), slow, ["good it's bad"])
    assert not found.reading.has_offsets
    assert [word.text for word in found[0].words][:2] == ["[CLS]", "good"]
    assert all(word.start is None for word in found[0].words)
    assert [word.special for word in found[0].words] == [True, *[False] * 5, True]
    whole = explain(calibrated(make_backbone("bert")), tokenizer, ["good it's bad"])
    assert whole.reading.has_offsets
    np.testing.assert_array_equal(found[0].token_contributions, whole[0].token_contributions)
    (pair,) = explain(calibrated(make_backbone("bert")), slow, ["good it's"], ["bad day"])
    ((*parts,),) = heat_of(pair, 0).texts  # of words without a place none is told to be of the second text
    assert [part.text for part in parts if part.told][-2:] == ["bad", "day"]


def test_only_special_tokens(tokenizer):
    rows = explain(calibrated(make_backbone("bert")), tokenizer, ["", "good"])
    assert [word.text for word in rows[0].words] == ["[CLS]", "[SEP]"]
    assert all(word.special for word in rows[0].words)


def test_no_token_at_all():
    """predict reads a pad token then; so it is what is explained."""
    model, tokenizer = calibrated(make_backbone("bert", vocab_size=300)), byte_tokenizer()
    rows = explain(model, tokenizer, ["", "good"])
    assert [(word.text, word.special) for word in rows[0].words] == [("[PAD]", True)]
    with pytest.raises(EmptyTextError, match="No text has a single token"):
        explain(model, tokenizer, [""])


def test_a_hundred_thousand_words_are_cut_and_it_is_said(tokenizer):
    text = "good bad " * 50_000
    found = explain(calibrated(make_backbone("bert")), tokenizer, ["good", text])
    assert [row.truncated for row in found] == [False, True]
    assert found.truncated == 1
    assert len(found[1].tokens) == SIZE
    assert found[1].to_dict()["truncated"] is True


def test_a_hundred_thousand_words_in_windows(tokenizer):
    model = calibrated(make_backbone("bert"))
    model.config.windows = Windows(SIZE, 8, 1, 1).to_dict()
    row = explain(model, tokenizer, ["good bad " * 50_000])[0]
    assert not row.truncated
    assert len(row.words) == 100_002
    assert row.words[-2].end == 449_999


def test_what_is_refused(tokenizer, bert_backbone):
    with pytest.raises(NotCalibratedError):
        explain(SpinForSequenceClassification.from_backbone(bert_backbone), tokenizer, ["good"])
    model = calibrated(make_backbone("bert"))
    with pytest.raises(TokenizerMismatchError, match="embeds only"):
        explain(model, byte_tokenizer(), ["good"])
    with pytest.raises(TokenizerMismatchError, match="is None"):
        explain(model, None, ["good"])
    model.config.text_pairs = True
    with pytest.raises(TextPairError):
        explain(model, tokenizer, ["good"])
    model.config.text_pairs = None
    for texts, message in (("good", "single str"), ([], "no rows"), (["good", 3], "no text but 3")):
        with pytest.raises(CalibrationError, match=message):
            explain(model, tokenizer, texts)
    with pytest.raises(CalibrationError, match="batch_tokens"):
        explain(model, tokenizer, ["good"], batch_tokens=0)
