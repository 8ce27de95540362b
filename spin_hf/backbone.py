"""The pretrained model that is wrapped: which class it has, how it is loaded, and how it is built again."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .checkpoint import dtype_name, fingerprint
from .configuration_spin import SpinConfig, unsealed
from .depth import truncate
from .layout import Layout
from .parts import (
    Stacks,
    auto_class,
    check_config,
    check_rebuilds,
    empty_model,
    rebuilt,
    text_part,
    whole_config,
)
from .taps import remove_hooks
from .trust import CheckpointError, check_size, remote_code_is_trusted

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def load_backbone(source: str, kwargs: dict[str, Any], stacks: Stacks = "encoder") -> PreTrainedModel:
    """The part of a pretrained model that reads text.

    Raises:
        ValueError: for a SPIN checkpoint, or where :func:`text_part` finds no such part.
    """
    kwargs = {"trust_remote_code": False, **kwargs}  # where nothing is said, transformers would ask at the terminal
    hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    config = AutoConfig.from_pretrained(source, **hub)
    if isinstance(config, SpinConfig):
        raise ValueError(f"{source} is a SPIN model already; load it with from_pretrained.")
    check_config(config)
    auto, fitting = auto_class(config, stacks)
    given = {} if fitting is config else {"config": fitting}
    return text_part(auto.from_pretrained(source, **kwargs, **given), stacks)


def build_backbone(config: SpinConfig) -> PreTrainedModel:
    """An empty backbone of the shape that a checkpoint's config gives. Raises :class:`CheckpointError` without one."""
    if config.backbone_config is None:
        raise CheckpointError(
            "SpinConfig has no backbone_config. Use SpinForSequenceClassification.from_backbone(...) to start from a "
            "pretrained model."
        )
    backbone_config = unsealed(config)
    # In the dtype that the whole model is made in, and not in the one the nested config remembers.
    options: dict[str, Any] = {"trust_remote_code": remote_code_is_trusted(), "dtype": torch.get_default_dtype()}
    if remote_code_is_trusted() and type(backbone_config) not in MODEL_MAPPING:
        options["code_revision"] = config.backbone_revision  # the code that was read when the model was made, not newer
    stacks = Layout.from_dict(config.layout).stacks if config.layout else "encoder"
    try:
        backbone = empty_model(backbone_config, stacks, **options)
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"No backbone can be built from config.json: {error}") from error
    check_size(backbone)
    return backbone


_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FOR_BACKBONE = (
    *(name for name in HUB_ARGUMENTS if name not in ("revision", "subfolder")),  # those are of the checkpoint
    *("device_map", "max_memory", "offload_folder", "offload_buffers", "proxies"),
)


def pinned_revision(source: str, kwargs: dict[str, Any]) -> str | None:
    """The commit that ``source`` was loaded from, or what the caller named where there is no commit."""
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs and name != "force_download"}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = None if os.path.isdir(source) else cached_file(source, "config.json", **hub, **quiet)
    commit: str | None = extract_commit_hash(file, None)
    return commit or kwargs.get("revision")


