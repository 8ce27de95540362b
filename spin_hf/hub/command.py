"""``spin-hf push``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .folder import Form


class FormName(str, Enum):
    """The forms of a checkpoint, as typer wants a choice."""

    full = "full"
    head = "head"
    self_contained = "self_contained"


_FORMS: dict[FormName, Form] = {
    FormName.full: "full",
    FormName.head: "head",
    FormName.self_contained: "self_contained",
}


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a classifier.")],
    repo: Annotated[str, typer.Argument(help="Name of the repository, like you/my-classifier; made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if need be.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload SPIN classifier",
    form: Annotated[FormName | None, typer.Option(help="Save in this form first; as it is by default.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="With --form: run code from the backbone's repository.")
    ] = False,
) -> None:
    """Upload a classifier with its tokenizer and card to the Hub, in one commit."""
    from .push import push_to_hub

    commit = push_to_hub(
        folder,
        repo,
        private=private or None,
        revision=revision,
        message=message,
        form=None if form is None else _FORMS[form],
        trust_remote_code=trust_remote_code,
    )
    typer.echo(f"Pushed {folder}: {commit.commit_url}")
