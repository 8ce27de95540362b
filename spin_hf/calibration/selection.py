"""From probes to candidates: which neurons each choice of kinds, poolings, eta and depth keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..features import FeatureGroup
from ..taps import Tap
from .probes import Probe
from .resampling import paired_error
from .shared_columns import Readable, read_features
from .task import Metric

Prefer = Literal["score", "widest", "compact"]
PREFERENCES: tuple[str, ...] = get_args(Prefer)
KINDS = ("hidden", "ffn")
BOTH, ALL = "both", "all"
_FRONT_RUNNERS = 30  # candidates that a near tie is looked for among


@dataclass(frozen=True)
class Candidate:
    """One classifier that was tried, and how it did on the evaluation rows.

    ``kind`` is ``hidden``, ``ffn`` or ``both``; ``pooling`` a pooling or ``all``. ``eta`` and ``C`` (the head's) say
    how it was made. A single probe has its tap in ``probe`` and no ``eta``. ``loss`` is the mean loss on the evaluation
    rows (``None`` for probes, which are chosen by the metric alone).
    """

    kind: str
    pooling: str
    eta: float | None
    depth: int
    C: float
    num_features: int
    score: float
    loss: float | None = None
    probe: str | None = None
    predictions: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    @property
    def rank(self) -> tuple[float, int, int]:
        """Sorts by score, highest first, then by features and depth, least first."""
        return (-self.score, self.num_features, self.depth)

    @property
    def name(self) -> str:
        if self.probe is not None:
            return f"probe on {self.probe}, {self.pooling}"
        return f"{self.kind}, {self.pooling}, eta {self.eta:g}, {self.depth} blocks"


def entry_shares(salience: Tensor) -> Tensor:
    """Share of a tap's salience already collected when a neuron's turn comes, most salient first; 2 where it has none.

    The smallest set that reaches a share of ``eta`` is then the neurons with an entry below ``eta``.
    """
    order = salience.argsort(descending=True, stable=True)
    ordered = salience[order].double()
    shares = torch.empty_like(ordered)
    total = ordered.sum().clamp_min(1e-300)
    shares[order] = (ordered.cumsum(0) - ordered) / total
    return torch.where(salience > 0, shares, torch.full_like(shares, 2.0))


@dataclass(frozen=True)
class Columns:
    """All neurons that some probes give a weight, in the order of the model's features, for one fit of the probes."""

    probes: tuple[Probe, ...]
    owner: np.ndarray  # index into probes
    neuron: np.ndarray
    block: np.ndarray
    entry: np.ndarray
    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, probes: Sequence[Probe], fit: int) -> Columns:
        ordered = tuple(sorted(probes, key=lambda p: (p.tap.block, p.tap.kind, p.pooling)))
        owner, neuron, entry, mean, scale = [], [], [], [], []
        for i, probe in enumerate(ordered):
            fitted = probe.fits[fit]
            kept = fitted.salience.nonzero()[:, 0]
            owner.append(np.full(len(kept), i))
            neuron.append(kept.cpu().numpy())
            entry.append(entry_shares(fitted.salience)[kept].cpu().numpy())
            mean.append(fitted.mean[kept])
            scale.append(fitted.scale[kept])
        owners = np.concatenate(owner)
        blocks = np.array([probe.tap.block for probe in ordered])[owners]
        return cls(
            ordered, owners, np.concatenate(neuron), blocks, np.concatenate(entry), torch.cat(mean), torch.cat(scale)
        )

    def kept(self, eta: float, depth: int) -> np.ndarray:
        """Mask of the columns kept at this share and depth."""
        return (self.entry < eta - 1e-9) & (self.block <= depth)

    def take(self, mask: np.ndarray) -> Columns:
        index = torch.from_numpy(np.flatnonzero(mask))
        return Columns(
            self.probes,
            self.owner[mask],
            self.neuron[mask],
            self.block[mask],
            self.entry[mask],
            self.mean[index.to(self.mean.device)],
            self.scale[index.to(self.scale.device)],
        )

    def read(self, source: Readable, device: torch.device, *rows: np.ndarray) -> list[Tensor]:
        """The standardised features ``(rows, columns)`` of each of these sets of rows."""
        return read_features(source, self.groups(), self.mean, self.scale, device, *rows)

    def groups(self) -> list[FeatureGroup]:
        """As the model stores them."""
        return [
            FeatureGroup(probe.tap, probe.pooling, torch.from_numpy(self.neuron[self.owner == i]))
            for i, probe in enumerate(self.probes)
            if (self.owner == i).any()
        ]


