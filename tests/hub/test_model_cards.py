"""The cards that we publish are whole, and tell nothing of the machine that wrote them."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

CARDS = Path(__file__).parents[2] / "model_cards"
PATH = re.compile(r"(?:^|[\s\"'(`|])(?:/(?:[\w.-]+/)+[\w.-]*|[A-Z]:\\)", re.MULTILINE)


@pytest.mark.parametrize("name", sorted(path.name for path in CARDS.iterdir() if path.is_dir()))
def test_a_published_card_is_whole(name):
    card = ModelCard.load(CARDS / name / "README.md")
    assert PATH.search('loaded from "/usr/share/models"')
    assert not PATH.search(card.content)
    assert card.data.base_model
    assert card.data.license
    assert card.data.language
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    pictures = re.findall(r"!\[[^]]+]\(([^)]+)\)", card.text)
    assert pictures
    assert all((CARDS / name / picture).is_file() for picture in pictures)
    assert f"({name}/README.md)" in (CARDS / "README.md").read_text(encoding="utf-8")
