"""What examples are run with."""

import shutil
from pathlib import Path

import pytest
from builders import make_backbone
from example_runs import DATA, run_example
from transformers import AutoTokenizer

import spin_hf.demo


@pytest.fixture(scope="module", autouse=True)
def backbone(minilm_path, tmp_path_factory):
    """What the examples find installed: MiniLM's tokenizer and card, and a random model as small as can be."""
    folder = tmp_path_factory.mktemp("backbone") / Path(minilm_path).name
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    make_backbone("bert", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(Path(minilm_path) / "README.md", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spin_hf.demo, "backbone_folder", lambda: folder)
        yield str(folder)


@pytest.fixture
def run(backbone):
    """``run(name, *options)``; with ``data="edos"`` on a public set, if it is at hand."""

    def run(name, *options, data=None):
        if data is None:
            return run_example(name, *options)
        if not (DATA / data).is_dir():
            pytest.skip(f"{DATA / data} is missing; SPIN_HF_DATA may name the folder that holds {data}")
        return run_example(name, "--data", DATA, *options)

    return run
