"""Exact truncation: a backbone without the blocks above a depth computes the same values below it, to the bit."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .layout import Layout
from .parts import rebuilt, submodules

_PER_BLOCK = re.compile(r"layer|block|per_|pattern")
_BLOCK_NUMBERS = re.compile(r"(layers|_ids|_idxs|_indices)$")
_COUNT = re.compile(r"(^|_)(layers?|blocks)$")
_FROM_THE_END = ("num_kv_shared_layers",)  # how many of the last blocks: those of them that go are fewer
_PROVENANCE = ("architectures", "dtype", "torch_dtype", "id2label", "label2id", "transformers_version")
_SWITCHES = ("training", "gradient_checkpointing")  # of a module, set after it was made


def truncate(backbone: PreTrainedModel, layout: Layout, depth: int) -> None:
    """Remove the blocks above ``depth`` from the module **in place**, and from its config.

    ``AutoModel.from_config(backbone.config)`` builds the truncated backbone again: that is tried first, without memory
    for weights, and shows which lists of modules get shorter and which weights narrower (those with a part for each
    block). Entries of the config that hold one value per block (``layer_types`` and the like) are cut, too.

    Raises:
        ValueError: unless ``1 <= depth <= number of blocks``, or where :func:`why_whole` has a reason.
    """
    total = layout.depth(backbone)
    if not 1 <= depth <= total:
        raise ValueError(f"depth must lie between 1 and the backbone's {total} blocks; got {depth}.")
    if depth == total:
        return
    shorter = _shorter(backbone, layout, depth)
    if isinstance(shorter, str):
        raise ValueError(f"{shorter} Keep all blocks with depths=[{total}].")
    config, twin = shorter
    before = dict(_configs(backbone.config))
    for name, part in _configs(config):
        changed = {key: value for key, value in _public(part).items() if _public(before[name]).get(key) != value}
        if getattr(part, "_heterogeneity_spec", None) is not None:  # transformers' values of single layers
            changed["_heterogeneity_spec"] = part._heterogeneity_spec
        for copied in _copies(backbone, before[name], before.values()):
            vars(copied).update(copy.deepcopy(changed))
    stack = layout.decoder or layout
    _adopt(backbone, twin, stack.own_depth(backbone), stack.own_depth(twin))


def why_whole(backbone: PreTrainedModel, layout: Layout, depth: int | None = None) -> str | None:
    """Why a backbone can't be truncated to ``depth`` and built again from its config; ``None`` if it can.

    Args:
        backbone: is not changed.
        layout: of the backbone.
        depth: the middle one by default.
    """
    total = layout.depth(backbone)
    depth = max(1, total // 2) if depth is None else depth
    shorter = None if depth == total else _shorter(backbone, layout, depth)
    return shorter if isinstance(shorter, str) else None


def nearest_depth(backbone: PreTrainedModel, layout: Layout, depth: int) -> int:
    """The smallest depth from this one up that the backbone can be truncated to; its own where there is no smaller."""
    total = layout.depth(backbone)
    return next((some for some in range(depth, total) if not why_whole(backbone, layout, some)), total)


def _shorter(backbone: PreTrainedModel, layout: Layout, depth: int) -> str | tuple[PreTrainedConfig, PreTrainedModel]:
    """The config of the truncated backbone and an empty model of it, or why there is none."""
    stack, total, kept = layout, layout.own_depth(backbone), depth
    if layout.decoder is not None:
        stack, kept = layout.decoder, depth - total
        total = stack.own_depth(backbone)
        if kept < 1:
            return f"{type(backbone).__name__} is read in both stacks, and this depth would leave its decoder empty."
    if (stack.config_field(backbone, "num_hidden_groups") or 1) > 1:
        return f"{type(backbone).__name__} divides its blocks into groups by their number, which truncation changes."
    named, problem = stack.config_field(backbone, "num_hidden_layers"), ""
    fields = _count_fields(stack.config(backbone), total, decoder=stack is not layout)
    for where, field, anything in product(_places(backbone, stack), fields, (False, True)):
        values = backbone.config.to_dict()
        place = values
        for name in where:
            place = place[name]
        place.update(shortened(place, total, kept, field=field, anything=anything))
        try:
            config = type(backbone.config).from_dict(values)
            twin = rebuilt(backbone, config, layout.stacks)
            fits = layout.depth(twin) == depth and stack.own_depth(twin) == kept
            _check_initialisable(twin)
        except Exception as error:  # each config checks its fields in its own way
            problem = problem or f"A config of {kept} blocks is refused: {error}"
            continue
        if fits:
            different = _difference(backbone, twin, stack.blocks)
            if different:  # or a module has changed a setting of its own since it was made
                different = _difference(rebuilt(backbone, backbone.config, layout.stacks), twin, stack.blocks)
            return different or (config, twin)
    return problem or (
        f"{type(backbone.config).__name__} gives num_hidden_layers={named}, but {total} blocks were found, so a "
        "truncated model could not be rebuilt from its config."
    )


def _check_initialisable(twin: PreTrainedModel) -> None:
    """Loading sets every module up before its weights come, and RWKV's can't be for a single block.

    Raises:
        ZeroDivisionError: if it is so. What else goes wrong does so for want of memory for the weights.
    """
    with torch.random.fork_rng(devices=[]):
        for module in twin.modules():
            try:
                owner = module if isinstance(module, PreTrainedModel) else twin
                owner._init_weights(module)
            except ZeroDivisionError:
                raise
            except Exception:
                continue


def _places(backbone: PreTrainedModel, stack: Layout) -> list[list[str]]:
    """Where in the backbone's config the part may lie that a stack goes by, the likely place first."""
    own = stack.config(backbone)
    alike = [(part is not own, name) for name, part in _configs(backbone.config) if type(part) is type(own)]
    # A stack may hold a copy of its part, made when it was built.
    return [[part for part in name.split(".") if part] for _, name in sorted(alike)]


