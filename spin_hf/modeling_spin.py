"""``SpinModel`` (a backbone read at a few neurons) and ``SpinForSequenceClassification`` (one linear layer on them)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .backbone import build_backbone, load_backbone, pinned_revision
from .batching import split_rows
from .checkpoint import Form as Form
from .configuration_spin import SpinConfig
from .depth import truncate
from .drift import sample, warn_if_moved
from .gates import Gates
from .layout import Layout, Tap, TapError
from .parts import Stacks, check_rebuilds, shifted_right, text_part, whole_config
from .pooling import PositionsError, align_left, pool
from .pretrained import NotCalibratedError as NotCalibratedError
from .pretrained import SpinPreTrainedModel
from .quantization import is_quantized as is_quantized
from .structure import find_layout
from .taps import attach, model_device, record
from .trust import CheckpointError as CheckpointError
from .windows import Windows, plan_windows

# Every module of the runtime is named above, since some versions of transformers copy from a self-contained folder only
# what the first file imports itself.

logger = logging.get_logger(__name__)


class FeatureGroup(NamedTuple):
    """Neurons of one tap under one pooling."""

    tap: Tap
    pooling: str
    neurons: Tensor  # (count,) int64


@dataclass
class SpinModelOutput(ModelOutput):
    """Output of :class:`SpinModel`.

    Args:
        features: the standardised features ``(batch, num_features)``, float32.
    """

    features: Tensor | None = None


@dataclass
class SpinSequenceClassifierOutput(ModelOutput):
    """Output of :class:`SpinForSequenceClassification`.

    Args:
        loss: scalar, when labels were given.
        logits: ``(batch, num_labels)``, float32.
        features: the standardised features ``(batch, num_features)``, with ``output_features=True``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None


