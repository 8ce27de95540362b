"""``spin-hf report`` and ``spin-hf app``: classifiers are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..loading import UserError, load_classifier
from .shared import Backbone, Device, LabelColumn, Model, TextColumn, TrustRemoteCode


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
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    device: Device = None,
    backbone: Backbone = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show a classifier in one HTML file: scores, layers, neurons, mistakes, examples and costs."""
    from ..calibration.sources import split_of
    from ..explain.evaluation import Evaluated
    from ..explain.report import Report
    from ..hub.card import read_evaluation, read_record

    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Name that of a classifier, as spin-hf calibrate --out wrote it.")
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a folder. Name a file: --out {out / 'report.html'}")
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
            from ..explain.paper_figures import save_figures

            written = save_figures(made.charts(), figures)
        except ImportError:
            raise UserError("--figures needs matplotlib. Run: pip install 'spin_hf[plots]'") from None
        typer.echo(f"Wrote {len(written)} figures to {figures}.")


def app(
    model: Model,
    port: Annotated[int | None, typer.Option(help="By default the first free one from 7860 on.")] = None,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    device: Device = None,
    backbone: Backbone = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Open a page to try a classifier on: type a text, see the answer, its words and its layers."""
    from ..explain.app import make_app

    page = make_app(model, device=device, backbone=backbone, trust_remote_code=trust_remote_code)
    try:
        page.launch(server_name=host, server_port=port)
    except OSError as error:
        raise UserError(f"The page can't be served on {host}, port {port or '7860 and up'}: {error}") from None


def _shown(source: str) -> str:
    path = Path(source)
    return path.name if path.exists() else source
