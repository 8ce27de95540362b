"""``spin-hf cache``, ``push`` and ``keep-exit``: what lies in folders is listed, uploaded and cut down."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from ..exits import demand_exit
from ..hub.folder import Form
from ..loading import UserError, load_classifier
from .shared import console


def cache(
    folder: Annotated[Path, typer.Argument(help="What was given as --cache-dir.")],
    clear: Annotated[bool, typer.Option("--clear", help="Remove the features; none that are being written.")] = False,
) -> None:
    """List the features that calibrations have kept, or remove them."""
    from ..calibration.cache import clear_store, list_stores

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    stores = list_stores(folder)
    table = Table("folder", "backbone", *(Column(name, justify="right") for name in ("texts", "done", "MB", "used")))
    for store in stores:
        state = "now" if store.in_use else f"{_ago(store.age)} ago"
        size = f"{store.bytes / 1e6:,.1f}"
        table.add_row(store.folder.name[:12], store.backbone, f"{store.texts:,}", f"{store.done:.0%}", size, state)
    if stores:
        console.print(table)
    console.print(
        f"{len(stores)} store{'s' * (len(stores) != 1)}, {sum(s.bytes for s in stores) / 1e6:,.1f} MB in {folder}",
        soft_wrap=True,
    )
    if clear:
        idle = [store for store in stores if not store.in_use]
        for store in idle:
            clear_store(store)
        console.print(f"{len(idle)} removed.")


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
    from ..hub.push import push_to_hub

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


def keep_exit(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a classifier that was calibrated with --exits.")],
    exit: Annotated[int, typer.Option(help="Its number in the classifier's config.json.")],
    out: Annotated[Path, typer.Option(help="Folder for the new classifier.")],
    backbone: Annotated[str | None, typer.Option(help="Of a head-only classifier: its backbone.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code from the backbone's repository.")
    ] = False,
) -> None:
    """Make an ordinary classifier of one exit: its head alone, and the blocks that it needs."""
    from ..hub.card import RECORD, read_record

    if Path(model).is_dir() and Path(model).resolve() == out.resolve():
        raise UserError(f"--out {out} is the classifier itself, whose other exits would be lost. Name another folder.")
    classifier, tokenizer = load_classifier(model, "cpu", trust_remote_code, backbone)
    demand_exit(classifier.exits, exit)
    entry = classifier.config.exits[exit]
    classifier.keep_exit(exit)
    classifier.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if (Path(model) / RECORD).is_file():  # a card and a report are made from it
        record = read_record(Path(model)).of_exit(exit, classifier.config.features)
        record.save(out / RECORD)
    typer.echo(
        f"Saved exit {exit} to {out}: {entry['depth']} blocks, {entry['num_features']:,} features, "
        f"{entry['score']:.4f} on the validation texts. Scores on other texts stay with {model}."
    )


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
