from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import builders
import pytest

from spin_hf import CalibrationResult, SpinForSequenceClassification, spin_calibrate


@dataclass(frozen=True)
class Made:
    model: SpinForSequenceClassification
    tokenizer: Any
    result: CalibrationResult


@pytest.fixture(scope="session")
def make() -> Callable[..., Made]:
    """``make(rows, **options)``: a tiny classifier calibrated on rows; ``problem_type`` and ``labels`` as usual."""

    def calibrate(rows: Any, **options: Any) -> Made:
        known = {name: options.pop(name) for name in ("problem_type", "labels") if name in options}
        model = SpinForSequenceClassification.from_backbone(builders.make_backbone("bert"), **known)
        tokenizer = builders.make_tokenizer()
        small = {
            "poolings": ["mean"],
            "validation_fraction": 0.2,
            "Cs": 3,
            "etas": [0.5, 1.0],
            "progress": False,
            **options,
        }
        return Made(model, tokenizer, spin_calibrate(model, tokenizer, rows, **small))

    return calibrate


@pytest.fixture(scope="session")
def sentiment(make) -> Made:
    return make(builders.make_sentiment_rows(), labels=["bad", "good"])


@pytest.fixture(scope="session")
def with_exits(make) -> Made:
    return make(builders.make_sentiment_rows(), labels=["bad", "good"], exits=True)


@pytest.fixture
def folder(sentiment, tmp_path) -> Path:
    """A saved classifier with its record."""
    path = tmp_path / "films"
    sentiment.model.save_pretrained(path)
    sentiment.tokenizer.save_pretrained(path)
    sentiment.result.save(path / "calibration.json")
    return path


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's or anyone's Chromium, headless, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pages are tested with the extra browser")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("pages are tested where Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
