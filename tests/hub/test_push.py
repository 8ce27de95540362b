"""Pushes to a hub on loopback, by the command line in one process; another process downloads and predicts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_hub
import pytest
from huggingface_hub import ModelCard
from transformers import pipeline

from spin_hf import SpinForSequenceClassification
from spin_hf.hub import PushError, push_to_hub, write_card
from spin_hf.hub.card import is_as_written
from spin_hf.hub.folder import Checkpoint

TEXTS = ["a lovely film with a witty end", "the plot was dull", "it was a year of grim and great scenes"]

PUSH = """
import json, os, sys
from typer.testing import CliRunner
from spin_hf.cli import app

for line in sys.stdin:
    token, arguments = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    done = CliRunner().invoke(app, ["push", *arguments])
    error = repr(done.exception) if done.exit_code not in (0, 2) else ""
    print(json.dumps([done.exit_code, done.stdout, done.stderr + error]))
"""

PREDICT = """
import json, sys
import spin_hf
from transformers import pipeline

texts = json.loads(sys.argv[1])
for line in sys.stdin:
    repo, options = json.loads(line)
    try:
        scores = pipeline("text-classification", repo, device="cpu", top_k=None, **options)(texts)
    except OSError as error:
        scores = str(error)
    print("scores:" + json.dumps(scores))
