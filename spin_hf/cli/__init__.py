"""The command line. Results go to standard output, progress and errors to standard error; exit code 2 for a mistake."""

from __future__ import annotations

from typing import Annotated

import typer

from .folders import cache, keep_exit, push
from .make import calibrate, demo
from .pages import app as serve
from .pages import report
from .shared import one_line_errors
from .use import evaluate, explain, predict

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"spin_hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and stop.")
    ] = False,
) -> None:
    """Turn a pretrained Hugging Face model into a text classifier without training it."""


for _command in (calibrate, predict, explain, evaluate, cache, demo, push, keep_exit, report):
    app.command()(one_line_errors(_command))
app.command(name="app")(one_line_errors(serve))
