"""The model card: everything that a reader of a classifier's page needs, from the record of its calibration."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError  # type: ignore[attr-defined]
from transformers.utils import logging
from yaml import YAMLError

from .. import __version__
from ..calibration import CalibrationResult
from ..calibration.task import metric_title
from ..taps import Tap
from .folder import Checkpoint, hub_id
from .markdown import Markdown, render
from .metadata import (
    PAPER,
    TAGS,
    UNNAMED,
    WRITTEN,
    base_model_of,
    metadata,
    scores,
    standard_error,
    was_trained,
)
from .profile import layer_profile

logger = logging.get_logger(__name__)

CARD, PICTURE = "README.md", "layer_profile.png"
RECORD, EVALUATION = "calibration.json", "evaluation.json"

Features = Sequence[Mapping[str, Any]]
_TASKS = {
    "single_label_classification": "one label per",
    "multi_label_classification": "any number of labels per",
    "regression": "a number per",
}
_LICENSE = ("license", "license_name", "license_link")
_CALLED = re.compile(r'pipeline\("text-classification", ("[^"\n]*")')  # what a card loads the model by
_MOST_LABELS = 20  # of a confusion matrix, and of names in the table of facts


class CardError(ValueError):
    """A card can't be written: its facts are missing or make no sense."""


def write_card(
    folder: str | Path,
    *,
    result: CalibrationResult | None = None,
    test: Mapping[str, Any] | None = None,
    backbone: str | Path | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    language: str | None = None,
) -> Path:
    """Write ``README.md``, and with matplotlib a picture of the layers, into the folder of a saved classifier.

    The facts are kept beside the card, in ``calibration.json`` and ``evaluation.json``, and what only a person knows in
    the card's own YAML head. A card that is written again takes them from there.

    Args:
        folder: of ``model.save_pretrained``.
        result: the record of the calibration; read from ``calibration.json`` if left out.
        test: scores on rows that chose nothing: ``{"rows": 1821, "accuracy": 0.845, ...}``, as
            ``spin-hf evaluate --json`` prints them, with ``labels`` and ``confusion_matrix`` if there are any.
        backbone: folder or Hub id where the backbone's own card, and with it the licence, can be read; by default
            where the model says it came from.
        base_model: Hub id of the backbone, if it was loaded from a folder.
        dataset: Hub id or a plain name of the data.
        license: of the backbone, and so of this classifier, where the backbone's own card can't be read.
        language: code of the data's language, such as ``en``.

    Returns:
        Path of the card.

    Raises:
        CheckpointError: if the folder holds no whole classifier.
        CardError: if there is no record of a calibration, ``test`` has no rows, or an existing card can't be read.
    """
    checkpoint = Checkpoint.read(folder)
    folder = checkpoint.folder
    check_base_model(base_model)
    if result is None:
        result = read_record(folder)
    else:
        result.save(folder / RECORD)
    if test is not None:
        _write(folder / EVALUATION, json.dumps(_checked(test), indent=1, ensure_ascii=False))
    told = _told_before(folder)
    if license is not None:
        told = {name: value for name, value in told.items() if name not in _LICENSE}
        told["license"] = license
    told.update({name: value for name, value in (("base_model", base_model), ("language", language)) if value})
    if not {"license", "license_name"} & told.keys():
        source, revision = backbone or checkpoint.config.get("backbone_id"), None
        if source == checkpoint.config.get("backbone_id"):
            revision = checkpoint.config.get("backbone_revision")
        told.update(_license_of(None if source is None else str(source), revision))
    if dataset is not None:
        told.update(_named(dataset))
    try:
        layer_profile(result).savefig(folder / PICTURE, metadata={"Software": None})
    except ImportError:
        (folder / PICTURE).unlink(missing_ok=True)  # of an earlier result
        logger.warning("The card has no picture, for want of matplotlib: pip install 'spin_hf[plots]'.")
    path = folder / CARD
    _write(path, _text(checkpoint, result, told, model_id=None))
    for line in _open_questions(checkpoint, told):
        logger.warning(line)
    return path


