"""Which part of a pretrained model reads the text: the model itself, the text part of a multimodal one, or an encoder.

The same steps lead from a loaded model and from an empty one to the part, so that a config alone rebuilds it.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)

from .trust import remote_code_is_trusted

Stacks = Literal["encoder", "both"]


def auto_class(config: PreTrainedConfig, stacks: Stacks = "encoder") -> tuple[Any, PreTrainedConfig]:
    """``AutoModel``, or where transformers has a class for the encoder alone its like for that; and the config to give.

    An encoder alone wants the config of the whole without the flag ``is_encoder_decoder``.
    """
    # Not by that flag alone: an encoder built from a T5Config sets it to False there.
    encoder = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    if stacks == "both" or encoder is None or encoder is MODEL_MAPPING.get(type(config), None):
        return AutoModel, config
    if config.is_encoder_decoder:
        config = copy.deepcopy(config)
        config.is_encoder_decoder = False
    return AutoModelForTextEncoding, config


def text_part(model: PreTrainedModel, stacks: Stacks = "encoder") -> PreTrainedModel:
    """The part of a model that reads ``input_ids``; the model itself where it is nothing else.

    Of a multimodal model this is its text model, as the config says which that is; of an encoder-decoder its encoder,
    unless ``stacks="both"``.

    Raises:
        ValueError: for a model of images or sound that has no such part, or one that AutoModel doesn't build, an
            encoder that can't be built by itself, or ``stacks="both"`` for a model without a decoder.
    """
    if stacks not in get_args(Stacks):
        raise ValueError(f'stacks must be "encoder" or "both"; got {stacks!r}.')
    part = _of_composite(model)
    encoder_decoder = part.config.is_encoder_decoder and part.get_encoder() is not part is not part.get_decoder()
    if stacks == "both" and not encoder_decoder:
        raise ValueError(f"{type(model).__name__} is no encoder-decoder. Leave stacks out.")
    if stacks == "encoder" and encoder_decoder:
        part = _of_composite(_encoder_of(part))
    _check_reads_text(type(part), type(model).__name__)
    return part


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a model of images or sound by its config alone. Raises ValueError."""
    built = _class_of(config)
    if isinstance(built, type) and _text_config(config) is None and not config.is_encoder_decoder:
        _check_reads_text(built, built.__name__)


def _check_reads_text(part: Any, name: str) -> None:
    if part.main_input_name != "input_ids":
        raise ValueError(f"{name} reads {part.main_input_name!r}, not text. Choose a model that takes input_ids.")


def _encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder as a model of the class that AutoModel would build; its modules are those of ``model``."""
    auto, config = auto_class(model.config)
    if auto is AutoModelForTextEncoding:
        with torch.device("meta"):
            alone: PreTrainedModel = auto.from_config(config)
        for name, _ in list(alone.named_children()):
            setattr(alone, name, getattr(model, name))
        alone._is_hf_initialized = True  # or transformers would draw its embeddings anew
        return alone
    encoder = model.get_encoder()
    if not isinstance(encoder, PreTrainedModel):
        raise ValueError(
            f"The encoder of {type(model).__name__} is no model of its own, so it can't be built and used alone. "
            "Choose an encoder, a decoder, or another encoder-decoder."
        )
    return encoder


def _of_composite(model: PreTrainedModel) -> PreTrainedModel:
    """The text part of a multimodal model; the whole where that can't be built alone and images go in with the text.

    A dual encoder, which has ``get_text_features`` for texts alone, is no such whole and is refused.
    """
    text = _text_config(model.config)
    if text is None:
        return model
    for module in model.modules():
        if module is not model and isinstance(module, PreTrainedModel) and type(module.config) is type(text):
            if isinstance(module, _class_of(text)):
                return module
            if not _class_of(text) and hasattr(model, "get_text_features"):
                raise ValueError(
                    f"{type(model).__name__} reads more than text, and AutoModel does not build its text part, a "
                    f"{type(module).__name__}, from a {type(text).__name__}, so that a saved classifier could not be "
                    "loaded. Choose a text model, or a multimodal one whose text part AutoModel builds (CLIPTextModel, "
                    "the text models of vision-language models)."
                )
            return model
    return model


def _class_of(config: PreTrainedConfig) -> Any:
    """What ``AutoModel`` builds from a config, for ``isinstance``; nothing where it builds none."""
    try:
        return MODEL_MAPPING.get(type(config), ())
    except ValueError:  # a class that is named, but not there
        return ()


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The config of the text part of a multimodal model, where it is not the whole."""
    try:
        text: PreTrainedConfig = config.get_text_config()
    except ValueError:  # several: one reads text, others write something else
        text = config.get_text_config(encoder=True)
    return None if text is config or config.is_encoder_decoder and not hasattr(config, "text_config") else text


