"""The levers of accuracy run on a few texts, and what they choose is what carries the label."""

import json

import pytest
import torch
from example_runs import EXAMPLES, lines_of
from transformers import AutoTokenizer, BertConfig, BertModel

from spin_hf.calibration.losses import Logistic, Multinomial

LEVERS = [
    "mean and max",
    "attention only",
    "directions",
    "stacking",
    "attention only, layers weighted",
    "stability selection",
    "joint probe",
    "group lasso",
    "prompt",
]


@pytest.fixture
def levers(monkeypatch):
    """The modules of ``levers/``."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "levers"))


def test_levers_are_measured_and_shown(run, minilm_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    path = tmp_path / "results.jsonl"
    options = ("--model", tmp_path / "tiny", "--sets", "sst2", "--rows", 60, "--cache", tmp_path, "--results", path)
    run("levers/run.py", *options, "--levers", *LEVERS, data="sst2")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["lever"] for row in rows] == LEVERS
    assert (rows[0]["gain"], rows[0]["rows"]) == (0, 120)
    assert all(0 <= row["score"] <= 100 and row["error"] >= 0 for row in rows)
    shown = run("levers/run.py", "--show", "--results", path, data="sst2")
    assert lines_of(shown, "| group lasso")


@pytest.mark.parametrize(("loss", "classes"), [(Logistic(), 1), (Multinomial(), 3)])
def test_group_lasso_is_at_its_optimum_and_finds_what_carries_the_label(levers, loss, classes):
    import selections

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 80, generator=draw)
    z = x[:, :4] @ torch.tensor([[2.0, -1, 1], [-2, 1, 1], [2, 1, -1], [2, -2, 1]])[:, :classes]
    y = (z > 0).float() if classes == 1 else torch.nn.functional.one_hot(z.argmax(1)).float()
    s, group, xt = torch.ones(300, 1), torch.arange(80) % 40, x.T.contiguous()
    weight, intercept, penalty = torch.zeros(80, classes), torch.zeros(classes), 20.0
    for _ in range(20):
        weight, intercept = selections._fista(xt, y, s, loss, group, weight, intercept, penalty)
    pull = xt @ loss.residual(x @ weight + intercept, y, s)
    norms, pulls = (torch.stack([v[group == g].norm() for g in range(40)]) for v in (weight, pull))
    assert pulls.max() <= 1.001 * penalty
    assert torch.allclose(pulls[norms > 0], torch.tensor(penalty), rtol=1e-3)
    assert set(norms.topk(4).indices.tolist()) == {0, 1, 2, 3}
    chosen = selections.chosen_together(xt, y, s, loss, group)
    assert {0, 1, 2, 3} <= set(chosen.tolist())