def check_base_model(name: str | None) -> None:
    """Raise :class:`CardError` for a name that no model on the Hub can have."""
    if name is not None and hub_id(name) != name:
        raise CardError(f'The base model {name!r} is no Hub id. One reads like "HuggingFaceTB/SmolLM2-135M".')


def card_text(checkpoint: Checkpoint, *, model_id: str | None = None) -> str:
    """The card of a folder from the facts beside it, as :func:`write_card` would write it again.

    Args:
        checkpoint: of the folder.
        model_id: what the card calls the model, and loads it by; the folder's name by default.

    Raises:
        CardError: as in :func:`write_card`.
    """
    return _text(checkpoint, read_record(checkpoint.folder), _told_before(checkpoint.folder), model_id=model_id)


def is_as_written(checkpoint: Checkpoint) -> bool:
    """Whether nobody changed the text of a folder's card since :func:`write_card`."""
    text = (checkpoint.folder / CARD).read_text(encoding="utf-8")
    called = _CALLED.search(text)
    try:
        return called is not None and text == card_text(checkpoint, model_id=json.loads(called[1]))
    except (CardError, json.JSONDecodeError):
        return False


def named_base_model(checkpoint: Checkpoint) -> str | None:
    """Hub id of the backbone, from the card's head or the config."""
    return base_model_of(checkpoint, _told_before(checkpoint.folder))


def read_record(folder: Path) -> CalibrationResult:
    """The record of the calibration that is kept in a classifier's folder. Raises :class:`CardError` without one."""
    try:
        return CalibrationResult.load(folder / RECORD)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CardError(
            f"{folder / RECORD} can't be read ({error}), and cards and reports are made from it. Save it there: "
            f"result.save({str(folder / RECORD)!r}), or pass result= to write_card."
        ) from error


def _checked(test: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(test.get("rows"), int) or test["rows"] < 1:
        raise CardError(f'test needs the number of its rows: {{"rows": 1821, "accuracy": 0.845}}; got {dict(test)}.')
    return dict(test)


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The scores on rows that chose nothing, if any are kept there. Raises :class:`CardError` for a damaged file."""
    path = folder / EVALUATION
    if not path.is_file():
        return None
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise CardError(f"{path} can't be read: {error}. Remove it, or pass test= to write_card.") from error


def _told_before(folder: Path) -> dict[str, Any]:
    """What the head of an existing card says beyond what is written anew: licence, language, a person's own tags."""
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path).data
    except (OSError, ValueError, YAMLError) as error:
        raise CardError(f"The YAML head of {path} can't be read: {error}. Correct it, or remove the file.") from error
    told = {name: value for name, value in data.to_dict().items() if name not in WRITTEN}
    told["more_tags"] = [tag for tag in data.tags or [] if tag not in TAGS]
    if data.eval_results and data.eval_results[0].dataset_name != UNNAMED:
        told["dataset_type"] = data.eval_results[0].dataset_type
        told["dataset_name"] = data.eval_results[0].dataset_name
    return told


def _named(dataset: str) -> dict[str, Any]:
    name = " ".join(dataset.split())
    on_hub = hub_id(name) is not None and "/" in name
    return {
        "dataset_name": name,
        "dataset_type": name if on_hub else "-".join(name.lower().split()),
        "datasets": [name] if on_hub else None,
    }


def _license_of(source: str | None, revision: str | None) -> dict[str, str]:
    """Licence fields of a model's own card, in its folder or on the Hub; none where they can't be read."""
    if source is None:
        return {}
    try:
        if os.path.isdir(source):
            path = os.path.join(source, CARD)
        elif (repo := hub_id(source)) is not None:
            path = hf_hub_download(repo, CARD, revision=revision)
        else:
            return {}
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError, YAMLError, EntryNotFoundError, HTTPError):
        return {}
    found = {name: str(data[name]) for name in _LICENSE if data.get(name)}
    if not found.get("license_link", "http").startswith("http"):
        del found["license_link"]  # a file of the backbone's repository, not of this one
    return found


