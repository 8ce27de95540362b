"""What each token of a text adds to each logit, read in one forward.

A logit is linear in the pooled neurons: logit_k = base_k + sum_f v_fk (pool_f - mean_f), where v_fk is the head's
weight times the feature's gate, divided by its scale and by the temperature; mean_f is the feature's mean in training.
The base is the logit of a text whose every feature is at that mean: the head's intercept over the temperature. What is
left is the difference of a pooled value and its mean, and that splits over tokens without a rest:

- ``mean``: token t adds (a_t - mean_f) / T;
- ``max``: the token that attains it adds all of (max - mean_f); several that do share it equally;
- ``first`` and ``last``: their token adds all of it;
- ``attention``: token t adds w_t (a_t - mean_f), with the token weights w_t of this text as they are. That the other
  tokens have a say in w_t is not split any further.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import ATTENTION, TokenWeights
from ..exits import demand_exit
from ..features import Selection
from ..modeling_spin import SpinForSequenceClassification
from ..modes import full_precision
from ..parts import shifted_right
from ..pooling import pool
from ..spin_model import SpinModel
from ..taps import Tap
from ..windows import WindowPlan, Windows, plan_windows


class ExplanationError(ValueError):
    """A text whose answer can't be split into what its tokens add."""


# Called with each tap, its activations (rows, positions, width), which of them are pooled (rows, positions), and whose
# they are (rows, positions): text x places + place, see Attribution.
Watch = Callable[[Tap, Tensor, Tensor, Tensor], None]


class Attribution(NamedTuple):
    """Of a batch: standardised features ``(texts, num_features)`` float32 as the head takes them, and what the token of
    each place adds, ``(texts, places, labels)``, or ``(texts, places, num_features)`` before the head.

    A place is a token of the text, in order; the last place is that of a decoder's start token, where there is one.
    """

    features: Tensor
    tokens: Tensor


class Head(NamedTuple):
    """A linear head and what it reads: the logits are base + standardised features @ weight.

    Gates and temperature are in them. In float64, where the device has it.
    """

    selection: Selection
    weight: Tensor  # (num_features, labels)
    base: Tensor  # (labels,)


def effective_head(model: SpinForSequenceClassification, exit: int | None = None) -> Head:
    """The head that a classifier answers with, or that of one of its exits.

    Raises:
        ExitError: for an exit that there is not.
    """
    if exit is None:
        selection = model.spin.standardizer.select(model.spin.groups)
        weight, bias = model.score.weight.detach(), model.score.bias.detach()
        temperature = model.config.logit_temperature
        if model.gates is not None:
            weight = weight.to(_exact(weight.device)) * model.gates.values().detach().to(_exact(weight.device))
    else:
        exits = demand_exit(model.exits, exit)
        head, selection = exits.head(exit), exits.select(exit)
        weight, bias, temperature = head.weight, head.bias, head.temperature
    kind = _exact(weight.device)
    return Head(selection, weight.T.to(kind) / temperature, bias.to(kind) / temperature)


def starts_with_special(spin: SpinModel) -> bool:
    """Whether a decoder is read whose first position stands for no token of the text."""
    return spin.layout.decoder is not None and getattr(spin.backbone.config, "decoder_start_token_id", None) is not None


@torch.no_grad()
def attribute(
    spin: SpinModel,
    selection: Selection,
    weight: Tensor | None,
    mask: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None = None,
    *,
    watch: Watch | None = None,
) -> Attribution:
    """Read a batch of texts that may run together, see :mod:`spin_hf.batching`.

    Args:
        spin: the model inside the classifier.
        selection: the neurons to read, see :func:`effective_head`.
        weight: of the head on them; ``None`` leaves the contributions to each feature apart, which
            takes ``tokens x num_features`` numbers a text.
        mask, input_ids, token_type_ids: ``(texts, tokens)``, padded on the right.
        watch: sees the activations too.

    Raises:
        ExplanationError: for a backbone that works on other positions than its tokens.
    """
    windows = None if spin.config.windows is None else Windows(**spin.config.windows)
    plan = None if windows is None or mask.shape[1] <= windows.size else plan_windows(mask, windows)
    spread = _Spread(spin, selection, weight, mask, plan, watch)
    poolings = {kept.tap: [pooling for pooling, _ in kept.poolings] for kept in selection.kept}
    pooled = spin.pooled(poolings, spread.read, mask, input_ids, token_type_ids, windows=windows)
    features = selection.standardise([part for kept in selection.kept for part in pooled[kept.tap]])
    spread.settle(pooled)
    return Attribution(features, spread.by_place())


class _Kept(NamedTuple):
    """Which tokens a pooled value of some rows comes from."""

    rows: slice
    attained: Tensor  # (rows, tokens, neurons), or (rows, tokens, 1) where all have the same; of attention what it adds
    pooled: Tensor  # (rows, neurons); of attention (rows,), the logarithm of the weights' normaliser