def family(kind: str, tap: Tap) -> bool:
    """Whether a tap belongs to a candidate's kind; the final norm's output counts as hidden."""
    return kind == BOTH or (kind == "ffn") == (tap.kind == "ffn")


def members(probes: Sequence[Probe], kind: str, pooling: str) -> list[Probe]:
    """The probes that a candidate of this kind and pooling draws on."""
    return [probe for probe in probes if family(kind, probe.tap) and pooling in (ALL, probe.pooling)]


def combinations(probes: Sequence[Probe], *, combine: bool) -> Iterator[tuple[str, str, list[Probe]]]:
    """(kind, pooling, probes) for each kind and pooling at hand; with ``combine`` also both kinds and all poolings."""
    kinds = [kind for kind in KINDS if any(family(kind, probe.tap) for probe in probes)]
    poolings = list(dict.fromkeys(probe.pooling for probe in probes))
    if combine and len(kinds) > 1:
        kinds.append(BOTH)
    if combine and len(poolings) > 1:
        poolings.append(ALL)
    for kind in kinds:
        for pooling in poolings:
            if chosen := members(probes, kind, pooling):
                yield kind, pooling, chosen


def probe_candidate(probe: Probe) -> Candidate:
    """A single probe by itself, as a candidate."""
    return Candidate(
        kind="ffn" if probe.tap.kind == "ffn" else "hidden",
        pooling=probe.pooling,
        eta=None,
        depth=max(1, probe.tap.block),
        C=probe.C,
        num_features=probe.num_features,
        score=probe.score,
        probe=str(probe.tap),
        predictions=probe.predictions,
    )


def winner(candidates: Sequence[Candidate], score: Metric, labels: np.ndarray, *, seed: int = 0) -> Candidate:
    """The candidate of the best score, near ties going to the lower loss, then to fewer features and less depth.

    Near is half a paired standard error: the best of hundreds of scores on a few hundred texts is partly luck, which
    the smoother loss sees through. No single probe may score more than the winner, and only the front runners count.
    """
    ranked = sorted(candidates, key=lambda c: c.rank)
    best = ranked[0]
    floor = max((c.score for c in ranked if c.probe is not None), default=-np.inf)
    near = [
        c
        for c in ranked[1:_FRONT_RUNNERS]
        if c.loss is not None
        and best.loss is not None
        and c.loss <= best.loss
        and c.score >= floor
        and best.score - c.score <= paired_error(score, labels, best.predictions, c.predictions, seed=seed) / 2
    ]
    return best if best.loss is None else min([best, *near], key=lambda c: (c.loss, c.rank))


def widest(candidates: Sequence[Candidate]) -> Candidate:
    """The head of the most features, of several the deepest; single probes don't count."""
    return max((c for c in candidates if c.probe is None), key=lambda c: (c.num_features, c.depth))


def smallest_within_error(
    candidates: Sequence[Candidate], best: Candidate, score: Metric, labels: np.ndarray, *, seed: int = 0
) -> Candidate:
    """The candidate with fewest features (then least depth) within one paired standard error of ``best``."""
    for candidate in sorted(candidates, key=lambda c: (c.num_features, c.depth, -c.score)):
        if candidate.num_features >= best.num_features:
            break
        if best.score - candidate.score > 0.2 * abs(best.score) + 0.05:
            continue  # far off: no resample would bring it within one standard error
        if best.score - candidate.score <= paired_error(
            score, labels, best.predictions, candidate.predictions, seed=seed
        ):
            return candidate
    return best