"""


def environment(url: str, home: Path) -> dict[str, str]:
    """Of a machine where nobody has logged in, and whose hub is on loopback."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home.mkdir(exist_ok=True)
    return {
        **clean,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


def run(code: str, env: dict[str, str], lines: list, *arguments: str) -> list[str]:
    """The output lines of a fresh process that reads JSON lines."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=text,
        env=env,
        cwd=env["HF_HOME"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def hub():
    with fake_hub.serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def folders(made, tmp_path_factory) -> dict[str, Path]:
    """Two classifiers that never agree: ``films``, and ``turned`` with the signs of its head turned around."""
    root = tmp_path_factory.mktemp("local")
    films = made(root / "films", labels=["bad", "good"])
    write_card(films, test={"rows": 20, "accuracy": 0.9}, base_model="someone/tiny-bert", dataset="town films")
    turned = Path(shutil.copytree(films, root / "turned"))
    model = SpinForSequenceClassification.from_pretrained(films)
    model.set_head(-model.score.weight, -model.score.bias)
    model.save_pretrained(turned)
    card = turned / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    for name in ("optimizer.pt", ".env", "notes.docx"):
        (films / name).write_text("for nobody else")
    return {"films": films, "turned": turned}


@pytest.fixture(scope="module")
def pushed(hub, folders, tmp_path_factory) -> dict[str, str]:
    """The commits of three pushes to one repository, by name."""
    stale = fake_hub.Repository(private=False)
    stale.commit("main", dict.fromkeys(("model-00001-of-00002.safetensors", "old.py", "LICENSE"), b"old"), "old")
    hub.repositories["someone/films"] = stale
    films, turned = str(folders["films"]), str(folders["turned"])
    lines = run(
        PUSH,
        environment(hub.url, tmp_path_factory.mktemp("pusher")),
        [
            ["hf_writer", [films, "someone/films", "--message", "The first"]],
            ["hf_writer", [turned, "someone/films", "--revision", "turned/1"]],
            ["hf_writer", [turned, "someone/films"]],
            ["hf_writer", [films, "hidden", "--private"]],
        ],
    )
    answers = [json.loads(line) for line in lines]
    assert [code for code, _, _ in answers] == [0, 0, 0, 0], answers
    commits = [re.search(r"/commit/([0-9a-f]{40})", output)[1] for _, output, _ in answers]
    return dict(zip(("first", "branch", "second", "hidden"), commits, strict=True))


def test_one_commit_holds_all_and_nothing_else(hub, folders, pushed):
    files = hub.files("someone/films", pushed["first"])
    assert set(files) == {
        *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("calibration.json", "evaluation.json", "layer_profile.png", "LICENSE"),
    }
    assert hub.repositories["someone/films"].messages[:3] == ["initial commit", "old", "The first"]
    assert files["model.safetensors"] == (folders["films"] / "model.safetensors").read_bytes()
    here = str(folders["films"].parent.parent).encode()
    assert here in (folders["films"] / "config.json").read_bytes()
    assert not [name for name, content in files.items() if here in content]
    assert json.loads(files["config.json"])["backbone_id"] == "someone/tiny-bert"


def test_the_card_loads_the_model_from_where_it_is(hub, pushed, folders):
    text = hub.files("someone/films", pushed["first"])["README.md"].decode()
    assert 'pipeline("text-classification", "someone/films")' in text
    assert ModelCard(text).data.base_model == "someone/tiny-bert"
    assert "someone/films" not in (folders["films"] / "README.md").read_text(
        encoding="utf-8"
    )  # that one is left as it is
    assert hub.files("someone/films", pushed["second"])["README.md"] == (folders["turned"] / "README.md").read_bytes()


def test_another_process_downloads_and_predicts(hub, folders, pushed, tmp_path):
    local = {}
    for name, folder in folders.items():
        local[name] = pipeline("text-classification", str(folder), device="cpu", top_k=None)(TEXTS)
    assert local["films"] != local["turned"]
    asked = [
        ["someone/films", {}],
        ["someone/films", {"revision": pushed["first"]}],
        ["someone/films", {"revision": "turned/1"}],
        ["someone/hidden", {"token": "hf_reader"}],
        ["someone/hidden", {"token": "hf_other"}],
    ]
    lines = run(PREDICT, environment(hub.url, tmp_path / "reader"), asked, json.dumps(TEXTS))
    latest, first, branch, hidden, refused = [json.loads(x[7:]) for x in lines if x.startswith("scores:")]
    assert first == hidden == local["films"]
    assert latest == branch == local["turned"]
    assert "someone/hidden" in refused


def test_the_cards_code_runs(hub, pushed, tmp_path):
    text = hub.files("someone/films", pushed["first"])["README.md"].decode()
    blocks = [b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "someone/films" in b]
    assert len(blocks) == 2
    push = 'model.push_to_hub("someone/copy", token="hf_writer")'
    lines = run("\n".join([*blocks, push]), environment(hub.url, tmp_path / "reader"), [])
    assert re.search(r"'label': '(good|bad)'", lines[-2])
    assert lines[-1] in ("good", "bad")
    tags = ModelCard(hub.files("someone/copy")["README.md"].decode()).data.tags  # transformers' own push, by the model
    assert tags == ["spin_hf", "text-classification"]


def test_mistakes_are_one_line_and_change_nothing(hub, folders, pushed, tmp_path):
    films, home = str(folders["films"]), environment(hub.url, tmp_path / "pusher")
    broken = Path(shutil.copytree(folders["films"], tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-9])
    unsaid = Path(shutil.copytree(folders["films"], tmp_path / "unsaid"))
    for name in ("README.md", "calibration.json"):
        (unsaid / name).unlink()
    before = {repo_id: dict(repo.branches) for repo_id, repo in hub.repositories.items()}
    cases = {
        "No token": [None, [films, "someone/films"]],
        "does not accept the token (401)": ["hf_stolen", [films, "someone/films"]],
        "may not write to someone/films (403)": ["hf_reader", [films, "someone/films"]],
        "may not write to someone/new (403)": ["hf_other", [films, "someone/new"]],
        "is no name for a repository": ["hf_writer", [films, "a/b/c"]],
        "damaged or cut off": ["hf_writer", [str(broken), "someone/broken"]],
        "result.save": ["hf_writer", [str(unsaid), "someone/unsaid"]],
        "no saved model": ["hf_writer", [str(tmp_path / "none"), "someone/none"]],
    }
    for message, line in zip(cases, run(PUSH, home, list(cases.values())), strict=True):
        code, output, error = json.loads(line)
        assert (code, output) == (2, "")
        assert error.startswith("error:")
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert {repo_id: dict(repo.branches) for repo_id, repo in hub.repositories.items()} == before


def test_a_hub_that_fails_halfway_has_nothing_half_written(hub, folders, pushed, tmp_path):
    before = dict(hub.repositories["someone/films"].branches)
    case = ["hf_writer", [str(folders["films"]), "someone/films"]]
    hub.broken = "/commit/"
    try:
        other = ["hf_writer", [str(folders["films"]), "someone/fresh"]]
        line, made = run(PUSH, environment(hub.url, tmp_path / "pusher"), [case, other])
    finally:
        hub.broken = ""
    code, _, error = json.loads(line)
    _, _, fresh = json.loads(made)
    assert code == 2
    assert "500" in error
    assert "delete it" not in error
    assert hub.repositories["someone/films"].branches == before
    assert "someone/fresh is there now, and empty" in fresh
    assert f"delete it at {hub.url}/someone/fresh/settings." in fresh
    assert not hub.files("someone/fresh")
    with fake_hub.serving() as gone:
        pass
    (line,) = run(PUSH, environment(gone.url, tmp_path / "pusher"), [case])
    code, _, error = json.loads(line)
    assert code == 2
    assert "can't be reached" in error
    assert len(error.strip().splitlines()) == 1


def test_other_forms_are_pushed_with_their_own_card(hub, folders, backbone_folder, tmp_path):
    backbone = fake_hub.Repository(private=False)
    backbone.commit("main", {path.name: path.read_bytes() for path in backbone_folder.iterdir()}, "Tiny BERT")
    hub.repositories["someone/tiny-bert"] = backbone
    films = str(folders["films"])
    lines = run(
        PUSH,
        environment(hub.url, tmp_path / "pusher"),
        [["hf_writer", [films, f"someone/{form}", "--form", form]] for form in ("head", "self_contained")],
    )
    assert [json.loads(line)[0] for line in lines] == [0, 0], lines
    small, whole = hub.files("someone/head"), hub.files("someone/self_contained")
    assert len(small["model.safetensors"]) < len(whole["model.safetensors"]) / 4
    head, alone = ModelCard(small["README.md"].decode()), ModelCard(whole["README.md"].decode())
    assert (head.data.library_name, head.data.base_model, head.data["base_model_relation"]) == (
        *("spin_hf", "someone/tiny-bert", "adapter"),
    )
    assert (alone.data.library_name, "modeling_spin.py" in whole) == ("transformers", True)

    expected = pipeline("text-classification", films, device="cpu", top_k=None)(TEXTS)
    reader = environment(hub.url, tmp_path / "reader")
    (line,) = run(PREDICT, reader, [["someone/head", {}]], json.dumps(TEXTS))
    assert json.loads(line.removeprefix("scores:")) == expected
    block = re.findall(r"```python\n(.*?)```", alone.content, flags=re.DOTALL)[0]
    without = 'import sys; sys.modules["spin_hf"] = None\n'
    show = f"import json; texts = {TEXTS!r}; inputs = tokenizer(texts, padding=True, return_tensors='pt')\n"
    show += "print(json.dumps(model(**inputs).logits.softmax(-1).max(-1).values.tolist()))"
    line = run(without + block + show, reader, [])[-1]
    assert json.loads(line) == pytest.approx([scores[0]["score"] for scores in expected], abs=1e-6)


def test_offline_is_told(classifier):
    with pytest.raises(PushError, match="HF_HUB_OFFLINE"):
        push_to_hub(classifier, "someone/films", token="hf_writer")
    assert (classifier / "README.md").is_file()  # a missing card is written first


def test_a_head_alone_needs_a_backbone_that_others_have(classifier):
    from safetensors.torch import load_file, save_file

    path = classifier / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if ".backbone." not in k}, path, {"format": "pt"})
    with pytest.raises(PushError, match="base_model"):
        push_to_hub(classifier, "someone/films", token="hf_writer")
    write_card(classifier, base_model="someone/tiny-bert")
    assert ModelCard.load(classifier / "README.md").data["base_model_relation"] == "adapter"
    with pytest.raises(PushError, match="HF_HUB_OFFLINE"):  # and so it gets as far as the network
        push_to_hub(classifier, "someone/films", token="hf_writer")


def test_a_card_that_a_person_edited_goes_up_as_it_is(classifier, tmp_path):
    path = write_card(classifier)
    moved = Path(shutil.copytree(classifier, tmp_path / "under another name"))
    assert is_as_written(Checkpoint.read(moved))
    path.write_text(path.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    assert not is_as_written(Checkpoint.read(classifier))
    (moved / "calibration.json").unlink()  # nothing to write it anew from
    assert not is_as_written(Checkpoint.read(moved))
