"""``spin-hf predict``, ``explain`` and ``evaluate``: classifiers answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..loading import load_classifier
from .shared import (
    DATA_HELP,
    Backbone,
    BatchTokens,
    Device,
    Exit,
    LabelColumn,
    MinConfidence,
    Model,
    TextColumn,
    TextFile,
    Texts,
    TrustRemoteCode,
    console,
    show,
    texts_given,
)


def predict(
    model: Model,
    texts: Texts = None,
    file: TextFile = None,
    text_column: TextColumn = None,
    min_confidence: MinConfidence = None,
    exit: Exit = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = None,
    backbone: Backbone = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Classify texts; for each one a JSON object goes to a line of standard output."""
    from ..prediction import predict as predict_texts

    first, second, given = texts_given(texts, file, text_column)
    classifier, tokenizer = load_classifier(model, device, trust_remote_code, backbone)
    prediction = predict_texts(
        classifier,
        tokenizer,
        [first[i] for i in given],
        None if second is None else [second[i] for i in given],
        batch_tokens=batch_tokens,
        min_confidence=min_confidence,
        exit=exit,
    )
    answers = dict(zip(given, map(prediction.row, range(len(given))), strict=True))
    _write(first, second, answers)


def explain(
    model: Model,
    texts: Texts = None,
    file: TextFile = None,
    text_column: TextColumn = None,
    label: Annotated[str | None, typer.Option(help="Explain this label instead of the answer.")] = None,
    exit: Exit = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line instead of colours.")] = False,
    batch_tokens: BatchTokens = 4096,
    device: Device = None,
    backbone: Backbone = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which words and blocks speak for and against the label of texts."""
    from ..explain import explain as explain_texts
    from ..explain.terminal import shown

    first, second, given = texts_given(texts, file, text_column)
    classifier, tokenizer = load_classifier(model, device, trust_remote_code, backbone)
    found = explain_texts(
        classifier,
        tokenizer,
        [first[i] for i in given],
        None if second is None else [second[i] for i in given],
        batch_tokens=batch_tokens,
        exit=exit,
    )
    if label is not None:
        found.reading.label(label)
    if not as_json:
        for explanation in found:
            console.print(shown(explanation, label), highlight=False)
        return
    _write(first, second, {i: explanation.to_dict() for i, explanation in zip(given, found, strict=True)})


def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    min_confidence: MinConfidence = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    backbone: Backbone = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a classifier on labelled texts, with the confusion matrix."""
    from ..calibration.sources import split_of
    from ..scoring import score_rows

    rows = split_of(data, "test")
    classifier, tokenizer = load_classifier(model, device, trust_remote_code, backbone)
    columns = {"text_column": text_column, "label_column": label_column}
    values = score_rows(classifier, tokenizer, rows, min_confidence=min_confidence, **columns)
    if as_json:
        sys.stdout.write(json.dumps(values) + "\n")
    else:
        show(values)


def _write(texts: Sequence[str], pairs: Sequence[str] | None, answers: dict[int, dict[str, Any]]) -> None:
    """A JSON object a line for each text, also for those that are blank and so were not read."""
    (answer,) = {"label", "labels", "value"} & next(iter(answers.values())).keys()
    for i, text in enumerate(texts):
        shown = {"text": text} if pairs is None else {"text": text, "text_pair": pairs[i]}
        found = answers.get(i, {answer: None, "reason": "no text"})
        sys.stdout.write(json.dumps({**shown, **found}, ensure_ascii=False) + "\n")
