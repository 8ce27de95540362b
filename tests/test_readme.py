"""The README's Python blocks run, one after another, as a reader would type them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import spin_hf.demo
from spin_hf.calibration import recipe, token_weights

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(minilm_path, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    # The same code on less data and fewer settings.
    whole, presets = spin_hf.demo.load_split, recipe._PRESETS
    monkeypatch.setattr(spin_hf.demo, "load_split", lambda split: whole(split)[:48])
    small = replace(presets["default"], Cs=(0.1,), etas=(0.6,), depths=(4,))
    monkeypatch.setitem(presets, "default", small)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_weights, "_LEAST_STEPS", 20)
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
