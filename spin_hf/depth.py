"""Exact truncation: a backbone without the blocks above a depth computes the same values below it, to the bit."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from .taps import Layout


def truncate(backbone: PreTrainedModel, layout: Layout, depth: int) -> None:
    """Remove the blocks above ``depth`` from the module **in place**, and from its config.

    ``AutoModel.from_config(backbone.config)`` builds the truncated backbone again. Entries of the config that hold one
    value per block (``layer_types`` and the like) are cut to the same length.

    Raises:
        ValueError: unless ``1 <= depth <= number of blocks``.
    """
    blocks = layout.block_list(backbone)
    total = len(blocks)
    if not 1 <= depth <= total:
        raise ValueError(f"depth must lie between 1 and the backbone's {total} blocks; got {depth}.")
    if depth == total:
        return
    shorten_config(backbone.config, total, depth)
    del blocks[depth:]


def shorten_config(config: PreTrainedConfig, total: int, depth: int) -> None:
    """Set the number of blocks in a config and cut its per-block lists.

    Raises:
        ValueError: if the config does not say ``num_hidden_layers``, so that no truncated model could be rebuilt.
    """
    text = config.get_text_config()
    if getattr(text, "num_hidden_layers", None) != total:
        raise ValueError(
            f"{type(text).__name__} gives num_hidden_layers={getattr(text, 'num_hidden_layers', None)}, but {total} "
            "blocks were found, so a truncated model could not be rebuilt from its config. Keep all blocks with "
            f"depths=[{total}]."
        )
    for name, value in list(vars(text).items()):
        per_block = isinstance(value, (list, tuple)) and len(value) == total and not name.startswith("_")
        if per_block and name != "architectures" and not name.endswith("token_id"):
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