def fitting_backbone(config: SpinConfig, given: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The backbone of a head-only checkpoint, cut to its depth and proved by its fingerprint.

    Args:
        config: the checkpoint's.
        given: ``None`` to load it by id and pinned revision; or a folder or id; or a loaded model, whose tensors are
            shared and which is not changed.
        kwargs: what the caller gave to ``from_pretrained``; what concerns the backbone is handed down.

    Raises:
        CheckpointError: for another backbone than the head was made for, or where the checkpoint names no Hub id.
    """
    backbone_config: Any = unsealed(config)
    if isinstance(given, nn.Module):
        stacks = Layout.from_dict(config.layout or {}).stacks
        part = text_part(given, stacks) if isinstance(given, PreTrainedModel) else given
        check_rebuilds(part, stacks)
        backbone = _shared(part)
    else:
        backbone = _load_fitting(config, given, kwargs)
    expected = f"{config.backbone_id} at {config.backbone_revision or 'its main revision'}"
    found = (getattr(backbone, "name_or_path", "") or type(backbone).__name__) if given is not None else expected
    layout = Layout.from_dict(config.layout or {})
    fits = whole_config(backbone.config).model_type == backbone_config.model_type
    depth, blocks = (
        layout.depth(model) if fits else getattr(model.config.get_text_config(), "num_hidden_layers", 0)
        for model in (rebuilt(backbone, backbone_config, layout.stacks), backbone)
    )
    if not fits or blocks < depth:
        raise CheckpointError(
            f"This head was made for {expected}, a {backbone_config.model_type!r} of at least {depth} blocks; {found} "
            f"is a {backbone.config.model_type!r} of {blocks} blocks."
        )
    if blocks > depth:
        truncate(backbone, layout, depth)
    known, own = config.backbone_fingerprint or {}, dtype_name(backbone)
    dtype = own if own in known else known.get("dtype", own)
    actual = fingerprint(backbone, layout, dtype)
    if actual != known.get(dtype):
        raise CheckpointError(
            f"This head was made for {expected}, with the fingerprint {str(known.get(dtype))[:12]} in {dtype}; the "
            f"weights of {found} have {actual[:12]}. They are another model or revision, or were trained since. Pass "
            "the right one with backbone=, or calibrate a head for this one."
        )
    if not isinstance(given, nn.Module) and _asked_dtype(kwargs) not in ("auto", own):
        for tensor in backbone.state_dict(keep_vars=True).values():  # what is not stored stays float32, as on loading
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(getattr(torch, _asked_dtype(kwargs)))
    return backbone


def _load_fitting(config: SpinConfig, given: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    if kwargs.get("quantization_config") is not None:
        raise CheckpointError(
            "A head-only checkpoint can't prove a backbone that is quantised on loading. Calibrate on the quantised "
            "backbone, or save the classifier with form='full' and quantise that."
        )
    options = {name: kwargs[name] for name in _FOR_BACKBONE if name in kwargs}
    options["trust_remote_code"] = remote_code_is_trusted()
    if (attention := getattr(config.backbone_config, "_attn_implementation", None)) is not None:
        options["attn_implementation"] = attention
    if (quantization := getattr(config.backbone_config, "quantization_config", None)) is not None:
        options["quantization_config"] = quantization
    if given is None:
        if not _HUB_ID.fullmatch(config.backbone_id or ""):
            raise CheckpointError(
                f"This head-only checkpoint names {config.backbone_id!r} as its backbone, which is no id on the Hub, "
                "and folders that a file names are not read. Pass the backbone: from_pretrained(..., "
                'backbone="folder, id or a loaded model").'
            )
        given, options["revision"] = config.backbone_id, config.backbone_revision
    asked, known = _asked_dtype(kwargs), config.backbone_fingerprint or {}
    # In the dtype it was read in, as a full checkpoint would have stored it; another is reached from there, unless it
    # is one whose fingerprint is known.
    options["dtype"] = asked if asked in known else known.get("dtype", "auto")
    try:
        return load_backbone(str(given), options, Layout.from_dict(config.layout or {}).stacks)
    except OSError as error:
        place = f"{given} at {options['revision']}" if options.get("revision") else given
        raise OSError(
            f"{place}, the backbone of this head-only checkpoint, can't be loaded: {error} If it lies elsewhere, pass "
            'from_pretrained(..., backbone="folder, id or a loaded model").'
        ) from error


def _asked_dtype(kwargs: dict[str, Any]) -> str:
    return str(kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto").removeprefix("torch.")


def _shared(given: Any) -> PreTrainedModel:
    """A model of its own modules and config on the tensors of another."""
    shared: dict[int, Any] = {}
    for tensor in (*given.parameters(), *given.buffers()):
        # Frozen apart from the given one's parameter, except for packed integers, which never take a gradient.
        own = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        shared[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False) if own else tensor
    backbone: PreTrainedModel = copy.deepcopy(given, shared)
    remove_hooks(backbone)
    return backbone
