import pytest
import torch
from builders import calibrated, make_backbone, make_tokenizer
from torch.utils.data import Dataset
from transformers import pipeline

from spin_hf import SpinTextClassificationPipeline, pipelines

TEXTS = 3 * ["a good film", "it was a dull and boring story with a clumsy plot", "so so", "the end of the night", "bad"]


class Rows(Dataset):
    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, row):
        return dict(enumerate(TEXTS))[row]  # it ends by its length alone


@pytest.fixture(scope="module")
def model():
    return calibrated(make_backbone("bert")).eval()


@pytest.fixture
def served(model):
    """The stock pipeline and ours, and the sizes of the batches that the model saw."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    options = {"model": model, "tokenizer": make_tokenizer()}
    stock = pipeline("text-classification", **options)
    yield stock, pipeline("text-classification", pipeline_class=SpinTextClassificationPipeline, **options), seen
    hook.remove()


def same(found, expected):
    for own, other in zip(found, expected, strict=True):
        own, other = (each if isinstance(each, list) else [each] for each in (own, other))
        assert [each["label"] for each in own] == [each["label"] for each in other]
        assert [each["score"] for each in own] == pytest.approx([each["score"] for each in other], abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"top_k": None}, {"truncation": True, "max_length": 4}])
def test_answers_as_the_stock_pipeline(served, options):
    stock, ours, _ = served
    same(ours(TEXTS, **options), stock(TEXTS, **options))
    same(ours(TEXTS[0], **options), stock(TEXTS[0], **options))


@pytest.mark.parametrize("make", [Rows, lambda: (text for text in TEXTS)], ids=["dataset", "generator"])
def test_streams_come_back_in_order(served, monkeypatch, make):
    stock, ours, seen = served
    expected = stock(TEXTS)
    monkeypatch.setattr(pipelines, "_AT_ONCE", 4)
    del seen[:]
    answers = iter(ours(make()))
    first = next(answers)
    assert sum(rows for rows, _ in seen) == 4  # not read to its end before the first answer
    same([first, *answers], expected)


def test_pairs(served):
    stock, ours, _ = served
    pairs = [{"text": text, "text_pair": "good"} for text in TEXTS]
    same(ours(pairs), stock(pairs))
    mixed = [*pairs[:2], {"text": "bad"}, "good"]
    same(ours(mixed), stock(mixed))


def test_texts_share_a_batch_with_those_of_their_length(served, monkeypatch):
    _, ours, seen = served
    ours(TEXTS, batch_size=3)
    assert seen == [(3, tokens) for tokens in (13, 7, 5, 4, 3)]
    del seen[:]
    monkeypatch.setattr(pipelines, "_BATCH_TOKENS", 26)
    ours(TEXTS)
    assert all(rows * tokens <= 26 for rows, tokens in seen)
    assert len(seen) < len(TEXTS)


def test_a_tokenizer_without_a_pad_token(model):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    ours = pipeline(
        "text-classification", model=model, tokenizer=tokenizer, pipeline_class=SpinTextClassificationPipeline
    )
    expected = pipeline("text-classification", model=model, tokenizer=make_tokenizer())
    same(ours(TEXTS), expected(TEXTS))
    assert torch.is_grad_enabled()
