"""Folders of feature stores: one for each fingerprint, filled by one calibration at a time, listed and cleared."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..batching import BATCHINGS, Batching
from ..taps import Tap
from .errors import OutputFolderError, StoreInUseError
from .ranks import Ranks
from .store import ABOUT, FeatureStore, recorded, write_whole

_LOCK, _OWNER = "lock", "owner.json"


@contextmanager
def open_store(
    cache_dir: str | Path | None,
    *,
    key: str,
    ranks: Ranks,
    widths: Mapping[Tap, int],
    poolings: Sequence[str],
    batches: Sequence[Sequence[int] | np.ndarray],
    about: Mapping[str, Any],
) -> Iterator[tuple[FeatureStore, list[int]]]:
    """The store of a calibration, and the batches that are still to be computed.

    In ``cache_dir`` the store of this key is taken up: batches that were recorded are checked, and computed again where
    the disk has lost them. A store that is whole may be read by many calibrations at once, another is held by one.
    Without ``cache_dir`` the store lives in a temporary folder and is removed in the end.

    Raises:
        StoreInUseError: if another calibration is filling this store.
        OutputFolderError: if the folder can't be used, or not by all processes of this launch.
    """
    with ExitStack() as held:

        def prepare() -> tuple[Path, dict[int, dict[int, int]], str]:
            folder = _folder(cache_dir, key, held)
            store = FeatureStore(folder, widths=widths, poolings=poolings, batches=batches)
            if cache_dir is not None and len(recorded(folder, len(batches))) < len(batches):
                _hold(folder, held)
            store.create(about)
            return folder, recorded(folder, len(batches)), uuid.uuid4().hex

        folder, records, launch = ranks.on_main(prepare)
        store = FeatureStore(folder, widths=widths, poolings=poolings, batches=batches, process=ranks.index)
        held.callback(store.close)
        with ranks.together():
            if not (folder / ABOUT).exists():
                raise OutputFolderError(
                    f"Process {ranks.index} on {socket.gethostname()} doesn't see {folder}, which the main process "
                    'made. Name a folder on a file system that all machines share: cache_dir="..."'
                )
            checked = store.whole(ranks.share(sorted(records)), records)
        whole = {number for part in ranks.gather(checked) for number in part}
        missing = [number for number in range(len(batches)) if number not in whole]
        if cache_dir is not None and missing and len(records) == len(batches):
            ranks.on_main(lambda: _hold(folder, held))
        with ranks.watching(folder / f"failed.{launch}"), ranks.together():
            yield store, missing


@dataclass(frozen=True)
class CachedStore:
    """A store in a cache folder. ``bytes`` is what it takes of the disk, ``age`` the seconds since it was last used."""

    folder: Path
    backbone: str
    texts: int
    done: float
    bytes: int
    age: float
    in_use: bool


def list_stores(cache_dir: str | Path) -> list[CachedStore]:
    """The stores in a cache folder, the latest used first. Folders of anything else are passed over."""
    found = []
    for folder in Path(cache_dir).iterdir() if Path(cache_dir).is_dir() else ():
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            used = (folder / ABOUT).stat().st_mtime
            files = [path.stat() for path in folder.rglob("*") if path.is_file()]
            done = recorded(folder, int(about["batches"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(
            CachedStore(
                folder=folder,
                backbone=str(about.get("backbone") or "?"),
                texts=int(about.get("texts", 0)),
                done=len(done) / max(1, int(about["batches"])),
                bytes=sum(512 * s.st_blocks if hasattr(s, "st_blocks") else s.st_size for s in files),
                age=time.time() - used,
                in_use=_is_held(folder),
            )
        )
    return sorted(found, key=lambda store: store.age)


def clear_store(store: CachedStore) -> None:
    """Remove a store. Raises :class:`StoreInUseError` while a calibration fills it."""
    with ExitStack() as held:
        _hold(store.folder, held)
        shutil.rmtree(store.folder)


def key_of(fingerprint: str, batching: str, learned: str = "") -> str:
    """A store's key: texts that are batched otherwise have other features, and a batch is found by its number.

    Args:
        learned: what learned token weights depend on beside, if there are any.
    """
    return hashlib.sha256(f"{fingerprint} {batching} {learned}".rstrip().encode()).hexdigest()


def known_batching(cache_dir: str | Path | None, fingerprint: str, learned: str = "") -> Batching | None:
    """How an earlier calibration of this fingerprint found that its texts may be batched, if there was one: the
    most careful, if there were several.
    """
    if cache_dir is None:
        return None
    for batching in reversed(BATCHINGS):
        with suppress(OSError, ValueError, AttributeError):
            about = Path(cache_dir) / _name(key_of(fingerprint, batching, learned)) / ABOUT
            if json.loads(about.read_text(encoding="utf-8")).get("batching") == batching:
                return batching
    return None


def _name(key: str) -> str:
    return key[:32]


def _folder(cache_dir: str | Path | None, key: str, held: ExitStack) -> Path:
    try:
        if cache_dir is None:
            folder = Path(tempfile.mkdtemp(prefix="spin_hf_"))
            held.callback(shutil.rmtree, folder, ignore_errors=True)
        else:
            folder = Path(cache_dir).resolve() / _name(key)
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFolderError(
            f'The feature store can\'t be made: {error}. Name another folder as cache_dir="...".'
        ) from error
    return folder


def _hold(folder: Path, held: ExitStack) -> None:
    """Keep others from filling the store until ``held`` is left, or this process ends in whatever way."""
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        held.enter_context(lock)
    except Timeout:
        raise StoreInUseError(
            f"The feature store {folder} is being filled by {_owner(folder)}. Wait for it to end, after which its "
            'features will be used, or name another folder as cache_dir="...".'
        ) from None
    write_whole(folder / _OWNER, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))


def _is_held(folder: Path) -> bool:
    try:
        with FileLock(folder / _LOCK, timeout=0):
            return False
    except Timeout:
        return True


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
