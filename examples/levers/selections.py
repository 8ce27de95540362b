"""Other ways to choose the neurons of a head than by the salience of one probe for each tap."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from heads import MOST, Features, Folds, Outcome, Selector, head
from torch import Tensor

from spin_hf.calibration.losses import Loss
from spin_hf.calibration.probes import standardise
from spin_hf.calibration.selection import entry_shares
from spin_hf.calibration.solver import balance, smallest_useful_C, solve_path

_HALVES = 10  # of the rows, drawn for each fold
_FACTORS = (4.0, 8.0)  # times the smallest useful C, as for the salience of one probe
_STEP = 0.85  # from one penalty of the group lasso to the next
_WEAKEST = 1e-3  # of the penalty up to which no group enters
_FISTA = 60  # steps between two looks at what was left out


def stability_selection(folds: Folds, places: Mapping[str, Features]) -> Outcome:
    """A head on the features that have a weight in most of the probes of random halves (Meinshausen and Bühlmann 2010).

    Features of equal frequency enter in the order of their entry share, of all the probes' mean salience.
    """
    matrices = []
    for fold, (rows, _) in enumerate(folds.parts):
        draw = np.random.default_rng(fold)
        halves = [draw.permutation(rows)[: len(rows) // 2] for _ in range(_HALVES)]
        frequencies, entries, values = [], [], []
        for features in places.values():
            own = features(fold)
            frequency, salience = _of_halves(folds, own, halves)
            kept = frequency.nonzero()[:, 0]
            frequencies.append(frequency[kept])
            entries.append(entry_shares(salience)[kept])
            values.append(scaled(own[:, kept], rows))
        order = np.lexsort((torch.cat(entries).numpy(), -torch.cat(frequencies).numpy()))
        matrices.append(torch.cat(values, 1)[:, np.sort(order[:MOST])])
    return head(folds, matrices)


def scaled(x: Tensor, rows: np.ndarray) -> Tensor:
    """Standardised by the statistics of some rows."""
    return (x - x[rows].mean(0)) / x[rows].std(0).clamp_min(1e-6)


def _of_halves(folds: Folds, values: Tensor, halves: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """How often each feature has a weight, and its mean salience, both ``(width,)``."""
    loss, found = folds.task.loss, []
    for rows in halves:
        x = torch.empty(len(rows), values.shape[1])
        standardise(values, rows, rows[:0], out=x)
        y, s = folds.targets[rows].cpu(), folds.ones(rows).cpu()
        *_, point = solve_path(x, y, s, loss, [f * smallest_useful_C(x, y, s, loss) for f in _FACTORS], tol=1e-2)
        found.append(point.salience)
    every = torch.stack(found)
    return (every > 0).float().mean(0), every.mean(0)


def joint_probe(folds: Folds, places: Mapping[str, Features], *, salient: Selector | None = None) -> Outcome:
    """A head on the features of one sparse probe of all taps at once, the last of its path that a head may have.

    Args:
        salient: whose neurons alone the probe may read, by the taps' own probes; else it may read all.
    """
    matrices = []
    for fold, (rows, _) in enumerate(folds.parts):
        if salient is None:
            x = torch.cat([scaled(features(fold), rows) for features in places.values()], 1)
        else:
            x = salient.salient(dict(places), fold)
        y, s, loss, own = folds.targets[rows].cpu(), folds.ones(rows).cpu(), folds.task.loss, x[rows]
        first, chosen = smallest_useful_C(own, y, s, loss), torch.zeros(0, dtype=torch.int64)
        for point in solve_path(own, y, s, loss, [first / _STEP**i for i in range(1, 60)], tol=1e-2):
            present = point.salience.nonzero()[:, 0]
            if len(present) > MOST:
                break
            chosen = present
        matrices.append(x[:, chosen])
    return head(folds, matrices)


def group_lasso(folds: Folds, places: Mapping[str, Features], groups: Mapping[str, str]) -> Outcome:
    """A head on the neurons of one sparse model of all taps at once: a neuron's weights enter together.

    The penalty falls until the features would be more than a head may have.

    Args:
        groups: the tap of each place; places of one tap have the same neurons under other poolings.
    """
    matrices = []
    taps = list(dict.fromkeys(groups[name] for name in places))
    for fold, (rows, _) in enumerate(folds.parts):
        values = {name: scaled(features(fold), rows) for name, features in places.items()}
        widest = max(own.shape[1] for own in values.values())
        group = [torch.arange(own.shape[1]) + widest * taps.index(groups[name]) for name, own in values.items()]
        x = torch.cat(list(values.values()), 1)
        y, s = folds.targets[rows].cpu(), folds.ones(rows).cpu()
        matrices.append(x[:, chosen_together(x[rows].T.contiguous(), y, s, folds.task.loss, torch.cat(group))])
    return head(folds, matrices)


def chosen_together(xt: Tensor, y: Tensor, s: Tensor, loss: Loss, group: Tensor) -> Tensor:
    """Features of the last model of a path of group penalties that has no more than a head may have.

    Args:
        xt: features by rows, ``(d, n)``, standardised.
        group: the group of each feature, ``(d,)``.
    """
    count = int(group.max()) + 1
    weight, nothing = xt.new_zeros(len(xt), y.shape[1]), torch.zeros_like(y, dtype=torch.float64)
    intercept = balance(loss, nothing, nothing[0], y.double(), s.double()).to(xt.dtype)
    pull = _norms(xt @ loss.residual(nothing.to(xt.dtype) + intercept, y, s), group, count)
    strongest = penalty = float(pull.max())
    chosen = torch.zeros(0, dtype=torch.int64)
    while penalty > _WEAKEST * strongest:
        last, penalty = penalty, penalty * _STEP
        inside = (pull >= 2 * penalty - last) | (_norms(weight, group, count) > 0)  # the sequential strong rule
        while True:
            own = inside[group].nonzero()[:, 0]
            part, named = xt[own], group[own].unique(return_inverse=True)[1]
            weight[own], intercept = _fista(part, y, s, loss, named, weight[own], intercept, penalty)
            residual = loss.residual(part.T @ weight[own] + intercept, y, s)
            pull = _norms(xt @ residual, group, count)
            broken = (pull > 1.01 * penalty) & ~inside
            if not broken.any():
                break
            inside |= broken
        present = (_norms(weight, group, count) > 0)[group].nonzero()[:, 0]
        if len(present) > MOST:
            break
        chosen = present
    return chosen


def _fista(
    xt: Tensor, y: Tensor, s: Tensor, loss: Loss, group: Tensor, weight: Tensor, intercept: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """The least of the loss plus ``penalty`` times the groups' norms, nearly."""
    count = int(group.max()) + 1
    v = xt[:, 0] + 1e-3
    for _ in range(15):
        v = xt @ ((v / v.norm()) @ xt)
    step = 1 / (1.1 * loss.bound * (float(v.norm()) + xt.shape[1]))
    ahead, ahead_intercept, momentum = weight, intercept, 1.0
    for _ in range(_FISTA):
        residual = loss.residual(xt.T @ ahead + ahead_intercept, y, s)
        moved = ahead + step * (xt @ residual)
        norms = _norms(moved, group, count)
        moved = moved * (1 - step * penalty / norms.clamp_min(1e-30)).clamp_min(0)[group][:, None]
        moved_intercept = ahead_intercept + step * residual.sum(0)
        if float(((ahead - moved) * (moved - weight)).sum()) > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        speed = (momentum - 1) / following
        ahead, ahead_intercept = (
            moved + speed * (moved - weight),
            moved_intercept + speed * (moved_intercept - intercept),
        )
        weight, intercept, momentum = moved, moved_intercept, following
    return weight, intercept


def _norms(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Of each group's rows of ``(d, K)``, ``(count,)``."""
    return values.new_zeros(count).index_add_(0, group, values.square().sum(1)).sqrt()
