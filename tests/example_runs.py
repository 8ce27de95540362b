"""Runs an example as the main program, in its short form, and reads what it printed."""

import contextlib
import io
import os
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spin_hf.calibration import recipe

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DATA = Path(os.environ.get("SPIN_HF_DATA", ROOT.parent / "shared" / "data"))  # the public sets, where they are at hand

SMALL = replace(recipe._PRESETS["default"], Cs=3, etas=(1.0,), max_depth=2, poolings=("mean",))


def run_example(name, *options):
    """Run an example as the main program, with fewer settings; return what it printed."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.syspath_prepend(str(EXAMPLES))
        patch.syspath_prepend(str((EXAMPLES / name).parent))
        patch.setitem(recipe._PRESETS, "default", SMALL)
        patch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return shown.getvalue()


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d+|\d+", line)]


def lines_of(shown, start):
    found = [line for line in shown.splitlines() if line.startswith(start)]
    assert found, shown
    return found
