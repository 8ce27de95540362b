"""HTML from the templates, with every text escaped on its way in; a report holds its style, script and plotly too."""

from __future__ import annotations

import base64
import gzip
import hashlib
import unicodedata
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..attention import pooling_title

LONGEST = 600  # characters of a text that are shown


class MissingExtraError(ImportError):
    """A package that only this part needs is not installed; the message says how to get it."""


def render(**values: Any) -> str:
    """The whole file.

    Args:
        **values: what the template names. Strings are data: they come out as text, whatever they hold.

    Raises:
        MissingExtraError: without plotly.
    """
    script = _asset("report.js")
    plotly, plotly_hash = _plotly()
    return _environment().get_template("report.html.jinja").render(
        css=Markup(style("report.css", "words.css")),
        js=Markup(script),
        plotly=Markup(plotly),
        script_hashes=Markup(f"'{_hash(script)}' '{plotly_hash}'"),
        **values,
    )  # fmt: skip


def render_part(template: str, macro: str, *values: Any) -> str:
    """One macro of a template, as HTML; escaping as in :func:`render`."""
    return str(getattr(_environment().get_template(template).module, macro)(*values))


def style(*names: str) -> str:
    """Style sheets of the templates folder, joined."""
    return "".join(map(_asset, names))


def shown(value: object, longest: int = LONGEST) -> str:
    """Text for a reader: control characters as pictures, what no file can hold as a mark, and long texts cut."""
    text = str(value)
    if len(text) > longest:
        text = f"{text[:longest]}… ({len(text):,} characters)"
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    kind = unicodedata.category(character)
    if kind == "Cc":
        code = ord(character)
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"
    return "�" if kind == "Cs" or ord(character) & 0xFFFE == 0xFFFE else character


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("spin_hf.explain", "templates"), undefined=StrictUndefined, autoescape=True
    )
    environment.filters["shown"] = shown
    environment.filters["pooling_title"] = pooling_title
    return environment


def _asset(name: str) -> str:
    return (files("spin_hf.explain") / "templates" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> tuple[str, str]:
    """Plotly's script, gzipped for a third of the size, as base64; and the hash that lets the page run it."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("The report's charts need plotly. Run: pip install 'spin_hf[report]'") from error
    script = get_plotlyjs()
    packed = gzip.compress(script.encode(), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode(), _hash(script)


def _hash(script: str) -> str:
    """As a content security policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