def _open_questions(checkpoint: Checkpoint, told: Mapping[str, Any]) -> list[str]:
    lines = []
    if not base_model_of(checkpoint, told):
        lines.append("The card names no base model, since the backbone was loaded from a folder. Name its Hub id: "
                     "--base-model, or base_model= of write_card.")  # fmt: skip
    if not {"license", "license_name"} & told.keys():
        lines.append("The backbone's licence is unknown: its own card can't be read. Find out before you share this.")
    return lines


def _text(checkpoint: Checkpoint, result: CalibrationResult, told: Mapping[str, Any], *, model_id: str | None) -> str:
    name = (model_id or checkpoint.folder.resolve().name).rpartition("/")[2]
    test = read_evaluation(checkpoint.folder)
    data = metadata(checkpoint, result, told, test, name)
    config, features = checkpoint.config, checkpoint.config["features"]
    return render(
        card_data=Markdown(data.to_yaml().rstrip()),
        name=name,
        model_id=model_id or name,
        version=__version__,
        paper=PAPER,
        form=checkpoint.form,
        problem_type=config.get("problem_type"),
        task=_TASKS.get(str(config.get("problem_type")), "unknown, per"),
        text="pair" if config.get("text_pairs") else "text",
        pairs=bool(config.get("text_pairs")),
        trained=was_trained(result),
        target="number" if config.get("problem_type") == "regression" else "label",
        labels=[str(label) for label in result.data["labels"]],
        most_labels=_MOST_LABELS,
        base_model=base_model_of(checkpoint, told),
        backbone_type=(config.get("backbone_config") or {}).get("model_type", "unknown"),
        license=told.get("license_name") or told.get("license"),
        dataset=told.get("dataset_name"),
        result=result,
        chosen=result.chosen,
        exits=config.get("exits") or [],
        blocks_run=result.blocks if config.get("exits") else result.chosen.depth,
        num_features=sum(entry["count"] for entry in features),
        changed=features != list(result.kept),
        metric=metric_title(result.metric),
        standard_error=standard_error(result.metric, result.chosen.score, result.data["eval_rows"]),
        best_baseline=max(result.baselines.values(), default=None),
        widest=result.settings["prefer"] == "widest",
        test=test,
        test_scores=_test_scores(result.metric, test, config.get("problem_type")),
        test_error=standard_error("accuracy", (test or {}).get("accuracy"), (test or {}).get("rows", 1)),
        matrix=_matrix(test),
        columns=[", ".join(column) for column in _columns(features)],
        has_norm=any(kind == "norm" for kind, _ in _columns(features)),
        blocks=[(block, [number or "" for number in counts]) for block, counts in _by_block(features)],
        picture=PICTURE if (checkpoint.folder / PICTURE).is_file() else None,
        weight_bytes=checkpoint.bytes,
    )


def _test_scores(first: str, test: Mapping[str, Any] | None, problem_type: str | None) -> list[tuple[str, float]]:
    """The test's scores by their titles, beginning with the one that chose the model."""
    words = {"accuracy": "Exact match"} if problem_type == "multi_label_classification" else {}  # of all labels at once
    ordered = sorted(scores(test), key=lambda pair: pair[0] != first)
    return [(words.get(key) or metric_title(key), value) for key, value in ordered]


def _matrix(test: Mapping[str, Any] | None) -> list[tuple[str, list[int]]]:
    names, counts = (test or {}).get("labels") or [], (test or {}).get("confusion_matrix") or []
    return list(zip(names, counts, strict=False)) if len(names) <= _MOST_LABELS else []


def _columns(features: Features) -> list[tuple[str, str]]:
    """(kind, pooling) of the kept groups."""
    return sorted({(Tap.parse(entry["tap"]).kind, entry["pooling"]) for entry in features}, reverse=True)


def _by_block(features: Features) -> list[tuple[int, list[int]]]:
    """Neurons kept in each block, column by column of :func:`_columns`."""
    columns = _columns(features)
    counts: dict[int, list[int]] = {}
    for entry in features:
        tap = Tap.parse(entry["tap"])
        counts.setdefault(tap.block, [0] * len(columns))[columns.index((tap.kind, entry["pooling"]))] = entry["count"]
    return sorted(counts.items())


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
