"""The README's Python blocks run, one after another, as a reader would type them."""

import re
from pathlib import Path

import pytest

import spin_hf.demo

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(minilm_path, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    whole = spin_hf.demo.load_split
    monkeypatch.setattr(spin_hf.demo, "load_split", lambda split: whole(split)[:80])  # the same code on less data
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    shown = capsys.readouterr().out
    assert "SPIN" in shown
    assert re.search(r"'label': '(complaint|praise|question|suggestion)'", shown)


@pytest.mark.parametrize(
    "command", re.findall(r"^spin-hf (\w+)", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
)
def test_commands_exist(command):
    from spin_hf.cli import app

    assert command in {registered.callback.__name__ for registered in app.registered_commands}