def empty_model(config: PreTrainedConfig, stacks: Stacks = "encoder", **options: Any) -> PreTrainedModel:
    """The part that reads text of a model of this config, with fresh weights (on the device that torch makes them on).

    Args:
        config: of the part, or of the whole model where the part has none of its own.
        stacks: see :func:`text_part`.
        **options: for ``from_config``.
    """
    options.setdefault("trust_remote_code", remote_code_is_trusted())
    auto, config = auto_class(config, stacks)
    return text_part(auto.from_config(config, **options), stacks)


def whole_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config to store for a part, from which ``AutoModel`` or its kin build it again.

    That is the part's own, or for one that only a multimodal config leads to such a config around it.
    """
    if type(config) in MODEL_MAPPING or type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return config
    for found in vars(sys.modules[type(config).__module__]).values():
        nested = getattr(found, "sub_configs", {}) if isinstance(found, type) else {}
        if nested.get("text_config") is type(config) and found in MODEL_FOR_TEXT_ENCODING_MAPPING:
            attention = config._attn_implementation
            whole: PreTrainedConfig = found(text_config=config)
            whole._attn_implementation = attention  # which it hands down, and would take away
            return whole
    return config


def rebuilt(backbone: PreTrainedModel, config: PreTrainedConfig, stacks: Stacks = "encoder") -> PreTrainedModel:
    """What a config builds in place of this backbone, without memory for its weights."""
    config = whole_config(config)
    config = type(config).from_dict(config.to_dict())  # what a file would say, and not what the object remembers
    with torch.device("meta"):
        if type(config) not in MODEL_MAPPING:  # its class came from a repository, and is here already
            return text_part(type(backbone)(config), stacks)
        return empty_model(config, stacks)


def check_rebuilds(model: Any, stacks: Stacks = "encoder") -> None:
    """Refuse a model that its config would not build again, before the work of calibrating it."""
    config = whole_config(model.config)
    if type(config) not in MODEL_MAPPING and type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
        if type(model).__module__.startswith("transformers.") or not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"A saved classifier rebuilds its backbone from the config, and AutoModel builds none from a "
                f"{type(config).__name__}. Choose a model that AutoModel.from_config builds."
            )
        return
    built = type(rebuilt(model, config, stacks))
    if not isinstance(model, built):
        raise ValueError(
            f"A saved classifier rebuilds its backbone from the config, here as {built.__name__}, so that it could not "
            f"be loaded with a {type(model).__name__}. Pass a {built.__name__} (model.base_model of one with a task "
            "head), or its name."
        )


def shifted_right(input_ids: Tensor, mask: Tensor | None, config: PreTrainedConfig) -> Tensor:
    """What the decoder of an encoder-decoder reads to classify a text: its tokens behind a start token.

    Where the config names no start token (mBART), the last token of each row is put in front, as mBART does.

    Args:
        input_ids: ``(batch, tokens)``, padded on the right.
        mask: ``(batch, tokens)``.
        config: of the model.
    """
    start = getattr(config, "decoder_start_token_id", None)
    if start is not None:
        first = torch.full_like(input_ids[:, :1], start)
    else:
        lengths = torch.full_like(input_ids[:, 0], input_ids.shape[1]) if mask is None else mask.sum(1)
        first = input_ids.gather(1, (lengths - 1).clamp_min(0)[:, None].to(input_ids))
    return torch.cat([first, input_ids[:, :-1]], 1)


def submodules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, a shared one under each of its names."""
    return dict(model.named_modules(remove_duplicate=False))
