"""The files of a checkpoint: written whole or not at all, looked through before they are used, and what proves them.

A checkpoint has one of three forms. *Full* holds the kept blocks of the backbone and the head; *head only* holds the
head and says by id, revision and fingerprint which backbone belongs to it; *self-contained* is full, with this
package's runtime files beside the weights, so that ``trust_remote_code=True`` loads it where the package is not there.

What is proved on loading: that the weights' file is whole (its header, names, shapes and length), that the head's
tensors are the ones that were saved (a SHA-256 in the config), and of a head-only checkpoint that the backbone is the
right one (a SHA-256 of its weights). A flipped bit inside the backbone's tensors of a full checkpoint is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import cached_file

from .layout import Layout
from .trust import CheckpointError

Form = Literal["full", "head", "self_contained"]
FORMS = get_args(Form)

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_WEIGHTS_FILE = re.compile(r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?")
_NARROWER = ("bfloat16", "float16")


def is_own(name: str) -> bool:
    """Whether a tensor of that name belongs to the head, and not to the backbone."""
    return "backbone" not in name.split(".")[:2]


# -- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write a checkpoint into, which takes the place of the one in ``folder`` when all went well.

    The config is moved last, and the old one is gone before the first of the new files comes: a folder in between does
    not load. Weights' files of the old checkpoint that the new one does not have are removed.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as name:
        staging = Path(name)
        yield staging
        new = {path.name for path in staging.iterdir()}
        if not new:  # a process that does not write
            return
        (target / _CONFIG).unlink(missing_ok=True)
        for path in target.iterdir():
            if path.name not in new and _WEIGHTS_FILE.fullmatch(path.name):
                path.unlink()
        for path in sorted(staging.iterdir(), key=lambda path: path.name == _CONFIG):
            os.replace(path, target / path.name)


def amend_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a ``config.json``, or drop them where the value is ``None``; and whatever would grant trust."""
    path = folder / _CONFIG
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = _without_trust({name: value for name, value in values.items() if value is not None or name not in changes})
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_code(folder: Path) -> None:
    """Put the runtime's modules next to a self-contained checkpoint, whichever of the two models it holds."""
    first = Path(__file__).with_name("modeling_spin.py")
    for path in (first, *get_relative_import_files(first)):
        shutil.copyfile(path, folder / Path(path).name)


def _without_trust(values: Any) -> Any:
    """Configs on the Hub hold ``trust_remote_code`` at times; none that we write does."""
    if isinstance(values, dict):
        return {name: _without_trust(value) for name, value in values.items() if name != "trust_remote_code"}
    return [_without_trust(value) for value in values] if isinstance(values, list) else values


# -- reading ---------------------------------------------------------------------------------------------------------


