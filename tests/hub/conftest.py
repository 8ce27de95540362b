from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import builders
import pytest

from spin_hf import SpinForSequenceClassification, spin_calibrate


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    """A backbone on disk, with a card that says its licence."""
    folder = tmp_path_factory.mktemp("backbones") / "tiny-bert"
    builders.make_backbone("bert").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def made(backbone_folder) -> Callable[..., Path]:
    """``made(folder, **options)``: a calibrated classifier with tokenizer and record, saved to a folder."""

    def make(
        folder: Path,
        *,
        rows: dict | None = None,
        backbone: str | None = None,
        exits: bool = False,
        calibrate: dict | None = None,
        **options: object,
    ) -> Path:
        tokenizer = builders.make_tokenizer()
        model = SpinForSequenceClassification.from_backbone(backbone or backbone_folder, **options)
        data = rows or builders.make_sentiment_rows()
        settings = {
            "kinds": ["ffn", "hidden"],
            "poolings": ["mean"],
            "Cs": [0.05, 0.2],
            "etas": [0.5],
            "validation_fraction": 0.2,
            "progress": False,
            **(calibrate or {}),
        }
        result = spin_calibrate(model, tokenizer, data, exits=exits, **settings)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        result.save(folder / "calibration.json")
        return folder

    return make


@pytest.fixture(scope="session")
def _saved(made, tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("saved") / "films", labels=["bad", "good"])


@pytest.fixture
def classifier(_saved, tmp_path) -> Path:
    """A fresh copy of a saved classifier, without a card."""
    return Path(shutil.copytree(_saved, tmp_path / "films"))
