"""Everything needed to rebuild a SPIN model, and nothing else."""

from __future__ import annotations

import inspect
import math
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from .batching import BATCHINGS, Batching
from .trust import CheckpointError as CheckpointError
from .trust import (
    check_values,
    checked_exits,
    checked_features,
    checked_layout,
    remote_code_is_trusted,
    trusting_remote_code,
)
from .windows import checked_windows

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
_SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads")  # the backbone's; shown, and never read


class SpinConfig(PreTrainedConfig):
    """Configuration of :class:`SpinModel` and :class:`SpinForSequenceClassification`.

    Args:
        backbone_config: config of the wrapped model, as an object or a dict with its ``model_type``.
        backbone_id: Hub id or path the backbone came from; provenance, never loaded by ``from_pretrained``.
        backbone_revision: commit of ``backbone_id``.
        layout: dotted names of the backbone's blocks, FFN down projection and final norm, and how many blocks in a row
            share a module.
        features: what the classifier reads, one entry ``{"tap": "ffn.3", "pooling": "mean", "count": 120}`` per tap
            and pooling, under ``attention`` with the width of its ``query`` too; empty until calibrated. The neurons'
            indices, and the queries, are buffers of the model.
        exits: the heads for other depths and etas, if calibration was asked for them, one entry ``{"depth": 4, "eta":
            0.8, "num_features": 120, "score": 0.91, "temperature": 1.0}`` each.
        exit_features: the features that they share, as ``features`` has them.
        class_weights: weight of each label in the training loss, in the order of ``id2label``.
        max_text_tokens: tokens per text that calibration used; longer texts were cut.
        windows: how texts longer than a window are read in windows, the values of :class:`Windows`; ``None`` if they
            are not.
        text_pairs: whether calibration read sentence pairs; ``None`` of an early checkpoint that doesn't say.
        logit_temperature: what the model divides its logits by, so that probabilities match how often they hold.
        gate_penalty: cost of an open gate in the training loss; ``None`` for a model without gates.
        batching: which texts may share a batch: ``"padded"`` (any), ``"equal_length"`` or ``"single"``. Calibration
            finds out; a model splits a batch that its backbone can't take whole.
        tokenizer: fingerprint of the tokenizer that calibration used.
        form: the checkpoint's form if its weights are not whole: ``"head"``.
        head_checksum: SHA-256 of the head's tensors in the checkpoint's file.
        backbone_fingerprint: of a head-only checkpoint, SHA-256 of the backbone's weights in each dtype.
        spin_format: version of this format. Keys that a later version adds to it are dropped with a warning.

    A remote-code backbone's config is kept as it is written until the model is loaded with ``trust_remote_code=True``.

    Raises:
        CheckpointError: for a newer format, an unknown backbone type, a ``logit_temperature`` that is not a positive
            number, or values that :func:`check_values` refuses.
    """

    model_type = "spin"

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        *,
        backbone_id: str | None = None,
        backbone_revision: str | None = None,
        layout: dict[str, Any] | None = None,
        features: list[dict[str, Any]] | None = None,
        exits: list[dict[str, Any]] | None = None,
        exit_features: list[dict[str, Any]] | None = None,
        class_weights: list[float] | None = None,
        max_text_tokens: int | None = None,
        windows: dict[str, int] | None = None,
        text_pairs: bool | None = None,
        logit_temperature: float = 1.0,
        gate_penalty: float | None = None,
        batching: Batching = "padded",
        tokenizer: dict[str, Any] | None = None,
        form: str | None = None,
        head_checksum: str | None = None,
        backbone_fingerprint: dict[str, str] | None = None,
        spin_format: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        given = {name: value for name, value in kwargs.items() if not name.endswith("_implementation")}
        kwargs = {name: value for name, value in kwargs.items() if name not in _SHAPE}
        check_values({**given, "backbone_id": backbone_id, "class_weights": class_weights, "layout": layout})
        if not isinstance(spin_format, int) or spin_format > FORMAT_VERSION:
            raise CheckpointError(
                f"This checkpoint has format {spin_format}, this version of spin_hf reads up to {FORMAT_VERSION}. "
                "Update it: pip install -U spin_hf."
            )
        self.spin_format = spin_format
        self.backbone_id = backbone_id
        self.backbone_revision = backbone_revision
        if isinstance(backbone_config, dict):
            backbone_config = _config_from_dict(backbone_config, backbone_id)
        self.backbone_config: PreTrainedConfig | None = backbone_config
        if remote_code_is_trusted():
            self.backbone_config = unsealed(self)
        self.layout = checked_layout(layout)
        self.features = checked_features(features or [])
        self.exits = checked_exits(exits or [])
        self.exit_features = checked_features(exit_features or [], "exit_features")
        self.class_weights = class_weights
        self.max_text_tokens = max_text_tokens
        self.windows = checked_windows(windows)
        self.text_pairs = text_pairs
        self.logit_temperature = _checked_temperature(logit_temperature)
        self.gate_penalty = gate_penalty
        if batching not in BATCHINGS:
            raise CheckpointError(f"`batching` should be one of {', '.join(BATCHINGS)}; got {batching!r}.")
        self.batching = batching
        self.tokenizer = tokenizer
        self.form = form
        self.head_checksum = head_checksum
        self.backbone_fingerprint = backbone_fingerprint
        attention = kwargs.pop("attn_implementation", None)  # the backbone's, as the wrapper has none
        if attention is not None and isinstance(self.backbone_config, PreTrainedConfig):
            self.backbone_config._attn_implementation = attention
        super().__init__(**kwargs)

    @property
    def num_features(self) -> int:
        return sum(entry["count"] for entry in self.features)

    @property
    def hidden_size(self) -> int | None:
        """The backbone's; asked for by Trainer and DeepSpeed integrations."""
        return None if self.backbone_config is None else self.backbone_config.get_text_config().hidden_size

    def to_dict(self) -> dict[str, Any]:
        """All values, and of the backbone's shape what tools look for in any config; PEFT for one."""
        text = None if self.backbone_config is None else self.backbone_config.get_text_config()
        shape = {name: getattr(text, name, None) for name in _SHAPE}
        return {**super().to_dict(), **{name: value for name, value in shape.items() if isinstance(value, int)}}

    @property
    def vocab_size(self) -> int:
        """There is none, and what asks for it is PEFT, to put virtual tokens before a text."""
        raise AttributeError(
            "SpinConfig has no vocab_size. Prompt tuning, prefix tuning and their kin are not supported: their virtual "
            "tokens shift what the neurons were chosen on. Use LoraConfig or IA3Config."
        )

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, trust_remote_code: bool | None = None, **kwargs: Any) -> SpinConfig:
        with trusting_remote_code(bool(trust_remote_code)):
            config: SpinConfig = super().from_pretrained(*args, **kwargs)
            return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """What a file says, and what the caller says. Only the caller can choose an attention kernel, or grant trust.

        Raises:
            CheckpointError: see the class.
        """
        values = dict(config_dict)
        check_values(values)
        if values.get("spin_format", FORMAT_VERSION) == FORMAT_VERSION:
            if not cls._auto_class:  # this class was not loaded from the checkpoint's files, so they do not matter
                values.pop("auto_map", None)
            if unknown := sorted(set(values) - _known_keys()):
                logger.warning_once(
                    f"config.json holds {', '.join(unknown)}, which this version of spin_hf does not know; left out. "
                    "If a newer version wrote it, update: pip install -U spin_hf."
                )
            values = {name: value for name, value in values.items() if name not in unknown}
        return super().from_dict(values, **kwargs)


