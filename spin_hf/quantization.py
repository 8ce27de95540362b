"""A quantised backbone in a model whose head stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel


def sparing_head(quantization: Any, *more: str) -> Any:
    """A copy of a quantization config, or of its dict, under which ``score`` is not converted, nor ``more``.

    transformers spares the last parameter of a model by default, which is the bias of ``score`` and not its weight.
    """
    spared = copy.deepcopy(quantization)
    is_dict = isinstance(spared, dict)
    names = spared if is_dict else vars(spared)
    field = "llm_int8_skip_modules" if _is_bitsandbytes(names) else "modules_to_not_convert"
    names[field] = list(dict.fromkeys([*(names.get(field) or []), *more, "score"]))
    return spared


def _is_bitsandbytes(values: dict[str, Any]) -> bool:
    return any(name.removeprefix("_") in ("load_in_8bit", "load_in_4bit") for name in values)


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether transformers loaded this very model quantised, and not only a part of it."""
    return getattr(model, "hf_quantizer", None) is not None


@contextmanager
def saving_quantized(model: PreTrainedModel, backbone: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` be saved as its quantised ``backbone`` would be: in the quantiser's format, told by the config."""
    quantizer = getattr(backbone, "hf_quantizer", None)
    if quantizer is None or is_quantized(model):
        yield
        return
    kept = getattr(quantizer, "modules_to_not_convert", None) or []
    model.hf_quantizer = quantizer
    model.config.quantization_config = sparing_head(backbone.config.quantization_config, *kept)
    try:
        yield
    finally:
        del model.hf_quantizer, model.config.quantization_config
