"""What is too large for memory lies in files and is worked through in blocks: the same classifier comes of it."""

import errno
import os

import numpy as np
import pytest
import torch

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import blocks
from spin_hf.calibration.errors import OutputFolderError

QUICK = {"progress": False, "validation_fraction": 0.2, "Cs": [0.05, 0.2], "etas": (0.5, 1.0), "poolings": ["mean"]}


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(blocks, "_LARGE", 1)
    monkeypatch.setattr(blocks, "ROWS", 7)


@pytest.mark.parametrize(
    "options",
    [{}, {"cv": 2, "etas": [1.0]}, {"preset": "paper", "Cs": [1.0], "poolings": ["mean"], "etas": [0.5, 1.0]}],
)
@pytest.mark.parametrize("classes", [2, 3])
def test_the_same_classifier(options, classes, make_backbone, tokenizer, sentiment_rows, monkeypatch):
    labels = [label + 2 * (i % 5 == 0) * (classes == 3) for i, label in enumerate(sentiment_rows["label"])]
    labels = [min(label, classes - 1) for label in labels]
    made = []
    for small in (False, True):
        if small:
            monkeypatch.setattr(blocks, "_LARGE", 1)
            monkeypatch.setattr(blocks, "ROWS", 7)
        model = SpinForSequenceClassification.from_backbone(make_backbone("bert"))
        result = spin_calibrate(
            model, tokenizer, (sentiment_rows["text"], labels), **{**QUICK, "kinds": ["hidden"], **options}
        )
        made.append((model, result))
    (plain, expected), (model, result) = made
    assert result.chosen.name == expected.chosen.name
    assert result.chosen.score == pytest.approx(expected.chosen.score, abs=1 / 16)
    assert model.config.features == plain.config.features
    torch.testing.assert_close(model.score.weight, plain.score.weight, rtol=2e-2, atol=2e-3)


def test_a_large_one_is_no_memory_of_the_process(little_memory):
    found = blocks.empty(1000, 3)
    assert type(found.numpy().base) is not None
    found.fill_(2.0)
    assert float(found.sum()) == 6000.0
    x = torch.arange(60.0).reshape(20, 3)
    rows = np.array([19, 2, 2, 7])
    assert torch.equal(blocks.take_rows(x, rows), x[rows])
    assert torch.equal(blocks.take_columns(x, torch.tensor([0, 2])), x[:, [0, 2]])
    assert [(s.start, s.stop) for s in blocks.slices(20)] == [(0, 7), (7, 14), (14, 20)]
    assert torch.equal(blocks.summed(20, lambda s: x[s].sum(0)), x.sum(0))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="can't ask for room")
def test_a_disk_without_room_is_said(little_memory, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputFolderError, match="no room for .* GB of features in .*No space left.*TMPDIR"):
        blocks.empty(1000, 3)