class Standardizer(nn.Module):
    """Which neurons are read, and the shift and scale of each feature. Buffers only, always float32 (indices int64)."""

    neurons: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("neurons", torch.zeros(num_features, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(num_features, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


class SpinModel(SpinPreTrainedModel):
    """A backbone whose output is a vector of a few pooled, standardised neurons.

    Only the blocks up to the last tap exist; the backbone runs once, hooks gather the kept neurons and pool them.
    """

    def __init__(self, config: SpinConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            backbone = build_backbone(config)
        self.backbone = backbone
        self.supports_gradient_checkpointing = backbone.supports_gradient_checkpointing
        config.backbone_config = whole_config(backbone.config)
        if config.layout is None:
            config.layout = find_layout(backbone).to_dict()
        self.layout = Layout.from_dict(config.layout)
        self._form = self.layout.form(backbone)
        self._takes = frozenset(signature(type(backbone).forward).parameters)
        self.standardizer = Standardizer(config.num_features)
        self.groups: list[tuple[Tap, list[tuple[str, int, int]]]] = []
        self._hooks: list[Any] = []
        self.install_hooks()
        self._weights_seen: dict[str, Tensor] | None = None
        self.register_state_dict_pre_hook(warn_if_moved)
        self.post_init()
        self.freeze_backbone()

    # -- features ---------------------------------------------------------------------------------------------------

    @property
    def taps(self) -> list[Tap]:
        """Every tap of the backbone as it is now."""
        return self.layout.taps(self.backbone)

    @property
    def depth(self) -> int:
        """Number of blocks that run."""
        return self.layout.depth(self.backbone)

    def feature_groups(self) -> list[FeatureGroup]:
        """The kept neurons, group by group, in the order of the feature vector."""
        neurons = self.standardizer.neurons
        return [
            FeatureGroup(tap, pooling, neurons[start:stop])
            for tap, parts in self.groups
            for pooling, start, stop in parts
        ]

    def set_features(self, groups: Sequence[FeatureGroup], mean: Tensor, scale: Tensor, *, depth: int) -> None:
        """Read these neurons from now on, and remove the blocks above ``depth``. **Changes the model in place.**

        Args:
            groups: the neurons to keep; one group per (tap, pooling).
            mean, scale: shift and scale of each feature, ``(num_features,)`` in the order of ``groups``.
            depth: blocks to keep.
        """
        order = sorted(range(len(groups)), key=lambda i: (groups[i].tap.block, groups[i].tap.kind, groups[i].pooling))
        if order != list(range(len(groups))):
            raise ValueError("Feature groups must be sorted by block, kind and pooling.")
        truncate(self.backbone, self.layout, depth)
        self.config.features = [
            {"tap": str(group.tap), "pooling": group.pooling, "count": len(group.neurons)} for group in groups
        ]
        standardizer = Standardizer(self.config.num_features)
        standardizer.neurons.copy_(torch.cat([group.neurons for group in groups]))
        standardizer.mean.copy_(mean)
        standardizer.scale.copy_(scale)
        self.standardizer = standardizer.to(model_device(self.backbone))
        self.config.backbone_config = whole_config(self.backbone.config)
        self.install_hooks()

    def install_hooks(self) -> None:
        """Read the kept taps of the backbone's modules as they are now, after a quantiser replaced them, say."""
        for hook in self._hooks:
            hook.remove()
        self.groups = _group_by_tap(self.config)
        self._hooks = attach(self.backbone, self.layout, [tap for tap, _ in self.groups])

    @contextmanager
    def hooked(self, taps: Sequence[Tap]) -> Iterator[None]:
        """Have the hooks on these taps, instead of those that the kept neurons need, for the length of a context."""
        for hook in self._hooks:
            hook.remove()
        hooks = attach(self.backbone, self.layout, taps)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.install_hooks()

    def remember_backbone(self) -> None:
        """Take the backbone's present weights for those that the neurons were chosen on.

        Where they have changed by the time the model is saved, or got an adapter, a warning says so.
        """
        self._weights_seen = sample(self.backbone)

    def forget_backbone(self) -> None:
        """Warn of no change, until :meth:`remember_backbone`."""
        self._weights_seen = None

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SpinModelOutput | tuple[Tensor]:
        """Read the features of a batch.

        Args:
            input_ids: ``(batch, tokens)``; or give ``inputs_embeds`` ``(batch, tokens, hidden_size)``.
            attention_mask: ``(batch, tokens)``, 1 for real tokens; all tokens are real without it. Rows may be padded
                on either side: real tokens are moved to the front first.
            token_type_ids, position_ids: ``(batch, tokens)``, as the backbone takes them.

        With ``config.windows``, texts longer than a window are cut here: give them whole, with the tokenizer's special
        tokens around each text, and no position_ids.

        Raises:
            NotCalibratedError: if no features were chosen yet.
            ValueError: for inputs that are missing, don't fit each other or can't be cut into windows.
        """
        if not self.groups:
            raise NotCalibratedError(
                "This model was never calibrated, so it has nothing to predict with. "
                "Call spin_calibrate(model, tokenizer, train_dataset) first, or load a calibrated checkpoint."
            )
        mask, inputs = align_left(
            self.token_mask(input_ids, attention_mask, inputs_embeds),
            input_ids,
            token_type_ids,
            position_ids,
            inputs_embeds,
        )
        if self.config.batching == "padded" or mask.shape[0] == 1:
            features = self._read(mask, *inputs, **kwargs)
        else:
            found, numbers = [], []
            for rows, length in split_rows(mask, self.config.batching):
                part = [None if given is None else given[rows.to(given.device), :length] for given in inputs]
                found.append(self._read(mask[rows, :length], *part, **kwargs))
                numbers.append(rows)
            features = torch.cat(found)[torch.cat(numbers).argsort().to(found[0].device)]
        if not _wants_dict(return_dict, self.config):
            return (features,)
        return SpinModelOutput(features=features)

    def _read(self, mask: Tensor, *inputs: Tensor | None, **kwargs: Any) -> Tensor:
        """The features of a right-padded batch that may run together."""
        parts_of = dict(self.groups)
        learns = torch.is_grad_enabled() and self._needs_gradient(inputs[-1])

        def read(tap: Tap, values: Tensor, mask: Tensor) -> list[Tensor]:
            if learns and not torch.is_grad_enabled():
                raise TapError(
                    f"Tap {tap} lies in a reentrant checkpoint, where its gradient is lost. Enable checkpointing with "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}.'
                )
            found = []
            with torch.autocast(values.device.type, enabled=False):
                for pooling, start, stop in parts_of[tap]:
                    neurons = self.standardizer.neurons[start:stop].to(values.device)
                    kept = values.index_select(-1, neurons)
                    found.append(pool(kept, mask, [pooling])[:, 0].to(self.standardizer.mean.device))
            return found

        poolings = {tap: [pooling for pooling, _, _ in parts] for tap, parts in self.groups}
        windows = None if self.config.windows is None else Windows(**self.config.windows)
        pooled = self.pooled(poolings, read, mask, *inputs, windows=windows, **kwargs)
        with torch.autocast(self.standardizer.mean.device.type, enabled=False):
            features: Tensor = self.standardizer(torch.cat([part for tap, _ in self.groups for part in pooled[tap]], 1))
        return features

    def pooled(
        self,
        poolings: Mapping[Tap, Sequence[str]],
        read: Callable[[Tap, Tensor, Tensor], list[Tensor]],
        mask: Tensor,
        *inputs: Tensor | None,
        windows: Windows | None,
        **kwargs: Any,
    ) -> dict[Tap, list[Tensor]]:
        """Pooled values of taps that have hooks, of texts that may run together.

        Args:
            poolings: of each tap.
            read: is given a tap, its activations ``(rows, tokens, width)`` and the mask of the tokens to pool, and
                returns ``(rows, neurons)`` for each of the tap's poolings.
            mask: ``(texts, tokens)``, right-padded.
            inputs: as :meth:`run_backbone` takes them.
            windows: that longer texts are cut into.

        Returns:
            ``(texts, neurons)`` for each pooling of each tap.
        """

        def run(mask: Tensor, tokens: Tensor, *inputs: Tensor | None) -> dict[Tap, list[Tensor]]:
            found: dict[Tap, list[Tensor]] = {}

            def keep(tap: Tap, values: Tensor) -> None:
                found[tap] = read(tap, values, tokens)

            with self.recording(list(poolings), keep, mask):
                self.run_backbone(inputs[0], mask, *inputs[1:], **kwargs)
            return found

        if windows is None or mask.shape[1] <= windows.size:
            return run(mask, mask, *inputs)
        if any(given is not None for given in inputs[2:3]):
            raise ValueError("A text in windows has positions of its own in each of them. Leave position_ids out.")
        plan = plan_windows(mask, windows)
        passes = []
        for part in plan.passes(windows.size, single=self.config.batching == "single"):
            try:
                passes.append(run(plan.mask[part], plan.pooled[part], *(plan.cut(given, part) for given in inputs)))
            except PositionsError as error:
                raise PositionsError(
                    f"{type(self.backbone).__name__} works on other positions than its tokens, so that windows can't "
                    "be told apart. Calibrate it without windows=True."
                ) from error
        return {
            tap: [plan.merge(torch.cat([part[tap][i] for part in passes]), name) for i, name in enumerate(names)]
            for tap, names in poolings.items()
        }

    def recording(
        self, taps: Sequence[Tap], read: Callable[[Tap, Tensor], None], mask: Tensor
    ) -> AbstractContextManager[None]:
        """:func:`record` the taps of a forward of this backbone, with this mask ``(batch, tokens)``."""
        return record(taps, read, shape=(mask.shape[0], mask.shape[1]), form=self._form)

    def token_mask(self, input_ids: Tensor | None, attention_mask: Tensor | None, embeds: Tensor | None) -> Tensor:
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

    def run_backbone(
        self,
        input_ids: Tensor | None,
        mask: Tensor | None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """One forward of the backbone for its side effects on the taps; nothing of its output is kept."""
        optional = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        inputs: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
        takes = self._takes
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        if "use_cache" in takes or getattr(self.backbone.config, "use_cache", None):
            inputs["use_cache"] = False
        if "attention_mask" in takes or "input_ids" not in takes:  # FNet takes none; some wrappers take what comes
            inputs["attention_mask"] = mask
        if "token_type_ids" in inputs and not {"token_type_ids", "kwargs"} & takes:
            del inputs["token_type_ids"]  # some tokenizers make them for models that have no use for them
        if self.layout.decoder is not None:
            if input_ids is None:
                raise ValueError('With stacks="both" the decoder reads token ids too: give input_ids.')
            inputs["decoder_input_ids"] = shifted_right(input_ids, mask, self.backbone.config)
            if "decoder_attention_mask" in takes:
                inputs["decoder_attention_mask"] = mask
        with nullcontext() if self._needs_gradient(inputs_embeds) else torch.no_grad():
            self.backbone(**inputs, **kwargs)

    # -- what is trained ----------------------------------------------------------------------------------------------

    def freeze_backbone(self) -> None:
        """Stop training the backbone: no gradients, and dropout off even in ``train()``."""
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def unfreeze_backbone(self, from_block: int | None = None) -> None:
        """Train the backbone too: all of it, or only the blocks from ``from_block`` (counted from 1) and what follows.

        Raises:
            ValueError: if ``from_block`` is not one of the blocks.
        """
        if from_block is not None and not 1 <= from_block <= self.depth:
            raise ValueError(f"from_block must lie between 1 and {self.depth}; got {from_block}.")
        self.backbone.requires_grad_(from_block is None)
        if from_block is not None:
            for module in self.layout.upward(self.backbone, from_block):
                module.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> SpinModel:
        super().train(mode)
        if mode and not self._backbone_trains():
            self.backbone.eval()
        return self

    def _backbone_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def _needs_gradient(self, inputs_embeds: Tensor | None) -> bool:
        return (inputs_embeds is not None and inputs_embeds.requires_grad) or self._backbone_trains()

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.backbone.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)


class SpinForSequenceClassification(SpinPreTrainedModel):
    """A text classifier: :class:`SpinModel` and one linear layer named ``score``.

    Make one with :meth:`from_backbone` and ``spin_calibrate``, or load one with :meth:`from_pretrained`.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch; Trainer divides it when it accumulates gradients

    def __init__(self, config: SpinConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.spin = SpinModel(config, backbone)
        self.supports_gradient_checkpointing = self.spin.supports_gradient_checkpointing
        self.score = _linear(config.num_features, config.num_labels)
        penalty = config.gate_penalty
        self.gates = None if penalty is None else Gates(config.num_features, penalty)
        self.model_tags = ["spin_hf", "text-classification"]  # of this model's push_to_hub; a list that it appends to
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel | Any,
        *,
        labels: Sequence[str] | None = None,
        num_labels: int | None = None,
        problem_type: str | None = None,
        blocks: str | None = None,
        ffn: str | None = None,
        stacks: Stacks = "encoder",
        **kwargs: Any,
    ) -> SpinForSequenceClassification:
        """Wrap a pretrained model. The only place that downloads.

        Args:
            backbone: Hub id, folder, or a loaded model without a task head. A loaded model is used as it is, not
                copied: calibration freezes it and removes blocks from it.
            labels: names of the labels, in the order of their ids.
            num_labels: number of labels, instead of names; 1 with ``problem_type="regression"``.
            problem_type: ``"single_label_classification"`` (default), ``"multi_label_classification"`` or
                ``"regression"``.
            blocks: dotted name of the backbone's block list, where it can't be found by structure.
            ffn: dotted name of the FFN's down projection inside a block, likewise.
            stacks: of an encoder-decoder the ``"encoder"`` alone, or ``"both"``: then the decoder's blocks count on
                after the encoder's. It reads the same tokens, shifted to the right behind its start token, as the
                classification heads that transformers has for such models (BART, T5) feed it.
            **kwargs: for ``AutoModel.from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``,
                ``quantization_config``, ``revision``, ``trust_remote_code`` and so on.

        Raises:
            ValueError: for labels that contradict ``num_labels`` or the problem type, or a loaded model of a class that
                could not be rebuilt from its config.
            TapError: if no blocks are found.
        """
        problem_type = problem_type or "single_label_classification"
        if unknown := sorted({"id2label", "label2id"} & kwargs.keys()):  # the backbone's config would swallow them
            raise ValueError(f"Name labels in the order of their ids, by labels=[...] instead of {unknown[0]}=.")
        names = _label_names(labels, num_labels, problem_type)
        if hasattr(backbone, "active_peft_config"):  # a PEFT model; what it leaves on a merged one differs by version
            raise ValueError(
                "The backbone is adapted by PEFT. Merge the adapter into its weights first: "
                "SpinForSequenceClassification.from_backbone(backbone.merge_and_unload(), ...)."
            )
        if isinstance(backbone, nn.Module):
            if kwargs:
                raise ValueError(f"{', '.join(kwargs)} can only be used when the backbone is loaded here, by its name.")
            model: PreTrainedModel = backbone
            source = getattr(backbone, "name_or_path", "") or None
            revision = getattr(model.config, "_commit_hash", None)
        else:
            model, source = load_backbone(str(backbone), kwargs, stacks), str(backbone)
            revision = pinned_revision(source, kwargs)
        if isinstance(model, SpinPreTrainedModel):
            raise ValueError(f"{source or type(model).__name__} is a SPIN model already; load it with from_pretrained.")
        if isinstance(model, PreTrainedModel):
            model = text_part(model, stacks)
        check_rebuilds(model, stacks)
        if source is not None and os.path.isdir(source):
            source = os.path.abspath(source)  # elsewhere a relative path could be taken for a Hub id
        config = SpinConfig(
            backbone_config=whole_config(model.config),
            backbone_id=source,
            backbone_revision=revision,
            layout=find_layout(model, blocks=blocks, ffn=ffn, stacks=stacks).to_dict(),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            problem_type=problem_type,
            pad_token_id=getattr(model.config.get_text_config(), "pad_token_id", None),
            dtype=model.dtype,
        )
        spin = cls(config, backbone=model)
        spin.score.to(model_device(model))
        device_map = getattr(model, "hf_device_map", {})
        if len(set(device_map.values())) > 1 or "disk" in device_map.values():
            spin.hf_device_map = {f"spin.backbone.{name}".rstrip("."): place for name, place in device_map.items()}
        spin.eval()
        return spin

    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Replace ``score``. ``weight`` is ``(num_labels, num_features)``, ``bias`` ``(num_labels,)``. **In place.**

        The temperature was the old head's, so it is 1 again.
        """
        score = _linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            score.weight.copy_(weight)
            score.bias.copy_(bias)
        self.score = score.to(model_device(self.spin.backbone))
        self.config.logit_temperature = 1.0

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
        output_features: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SpinSequenceClassifierOutput | tuple[Tensor, ...]:
        """Classify a batch.

        Logits are the head's output divided by ``config.logit_temperature``, which calibration fitted, so that softmax
        or sigmoid gives probabilities that match how often they hold. The loss is taken on these same logits: a head
        that is trained further adapts to the temperature, and evaluation and serving see what was trained.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds: as in :meth:`SpinModel.forward`.
            labels: class ids ``(batch,)``, 0/1 floats ``(batch, num_labels)`` for multi-label, or floats ``(batch,)``
                for regression.
            features: standardised features ``(batch, num_features)`` read before, instead of texts: the backbone does
                not run.
            output_features: return the feature vectors too.

        Returns:
            Loss (with labels), logits and, on request, features; a tuple where ``return_dict``, here or in the config,
            is false.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if features is None:
            features = self.spin(*inputs, return_dict=True, **kwargs).features
        elif features.shape[1:] != (self.config.num_features,) or not self.calibrated:
            raise ValueError(
                f"features should be (batch, {self.config.num_features}), not {tuple(features.shape)}. Read them with "
                "this model: spin_hf.training.store_features(model, tokenizer, data)."
            )
        with torch.autocast(features.device.type, enabled=False):
            logits = self.score(features if self.gates is None else self.gates(features))
            logits = logits / self.config.logit_temperature
            loss = None if labels is None else self._loss(logits, labels.to(logits.device))
            if loss is not None and self.gates is not None and self.training:
                loss = loss + self.gates.penalty()
        shown = features if output_features else None
        if not _wants_dict(return_dict, self.config):
            return tuple(part for part in (loss, logits, shown) if part is not None)
        return SpinSequenceClassifierOutput(loss=loss, logits=logits, features=shown)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = self.config.class_weights
        weight = None if weights is None else logits.new_tensor(weights)
        if self.config.problem_type == "regression":
            return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
        if self.config.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), pos_weight=weight)
        return F.cross_entropy(logits, labels.reshape(-1).long(), weight=weight)

    def freeze_backbone(self) -> None:
        """See :meth:`SpinModel.freeze_backbone`."""
        self.spin.freeze_backbone()

    def unfreeze_backbone(self, from_block: int | None = None) -> None:
        """See :meth:`SpinModel.unfreeze_backbone`."""
        self.spin.unfreeze_backbone(from_block)

    def get_input_embeddings(self) -> nn.Module:
        return self.spin.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.spin.set_input_embeddings(value)


def _wants_dict(asked: bool | None, config: SpinConfig) -> bool:
    return bool(config.return_dict if asked is None else asked)


def _linear(num_features: int, num_labels: int) -> nn.Linear:
    """The head. Before calibration it has no features, of which torch warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.Linear(num_features, num_labels, dtype=torch.float32)


def _group_by_tap(config: SpinConfig) -> list[tuple[Tap, list[tuple[str, int, int]]]]:
    """For each tap its (pooling, start, stop) slices of the feature vector."""
    groups: list[tuple[Tap, list[tuple[str, int, int]]]] = []
    start = 0
    for entry in config.features:
        tap = Tap.parse(entry["tap"])
        stop = start + entry["count"]
        if not groups or groups[-1][0] != tap:
            groups.append((tap, []))
        groups[-1][1].append((entry["pooling"], start, stop))
        start = stop
    return groups


def _label_names(labels: Sequence[str] | None, num_labels: int | None, problem_type: str) -> list[str]:
    known = ("single_label_classification", "multi_label_classification", "regression")
    if problem_type not in known:
        raise ValueError(f"problem_type must be one of {', '.join(known)}; got {problem_type!r}.")
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of names; got {labels!r}.")
    if labels is not None and num_labels is not None and len(labels) != num_labels:
        raise ValueError(f"labels names {len(labels)} labels, num_labels says {num_labels}. Give one of them.")
    if labels is not None and len(set(labels)) != len(labels):
        raise ValueError(f"labels must differ from each other; got {list(labels)}.")
    count = len(labels) if labels is not None else num_labels
    if count is None:
        count = 1 if problem_type == "regression" else 2
    if problem_type == "regression" and count != 1:
        raise ValueError(f"Regression predicts one number; got {count} labels.")
    if problem_type == "single_label_classification" and count < 2:
        raise ValueError(f"Single-label classification needs at least two labels; got {count}.")
    return [str(name) for name in labels] if labels is not None else [f"LABEL_{i}" for i in range(count)]
