"""What the commands share: their common options, how mistakes are told, and where results are printed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from ..loading import UserError, texts_to_predict
from ..wording import in_shell_words

console = Console()
_err = Console(stderr=True)
_F = TypeVar("_F", bound=Callable[..., Any])

DATA_HELP = (
    "csv, tsv, json, jsonl or parquet file, a folder, or NAME/CONFIG:SPLIT on the Hub, where /CONFIG and :SPLIT may be "
    "left out."
)
Texts = Annotated[list[str] | None, typer.Argument(help="Texts; without any, --file or standard input.")]
TextFile = Annotated[
    Path | None, typer.Option(help="csv, tsv, json, jsonl, parquet, or txt with a text a line, or none.")
]
BatchTokens = Annotated[int, typer.Option(help="Padded tokens per batch.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")]
TextColumn = Annotated[list[str] | None, typer.Option(help="Column of the texts; twice for sentence pairs.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels.")]
MinConfidence = Annotated[float | None, typer.Option(help="Abstain from texts of a lower confidence, 0 to 1.")]
Exit = Annotated[int | None, typer.Option(help="Answer with this exit; see calibrate --exits.")]
Model = Annotated[str, typer.Argument(help="Folder or Hub id of a classifier.")]
Backbone = Annotated[str | None, typer.Option(help="Of a head-only classifier: the backbone's folder or Hub id.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the backbone's repository.")]


def one_line_errors(command: _F) -> _F:
    """Turn the errors a caller can put right into one line and exit code 2; others keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from ..calibration import CalibrationError
        from ..calibration.ranks import Ranks, ending_together
        from ..exits import ExitError
        from ..explain import ExplanationError
        from ..explain.page import MissingExtraError
        from ..hub import CardError, PushError
        from ..modeling_spin import NotCalibratedError
        from ..taps import TapError
        from ..trust import CheckpointError

        known: tuple[type[Exception], ...] = (UserError, CalibrationError, CardError, CheckpointError, ExitError)
        known += (ExplanationError, MissingExtraError, NotCalibratedError, PushError, TapError)
        try:
            return ending_together(command)(*args, **kwargs)
        except known as error:
            if Ranks.here().main:
                _err.print("[red]error:[/red]", escape(in_shell_words(str(error))), highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]


def texts_given(
    texts: list[str] | None, file: Path | None, text_column: list[str] | None
) -> tuple[list[str], list[str] | None, list[int]]:
    """Texts, their pairs, and the numbers of those that are not blank."""
    first, second = texts_to_predict(texts, file, text_column)
    given = [i for i, text in enumerate(first) if text.strip() or (second is not None and second[i].strip())]
    if not given:
        raise UserError("No texts: give some as arguments, with --file, or on standard input.")
    return first, second, given


def show(scores: dict[str, Any]) -> None:
    """Print scores, with the confusion matrix."""
    from ..scoring import shown_scores

    for part in shown_scores(scores):
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))