class Weights:
    """The safetensors files of a checkpoint, of which only the headers are read at first.

    Args:
        files: their paths.
        source: what the caller named, for messages.

    Raises:
        CheckpointError: for a file that is truncated, or whose header is damaged.
    """

    def __init__(self, files: Iterable[str | Path], source: object) -> None:
        self.source = source
        self.files = [Path(file) for file in files]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                    self._file_of[name] = file

    @classmethod
    def in_folder(cls, folder: Path) -> Weights:
        return cls(sorted(folder.glob("model*.safetensors")), folder)

    @classmethod
    def find(cls, source: Any, kwargs: Mapping[str, Any]) -> Weights | None:
        """Those of a folder or Hub repository; ``None`` where there are none under the usual names."""
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
        hub = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        variant = kwargs.get("variant")
        whole = _WEIGHTS if variant is None else f"model.{variant}.safetensors"
        index = _INDEX if variant is None else f"model.safetensors.index.{variant}.json"
        if (file := cached_file(source, whole, **hub, **quiet)) is not None:
            return cls([file], source)
        if (file := cached_file(source, index, **hub, **quiet)) is None:
            return None
        try:
            shards = sorted(set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} of {source} is damaged ({error}). Save or download it again.") from error
        if not all(isinstance(shard, str) and _WEIGHTS_FILE.fullmatch(shard) for shard in shards):
            raise CheckpointError(f"{index} of {source} names {shards}, which are not all files of the checkpoint.")
        return cls([str(cached_file(source, shard, **hub)) for shard in shards], source)

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def own(self) -> dict[str, Tensor]:
        """The head's tensors, sorted by name."""
        found = {}
        for name in sorted(filter(is_own, self.shapes)):
            with self._open(self._file_of[name]) as opened:
                found[name] = opened.get_tensor(name)
        return found

    def checksum(self) -> str:
        """SHA-256 of the head's tensors: names, dtypes, shapes and values."""
        return _digest(self.own().items())

    def check(self, checksum: str | None, num_features: int, query_widths: Sequence[int] = ()) -> None:
        """Raise :class:`CheckpointError` unless the head's tensors are there, of the right size, as they were saved.

        Args:
            checksum: from the config; ``None`` of an early checkpoint that has none.
            num_features, query_widths: from the config.
        """
        prefix = "spin." if any(name.startswith("spin.") for name in self.shapes) else ""
        sizes = dict.fromkeys(("neurons", "mean", "scale"), num_features)
        if query_widths:
            sizes["queries"] = sum(query_widths)
        needed = {f"{prefix}standardizer.{part}": size for part, size in sizes.items()}
        if missing := [name for name in needed if name not in self.shapes]:
            raise CheckpointError(f"{self.source} lacks {', '.join(missing)}. Save the model again.")
        for name, size in needed.items():
            if self.shapes[name] != (size,):
                promised = f"{num_features} features" if size == num_features else f"{size} values of queries"
                raise CheckpointError(
                    f"config.json of {self.source} promises {promised}, but its weights hold {name} of "
                    f"shape {self.shapes[name]}. Config and weights are not of one checkpoint."
                )
        if checksum is not None and self.checksum() != checksum:
            raise CheckpointError(
                f"The head's tensors in {self.source} are not the ones that were saved: the file is damaged, or config "
                "and weights are not of one checkpoint. Copy or download it again."
            )

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(
                f"{file.name} of {self.source} is truncated or damaged ({error}). Copy or download it again."
            ) from error


# -- which backbone it is --------------------------------------------------------------------------------------------


def fingerprints(backbone: PreTrainedModel, layout: Layout) -> dict[str, str]:
    """Its ``dtype`` and the :func:`fingerprint` in it; if it is float32, also what loading it in fewer bits gives."""
    own = dtype_name(backbone)
    names = (own, *_NARROWER) if own == "float32" else (own,)
    return {"dtype": own, **{name: fingerprint(backbone, layout, name) for name in names}}


def fingerprint(backbone: PreTrainedModel, layout: Layout, dtype: str) -> str:
    """SHA-256 over names and values of the weights that features depend on, cast to ``dtype``.

    Poolers, which follow the blocks, are left out: no tap reads them, and where a repository has none transformers
    makes them at random. Quantised tensors are taken as they are.

    Raises:
        CheckpointError: if weights are offloaded, so that they can't be read.
    """
    children = [name for name, _ in backbone.named_children()]
    last = (layout.decoder or layout).blocks.partition(".")[0]
    after = {name for name in children[children.index(last) + 1 :] if "pool" in name}
    kept = {name: value for name, value in backbone.state_dict().items() if name.partition(".")[0] not in after}
    return _digest(((name, kept[name]) for name in sorted(kept)), getattr(torch, dtype))


def dtype_name(model: PreTrainedModel) -> str:
    """The model's dtype as configs spell it, such as ``"bfloat16"``."""
    return str(model.dtype).removeprefix("torch.")


def _digest(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    def of_one(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        found = hashlib.sha256()
        for part in _plain(tensor.detach()):
            if part.is_meta:
                raise CheckpointError(
                    f"{name} is offloaded, so that it can't be compared. Load the backbone without offloading."
                )
            if dtype is not None and part.is_floating_point() and part.element_size() > 1:
                part = part.to(dtype)
            found.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            found.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return f"{name} {found.hexdigest()}\n"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
        return hashlib.sha256("".join(pool.map(of_one, tensors)).encode()).hexdigest()


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that a quantised one is made of; of an ordinary one itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain(getattr(tensor, name))]