def _known_keys() -> set[str]:
    own = inspect.signature(SpinConfig.__init__).parameters
    written_by_others = (
        *("quantization_config", "pad_token_id", "num_labels", "torch_dtype"),
        *("_name_or_path", "name_or_path", "_commit_hash", "auto_map"),
        "use_cache",  # set by Trainer
    )
    return {*own, *_SHAPE, *PreTrainedConfig().to_dict(), *written_by_others}


class SealedConfig(PreTrainedConfig):
    """The values of a remote-code backbone's config, whose class was not loaded, since nobody gave trust so far."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.values = dict(values or {})
        self.model_type = self.values.get("model_type", "")

    def to_dict(self) -> dict[str, Any]:
        return {"transformers_version": None, **self.values}

    to_diff_dict = to_dict

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(name)


def unsealed(config: SpinConfig) -> PreTrainedConfig | None:
    """The backbone's config as an object of its own class; of a remote-code backbone by the caller's trust alone.

    Raises:
        CheckpointError: without that trust.
    """
    nested = config.backbone_config
    values = getattr(nested, "values", None)
    if type(nested).__name__ != SealedConfig.__name__ or not isinstance(values, dict):
        return nested
    source, auto_map = config.backbone_id, values["auto_map"]
    if not remote_code_is_trusted():
        classes = [auto_map[name] for name in ("AutoConfig", "AutoModel") if name in auto_map]
        places = {str(name.partition("--")[0] if "--" in name else source) for name in classes}
        raise CheckpointError(
            f"The backbone ({values.get('model_type')!r}) runs code from {' and '.join(sorted(places))}. Read that "
            "code, and if you trust it, pass trust_remote_code=True to this call."
        )
    config_class = get_class_from_dynamic_module(auto_map["AutoConfig"], source, revision=config.backbone_revision)
    found: PreTrainedConfig = config_class.from_dict(dict(values))
    found.name_or_path = source  # where AutoModel looks for the model's code
    return found


def _config_from_dict(values: dict[str, Any], source: str | None) -> PreTrainedConfig:
    check_values(values, "config.json: backbone_config")
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        try:
            return CONFIG_MAPPING[model_type].from_dict(dict(values))
        except Exception as error:  # transformers checks each field in its own way
            raise CheckpointError(f"The backbone's config ({model_type!r}) can't be read: {error}") from error
    if source is None or "AutoConfig" not in (values.get("auto_map") or {}):
        raise CheckpointError(
            f"The backbone's model_type is {model_type!r}, which this version of transformers does not know. "
            "Update transformers, or check that the checkpoint is whole."
        )
    return SealedConfig(values)


def _checked_temperature(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"`logit_temperature` should be a positive, finite number (1.0 for none); got {value!r}.")
    return float(value)
