"""Exact truncation: a backbone without the blocks above a depth computes the same values below it, to the bit."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from .taps import Layout, config_field


def truncate(backbone: PreTrainedModel, layout: Layout, depth: int) -> None:
    """Remove the blocks above ``depth`` from the module **in place**, and from its config.

    ``AutoModel.from_config(backbone.config)`` builds the truncated backbone again. Entries of the config that hold one
    value per block (``layer_types`` and the like) are cut to the same length.

    Raises:
        ValueError: unless ``1 <= depth <= number of blocks``, or where :func:`why_whole` has a reason.
    """
    total = layout.depth(backbone)
    if not 1 <= depth <= total:
        raise ValueError(f"depth must lie between 1 and the backbone's {total} blocks; got {depth}.")
    if depth == total:
        return
    if reason := why_whole(backbone, layout):
        raise ValueError(f"{reason} Keep all blocks with depths=[{total}].")
    shorten_config(backbone.config, total, depth)
    del layout.module_list(backbone)[-(-depth // layout.calls) :]


def why_whole(backbone: PreTrainedModel, layout: Layout) -> str | None:
    """Why a backbone can't be truncated and built again from its config; ``None`` if it can."""
    total, named = layout.depth(backbone), config_field(backbone, "num_hidden_layers")
    if named != total:
        return (
            f"{type(backbone.config).__name__} gives num_hidden_layers={named}, but {total} blocks were found, so a "
            "truncated model could not be rebuilt from its config."
        )
    if (config_field(backbone, "num_hidden_groups") or 1) > 1:
        return f"{type(backbone).__name__} divides its blocks into groups by their number, which truncation changes."
    return None


def shorten_config(config: PreTrainedConfig, total: int, depth: int) -> None:
    """Set the number of blocks in a config and cut its per-block lists."""
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        per_block = isinstance(value, (list, tuple)) and len(value) == total and not name.startswith("_")
        if per_block and name != "architectures" and not name.endswith("token_id"):
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
