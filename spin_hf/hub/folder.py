"""What a saved classifier's folder holds, read without loading the model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open

from .. import CheckpointError, SpinConfig
from ..checkpoint import Form as Form
from ..configuration_spin import FORMAT_VERSION

_INDEX = "model.safetensors.index.json"
_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".jinja", ".md", ".png"}  # nothing that could hold a pickle
_TRAINERS = {"trainer_state.json"}  # tells of folders on the machine that trained
_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a whole, calibrated SPIN model.

    Attributes:
        folder: where it lies.
        config: its ``config.json``.
        form: ``full``; ``head`` (the weights of the backbone are not in it); or ``self_contained`` (with the code).
        weights: names of its weight files.
        bytes: size of these.
    """

    folder: Path
    config: Mapping[str, Any]
    form: Form
    weights: tuple[str, ...]
    bytes: int

    @classmethod
    def read(cls, folder: str | Path) -> Checkpoint:
        """Look at a folder; only the headers of the weights are read.

        Raises:
            CheckpointError: if a part of the model is missing, cut off, or no SPIN model's.
        """
        folder = Path(folder)
        config = _config(folder)
        weights = _weight_files(folder)
        shapes: dict[str, list[int]] = {}
        for name in weights:
            shapes.update(_shapes(folder / name))
        features = _num_features(folder, config)
        for name in ("spin.standardizer.neurons", "spin.standardizer.mean", "spin.standardizer.scale", "score.weight"):
            if shapes.get(name, [0])[-1] != features:
                raise CheckpointError(
                    f"{folder}: the config has {features} features, the weights' {name} "
                    + (f"has the shape {shapes[name]}." if name in shapes else "is missing.")
                    + " Save the model again."
                )
        has_backbone = any(name.startswith("spin.backbone.") for name in shapes)
        form: Form = "head" if not has_backbone else "self_contained" if config.get("auto_map") else "full"
        return cls(folder, config, form, weights, sum((folder / name).stat().st_size for name in weights))

    def uploads(self) -> list[str]:
        """Names of the files that belong to the model: no subfolders, no hidden files, nothing that could be a pickle.

        Raises:
            CheckpointError: if there is no tokenizer.
        """
        if not (self.folder / "tokenizer_config.json").is_file():
            raise CheckpointError(
                f"{self.folder} has no tokenizer. Call tokenizer.save_pretrained({str(self.folder)!r}) first."
            )
        suffixes = _SUFFIXES | ({".py"} if self.form == "self_contained" else set())
        names = [path.name for path in self.folder.iterdir() if path.is_file() and path.suffix in suffixes]
        other_weights = {name for name in names if is_weight_file(name)} - {*self.weights, _INDEX}
        return sorted(name for name in names if name[0] != "." and name not in other_weights | _TRAINERS)

    @property
    def backbone_hub_id(self) -> str | None:
        """Hub id of the backbone; ``None`` where it came from a folder or from memory."""
        return hub_id(self.config.get("backbone_id"))


def is_weight_file(name: str) -> bool:
    """Whether transformers would load weights from a file of this name."""
    return name.endswith((".safetensors", ".bin")) or name == _INDEX


def hub_id(source: str | None) -> str | None:
    """The Hub id that a backbone's source is, or that a folder of the download cache belongs to."""
    if not source:
        return None
    if cached := _SNAPSHOT.search(source):
        return cached[1].replace("--", "/")
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return None if os.path.isdir(source) else source


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is no saved model: its config.json can't be read ({error}). "
            f"Save the model there first: model.save_pretrained({str(folder)!r})."
        ) from error
    if not isinstance(config, dict) or config.get("model_type") != SpinConfig.model_type:
        raise CheckpointError(f"{folder} is not a SPIN checkpoint: the model_type in its config.json is not 'spin'.")
    version = config.get("spin_format", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format {version}, this version of spin_hf reads up to {FORMAT_VERSION}. "
            "Update it: pip install -U spin_hf."
        )
    if not config.get("features"):
        raise CheckpointError(f"{folder} was never calibrated. Run spin_calibrate, then save the model again.")
    return config


def _num_features(folder: Path, config: dict[str, Any]) -> int:
    try:
        return sum(int(entry["count"]) for entry in config["features"])
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: `features` in config.json can't be read. Save the model again.") from error


def _weight_files(folder: Path) -> tuple[str, ...]:
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return (single.name,)
    if not index.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors. Save the model again with save_pretrained.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} can't be read: {error}. Save the model again.") from error
    lacking = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if lacking:
        raise CheckpointError(f"{folder} lacks {', '.join(lacking)}. Save the model again.")
    return tuple(names)


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}. Save the model again.") from error
