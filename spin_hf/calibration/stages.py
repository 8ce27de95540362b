"""From stored features to the chosen head, the work spread over the processes: probes, heads, the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..attention import pooling_title
from ..features import FeatureGroup
from ..taps import Tap
from .confidence import Confidence
from .errors import CalibrationError
from .fits import Fits
from .halving import in_halves, is_out_of_memory, no_room_to_solve
from .heads import HeadFitter, HeadSet, head_sets, whole_set
from .probes import Labelled, Place, Probe, fit_probes, in_groups
from .progress import Show
from .ranks import Ranks
from .recipe import Recipe
from .resampling import bootstrap_interval
from .selection import Candidate, Prefer, probe_candidate, smallest_within_error, widest, winner
from .shared_columns import read_features
from .store import FeatureStore
from .task import METRICS, Task

Fitted = tuple[Candidate, list[Probe]]


def probe_all(
    taps: Sequence[Tap],
    store: FeatureStore,
    data: Labelled,
    recipe: Recipe,
    tol: float,
    fits: Fits,
    ranks: Ranks,
    show: Show,
) -> list[list[Probe]]:
    """For each (tap, pooling) its probes, best first: one, or one per C where all taps must share it.

    Raises:
        CalibrationError: if all of them are empty.
    """

    def solve(group: Sequence[Place]) -> list[list[Probe]]:
        try:
            features = [store.read(*place, device=fits.device) for place in group]
            return fit_probes(
                features, group, data, Cs=recipe.Cs, raw=recipe.raw, stop_early=not recipe.shared_C, tol=tol
            )
        except (RuntimeError, MemoryError) as error:
            if len(group) == 1 and is_out_of_memory(error):
                raise no_room_to_solve(f"A probe of {group[0][0]}", store.rows, fits.device, error) from error
            raise

    def probe(group: list[Place]) -> list[list[Probe]]:
        found = chain.from_iterable(in_halves(group, solve))
        wanted = [ranked if recipe.shared_C else ranked[:1] for ranked in found]
        return [[probe for probe in ranked if probe.num_features] for ranked in wanted]

    settings = recipe.Cs, recipe.raw, recipe.shared_C, tol
    places = [(tap, pooling) for tap in taps for pooling in store.poolings]
    outputs = data.targets.shape[1]
    groups = in_groups(places, store.widths, store.rows, fits.device, fits=len(data.fits()), outputs=outputs)
    with show.bar("Probing", len(groups)) as advance:
        solved = ranks.map(
            groups,
            lambda group: fits.keep(_named(group), settings, lambda: probe(group)),
            cost=lambda group: sum(store.widths[tap] for tap, _ in group),
            advance=advance,
        )
    by_place = dict(zip((place for group in groups for place in group), chain.from_iterable(solved), strict=True))
    found = [by_place[place] for place in places]
    kept = [ranked for ranked in found if ranked]
    if not kept:
        raise CalibrationError("No neuron of any tap carries the label: every probe is empty. Try larger Cs.")
    return kept


def _named(group: list[Place]) -> str:
    (tap, pooling), others = group[0], len(group) - 1
    return f"probe.{tap}.{pooling}" + (f"+{others}" if others else "")


def settle(
    prefer: Prefer, probes: list[list[Probe]], recipe: Recipe, depths: list[int], show: Show
) -> tuple[Prefer, HeadSet | None]:
    """What is preferred after all; and where that is the widest head, what it draws on.

    Where the probes keep too much for one head, or what may not be combined, it is the score.
    """
    if prefer != "widest":
        return prefer, None
    best = [ranked[0] for ranked in probes]
    sets = [] if recipe.shared_C else head_sets(best, depths[-1:], combine=recipe.combine)
    whole = whole_set(sets, best, recipe.etas, recipe.max_features)
    if whole:
        return "widest", whole
    show.say("The probes keep too much for one head, or what may not be combined: the score decides.")
    return "score", None


def try_heads(
    fitter: HeadFitter,
    probes: list[list[Probe]],
    recipe: Recipe,
    depths: list[int],
    tol: float,
    fits: Fits,
    ranks: Ranks,
    show: Show,
    *,
    only: HeadSet | None = None,
) -> tuple[list[Fitted], int]:
    """Every candidate with the probes it was selected by: heads on combined taps, and single probes; and how many more
    there would be, had they not too many features.

    Args:
        only: fit no head but that of the most features of these.

    Raises:
        CalibrationError: if all of them have too many features.
    """
    grids = [[ranked[0] for ranked in probes]]
    if recipe.shared_C:
        values = sorted({probe.C for ranked in probes for probe in ranked})
        grids = [[probe for ranked in probes for probe in ranked if probe.C == C] for C in values]

    def fit(heads: HeadSet) -> tuple[list[Candidate], int]:
        return fitter.fit(heads, etas=recipe.etas, max_features=recipe.max_features, widest=only is not None)

    settings = recipe, tol, fitter.tol, only is not None
    sets = [(grid, heads) for grid in grids for heads in head_sets(grid, depths, combine=recipe.combine)]
    sets = [(grids[0], only)] if only else sets if recipe.etas else []
    fitter = fitter.sharing([heads for _, heads in sets], etas=recipe.etas, max_features=recipe.max_features)
    with show.bar("Fitting heads", len(sets)) as advance:
        found = ranks.map(
            sets,
            lambda entry: fits.keep(entry[1].name, settings, lambda: fit(entry[1])),
            cost=lambda entry: min(entry[1].num_features, recipe.max_features),
            advance=advance,
        )
    tried = [(candidate, grid) for (grid, _), (fitted, _) in zip(sets, found, strict=True) for candidate in fitted]
    skipped = sum(more for _, more in found)
    singles = [probe_candidate(probe) for probe in grids[0]] if not recipe.shared_C else []
    singles = [c for c in singles if c.num_features > 0 and c.depth <= depths[-1]]
    fitting = [c for c in singles if c.num_features <= recipe.max_features]
    skipped += len(singles) - len(fitting)
    tried += [(candidate, grids[0]) for candidate in fitting]
    if not tried:
        raise CalibrationError(
            f"No candidate has at most {recipe.max_features} features. Raise max_features, or try smaller etas."
        )
    return tried, skipped


@dataclass(frozen=True)
class Final:
    """What is written into the model."""

    candidate: Candidate
    groups: list[FeatureGroup]
    mean: Tensor
    scale: Tensor
    weight: Tensor
    intercept: Tensor
    gap: float

    def logits(self, store: FeatureStore, task: Task, rows: np.ndarray) -> np.ndarray:
        """``(rows, num_labels)``, as the model will give them."""
        (features,) = read_features(store, self.groups, self.mean, self.scale, torch.device("cpu"), rows)
        weight, bias = task.as_logits(self.weight, self.intercept)
        return np.asarray((features @ weight.cpu().T + bias.cpu()).numpy())


@dataclass(frozen=True)
class Conclusion:
    """The choice: its head, the winner by score or width, all candidates, best first. Regression has no confidence."""

    final: Final
    best: Candidate
    candidates: tuple[Candidate, ...]
    baselines: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]  # of the baselines and "SPIN"
    confidence: Confidence | None


def conclude(
    fitter: HeadFitter,
    tried: list[Fitted],
    probes: list[list[Probe]],
    *,
    prefer: Prefer,
    tol: float,
    seed: int,
    last: Tap,
) -> Conclusion:
    """Choose among the candidates and fit the chosen one on the final training rows.

    Args:
        prefer: as in :func:`spin_hf.spin_calibrate`.
        tol: relative duality gap of the final head.
        seed: of the bootstrap.
        last: the tap of the baseline on the last layer.
    """
    every, truth = [candidate for candidate, _ in tried], fitter.data.labels[fitter.data.eval_rows]
    metric = fitter.data.task.metric
    best = chosen = widest(every) if prefer == "widest" else winner(every, metric, truth, seed=seed)
    if prefer == "compact":
        chosen = smallest_within_error(every, best, metric, truth, seed=seed)
    final = finish(fitter, chosen, tried, tol)
    if chosen is best:
        singles = [c for c in every if c.probe is not None]
        ahead = [c for c in singles if c.score > final.candidate.score]
        if ahead and prefer != "widest":  # the tighter tolerance turned a text that stood on the fence
            chosen = min(ahead, key=lambda c: c.rank)
            final = finish(fitter, chosen, tried, tol)
        best = final.candidate
    ranked = sorted((final.candidate if c is chosen else c for c in every), key=lambda c: c.rank)
    pooling = "mean" if "mean" in fitter.store.poolings else fitter.store.poolings[0]
    within: list[Candidate | Probe] = [c for c in every if c.probe is not None] or [of_tap[0] for of_tap in probes]
    probe = max(within, key=lambda each: each.score)
    usual = f"last layer ({pooling_title(pooling)})"
    found = {usual: fitter.fit_tap(last, pooling), "best probe": (probe.score, probe.predictions)}
    baselines = {name: score for name, (score, _) in found.items()}
    predictions = {name: own for name, (_, own) in found.items()} | {"SPIN": final.candidate.predictions}
    rounds = 200 if fitter.data.task.metric_name not in METRICS else 1000  # a caller's function may be slow
    bounds = {
        name: bootstrap_interval(metric, truth, own, rounds=rounds, seed=seed) for name, own in predictions.items()
    }
    intervals = {name: between for name, between in bounds.items() if between is not None}
    confidence = None
    if fitter.data.task.problem_type != "regression":
        confidence = Confidence.measure(held_out_logits(fitter, chosen, tried, final, tol), truth, seed=seed)
    return Conclusion(final, best, tuple(ranked), baselines, intervals, confidence)


def held_out_logits(fitter: HeadFitter, chosen: Candidate, tried: list[Fitted], final: Final, tol: float) -> np.ndarray:
    """Logits ``(evaluation rows, num_labels)`` of heads that did not see those rows.

    Args:
        fitter, tried, tol: as :func:`finish` takes them.
        chosen: one of those tried.
        final: it as :func:`finish` fitted it.
    """
    folds = fitter.data.folds
    heads = [final] if len(folds) == 1 else [finish(fitter, chosen, tried, tol, fold) for fold in range(len(folds))]
    return np.concatenate(
        [head.logits(fitter.store, fitter.data.task, rows) for head, (_, rows) in zip(heads, folds, strict=True)]
    )


def finish(fitter: HeadFitter, candidate: Candidate, tried: list[Fitted], tol: float, fold: int = -1) -> Final:
    """The chosen candidate, fitted on the final training rows, or on those of a fold."""
    probes = next(probes for other, probes in tried if other is candidate)
    if candidate.probe is None:
        columns, point, candidate = fitter.fit_final(probes, candidate, tol, fold)
        groups = columns.groups()
        return Final(candidate, groups, columns.mean, columns.scale, point.weight, point.intercept, point.gap)
    probe = next(p for p in probes if str(p.tap) == candidate.probe and p.pooling == candidate.pooling)
    fit = probe.fits[fold]
    kept = fit.salience.nonzero()[:, 0]
    group = FeatureGroup(probe.tap, probe.pooling, kept.cpu())
    mean, scale, weight = fit.mean[kept], fit.scale[kept], fit.weight[:, kept]
    return Final(candidate, [group], mean, scale, weight, fit.intercept, probe.worst_gap)
