"""What a checkpoint's files may decide, and what only the caller may."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from .attention import ATTENTION


class CheckpointError(ValueError):
    """A checkpoint that is not ours, too new, damaged, inconsistent, or that needs trust the caller did not give."""


# Trust in remote code is the caller's alone and lasts for one call; no file can grant it.
_trust: ContextVar[bool] = ContextVar("spin_hf_trust_remote_code", default=False)
_most_values: ContextVar[float] = ContextVar("spin_hf_most_values", default=math.inf)


@contextmanager
def trusting_remote_code(trust: bool) -> Iterator[None]:
    """Trust, or do not, for the length of a call."""
    token = _trust.set(trust)
    try:
        yield
    finally:
        _trust.reset(token)


def remote_code_is_trusted() -> bool:
    """Whether the caller of the present call gave trust."""
    return _trust.get()


_SPARE_VALUES = 2**26  # attention masks and the like that are not stored: at most 256 MB in float32
_VALUES_PER_BYTE = 4  # of weights in two bits each


@contextmanager
def backed_by(stored_bytes: int) -> Iterator[None]:
    """Refuse, for the length of a call, a model far larger than the bytes its checkpoint holds."""
    token = _most_values.set(_VALUES_PER_BYTE * stored_bytes + _SPARE_VALUES)
    try:
        yield
    finally:
        _most_values.reset(token)


def check_size(model: nn.Module) -> None:
    """Raise :class:`CheckpointError` for a model, still without memory, that :func:`backed_by` does not allow."""
    values = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if values > _most_values.get():
        raise CheckpointError(
            f"config.json describes a {type(model).__name__} of {values:,} values, far more than its weights' file "
            "holds. The checkpoint is damaged or was made to exhaust memory; get it again from where it came from."
        )


_CLASS_REFERENCE = re.compile(r"([\w-][\w.-]*(/[\w-][\w.-]*)?--)?[\w-]+\.\w+")
_MODULE_COUNT = re.compile(r"(layers|blocks|groups|experts|stages|heads|(^|_)n_(layer|head))$")
_MOST_MODULES, _MOST_LABELS, _MOST_NEURONS = 10_000, 1_000_000, 2**24


def check_values(values: Any, name: str = "config.json") -> None:
    """Look through the values of a config, at every level, before anything is made of them.

    Raises:
        CheckpointError: for a key ``trust_remote_code``, a class reference or ``backbone_id`` that climbs out of its
            repository, an attention kernel from a repository, NaN, or a number of layers, heads, experts or labels that
            no model has.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            _check_entry(f"{name}: {key}", str(key), value)
            if isinstance(value, (Mapping, list, tuple)):
                check_values(value, f"{name}: {key}")
    elif isinstance(values, (list, tuple)):
        for value in values:
            check_values(value, name)
    elif isinstance(values, float) and math.isnan(values):
        raise CheckpointError(f"{name} holds NaN. The checkpoint is damaged; save it again.")


def _check_entry(name: str, key: str, value: Any) -> None:
    if key == "trust_remote_code":
        raise CheckpointError(
            f"{name} = {value!r}: no file can grant trust. If you have read the code and trust it, remove the key and "
            "pass trust_remote_code=True to the call that loads the model."
        )
    if key == "auto_map":
        _check_auto_map(name, value)
    if key == "backbone_id" and isinstance(value, str) and ".." in re.split(r"[/\\]", value):
        raise CheckpointError(f"{name} = {value!r} is no id: it climbs out of its folder. Pass the backbone yourself.")
    if key.endswith(("attn_implementation", "experts_implementation")) and re.search(r"[/:|@]", str(value)):
        raise CheckpointError(
            f"{name} = {value!r} would load a kernel from a repository. Remove the key and, if you trust that kernel, "
            f"pass attn_implementation={value!r} to the call that loads the model."
        )
    if isinstance(value, float) and math.isnan(value):
        raise CheckpointError(f"{name} is NaN. The checkpoint is damaged; save it again.")
    if isinstance(value, int) and not isinstance(value, bool):
        most = _MOST_LABELS if key == "num_labels" else _MOST_MODULES if _MODULE_COUNT.search(key) else None
        if most is not None and not 0 <= value <= most:
            raise CheckpointError(f"{name} = {value}, but it should lie between 0 and {most}. The config is damaged.")


