"""The pretrained model that is wrapped: which class it has, how it is loaded, and how it is built again."""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_spin import CheckpointError, SpinConfig, remote_code_is_trusted

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _auto_class(config: PreTrainedConfig) -> Any:
    """``AutoModel``, or for an encoder-decoder the class of its encoder."""
    # Not by is_encoder_decoder alone: an encoder built from a T5Config sets it to False there.
    encoder = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    if encoder is not None and encoder is not MODEL_MAPPING.get(type(config), None):
        return AutoModelForTextEncoding
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type!r} is an encoder-decoder, and transformers has no class for its encoder alone. "
            "Choose an encoder or a decoder, or an encoder-decoder of the T5 family."
        )
    return AutoModel


def check_rebuilds(model: Any) -> None:
    """Refuse a model that its config would not build again, before the work of calibrating it."""
    auto = _auto_class(model.config)
    mapping = MODEL_FOR_TEXT_ENCODING_MAPPING if auto is AutoModelForTextEncoding else MODEL_MAPPING
    built: Any = mapping.get(type(model.config), None)
    if built is not None and not isinstance(model, built):
        name = getattr(built, "__name__", str(built))
        raise ValueError(
            f"A saved classifier rebuilds its backbone from the config, here as {name}, so that it could not be loaded "
            f"with a {type(model).__name__}. Pass a {name} (model.base_model of one with a task head), or its name."
        )


def load_backbone(source: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The pretrained model, or of an encoder-decoder its encoder. Raises ValueError for a SPIN checkpoint."""
    hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    config = AutoConfig.from_pretrained(source, **hub)
    if isinstance(config, SpinConfig):
        raise ValueError(f"{source} is a SPIN model already; load it with from_pretrained.")
    return _auto_class(config).from_pretrained(source, **kwargs)


def build_backbone(config: SpinConfig) -> PreTrainedModel:
    """An empty backbone of the shape that a checkpoint's config gives. Raises :class:`CheckpointError` without one."""
    if config.backbone_config is None:
        raise CheckpointError(
            "SpinConfig has no backbone_config. Use SpinForSequenceClassification.from_backbone(...) to start from a "
            "pretrained model."
        )
    trust: dict[str, Any] = {"trust_remote_code": remote_code_is_trusted()}
    if remote_code_is_trusted() and type(config.backbone_config) not in MODEL_MAPPING:
        trust["code_revision"] = config.backbone_revision  # the code that was read when the model was made, not newer
    return _auto_class(config.backbone_config).from_config(config.backbone_config, **trust)
