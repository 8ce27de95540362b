"""``spin-hf report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..loading import UserError, load_classifier


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a classifier.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Labelled texts to show answers on, as of calibrate --test; may be repeated. Mistakes and examples "
            "are of the first."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file; report.html in the folder by default.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Also write every chart here, as PNG and as SVG.")] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(help="Column of the texts; twice for sentence pairs.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Of a head-only classifier: the backbone's folder or Hub id.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code from the backbone's repository.")
    ] = False,
) -> None:
    """Show a classifier in one HTML file: scores, layers, neurons, mistakes, examples and costs."""
    from ..calibration.sources import split_of
    from ..hub.card import read_evaluation, read_record
    from .evaluation import Evaluated
    from .report import Report

    result, test = read_record(folder), read_evaluation(folder)
    evaluated: list[Evaluated] = []
    if data:
        sources = [(name, split_of(name, "test")) for name in data]
        model, tokenizer = load_classifier(str(folder), device, trust_remote_code, backbone)
        columns = {"text_column": text_column, "label_column": label_column}
        evaluated = [Evaluated.of(model, tokenizer, rows, _shown(name), **columns) for name, rows in sources]
    elif text_column or label_column:
        raise UserError("--text-column and --label-column name columns of --data, and there is none. Leave them out.")
    name = folder.resolve().name
    made = Report(name, result, tuple(evaluated), test, how=f"spin-hf report {folder} --data FILE")
    path = made.save(out or folder / "report.html")
    typer.echo(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB). Open it in a browser.")
    if figures is not None:
        try:
            from .paper_figures import save_figures

            written = save_figures(made.charts(), figures)
        except ImportError:
            raise UserError("--figures needs matplotlib. Run: pip install 'spin_hf[plots]'") from None
        typer.echo(f"Wrote {len(written)} figures to {figures}.")


def _shown(source: str) -> str:
    path = Path(source)
    return path.name if path.exists() else source
