"""``RESULTS.md``: each benchmark, given ``--record``, writes its section there, in place of the one it wrote before.

A section is a heading, the command, a table, and the machine, versions and date. On a machine whose copy of the
repository is thrown away, record into a file of your own and merge that here:

    python examples/benchmarks/inference.py --record somewhere.md
    python examples/benchmarks/results.py merge somewhere.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = """# Results

What the commands of this folder measured. Each writes its own section when it is run with `--record`; nothing here is
written by hand but the notes in italics. Ratios compare what took turns in one run.
"""
Rows = Sequence[Mapping[str, Any]]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark, among them ``--record``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--record", type=Path, nargs="?", const=RESULTS, metavar="PATH", help=f"write to it (default: {RESULTS.name})"
    )
    return made


def report(path: Path | None, name: str, rows: Iterable[Mapping[str, Any]], *, on: str | None = None) -> None:
    """Print each row as a line of JSON once it is there, and :func:`write_section` of all so far.

    Until the last is there, the section says that some are missing.

    Args:
        on: the device, whose name ends that of the section: another machine's figures do not take its place.
    """
    if on is not None:
        name += f", {torch.cuda.get_device_name(on) if on.startswith('cuda') else _processor()}"
    found: list[Mapping[str, Any]] = []
    for row in rows:
        found.append(row)
        print(json.dumps(row), flush=True)
        write_section(path, name, found, "*Rows are missing: the command did not come to its end.*")
    write_section(path, name, found)


def write_section(path: Path | None, name: str, rows: Rows, note: str = "") -> None:
    """Write the rows, and a note, to the section of that name, where there is a path."""
    if path is not None:
        parts = [f"```console\n{command(sys.argv)}\n```", *filter(None, [note]), table(rows), f"{machine()}."]
        write(path, {name: "\n\n".join(parts)})


def table(rows: Rows) -> str:
    """A Markdown table. What is alike in several rows stands below it."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    alike = [name for name in names if len(flat) > 1 and len({row.get(name) for row in flat}) == 1]
    head = [name for name in names if name not in alike]
    if len(flat) == 1:
        lines = [["", ""], *([name, flat[0][name]] for name in head)]
    else:
        lines = [head, *([row.get(name, "") for name in head] for row in flat)]
    lines.insert(1, ["---"] * len(lines[0]))
    shown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return shown + ("\n\n" + "; ".join(f"{name}: {flat[0][name]}" for name in alike) + "." if alike else "")


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    cells: dict[str, str] = {}
    for key, value in row.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        cells |= _flat(value, f"{name}, ") if isinstance(value, Mapping) else {name: _cell(value)}
    return cells


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " x ".join(map(_cell, value))
    return str(value)


def command(words: Sequence[str]) -> str:
    """The command line in short: without ``--record``, of absolute paths the last part alone."""
    script, *given = words
    kept: list[str] = []
    for word in given:
        if word.partition("=")[0] == "--record":
            kept.append("--record")
        elif kept[-1:] == ["--record"] and not word.startswith("-"):
            continue  # where it was recorded
        else:
            kept.append(f"PATH/TO/{Path(word).name}" if os.path.isabs(word) else shlex.quote(word))
    return " ".join(["python", f"examples/benchmarks/{Path(script).name}", *(w for w in kept if w != "--record")])


def machine() -> str:
    """Processor, GPU, versions and date."""
    parts = [f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts.append(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return "; ".join([*parts, datetime.date.today().isoformat()])


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def read(path: Path) -> dict[str, str]:
    """The sections of a file, by name; none where there is no file."""
    if not path.exists():
        return {}
    _, *parts = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip() for name, _, text in (part.partition("\n") for part in parts)}


def write(path: Path, sections: Mapping[str, str]) -> None:
    """Replace these sections of a file, or add them, in the order of their names."""
    every = read(path) | dict(sections)
    path.write_text("\n".join([HEAD, *(f"## {name}\n\n{every[name]}\n" for name in sorted(every))]), encoding="utf-8")


if __name__ == "__main__":
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("action", choices=["merge"])
    main.add_argument("files", type=Path, nargs="+")
    main.add_argument("--into", type=Path, default=RESULTS)
    chosen = main.parse_args()
    for file in chosen.files:
        found = read(file)
        if not found:
            main.error(f"{file} has no sections. Give a file that a benchmark wrote with --record {file}.")
        write(chosen.into, found)
