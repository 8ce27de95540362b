"""Backbones that ignore the mask or mix the examples of a batch."""

import warnings

import pytest
import torch
import transformers as hf
from builders import calibrated, make_batch
from census.checks import make_model
from torch import nn

from spin_hf import CheckpointError, SpinConfig, SpinForSequenceClassification, spin_calibrate
from spin_hf.batching import split_rows
from spin_hf.calibration.errors import CalibrationError
from spin_hf.calibration.extraction import plan_batches
from spin_hf.calibration.independence import find_batching
from spin_hf.layout import PositionsError
from spin_hf.pooling import pool

QUICK = {
    "progress": False,
    "poolings": ["mean", "max"],
    "validation_fraction": 0.2,
    "Cs": 2,
    "etas": (0.5,),
    "depths": [2],
}
TEXTS = [[*range(5, 25)], [7, 8, 9, 10], [*range(20, 32)]]


class MixesExamples(nn.Module):
    """Around a block: a text's values are changed by the other texts of the batch."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, *args, **kwargs):
        return self.block(hidden_states + hidden_states.mean((0, 1), keepdim=True), *args, **kwargs)


class Random(MixesExamples):
    def forward(self, hidden_states, *args, **kwargs):
        return self.block(hidden_states + torch.randn_like(hidden_states), *args, **kwargs)


def wrapped(kind):
    backbone = make_model("bert")
    for number, block in enumerate(backbone.encoder.layer):
        backbone.encoder.layer[number] = kind(block)
    return SpinForSequenceClassification.from_backbone(backbone, ffn="block.output.dense")


@pytest.mark.parametrize(
    ("model_type", "batching"),
    [
        ("bert", "padded"),
        ("llama", "padded"),
        ("mixtral", "padded"),
        ("fnet", "equal_length"),
        ("convbert", "equal_length"),
    ],
)
def test_what_may_share_a_batch_is_found_by_trying(model_type, batching):
    model = SpinForSequenceClassification.from_backbone(make_model(model_type))
    assert find_batching(model.spin, model.spin.taps, TEXTS, 0) == batching


def test_a_backbone_that_mixes_the_examples_of_a_batch():
    model = wrapped(MixesExamples)
    assert find_batching(model.spin, model.spin.taps, TEXTS, 0) == "single"


def test_a_backbone_that_reads_at_random():
    spin = wrapped(Random).spin
    with pytest.raises(CalibrationError, match="BertModel gives other features each time"):
        find_batching(spin, spin.taps, TEXTS, 0)


def test_texts_of_one_length_tell_the_same():
    model = SpinForSequenceClassification.from_backbone(make_model("fnet"))
    assert find_batching(model.spin, model.spin.taps, [[*range(5, 21)]] * 4, 0) == "equal_length"


@pytest.mark.parametrize("length", [1, 6, 8])
def test_short_texts_of_one_length_tell_the_same(length):
    model = SpinForSequenceClassification.from_backbone(make_model("fnet"))
    texts = [[*range(start, start + length)] for start in range(5, 25)]
    assert find_batching(model.spin, model.spin.taps, texts, 0) == "equal_length"


def big_bird(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    small = {"num_attention_heads": 4, "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 128}
    return SpinForSequenceClassification.from_backbone(hf.BigBirdModel(hf.BigBirdConfig(**sizes, **small, **options)))


def test_a_backbone_that_changes_a_setting_of_its_own():
    # From block-sparse to full attention with the first short text, and never back.
    call = r"from_backbone\(name, attention_type='original_full'\)"
    spin = big_bird().spin
    with pytest.warns(UserWarning, match=f"set attention_type='original_full' of itself.*{call}"):
        find_batching(spin, spin.taps, TEXTS, 0)
    spin = big_bird().spin
    with pytest.raises(CalibrationError, match=f"gives other features each time.*{call}"):
        find_batching(spin, spin.taps, [[*range(4, 60)] * 2, *TEXTS], 0)
    spin = big_bird(attention_type="original_full").spin
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_batching(spin, spin.taps, [[*range(4, 60)] * 2, *TEXTS], 0) == "padded"


@pytest.mark.parametrize("model_type", ["fnet", "mobilebert"])
def test_a_text_gets_the_same_logits_in_any_batch(model_type, tokenizer, sentiment_rows, tmp_path):
    model = SpinForSequenceClassification.from_backbone(make_model(model_type))
    spin_calibrate(model, tokenizer, sentiment_rows, **QUICK)
    model.save_pretrained(tmp_path)
    model = SpinForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.batching == "equal_length"
    batch = make_batch(rows=6)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    together = model(ids, mask).logits
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(ids[row : row + 1, :length]).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    left = [
        torch.stack([row.roll(9 - int(n)) for row, n in zip(rows, mask.sum(1), strict=True)]) for rows in (ids, mask)
    ]
    torch.testing.assert_close(model(*left).logits, together, rtol=1e-4, atol=1e-4)


def test_one_text_at_a_time():
    model = calibrated(make_model("bert"))
    batch, calls = make_batch(), []
    whole = model(**batch).logits
    model.spin.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.config.batching = "single"
    torch.testing.assert_close(model(**batch).logits, whole, rtol=1e-5, atol=1e-5)
    assert sorted(calls) == [(1, int(length)) for length in sorted(batch["attention_mask"].sum(1))]


def test_rows_of_one_length_run_together():
    mask = (torch.arange(5) < torch.tensor([3, 5, 3, 0])[:, None]).long()
    assert [(rows.tolist(), n) for rows, n in split_rows(mask, "equal_length")] == [([3], 1), ([0, 2], 3), ([1], 5)]
    assert [(rows.tolist(), n) for rows, n in split_rows(mask, "single")] == [([3], 1), ([0], 3), ([2], 3), ([1], 5)]


def test_the_batches_of_an_extraction():
    lengths = [3, 5, 3, 5, 2]
    assert plan_batches(lengths, 100) == [[1, 3, 0, 2, 4]]
    assert plan_batches(lengths, 100, "equal_length") == [[1, 3], [0, 2], [4]]
    assert plan_batches(lengths, 5, "equal_length") == [[1], [3], [0], [2], [4]]
    assert plan_batches(lengths, 100, "single") == [[1], [3], [0], [2], [4]]


def test_other_positions_than_tokens():
    values = torch.arange(12.0).reshape(1, 4, 3)
    whole = torch.ones(1, 8, dtype=torch.long)
    assert torch.equal(pool(values, whole, ["mean"])[0, 0], values[0].mean(0))
    with pytest.raises(PositionsError, match="8 tokens became 4 positions"):
        pool(values, whole.index_fill(1, torch.tensor([7]), 0), ["mean"])


def test_a_batching_that_is_none():
    with pytest.raises(CheckpointError, match="`batching` should be one of padded, equal_length, single; got 'any'"):
        SpinConfig(batching="any")
