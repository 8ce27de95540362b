"""``SpinForSequenceClassification``: :class:`SpinModel`, which reads features, and one linear layer on them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .attention import TokenWeights as TokenWeights
from .backbone import load_backbone, pinned_revision
from .batching import split_rows as split_rows
from .checkpoint import Form as Form
from .configuration_spin import SpinConfig
from .depth import truncate as truncate
from .drift import sample as sample
from .exits import Exit, Exits, demand_exit
from .features import FeatureGroup, described
from .gates import Gates
from .inputs import token_mask as token_mask
from .labels import label_names
from .layout import Tap as Tap
from .modes import full_precision
from .outputs import SpinSequenceClassifierOutput, wants_dict
from .parts import Stacks, check_rebuilds, text_part, whole_config
from .pooling import pool as pool
from .pretrained import NotCalibratedError as NotCalibratedError
from .pretrained import SpinPreTrainedModel
from .quantization import is_quantized as is_quantized
from .readers import Gathering as Gathering
from .spin_model import SpinModel
from .structure import find_layout
from .taps import is_read, model_device
from .token_scores import token_scores as token_scores
from .trust import CheckpointError as CheckpointError
from .windows import Windows as Windows

if TYPE_CHECKING:  # importing it needs Triton
    from .triton_scores import scores as scores

# Every module of the runtime is named above, since some versions of transformers copy from a self-contained folder only
# what the first file imports itself.


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
        self.exits = Exits(config.exit_features, config.exits, config.num_labels) if config.exits else None
        self.model_tags = ["spin_hf", "text-classification"]  # of this model's push_to_hub; a list that it appends to
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike[str] | PreTrainedModel | Any,
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
            ValueError: for labels that contradict ``num_labels`` or the problem type, a loaded model of a class that
                could not be rebuilt from its config or that a classifier was calibrated on, or a repository with
                code of its own without trust.
            TapError: if no blocks are found.
        """
        problem_type = problem_type or "single_label_classification"
        if unknown := sorted({"id2label", "label2id"} & kwargs.keys()):  # the backbone's config would swallow them
            raise ValueError(f"Name labels in the order of their ids, by labels=[...] instead of {unknown[0]}=.")
        names = label_names(labels, num_labels, problem_type)
        if hasattr(backbone, "active_peft_config"):  # a PEFT model; what it leaves on a merged one differs by version
            raise ValueError(
                "The backbone is adapted by PEFT. Merge the adapter into its weights first: "
                "SpinForSequenceClassification.from_backbone(backbone.merge_and_unload(), ...)."
            )
        if not isinstance(backbone, (str, os.PathLike, PreTrainedModel)):
            raise ValueError(
                f"The backbone should be a Hub id, a folder or a loaded model of transformers; got a "
                f"{type(backbone).__name__}."
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
        if is_read(model):
            raise ValueError(
                "A classifier was calibrated on this backbone, which it reads and may have removed blocks from. Load "
                "it anew; to share one in memory, pass it to from_pretrained(head_only_folder, backbone=...)."
            )
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

    def set_exits(self, groups: Sequence[FeatureGroup], mean: Tensor, scale: Tensor, exits: Sequence[Exit]) -> None:
        """Hold these heads for other depths and etas too. **In place.**

        Args:
            groups: the features that they share; one group per (tap, pooling).
            mean, scale: shift and scale of each, ``(num_features,)`` in the order of ``groups``.
            exits: the heads; no blocks are removed or brought back for them.
        """
        self.config.exit_features, self.config.exits = described(groups), [each.to_dict() for each in exits]
        self.exits = Exits(self.config.exit_features, self.config.exits, self.config.num_labels)
        self.exits.fill(groups, mean, scale, exits)
        self.exits.to(model_device(self.spin.backbone))
        self.spin.install_hooks()

    def remove_exits(self) -> None:
        """Hold no exits any more, and keep the blocks that they needed. **In place.**"""
        self.config.exit_features, self.config.exits, self.exits = [], [], None
        self.spin.install_hooks()

    def keep_exit(self, exit: int | None) -> None:
        """Make an ordinary classifier of one exit: drop the other heads, and the blocks above it. **In place.**

        Its logits are those that ``model(..., exit=exit)`` gave. For several, work on copies (``copy.deepcopy``).

        Args:
            exit: its number in ``config.exits``; ``None`` for the head that the model answers with.

        Raises:
            ExitError: if there is no such exit.
        """
        exits, spin = demand_exit(self.exits, exit), self.spin
        if exit is None:
            kept, depth = spin.standardizer.select(spin.groups), spin.depth_for(spin.feature_groups())
            weight: Tensor = self.score.weight
            bias: Tensor = self.score.bias
            temperature = self.config.logit_temperature
        else:
            kept, depth, head = exits.select(exit), self.config.exits[exit]["depth"], exits.head(exit)
            weight, bias, temperature = head.weight, head.bias, head.temperature
        self.remove_exits()
        spin.set_features(kept.groups(), kept.mean, kept.scale, depth=depth)
        self.set_head(weight, bias)
        self.config.logit_temperature = temperature

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
        exit: int | None = None,
        output_exits: bool = False,
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
            exit: answer with this exit, by its number in ``config.exits``, instead of ``score``.
            output_exits: return the logits of all exits too, from this one forward. They may differ from those that
                each gives alone by rounding.

        Returns:
            Loss (with labels), logits and, on request, features and the exits' logits; a tuple where ``return_dict``,
            here or in the config, is false.

        Raises:
            ExitError: for an exit that there is not.
            ValueError: for features that are not this model's.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        shared: list[Tensor] = []
        if exit is not None or output_exits:
            exits = demand_exit(self.exits, exit)
            if features is not None:
                raise ValueError("The exits read other features than these. Give texts, or leave the exits out.")
            own = exits.select(exit) if exit is not None else self.spin.standardizer.select(self.spin.groups)
            selections = [own, exits.select()] if output_exits else [own]
            features, *shared = self.spin.read(selections, *inputs, **kwargs)
        elif features is None:
            features = self.spin(*inputs, return_dict=True, **kwargs).features
        elif features.shape[1:] != (self.config.num_features,) or not self.calibrated:
            raise ValueError(
                f"features should be (batch, {self.config.num_features}), not {tuple(features.shape)}. Read them with "
                "this model: spin_hf.training.store_features(model, tokenizer, data)."
            )
        with full_precision(features.device):
            if exit is None:
                logits = self.score(features if self.gates is None else self.gates(features))
                logits = logits / self.config.logit_temperature
            else:
                logits = exits.head(exit)(features)
            exit_logits = exits(shared[0]) if shared else None
            loss = None if labels is None else self._loss(logits, labels.to(logits.device))
            if loss is not None and self.gates is not None and self.training:
                loss = loss + self.gates.penalty()
        shown = features if output_features else None
        if not wants_dict(return_dict, self.config):
            return tuple(part for part in (loss, logits, shown, exit_logits) if part is not None)
        return SpinSequenceClassifierOutput(loss=loss, logits=logits, features=shown, exit_logits=exit_logits)

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


def _linear(num_features: int, num_labels: int) -> nn.Linear:
    """The head. Before calibration it has no features, of which torch warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.Linear(num_features, num_labels, dtype=torch.float32)
