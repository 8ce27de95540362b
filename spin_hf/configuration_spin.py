"""Everything needed to rebuild a SPIN model, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that is not ours, too new, inconsistent, or that needs trust the caller did not give."""


# Trust in remote code is the caller's alone and lasts for one call; no file can grant it.
_trust: ContextVar[bool] = ContextVar("spin_hf_trust_remote_code", default=False)


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


class SpinConfig(PreTrainedConfig):
    """Configuration of :class:`SpinModel` and :class:`SpinForSequenceClassification`.

    Args:
        backbone_config: config of the wrapped model, as an object or a dict with its ``model_type``.
        backbone_id: Hub id or path the backbone came from; provenance, never loaded by ``from_pretrained``.
        backbone_revision: commit of ``backbone_id``.
        layout: dotted names of the backbone's blocks, FFN down projection and final norm, and how many blocks in a row
            share a module.
        features: what the classifier reads, one entry ``{"tap": "ffn.3", "pooling": "mean", "count": 120}`` per tap
            and pooling; empty until calibrated. The neurons' indices are a buffer of the model.
        class_weights: weight of each label in the training loss, in the order of ``id2label``.
        max_text_tokens: tokens per text that calibration used; longer texts were cut.
        logit_temperature: what the model divides its logits by, so that probabilities match how often they hold.
        gate_penalty: cost of an open gate in the training loss; ``None`` for a model without gates.
        spin_format: version of this format.

    Raises:
        CheckpointError: for a newer format, an unknown backbone type, a remote-code backbone without trust,
            or a ``logit_temperature`` that is not a positive number.
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
        class_weights: list[float] | None = None,
        max_text_tokens: int | None = None,
        logit_temperature: float = 1.0,
        gate_penalty: float | None = None,
        spin_format: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if spin_format > FORMAT_VERSION:
            raise CheckpointError(
                f"This checkpoint has format {spin_format}, this version of spin_hf reads up to {FORMAT_VERSION}. "
                "Update it: pip install -U spin_hf."
            )
        self.spin_format = spin_format
        self.backbone_id = backbone_id
        self.backbone_revision = backbone_revision
        if isinstance(backbone_config, dict):
            backbone_config = _config_from_dict(backbone_config, backbone_id, backbone_revision)
        self.backbone_config: PreTrainedConfig | None = backbone_config
        self.layout = layout
        self.features = [_checked_entry(entry) for entry in features or []]
        self.class_weights = class_weights
        self.max_text_tokens = max_text_tokens
        self.logit_temperature = _checked_temperature(logit_temperature)
        self.gate_penalty = gate_penalty
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


def _config_from_dict(values: dict[str, Any], source: str | None, revision: str | None) -> PreTrainedConfig:
    model_type = values.get("model_type")
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type].from_dict(dict(values))
    auto_map = values.get("auto_map") or {}
    remote_class = auto_map.get("AutoConfig")
    if remote_class is None or source is None:
        raise CheckpointError(
            f"The backbone's model_type is {model_type!r}, which this version of transformers does not know. "
            "Update transformers, or check that the checkpoint is whole."
        )
    if not remote_code_is_trusted():
        classes = [auto_map[name] for name in ("AutoConfig", "AutoModel") if name in auto_map]
        places = {name.partition("--")[0] if "--" in name else source for name in classes}
        raise CheckpointError(
            f"The backbone ({model_type!r}) runs code from {' and '.join(sorted(places))}. Read that code, and if you "
            "trust it, pass trust_remote_code=True to this call."
        )
    config_class = get_class_from_dynamic_module(remote_class, source, revision=revision)
    config: PreTrainedConfig = config_class.from_dict(dict(values))
    config.name_or_path = source  # where AutoModel looks for the model's code
    return config


def _checked_entry(entry: dict[str, Any]) -> dict[str, Any]:
    if set(entry) != {"tap", "pooling", "count"} or not isinstance(entry["count"], int) or entry["count"] < 1:
        raise CheckpointError(
            f"An entry of `features` should look like {{'tap': 'ffn.3', 'pooling': 'mean', 'count': 120}}; got {entry}."
        )
    return entry


def _checked_temperature(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"`logit_temperature` should be a positive, finite number (1.0 for none); got {value!r}.")
    return float(value)
