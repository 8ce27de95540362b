"""How both models are loaded and saved, and the dtype that their head keeps."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone import HUB_ARGUMENTS, fitting_backbone, pinned_revision
from .checkpoint import FORMS, Form, Weights, amend_config, copy_code, dtype_name, fingerprints, is_own, staged
from .configuration_spin import SpinConfig, unsealed
from .features import query_widths
from .gates import Gates
from .quantization import is_quantized, saving_quantized, sparing_head
from .taps import Layout, TapError, model_device
from .trust import CheckpointError, backed_by, remote_code_is_trusted, trusting_remote_code

logger = logging.get_logger(__name__)

_AUTO_MAP = {
    "AutoConfig": "configuration_spin.SpinConfig",
    "AutoModel": "modeling_spin.SpinModel",
    "AutoModelForSequenceClassification": "modeling_spin.SpinForSequenceClassification",
}
_WEIGHT_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config")  # a config would take these for its own fields
_UPLOAD_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
_form_of_push: ContextVar[Form] = ContextVar("spin_hf_form_of_push", default="full")


class NotCalibratedError(RuntimeError):
    """The model has no features yet, so it can't predict."""


class SpinPreTrainedModel(PreTrainedModel):
    """Loading, saving and dtype rules shared by both models."""

    config_class = SpinConfig
    base_model_prefix = "spin"
    main_input_name = "input_ids"
    # Not all of standardizer and exits: their indices would become floats.
    _keep_in_fp32_modules_strict = [
        *("score", "gates", "standardizer.mean", "standardizer.scale", "standardizer.queries"),
        *("exits.heads.*.weight", "exits.heads.*.bias"),
    ]

    @property
    def calibrated(self) -> bool:
        return bool(self.config.features)

    def _init_weights(self, module: nn.Module) -> None:
        """A fresh head starts at zero, fresh gates open; everything else is loaded, or the backbone's own business."""
        if module is getattr(self, "score", None):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Gates):
            module.open()

    def is_custom_code(self) -> bool:
        """Of these two the backbone is the one with weights and buffers that transformers may have to make."""
        custom: bool = type(self._backbone).is_custom_code()
        return custom

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        backbone: Any = None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model, of any form.

        A full checkpoint is all that is read. For a head-only one the backbone is loaded from the Hub by the id and
        revision it names, cut to its depth, and refused unless its weights are the ones the head was made for; it is
        read in the dtype it had then, whatever its repository says, so that the logits are the same.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            backbone: for a head-only checkpoint, its backbone: a folder or Hub id, or a loaded model. A loaded model's
                tensors are shared, not copied, so that many heads need the memory of one; it is not changed.
            trust_remote_code: allow a backbone whose code lives in its repository; for this call only.
            **kwargs: as for any model of transformers, handed down to the backbone of a head-only checkpoint:
                ``cache_dir``, ``token``, ``local_files_only``, ``dtype``, ``device_map``, ``attn_implementation`` and
                so on. ``revision`` and ``subfolder`` are the checkpoint's.

        Raises:
            CheckpointError: for a folder of another model, a newer format, a hostile config, a file that is truncated,
                damaged or lacks tensors, another backbone than the head was made for, or a remote-code backbone without
                trust. :mod:`spin_hf.checkpoint` says what is proved.
        """
        source = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)
        with trusting_remote_code(bool(trust_remote_code)):
            if kwargs.get("config") is None:
                config, kwargs = cls._load_config(source, kwargs)
                kwargs["config"] = config
            elif (attention := kwargs.pop("attn_implementation", None)) is not None:
                kwargs["config"].backbone_config._attn_implementation = attention
            config = kwargs["config"]
            config.backbone_config = unsealed(config)
            wants_info = kwargs.pop("output_loading_info", False)
            weights = None if source is None else Weights.find(source, kwargs)
            if weights is not None:
                weights.check(config.head_checksum, config.num_features, query_widths(config.features))
            if config.form == "head":
                model, info = cls._from_head(config, weights, backbone, kwargs)
            elif backbone is not None:
                raise CheckpointError(f"{source} holds its own backbone, so backbone= can't be used. Leave it out.")
            else:
                model, info = cls._from_whole(source, weights, args, kwargs)
        model.freeze_backbone()  # loading replaces the parameters that __init__ froze
        getattr(model, "spin", model).remember_backbone()
        return (model, info) if wants_info else model

    @classmethod
    def _from_whole(
        cls, source: Any, weights: Weights | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = sparing_head(kwargs["quantization_config"])
        try:
            with nullcontext() if weights is None else backed_by(weights.bytes):
                model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        except (SafetensorError, TapError) as error:
            raise CheckpointError(f"{source} can't be loaded: {error}") from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise CheckpointError(f"Config and weights of {source} are not of one checkpoint: {error}") from error
        if is_quantized(model):  # which may have replaced the modules that the hooks were on
            getattr(model, "spin", model).install_hooks()
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CheckpointError(f"{source} lacks {', '.join(missing[:5])}{more}. Save the model again.")
        return model, info

    @classmethod
    def _from_head(
        cls, config: SpinConfig, weights: Weights | None, backbone: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if weights is None:
            raise CheckpointError("This head-only checkpoint has no model.safetensors. Save or download it again.")
        config.form = config.head_checksum = None
        fitting = fitting_backbone(config, backbone, kwargs)
        config.backbone_fingerprint = None
        try:
            model = cls(config, fitting)
        except TapError as error:
            raise CheckpointError(f"{weights.source} can't be loaded: {error}") from error
        stored = {name.removeprefix("spin."): value for name, value in weights.own().items()}
        with torch.no_grad():
            for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
                if not is_own(name):
                    continue
                value = stored.get(name.removeprefix("spin."))
                if value is None or value.shape != tensor.shape:
                    found = "nothing" if value is None else f"a tensor of shape {tuple(value.shape)}"
                    raise CheckpointError(
                        f"{weights.source} should hold {name} of shape {tuple(tensor.shape)}, but has {found}."
                    )
                tensor.copy_(value)
        body: Any = getattr(model, "spin", model)
        for part in (body.standardizer, *(getattr(model, name, None) for name in ("score", "gates", "exits"))):
            if part is not None:
                part.to(model_device(fitting))
        if (places := getattr(fitting, "hf_device_map", None)) is not None:
            prefix = "backbone" if body is model else "spin.backbone"
            model.hf_device_map = {f"{prefix}.{name}".removesuffix("."): place for name, place in places.items()}
        model.eval()
        return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}

    @classmethod
    def _load_config(cls, source: Any, kwargs: dict[str, Any]) -> tuple[SpinConfig, dict[str, Any]]:
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        values, _ = SpinConfig.get_config_dict(source, **hub)
        if not values:
            raise CheckpointError(f"{source} has no config.json, or an empty one, so it is no saved model.")
        if values.get("model_type") != SpinConfig.model_type:
            raise CheckpointError(
                f"{source} holds a {values.get('model_type', 'unnamed')!r} model, not a SPIN checkpoint. To make a "
                f"classifier from it, call SpinForSequenceClassification.from_backbone({str(source)!r}, labels=[...])."
            )
        weights = {name: kwargs.pop(name) for name in _WEIGHT_ARGUMENTS if name in kwargs}
        config, kwargs = SpinConfig.from_pretrained(
            source, return_unused_kwargs=True, trust_remote_code=remote_code_is_trusted(), **kwargs
        )
        return config, {**kwargs, **hub, **weights}

    # -- saving -------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, form: Form | None = None, **kwargs: Any
    ) -> None:
        """Save config and weights. The folder's old checkpoint stays as it is until the new one is complete.

        Args:
            save_directory: a folder, made if need be.
            *args, **kwargs: as for any model of transformers.
            form: ``"full"`` (default); ``"head"``, a few hundred KB that name their backbone on the Hub, which is
                loaded once more here to make sure that it is the one; or ``"self_contained"``, a full checkpoint that
                ``trust_remote_code=True`` loads where this package is not installed.

        Raises:
            NotCalibratedError: for a model that could not be used, before anything is written.
            CheckpointError: for ``form="head"`` if the backbone is not what its id and revision load.
        """
        form = form or _form_of_push.get()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}.")
        if not self.calibrated:
            raise NotCalibratedError("This model was never calibrated; run spin_calibrate before saving it.")
        if kwargs.get("distributed_checkpoint") or getattr(self, "_hf_peft_config_loaded", False):
            if form != "full":
                raise ValueError(f"form={form!r} can't be combined with distributed_checkpoint, or with an adapter.")
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        push = kwargs.pop("push_to_hub", False)
        repository = kwargs.pop("repo_id", os.path.basename(os.fspath(save_directory))) if push else None
        upload = {name: kwargs.pop(name) for name in _UPLOAD_ARGUMENTS if name in kwargs}
        changes: dict[str, Any] = {"form": None, "backbone_fingerprint": None, "auto_map": None}
        if form == "head":
            changes |= {"form": form, **self._proved_backbone(upload.get("token"))}
        with staged(save_directory) as folder:
            if form == "head":
                self._write_head(folder, *args, **kwargs)
            else:
                if is_quantized(self):  # transformers can't turn back what its quantisers did on loading
                    kwargs.setdefault("save_original_format", False)
                with saving_quantized(self, self._backbone):
                    super().save_pretrained(folder, *args, **kwargs)
            if not (folder / "config.json").exists():  # a process that does not write
                return
            if form == "self_contained" or self._auto_class is not None:
                copy_code(folder)
                changes["auto_map"] = _AUTO_MAP
            amend_config(folder, {**changes, "head_checksum": Weights.in_folder(folder).checksum()})
        if repository is not None:
            self.push_to_hub(repository, form=form, **upload)

    def push_to_hub(self, *args: Any, form: Form = "full", **kwargs: Any) -> Any:
        """Upload the model to the Hub, as for any model of transformers.

        Args:
            *args, **kwargs: ``repo_id`` and the rest.
            form: see :meth:`save_pretrained`.
        """
        token = _form_of_push.set(form)  # transformers hands nothing of ours down to save_pretrained
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            _form_of_push.reset(token)

    def _write_head(
        self,
        folder: Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
    ) -> None:
        """What transformers would write, without the backbone."""
        if not is_main_process:
            return
        tensors = self.state_dict() if state_dict is None else state_dict
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if is_own(name)}
        name = "model.safetensors" if variant is None else f"model.{variant}.safetensors"
        save_file(own, folder / name, metadata={"format": "pt"})
        self.config.architectures, self.config.dtype = [type(self).__name__], dtype_name(self._backbone)
        self.config.save_pretrained(folder)

    def _proved_backbone(self, token: str | bool | None) -> dict[str, Any]:
        """Fingerprint and commit, after loading the backbone again from where the checkpoint will send its readers."""
        source = self.config.backbone_id
        if source is None:
            raise CheckpointError(
                "The config names no backbone_id, so nobody could find the backbone of a head-only checkpoint. Set "
                "model.config.backbone_id and backbone_revision, or save with form='full'."
            )
        if folder := os.path.isdir(source):
            logger.warning_once(
                f"The backbone came from the folder {source}, which is not read from a file's word: who loads this "
                "head-only checkpoint must pass backbone=."
            )
        config = copy.copy(self.config)
        config.backbone_fingerprint = fingerprints(self._backbone, Layout.from_dict(config.layout))
        runs_remote_code = type(self._backbone).__module__.startswith("transformers_modules.")
        hub = {} if token is None else {"token": token}
        with trusting_remote_code(runs_remote_code):
            fitting_backbone(config, source if folder else None, hub)
        revision = pinned_revision(source, {**hub, "revision": config.backbone_revision})
        return {"backbone_fingerprint": config.backbone_fingerprint, "backbone_revision": revision}

    @property
    def _backbone(self) -> PreTrainedModel:
        body: Any = getattr(self, "spin", self)
        found: PreTrainedModel = body.backbone
        return found

    # -- dtype --------------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast, but leave the head's numbers exactly as they are in float32 (``.half()``, ``.to(bf16)``)."""
        own = self._float32_tensors()
        before = {name: tensor.data for name, tensor in own.items()}
        super()._apply(fn, recurse)
        for name, tensor in self._float32_tensors().items():
            if tensor.dtype != torch.float32 and before[name].dtype == torch.float32:
                tensor.data = before[name].to(tensor.device)
        return self

    def _float32_tensors(self) -> dict[str, Tensor]:
        found = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {
            name: tensor
            for name, tensor in found.items()
            if tensor.is_floating_point()
            and not {"score", "gates", "exits", "standardizer"}.isdisjoint(name.split(".")[:2])
        }
