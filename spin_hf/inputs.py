"""What a backbone is given: its mask, and of the inputs those that its forward takes."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .layout import Layout
from .parts import shifted_right

logger = logging.get_logger(__name__)


def token_mask(input_ids: Tensor | None, attention_mask: Tensor | None, embeds: Tensor | None) -> Tensor:
    """The mask ``(batch, tokens)``; all ones, with one warning, where none was given."""
    given = input_ids if input_ids is not None else embeds
    if given is None:
        raise ValueError("Give input_ids or inputs_embeds.")
    if attention_mask is None:
        if given.shape[0] > 1 and not torch.compiler.is_compiling():
            logger.warning_once("No attention_mask was given: every token is taken as real, padding included.")
        return torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
    if attention_mask.shape != given.shape[:2]:
        raise ValueError(
            f"attention_mask should be {tuple(given.shape[:2])} (batch, tokens), not {tuple(attention_mask.shape)}."
        )
    return attention_mask


def backbone_inputs(
    backbone: PreTrainedModel, layout: Layout, takes: Set[str], *, mask: Tensor | None, **given: Tensor | None
) -> dict[str, Any]:
    """The arguments of one forward of a backbone, which is not asked for a cache.

    Args:
        backbone, layout: the backbone as it is now.
        takes: names of the parameters of its forward.
        mask: ``(batch, tokens)``, of a right-padded batch.
        given: ``input_ids``, ``token_type_ids``, ``position_ids``, ``inputs_embeds``, each as in
            :meth:`SpinModel.forward`.

    Raises:
        ValueError: without ``input_ids`` where the decoder of an encoder-decoder is to read them.
    """
    inputs: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "use_cache" in takes or getattr(backbone.config, "use_cache", None):
        inputs["use_cache"] = False
    if "attention_mask" in takes or "input_ids" not in takes:  # FNet takes none; some wrappers take what comes
        inputs["attention_mask"] = mask
    if "token_type_ids" in inputs and not {"token_type_ids", "kwargs"} & takes:
        del inputs["token_type_ids"]  # some tokenizers make them for models that have no use for them
    if layout.decoder is not None:
        if "input_ids" not in inputs:
            raise ValueError('With stacks="both" the decoder reads token ids too: give input_ids.')
        inputs["decoder_input_ids"] = shifted_right(inputs["input_ids"], mask, backbone.config)
        if "decoder_attention_mask" in takes:
            inputs["decoder_attention_mask"] = mask
    return inputs