def _configs(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """A config and those nested in it, by name."""
    yield prefix, config
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value, f"{prefix}.{name}")


def _public(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config that files hold, without those nested in it."""
    return {
        name: value
        for name, value in vars(config).items()
        if not (name.startswith("_") or name in _PROVENANCE or isinstance(value, PreTrainedConfig))
    }


def _copies(
    backbone: PreTrainedModel, config: PreTrainedConfig, places: Iterable[PreTrainedConfig]
) -> list[PreTrainedConfig]:
    """A config, and the copies of it that modules of the backbone hold; not those at other places of the whole."""
    seen = {id(config): config}
    others = {id(place) for place in places}
    for module in backbone.modules():
        own = getattr(module, "config", None)
        if type(own) is type(config) and id(own) not in others:
            seen.setdefault(id(own), own)
    return list(seen.values())


def _count_fields(config: PreTrainedConfig, total: int, *, decoder: bool) -> list[str]:
    """Fields of a config that may hold the number of blocks, the likely ones first."""
    names = [name for name, value in vars(config).items() if type(value) is int and value == total]
    names = [name for name in names if _COUNT.search(name)]
    mapped = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    own = "decoder" if decoder else mapped
    if not decoder and mapped not in names and getattr(config, "num_hidden_layers", None) == total:
        names.append(mapped)
    return sorted(names, key=lambda name: (name != own, own not in name, name != "num_hidden_layers"))


def shortened(
    values: dict[str, Any], total: int, depth: int, *, field: str = "num_hidden_layers", anything: bool = False
) -> dict[str, Any]:
    """The values of a config for fewer blocks: their number, lists of one entry per block, and lists of block numbers.

    Args:
        values: of the stack's config, as ``to_dict`` gives them.
        total: the number of blocks it has.
        depth: the number that it gets.
        field: where it says so.
        anything: take every list of that length for one entry per block, whatever its name.
    """
    found = dict(values)
    for name, value in values.items():
        if name in _PROVENANCE or name.endswith("token_id"):
            continue
        if name in _FROM_THE_END and isinstance(value, int):
            found[name] = max(0, value - (total - depth))
        elif isinstance(value, (list, tuple)) and len(value) == total and (anything or _PER_BLOCK.search(name)):
            found[name] = value[:depth]
        elif isinstance(value, (list, tuple)) and _BLOCK_NUMBERS.search(name):
            if all(type(number) is int and 0 <= number < total for number in value):
                found[name] = type(value)(number for number in value if number < depth)
        elif isinstance(value, dict) and _PER_BLOCK.search(name) and all(str(key).isdigit() for key in value):
            found[name] = {key: entry for key, entry in value.items() if int(key) < depth}
    found[field] = depth
    return found


def _difference(backbone: nn.Module, twin: nn.Module, blocks: str) -> str | None:
    """What the blocks that stay would be if they were built anew, where that is not what they are."""
    own = submodules(backbone)
    fewer = f"A {type(backbone).__name__} of fewer blocks is built with"
    for name, module in submodules(twin).items():
        if not name.startswith(f"{blocks}."):
            continue
        if name not in own:
            return f"{fewer} {name}, which the whole one doesn't have."
        if type(own[name]) is not type(module):
            if list(module.children()):
                return f"{fewer} another kind of {name}."
            continue  # another kind of linear layer, of a quantiser or an adapter
        for key, value in vars(module).items():
            plain = isinstance(value, (bool, float, str)) and key not in _SWITCHES and not key.startswith("_")
            if plain and vars(own[name]).get(key) != value:
                return f"{fewer} {name}.{key} = {value!r}."
    return None


def _adopt(backbone: nn.Module, twin: nn.Module, total: int, depth: int) -> None:
    """Cut lists of modules, and weights that have a part for each block, to what they are in the twin.

    The numbers and lists that a module notes of itself go with them, where they go by the number of blocks.
    """
    twins = submodules(twin)
    for name, module in submodules(backbone).items():
        other = twins.get(name)
        if isinstance(module, nn.ModuleList) and isinstance(other, nn.ModuleList) and len(other) < len(module):
            del module[len(other) :]
        elif isinstance(module, nn.ModuleDict) and isinstance(other, nn.ModuleDict):
            for key in [key for key in module if key not in other]:
                del module[key]
    for name, module in submodules(backbone).items():
        other = twins.get(name)
        if type(other) is not type(module) or other is None:
            continue
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            shape = getattr(getattr(other, key, None), "shape", None)
            if tensor is None or shape is None or tensor.shape == shape or tensor.dim() != len(shape):
                continue
            cut = tensor.data[tuple(slice(size) for size in shape)].clone()
            if key in module._parameters:
                setattr(module, key, nn.Parameter(cut, requires_grad=tensor.requires_grad))
            else:
                setattr(module, key, cut)
        for key, value in vars(other).items():
            own: Any = vars(module).get(key)
            counts = type(value) is int and type(own) is int and own != value and own * depth == value * total
            lists = isinstance(value, (list, tuple)) and type(own) is type(value) and own[: len(value)] == value
            if (counts or lists) and not key.startswith("_"):
                setattr(module, key, value)
