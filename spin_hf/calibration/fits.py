"""Finished probes and heads, kept beside the features, so that a calibration that was killed goes on from there."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ..taps import Tap
from .probes import Probe, ProbeFit
from .selection import Candidate

T = TypeVar("T")

_CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (Candidate, Probe, ProbeFit, Tap)}


@dataclass(frozen=True)
class Fits:
    """Finished pieces of work in a folder, each a safetensors file; without a folder nothing is kept.

    Attributes:
        folder: of one feature store and one set of labels.
        device: where the work is done, and what is read back goes.
    """

    folder: Path | None
    device: torch.device

    @classmethod
    def beside(cls, store: Path, labels: str, device: torch.device) -> Fits:
        """Those of a store's folder, made from these labels by this code on this kind of device."""
        origin = hashlib.sha256(f"{labels} {_code()} {torch.__version__} {device.type}".encode()).hexdigest()
        return cls(store / f"fits.{origin[:16]}", device)

    def keep(self, name: str, settings: object, make: Callable[[], T]) -> T:
        """What ``make`` returned the last time under these settings, if it is there undamaged, or returns now."""
        if self.folder is None:
            return make()
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()
        path = self.folder / f"{name}.{digest[:16]}.safetensors"
        with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
            kept: T = _read(path, self.device)
            return kept
        made = make()
        with suppress(OSError):  # it is there for the next run only
            self.folder.mkdir(exist_ok=True)
            partial = path.with_suffix(f".{uuid.uuid4().hex}")  # another calibration may be writing the same
            _write(partial, made)
            os.replace(partial, path)
        return made


def _write(path: Path, value: Any) -> None:
    arrays: dict[str, np.ndarray] = {}
    content = json.dumps(_encoded(value, arrays))
    save_file(arrays, path, {"content": content, "checksum": str(_checksum(content, arrays))})


def _read(path: Path, device: torch.device) -> Any:
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata["checksum"] != str(_checksum(metadata["content"], arrays)):
        raise ValueError(f"{path} is damaged")
    return _decoded(json.loads(metadata["content"]), arrays, device)


def _checksum(content: str, arrays: Mapping[str, np.ndarray]) -> int:
    checksum = zlib.crc32(content.encode())
    for name in sorted(arrays):
        checksum = zlib.crc32(arrays[name].tobytes(), checksum)
    return checksum


def _encoded(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """As JSON, tensors and arrays replaced by their names in ``arrays``."""
    if isinstance(value, (Tensor, np.ndarray)):
        name = str(len(arrays))
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        arrays[name] = np.array(array, order="C")
        return {"tensor" if isinstance(value, Tensor) else "array": name}
    if type(value).__name__ in _CLASSES:
        names = [field.name for field in fields(value)] if is_dataclass(value) else value._fields
        return {type(value).__name__: {name: _encoded(getattr(value, name), arrays) for name in names}}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_encoded(item, arrays) for item in value]}
    return value.item() if isinstance(value, np.generic) else value


def _decoded(value: Any, arrays: Mapping[str, np.ndarray], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return torch.from_numpy(arrays[inner]).to(device)
    if kind == "array":
        return arrays[inner]
    if kind in ("list", "tuple"):
        items = [_decoded(item, arrays, device) for item in inner]
        return items if kind == "list" else tuple(items)
    return _CLASSES[kind](**{name: _decoded(item, arrays, device) for name, item in inner.items()})


@functools.cache
def _code() -> str:
    """Hash of this package's calibration, so that nothing is taken for the work of other code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