def _check_auto_map(name: str, value: Any) -> None:
    references = value.values() if isinstance(value, Mapping) else [value]
    for entry in references:
        for reference in entry if isinstance(entry, (list, tuple)) else [entry]:
            fits = isinstance(reference, str) and _CLASS_REFERENCE.fullmatch(reference)
            if reference is not None and not (fits and ".." not in reference):
                raise CheckpointError(
                    f"{name} names {reference!r}, which is not a class of a repository, such as "
                    "'modeling_tiny.TinyModel'. Nothing of it was run."
                )


def checked_layout(values: Any) -> dict[str, Any] | None:
    """``SpinConfig.layout``. Raises :class:`CheckpointError` for one of another shape."""
    if values is None:
        return None
    if not isinstance(values, Mapping) or not isinstance(values.get("blocks"), str) or not _names_fit(values):
        raise CheckpointError(
            "`layout` should look like {'blocks': 'layers', 'ffn': 'mlp.down_proj', 'norm': 'norm', 'calls': 1}; got "
            f"{values}."
        )
    found = {"ffn": None, "norm": None, **values}
    return found if found.get("decoder") is None else {**found, "decoder": checked_layout(found["decoder"])}


def _names_fit(values: Mapping[str, Any]) -> bool:
    ffn, norm, calls = values.get("ffn"), values.get("norm"), values.get("calls", 1)
    names = [norm, values.get("entry"), *(ffn if isinstance(ffn, (list, tuple)) else [ffn])]
    return all(name is None or isinstance(name, str) for name in names) and type(calls) is int and calls >= 1


def checked_exits(entries: Any) -> list[dict[str, Any]]:
    """The entries of ``SpinConfig.exits``. Raises :class:`CheckpointError` for one of another shape."""
    numbers = {"depth": int, "eta": float, "num_features": int, "score": float, "temperature": float}
    for entry in entries:
        fits = isinstance(entry, Mapping) and set(entry) == set(numbers)
        fits = fits and all(type(entry[name]) in (int, kind) for name, kind in numbers.items())
        fits = fits and entry["depth"] >= 1 and 1 <= entry["num_features"] <= _MOST_NEURONS
        if not fits or not 0 < entry["temperature"] < math.inf:
            raise CheckpointError(
                "An entry of `exits` should look like {'depth': 4, 'eta': 0.8, 'num_features': 120, 'score': 0.91, "
                f"'temperature': 1.0}}, with no more than {_MOST_NEURONS} features; got {entry}."
            )
    return list(entries)


def checked_features(entries: Any, name: str = "features") -> list[dict[str, Any]]:
    """The entries of ``SpinConfig.features``, or of another list alike.

    Raises:
        CheckpointError: for one of another shape.
    """
    for entry in entries:
        weighted = isinstance(entry, Mapping) and entry.get("pooling") == ATTENTION
        sizes = ("count", "query") if weighted else ("count",)
        whole = isinstance(entry, Mapping) and set(entry) == {"tap", "pooling", *sizes}
        if not whole or not all(type(entry[size]) is int and 1 <= entry[size] <= _MOST_NEURONS for size in sizes):
            raise CheckpointError(
                f"An entry of `{name}` should look like {{'tap': 'ffn.3', 'pooling': 'mean', 'count': 120}}, with a "
                f"count from 1 to {_MOST_NEURONS}, and under the pooling 'attention' the width of its 'query'; "
                f"got {entry}."
            )
    places = [(entry["tap"], entry["pooling"]) for entry in entries]
    if twice := [place for place in places if places.count(place) > 1]:
        raise CheckpointError(f"`{name}` lists tap {twice[0][0]} under the pooling {twice[0][1]} twice.")
    return list(entries)
