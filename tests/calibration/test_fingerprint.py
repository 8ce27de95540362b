"""The tokenizer a classifier was calibrated with is the one that predicts."""

import copy
import json
import warnings

import pytest
import transformers as hf
from builders import calibrated, make_backbone, make_sentiment_rows, make_tokenizer
from tokenizers import Tokenizer, normalizers

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration.errors import TokenizerMismatchError
from spin_hf.calibration.fingerprint import tokenizer_fingerprint
from spin_hf.prediction import predict


@pytest.fixture
def classifier():
    model = calibrated(make_backbone("bert"))
    model.config.tokenizer = tokenizer_fingerprint(make_tokenizer())
    return model


def changed(**changes):
    """The tokenizer with other entries in its file."""
    tokenizer = make_tokenizer()
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    for path, value in changes.items():
        values["model"][path] = value(values["model"][path])
    special = {name: getattr(tokenizer, name) for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)), **special)


def test_it_is_kept_in_the_checkpoint(tmp_path):
    tokenizer = make_tokenizer()
    model = SpinForSequenceClassification.from_backbone(make_backbone("bert"))
    spin_calibrate(model, tokenizer, make_sentiment_rows(), depths=[1], etas=[0.5], Cs=2, progress=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.tokenizer == tokenizer_fingerprint(tokenizer)
    saved = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(saved) == loaded.config.tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(loaded, saved, ["a lovely film"])


def test_another_pad_token_is_the_same_tokenizer(classifier):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "[SEP]"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(classifier, tokenizer, ["a lovely film", "dull"])


def test_another_vocabulary_is_refused(classifier):
    def swapped(vocab):
        return {**vocab, "good": vocab["bad"], "bad": vocab["good"]}

    with pytest.raises(TokenizerMismatchError, match=r"vocabulary of this tokenizer \(\d+ tokens\) is not the one"):
        predict(classifier, changed(vocab=swapped), ["a lovely film"])


def test_another_special_token_is_named(classifier):
    tokenizer = make_tokenizer()
    tokenizer.cls_token = "[UNK]"
    with pytest.warns(UserWarning, match=r"cls_token is '\[UNK\]', was '\[CLS\]'"):
        predict(classifier, tokenizer, ["a lovely film"])


def test_another_way_of_reading_is_noticed(classifier):
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Then", "the")
    with pytest.warns(UserWarning, match="splits or frames a sample text in another way"):
        predict(classifier, tokenizer, ["a lovely film"])


def test_the_vocabulary_is_read_once_and_anew_when_tokens_were_added(monkeypatch):
    tokenizer, calls = make_tokenizer(), []
    whole = type(tokenizer).get_vocab
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: calls.append(1) or whole(self))
    first = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tokenizer) == first
    assert len(calls) == 1
    tokenizer.add_tokens(["unheard-of"])
    second = tokenizer_fingerprint(tokenizer)
    assert (second["size"], len(calls)) == (first["size"] + 1, 2)
    assert second["vocabulary"] != first["vocabulary"]
    assert tokenizer_fingerprint(make_tokenizer()) == first
