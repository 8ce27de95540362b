"""Our own solvers on features of five folds: sparse probes choose neurons, one L2 head reads them.

As in :func:`spin_hf.spin_calibrate`, but with one C for the probes (a fixed multiple of the smallest useful one),
not a path for each, so that a lever takes seconds. C of the head has the least loss on the rows held out, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from spin_hf.calibration.batched import pays
from spin_hf.calibration.paths import solve_paths
from spin_hf.calibration.probes import standardise
from spin_hf.calibration.resampling import paired_error
from spin_hf.calibration.ridge import solve_ridge
from spin_hf.calibration.selection import entry_shares
from spin_hf.calibration.solver import smallest_useful_C, solve_path
from spin_hf.calibration.task import Task

FOLDS = 5
MOST = 1536  # features of a head
_FACTORS = (4.0, 8.0)  # times the smallest useful C; the last one counts
_LOGIT_VARIANCES = (0.4, 1.6, 6.4)
Features = Callable[[int], Tensor]  # of a fold: ``(texts, width)``


@dataclass(frozen=True)
class Folds:
    """Labels of all texts, and five parts of them."""

    labels: np.ndarray
    metric: str
    device: str
    seed: int = 0

    @cached_property
    def task(self) -> Task:
        names = tuple(map(str, np.unique(self.labels)))
        return Task.make("single_label_classification", names, self.metric, "multinomial")

    @cached_property
    def targets(self) -> Tensor:
        return self.task.targets(self.labels).to(self.device)

    @cached_property
    def parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=self.seed)
        return list(folds.split(self.labels, self.labels))

    @property
    def columns(self) -> int:
        return self.targets.shape[1]

    def ones(self, rows: np.ndarray) -> Tensor:
        return torch.ones(len(rows), 1, device=self.device)

    def loss(self, scores: Tensor, rows: np.ndarray) -> float:
        z = scores.double().to(self.device)
        value = self.task.loss.value(z, self.targets[rows].double(), self.ones(rows).double()).sum()
        return float(value) / len(rows)


@dataclass(frozen=True)
class Outcome:
    """Scores of every text by the head that was not fitted on it, and how many features heads had."""

    scores: Tensor  # (texts, columns)
    features: float

    def save(self, folds: Folds) -> dict:
        prediction = folds.task.predict(self.scores)
        return {
            "score": 100 * folds.task.score(folds.labels, prediction),
            "loss": folds.loss(self.scores, np.arange(len(folds.labels))),
            "features": round(self.features),
        }

    def gain(self, base: Outcome, folds: Folds) -> tuple[float, float]:
        """Points over another outcome, and their paired standard error over the texts."""
        own, other = (folds.task.predict(each.scores) for each in (self, base))
        score, labels = folds.task.metric, folds.labels
        error = paired_error(score, labels, own, other, rounds=500)
        return 100 * (score(labels, own) - score(labels, other)), 100 * error


class Selector:
    """Probes of places, kept by name and fold, so that levers share them."""

    def __init__(self, folds: Folds) -> None:
        self.folds = folds
        self._kept: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}

    def prepare(self, places: dict[str, Features], fold: int) -> None:
        """Keep the salient neurons of these places; probes of one width are solved together where it pays."""
        left = [name for name in places if (name, fold) not in self._kept]
        width = {name: places[name](fold).shape[1] for name in left}
        rows, device = len(self.folds.parts[fold][0]), torch.device(self.folds.device)
        for each in dict.fromkeys(width.values()):
            alike = [name for name in left if width[name] == each]
            at_once = 16 if pays(device, rows, each, self.folds.columns) else 1
            for start in range(0, len(alike), at_once):
                self._probe({name: places[name] for name in alike[start : start + at_once]}, fold)

    def _probe(self, places: dict[str, Features], fold: int) -> None:
        """For each place standardised values of its neurons ``(texts, kept)``, their entry shares, their numbers."""
        folds, rows = self.folds, self.folds.parts[fold][0]
        y, s, loss = folds.targets[rows], folds.ones(rows), folds.task.loss
        values = [features(fold).to(folds.device) for features in places.values()]
        x = torch.empty(len(values), len(rows), values[0].shape[1], device=folds.device)
        standards = [standardise(own, rows, rows[:0], out=out)[1:] for own, out in zip(values, x, strict=True)]
        grids = [[factor * smallest_useful_C(own, y, s, loss) for factor in _FACTORS] for own in x]
        if pays(x.device, len(rows), x.shape[2], folds.columns):
            *_, points = solve_paths(x, y, s, loss, grids, list(map(len, grids)), tol=1e-2)
        else:
            paths = (solve_path(own, y, s, loss, grid, tol=1e-2) for own, grid in zip(x, grids, strict=True))
            points = [list(path)[-1] for path in paths]
        for name, own, (mean, scale), point in zip(places, values, standards, points, strict=True):
            assert point is not None
            entry = entry_shares(point.salience)
            index = (entry < 1 - 1e-9).nonzero()[:, 0]
            kept = ((own[:, index] - mean[index]) / scale[index]).half().cpu()
            self._kept[name, fold] = kept, entry[index].cpu(), index.cpu()

    def salient(self, places: dict[str, Features], fold: int) -> Tensor:
        """All salient neurons of these places, standardised, ``(texts, kept)``."""
        self.prepare(places, fold)
        return torch.cat([self._kept[name, fold][0] for name in places], 1).float()

    def fit(self, places: dict[str, Features], **options: Any) -> Outcome:
        """A head on what :meth:`matrices` makes of these places."""
        return head(self.folds, self.matrices(places, **options))

    def matrices(
        self, places: dict[str, Features], *, dense: dict[str, Features] | None = None, weighted: bool = False
    ) -> list[Tensor]:
        """The salient neurons of these places, and all of the dense ones, standardised, for each fold.

        Args:
            dense: a few features that need no selection.
            weighted: by how much each place is worth, see :meth:`worth`.
        """
        matrices = []
        for fold in range(FOLDS):
            self.prepare(places, fold)
            found = [self._kept[name, fold] for name in places]
            entry = torch.cat([each[1] for each in found])
            order = entry.argsort(stable=True)[:MOST].sort().values
            x = torch.cat([each[0] for each in found], 1)[:, order].float()
            if weighted:
                worth = torch.tensor([self.worth(name, fold) for name in places])
                scale = worth.repeat_interleave(torch.tensor([each[0].shape[1] for each in found]))[order]
                if scale.any():
                    x *= scale / scale.square().mean().sqrt()
            rows = self.folds.parts[fold][0]
            for features in (dense or {}).values():
                own = features(fold).float()
                x = torch.cat([x, (own - own[rows].mean(0)) / own[rows].std(0).clamp_min(1e-6)], 1)
            matrices.append(x)
        return matrices

    def worth(self, name: str, fold: int) -> float:
        """The share of the loss without any feature that a head on a place's neurons takes off, on a fifth of the
        fold's rows that it was not fitted on, though the neurons and its C were chosen with them; its square root,
        since a prior on weights goes by the square.
        """
        folds, x = self.folds, self._kept[name, fold][0].float()
        if not x.shape[1]:
            return 0.0
        rows = np.random.default_rng(fold).permutation(folds.parts[fold][0])
        other, own = np.split(rows, [len(rows) // 5])
        nothing = ridge(folds, torch.zeros(len(x), 1), own, other)
        least, most = (
            min(folds.loss(z.to(folds.device), other) for z in zs) for zs in (ridge(folds, x, own, other), nothing)
        )
        return max(0.0, 1 - least / most) ** 0.5


def head(folds: Folds, matrices: Sequence[Tensor], *, share: float = 1.0) -> Outcome:
    """L2 heads on each fold's standardised features ``(texts, width)``, of the C with the least held-out loss.

    Args:
        share: of the fold's rows to fit on.
    """
    scores = torch.zeros(len(_LOGIT_VARIANCES), len(folds.labels), folds.columns)
    for fold, (x, (rows, held_out)) in enumerate(zip(matrices, folds.parts, strict=True)):
        if share < 1:
            rows = np.random.default_rng(fold).permutation(rows)[: round(len(rows) * share)]
        for i, z in enumerate(ridge(folds, x, rows, held_out)):
            scores[i, held_out] = z
    everything = np.arange(len(folds.labels))
    losses = [folds.loss(z.to(folds.device), everything) for z in scores]
    return Outcome(scores[int(np.argmin(losses))], float(np.mean([x.shape[1] for x in matrices])))


def ridge(folds: Folds, x: Tensor, rows: np.ndarray, held_out: np.ndarray) -> list[Tensor]:
    """Scores of the rows held out ``(rows, columns)`` at each C."""
    own = x[rows].to(folds.device)
    Cs = [variance / x.shape[1] for variance in _LOGIT_VARIANCES]
    points = solve_ridge(own, folds.targets[rows], folds.ones(rows), folds.task.loss, Cs, tol=3e-3)
    other = x[held_out].to(folds.device)
    return [(other @ point.weight.T + point.intercept).cpu() for point in points]
