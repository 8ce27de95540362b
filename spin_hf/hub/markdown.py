"""The card's template, and the escaping of all that is written into it."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$])")


class Markdown(str):
    """Text that is Markdown already."""


def render(**values: Any) -> str:
    """Fill the template. Every value is escaped on the way in, except :class:`Markdown`."""
    return _environment().get_template("card.md.jinja").render(values)


def plain(value: Any) -> Markdown:
    """Text as Markdown that shows exactly this text, on one line, also inside a table."""
    if isinstance(value, Markdown):
        return value
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markdown(_SPECIAL.sub(r"\\\1", text))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("spin_hf.hub", "templates"),
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML: `finalize` escapes
    )
    environment.filters.update(
        score=lambda value: "–" if value is None else f"{value:.4f}",
        count=lambda value: f"{value:,}",
        megabytes=lambda value: f"{value / 1e6:,.1f} MB",
        python=lambda value: Markdown(json.dumps(value, ensure_ascii=False)),
        row=lambda cells: Markdown(f"| {' | '.join(map(plain, cells))} |"),
        url=lambda value: Markdown(quote(value)),
        shell=lambda value: Markdown(shlex.quote(value)),
    )
    return environment
