"""Exits: of the heads that were tried, those which a classifier keeps beside its own, one for each depth and eta."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..exits import Exit
from ..features import FeatureGroup
from .confidence import Confidence
from .errors import CalibrationError
from .fits import Fits
from .heads import HeadFitter, HeadSet
from .progress import Show
from .ranks import Ranks
from .recipe import Recipe
from .selection import Candidate, Columns, members
from .stages import Fitted, finish, held_out_logits


@dataclass(frozen=True)
class FittedExits:
    """Heads on parts of one set of features, in the order of their depths and etas.

    Attributes:
        candidates: each as it was tried, with the score of the head that is kept.
        exits: each as the model holds it.
        groups, mean, scale: the features that they share.
        worst_gap: largest relative duality gap of a head.
    """

    candidates: tuple[Candidate, ...]
    exits: tuple[Exit, ...]
    groups: list[FeatureGroup]
    mean: Tensor
    scale: Tensor
    worst_gap: float


def check_exits(exits: bool, recipe: Recipe) -> None:
    """Raise :class:`CalibrationError` for a value that says neither yes nor no, or where there could be no exits."""
    if not isinstance(exits, (bool, np.bool_)):
        raise CalibrationError(
            f"exits must be True or False; got {exits!r}. There is an exit for each of depths= and etas=."
        )
    if exits and not recipe.etas:
        raise CalibrationError("exits=True keeps a head for each depth and eta, and etas names none. Leave etas out.")


def fit_exits(
    fitter: HeadFitter,
    tried: list[Fitted],
    chosen: Candidate,
    recipe: Recipe,
    tol: float,
    fits: Fits,
    ranks: Ranks,
    show: Show,
    *,
    seed: int,
) -> FittedExits:
    """A head for every depth and eta that was tried with the kinds and poolings of the chosen candidate.

    An eta that keeps nothing new at its depth, or too much, was not tried and gives none. Where no head was tried with
    them, as a single probe was chosen and any more is too much, those of the best head are taken.

    Raises:
        CalibrationError: if no head was tried at all.
    """

    def other(candidate: Candidate) -> bool:
        same = (candidate.kind, candidate.pooling) == (chosen.kind, chosen.pooling)
        return not same or (recipe.shared_C and candidate.C != chosen.C)

    heads = [(candidate, probes) for candidate, probes in tried if candidate.eta is not None]
    if not heads:
        raise CalibrationError(
            f"exits=True keeps a head for each depth and eta, and none has at most max_features={recipe.max_features} "
            "features. Raise max_features, or try smaller etas."
        )
    leader, probes = min(heads, key=lambda entry: (other(entry[0]), entry[0].rank))
    family = leader.kind, leader.pooling
    grid = [c for c, others in heads if others is probes and (c.kind, c.pooling) == family]
    grid = sorted(grid, key=lambda candidate: (candidate.depth, candidate.num_features))

    drawn, depths = members(probes, *family), sorted({candidate.depth for candidate in grid})
    sets = [HeadSet(*family, depth, drawn) for depth in depths]
    fitter = fitter.sharing(sets, etas=recipe.etas, max_features=recipe.max_features)

    def fit(candidate: Candidate) -> tuple[Candidate, Tensor, Tensor, float, float]:
        final = finish(fitter, candidate, tried, tol)
        temperature = 1.0
        if fitter.data.task.problem_type != "regression":
            logits = held_out_logits(fitter, candidate, tried, final, tol)
            labels = fitter.data.labels[fitter.data.eval_rows]
            temperature = Confidence.measure(logits, labels, seed=seed).temperature
        return final.candidate, final.weight, final.intercept, temperature, final.gap

    settings = recipe, tol, fitter.tol, seed
    with show.bar("Fitting exits", len(grid)) as advance:
        found = ranks.map(
            grid,
            lambda c: fits.keep(f"exit.{c.kind}.{c.pooling}.{c.depth}.{c.eta}.{c.C!r}", settings, lambda: fit(c)),
            cost=lambda c: c.num_features,
            advance=advance,
        )
    every = Columns.of(drawn, -1)
    masks = [every.kept(float(c.eta or 0), c.depth) for c in grid]
    shared = np.logical_or.reduce(masks)
    exits = []
    for mask, (candidate, weight, intercept, temperature, _) in zip(masks, found, strict=True):
        columns = torch.from_numpy(np.flatnonzero(mask[shared]))
        head = fitter.data.task.as_logits(weight, intercept)
        eta = float(candidate.eta or 0)
        exits.append(Exit(candidate.depth, eta, candidate.score, temperature, columns, *head))
    kept = every.take(shared)
    return FittedExits(
        candidates=tuple(candidate for candidate, *_ in found),
        exits=tuple(exits),
        groups=kept.groups(),
        mean=kept.mean,
        scale=kept.scale,
        worst_gap=max(gap for *_, gap in found),
    )