class _Spread:
    """How the pooled values of a batch spread over its tokens, gathered tap by tap while the backbone runs.

    Rows are what the backbone reads: texts, or their windows. What ``mean`` gives a token is known at once. Which
    tokens attain a maximum, or are the first, is kept as a mask: only the end of the forward tells which window counts.
    """

    def __init__(
        self,
        spin: SpinModel,
        selection: Selection,
        weight: Tensor | None,
        mask: Tensor,
        plan: WindowPlan | None,
        watch: Watch | None,
    ) -> None:
        self.spin, self.weight, self.mask, self.plan, self.watch = spin, weight, mask, plan, watch
        self.mean, self.scale = selection.mean, selection.scale
        self.device = self.mean.device
        self.exact = _exact(self.device)
        self.parts_of: dict[Tap, list[tuple[str, Tensor, slice]]] = {}  # with their place among the features
        start = 0
        for tap, pooling, neurons, _ in selection.groups():
            own = slice(start, start + len(neurons))
            self.parts_of.setdefault(tap, []).append((pooling, neurons, own))
            start = own.stop
        self.text = torch.arange(len(mask), device=mask.device) if plan is None else plan.text[:, 0]
        self.lengths = mask.sum(1).clamp_min(1)
        self.queries = selection.queries()
        self.weights: TokenWeights | None = None  # of the forward that runs, whose mask is this one
        self.pooling: Tensor | None = None
        self.seen: dict[Tap, int] = {}
        self.kept: dict[tuple[Tap, int], list[_Kept]] = {}
        self.totals: dict[bool, Tensor] = {}  # of the encoder's taps (False) and the decoder's, by row and column

    def read(self, tap: Tap, values: Tensor, mask: Tensor) -> list[Tensor]:
        """Pool a tap of some rows as the model does, and keep what is needed to split the result."""
        if values.shape[1] != mask.shape[1]:
            raise ExplanationError(
                f"{mask.shape[1]} tokens became {values.shape[1]} positions at tap {tap}, so that it can't be told "
                "what a token adds. predict() still answers."
            )
        if mask is not self.pooling:
            self.weights, self.pooling = TokenWeights(self.queries, mask), mask
        assert self.weights is not None
        self.weights.see(tap, values)
        if tap not in self.parts_of:
            return []
        first = self.seen.get(tap, 0)
        rows = slice(first, first + len(values))
        self.seen[tap] = rows.stop
        mask = mask.to(device=values.device, dtype=torch.bool)
        if self.watch is not None:
            self.watch(tap, values, mask, self._places(self._in_decoder(tap))[rows])
        found = []
        with full_precision(values.device):
            for index, (pooling, neurons, own) in enumerate(self.parts_of[tap]):
                kept = values.index_select(-1, neurons.to(values.device))
                if pooling == ATTENTION:
                    found.append(self._weigh(tap, index, rows, kept).to(self.device))
                    continue
                pooled = pool(kept, mask, [pooling])[:, 0]
                if pooling == "mean":
                    mean = self.mean[own].to(values.device, _exact(values.device))
                    lengths = self.lengths[self.text[rows]].to(values.device)
                    parts = (kept - mean).masked_fill(~mask[..., None], 0.0) / lengths[:, None, None]
                    self._add(tap, rows, own, parts)
                else:
                    attained = _attained(kept, pooled, mask, pooling)
                    self.kept.setdefault((tap, index), []).append(_Kept(rows, attained, pooled))
                found.append(pooled.to(self.device))
        return found

    def _weigh(self, tap: Tap, index: int, rows: slice, kept: Tensor) -> Tensor:
        assert self.weights is not None
        _, _, own = self.parts_of[tap][index]
        weights, mass = (part[0] for part in self.weights.of([tap], kept.device))
        mean = self.mean[own].to(kept.device, _exact(kept.device))
        parts = (kept - mean).masked_fill(weights[..., None] == 0, 0.0) * weights[..., None]
        if self.plan is None:
            self._add(tap, rows, own, parts)
        else:  # only the end of the forward tells what the window's share of the text is
            self.kept.setdefault((tap, index), []).append(_Kept(rows, self._through(own, parts), mass))
        return self.weights.pool([tap], [kept])[0]

    def _settle_weighted(self, tap: Tap, own: slice, kept: list[_Kept]) -> None:
        assert self.plan is not None
        mass = torch.cat([part.pooled for part in kept]).to(self.device, self.exact)
        text = self.text.to(self.device)
        texts = torch.full((len(self.mask),), -torch.inf, dtype=self.exact, device=self.device)
        peak = texts.scatter_reduce(0, text, mass, "amax")
        total = torch.zeros_like(texts).index_add_(0, text, (mass - peak[text]).exp())
        share = (mass - peak[text]).exp() / total[text]
        for part in kept:
            self._keep(tap, part.rows, own, part.attained * share[part.rows, None, None].to(part.attained))

    def settle(self, pooled: dict[Tap, list[Tensor]]) -> None:
        """Give the tokens that were kept their shares of the texts' pooled values ``(texts, neurons)``."""
        for (tap, index), kept in self.kept.items():
            pooling, _, own = self.parts_of[tap][index]
            if pooling == ATTENTION:
                self._settle_weighted(tap, own, kept)
                continue
            value = pooled[tap][index]
            counts = [self._counting(part, value, pooling) for part in kept]
            ties = torch.zeros(len(value), counts[0].shape[-1], dtype=self.exact, device=self.device)
            for part, counted in zip(kept, counts, strict=True):
                number = counted.sum(1).to(self.device, self.exact)
                ties.index_add_(0, self.text[part.rows].to(self.device), number)
            share = (value.to(self.exact) - self.mean[own]) / ties.clamp_min(1)
            for part, counted in zip(kept, counts, strict=True):
                each = share[self.text[part.rows].to(self.device)][:, None].to(counted.device)
                self._add(tap, part.rows, own, counted * each)
        self.kept.clear()

    def by_place(self) -> Tensor:
        """What each token adds, ``(texts, places, labels)`` or ``(texts, places, num_features)``."""
        if self.plan is None and self.spin.layout.decoder is None:
            return self.totals[False]
        places = self.mask.shape[1] + starts_with_special(self.spin)
        width = next(iter(self.totals.values())).shape[-1]
        out = torch.zeros(len(self.mask) * places, width, dtype=self.exact, device=self.device)
        for decoder, total in self.totals.items():
            out.index_add_(0, self._places(decoder).to(self.device).flatten(), total.flatten(0, 1))
        return out.reshape(len(self.mask), places, width)

    def _places(self, decoder: bool) -> Tensor:
        """Whose token each position of the rows reads, ``(rows, positions)``: text x places + place."""
        spare, tokens = starts_with_special(self.spin), self.mask.shape[1]
        row_mask, place = self.mask, torch.arange(tokens, device=self.mask.device).expand_as(self.mask)
        if self.plan is not None:
            row_mask, place = self.plan.mask, self.plan.place.clamp(0, tokens - 1)  # padding, beyond, adds nothing
        if decoder:  # each position reads the token before
            place = shifted_right(place, row_mask, self.spin.backbone.config)
            if spare:
                place = torch.cat([torch.full_like(place[:, :1], tokens), place[:, 1:]], 1)
        return self.text[:, None] * (tokens + spare) + place

    def _in_decoder(self, tap: Tap) -> bool:
        layout = self.spin.layout
        return layout.decoder is not None and tap.block > layout.own_depth(self.spin.backbone)

    def _counting(self, part: _Kept, value: Tensor, pooling: str) -> Tensor:
        """Its tokens that the text's value comes from: of one window, where several tie of all of these."""
        text = self.text[part.rows]
        if self.plan is None:
            return part.attained
        if pooling == "max":
            return part.attained & (part.pooled == value[text.to(value.device)].to(part.pooled))[:, None]
        number = torch.arange(part.rows.start, part.rows.stop, device=text.device)
        last = self.plan.counts.cumsum(0)[text] - 1
        own = number == (last if pooling == "last" else last + 1 - self.plan.counts[text])
        return part.attained & own[:, None, None].to(part.attained.device)

    def _add(self, tap: Tap, rows: slice, own: slice, parts: Tensor) -> None:
        """Add ``(rows, tokens, neurons)`` of differences from the mean, through the head or as they are."""
        self._keep(tap, rows, own, self._through(own, parts))

    def _through(self, own: slice, parts: Tensor) -> Tensor:
        """``(rows, tokens, labels)`` of differences from the mean; without a head in units of the features' scales."""
        scale = self.scale[own].to(parts)
        return parts / scale if self.weight is None else parts @ (self.weight[own].to(parts) / scale[:, None])

    def _keep(self, tap: Tap, rows: slice, own: slice, parts: Tensor) -> None:
        """Add what :meth:`_through` gives."""
        decoder = self._in_decoder(tap)
        width = len(self.mean) if self.weight is None else self.weight.shape[1]
        if decoder not in self.totals:
            shape = (len(self.text), parts.shape[1], width)
            self.totals[decoder] = torch.zeros(shape, dtype=self.exact, device=self.device)
        total = self.totals[decoder][rows]
        (total[..., own] if self.weight is None else total).add_(parts.to(self.device, self.exact))


def _attained(values: Tensor, pooled: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Which tokens a pooled value comes from: ``(rows, tokens, neurons)``, or ``(rows, tokens, 1)``."""
    if pooling == "max":
        return (values == pooled[:, None].to(values)) & mask[..., None]
    order = mask if pooling == "first" else mask.flip(1)
    first = order & (order.cumsum(1) == 1)
    return (first if pooling == "first" else first.flip(1))[..., None]


def _exact(device: torch.device) -> torch.dtype:
    """In which sums are taken, so that their error is the model's own rounding alone. MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
