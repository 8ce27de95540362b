"""``SpinModel``: a backbone read at a few neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import source, sources, whole
from .backbone import build_backbone
from .batching import split_rows
from .configuration_spin import SpinConfig
from .depth import nearest_depth, truncate
from .drift import sample, warn_if_moved
from .features import FeatureGroup, Selection, Standardizer, TapPart, described, group_by_tap, query_widths
from .inputs import backbone_inputs, token_mask
from .layout import Layout, PositionsError, Tap
from .modes import full_precision
from .outputs import SpinModelOutput, wants_dict
from .parts import whole_config
from .pooling import align_left
from .pretrained import NotCalibratedError, SpinPreTrainedModel
from .readers import Gathering, Reader, TapByTap
from .structure import find_layout
from .taps import attach, model_device, record, tap_width
from .trust import CheckpointError
from .windows import WindowPlan, Windows, plan_windows


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
        self.standardizer = Standardizer(config.num_features, query_widths(config.features))
        self.groups: list[TapPart] = []
        self._hooks: list[Any] = []
        self.install_hooks()
        self._check_queries()
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
        return self.standardizer.select(self.groups).groups()

    def set_features(self, groups: Sequence[FeatureGroup], mean: Tensor, scale: Tensor, *, depth: int) -> None:
        """Read these neurons from now on, and remove the blocks above ``depth``. **Changes the model in place.**

        Args:
            groups: the neurons to keep; one group per (tap, pooling).
            mean, scale: shift and scale of each feature, ``(num_features,)`` in the order of ``groups``.
            depth: blocks to keep.
        """
        entries = described(groups)
        deepest = max((entry["depth"] for entry in self.config.exits), default=0)
        if deepest > depth:
            raise ValueError(f"The exits need {deepest} blocks; remove them first: model.keep_exit(None).")
        truncate(self.backbone, self.layout, depth)
        self.config.features = entries
        self.standardizer = Standardizer.of(groups, mean, scale).to(model_device(self.backbone))
        self.config.backbone_config = whole_config(self.backbone.config)
        self.install_hooks()

    def depth_for(self, groups: Sequence[FeatureGroup]) -> int:
        """The fewest blocks to which the backbone can be cut and still has the taps of these groups."""
        if any(group.tap.kind == "norm" for group in groups):
            return self.depth
        return nearest_depth(self.backbone, self.layout, max(1, *(group.tap.block for group in groups)))

    def install_hooks(self) -> None:
        """Read the kept taps of the backbone's modules as they are now, after a quantiser replaced them, say.

        Those that only exits need have hooks too, which are idle until an exit is asked for.
        """
        for hook in self._hooks:
            hook.remove()
        self.groups = group_by_tap(self.config.features)
        exits = group_by_tap(self.config.exit_features)
        named: dict[Tap, list[str]] = {}
        for part in (*self.groups, *exits):
            named.setdefault(part.tap, []).extend(pooling for pooling, _ in part.poolings)
        self._hooks = attach(self.backbone, self.layout, list(dict.fromkeys((*named, *sources(named)))))

    def _check_queries(self) -> None:
        for entry in (*self.config.features, *self.config.exit_features):
            if "query" in entry:
                width = tap_width(self.backbone, self.layout, source(Tap.parse(entry["tap"])))
                if entry["query"] != width:
                    raise CheckpointError(
                        f"The query of {entry['tap']} has {entry['query']} values, but scores states of width {width}. "
                        "The config is damaged, or of another backbone."
                    )

    @contextmanager
    def hooked(self, taps: Sequence[Tap]) -> Iterator[None]:
        """Have the hooks on these taps, instead of those that the kept neurons need, for the length of a context."""
        hooks = attach(self.backbone, self.layout, taps)  # first: what it raises leaves the model as it was
        for hook in self._hooks:
            hook.remove()
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
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        (features,) = self.read([self.standardizer.select(self.groups)], *inputs, **kwargs)
        if not wants_dict(return_dict, self.config):
            return (features,)
        return SpinModelOutput(features=features)

    def read(
        self,
        selections: Sequence[Selection],
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """The features ``(batch, num_features)`` of each selection, from one forward; its taps must have hooks.

        The other arguments, and what is raised for them, are those of :meth:`forward`.
        """
        mask = token_mask(input_ids, attention_mask, inputs_embeds)
        inputs = [input_ids, token_type_ids, position_ids, inputs_embeds]
        if attention_mask is not None:  # else all tokens are real
            mask, inputs = align_left(mask, *inputs)
        if self.config.batching == "padded" or mask.shape[0] == 1:
            return self._read(selections, mask, *inputs, **kwargs)
        found, numbers = [], []
        for rows, length in split_rows(mask, self.config.batching):
            part = [None if given is None else given[rows.to(given.device), :length] for given in inputs]
            found.append(self._read(selections, mask[rows, :length], *part, **kwargs))
            numbers.append(rows)
        order = torch.cat(numbers).argsort()
        return [torch.cat(parts)[order.to(parts[0].device)] for parts in zip(*found, strict=True)]

    def _read(
        self, selections: Sequence[Selection], mask: Tensor, *inputs: Tensor | None, **kwargs: Any
    ) -> list[Tensor]:
        """The features of a right-padded batch that may run together."""
        poolings: dict[Tap, list[str]] = {}
        for selection in selections:
            for kept in selection.kept:
                poolings.setdefault(kept.tap, []).extend(pooling for pooling, _ in kept.poolings)
        windows = None if self.config.windows is None else Windows(**self.config.windows)
        start = partial(Gathering, selections, torch.is_grad_enabled() and self._needs_gradient(inputs[-1]))
        pooled = self.read_taps(poolings, start, mask, *inputs, windows=windows, **kwargs)
        features = []
        with full_precision(self.standardizer.mean.device):
            for selection in selections:
                own = []
                for kept in selection.kept:  # each tap's values stand in the order of the selections
                    own += pooled[kept.tap][: len(kept.poolings)]
                    pooled[kept.tap] = pooled[kept.tap][len(kept.poolings) :]
                features.append(selection.standardise(own))
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
        return self.read_taps(poolings, partial(TapByTap, read), mask, *inputs, windows=windows, **kwargs)

    def read_taps(
        self,
        poolings: Mapping[Tap, Sequence[str]],
        start: Callable[[Tensor], Reader],
        mask: Tensor,
        *inputs: Tensor | None,
        windows: Windows | None,
        **kwargs: Any,
    ) -> dict[Tap, list[Tensor]]:
        """:meth:`pooled` by what ``start`` makes of the mask of the tokens to pool, once for each forward.

        It also gets to read the taps that token weights come from, which must have hooks.
        """
        read = list(dict.fromkeys((*sources(poolings), *poolings)))

        def run(mask: Tensor, tokens: Tensor, *inputs: Tensor | None) -> dict[Tap, list[Tensor]]:
            reader = start(tokens)

            def keep(tap: Tap, values: Tensor) -> None:
                if tap in read:
                    reader.read(tap, values)

            with self.recording(read, keep, mask):
                self.run_backbone(inputs[0], mask, *inputs[1:], **kwargs)
            return reader.finish()

        if windows is None or mask.shape[1] <= windows.size:
            return whole(run(mask, mask, *inputs), poolings)
        if any(given is not None for given in inputs[2:3]):
            raise ValueError("A text in windows has positions of its own in each of them. Leave position_ids out.")
        plan: WindowPlan = plan_windows(mask, windows)
        try:
            return plan.pooled_by(run, poolings, inputs, size=windows.size, single=self.config.batching == "single")
        except PositionsError as error:
            raise PositionsError(
                f"{type(self.backbone).__name__} works on other positions than its tokens, so that windows can't "
                "be told apart. Calibrate it without windows=True."
            ) from error

    def recording(
        self, taps: Sequence[Tap], read: Callable[[Tap, Tensor], None], mask: Tensor
    ) -> AbstractContextManager[None]:
        """:func:`record` the taps of a forward of this backbone, with this mask ``(batch, tokens)``."""
        return record(taps, read, shape=(mask.shape[0], mask.shape[1]), form=self._form)

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
        inputs = backbone_inputs(
            self.backbone,
            self.layout,
            self._takes,
            mask=mask,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        # Asked first whether gradients are wanted at all: to look at every parameter takes as long as a small layer.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._needs_gradient(inputs_embeds)):
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
