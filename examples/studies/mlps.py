"""Small MLPs as probes: one hidden layer, many of them trained together on the same features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spin_hf.calibration.losses import Loss

HIDDEN = 32
DECAYS = (1e-3, 1e-2, 1e-1, 3e-1, 1.0)  # of the first layer's squared weights, halved, beside the mean loss of a text
EPOCHS, STEPS, BATCH, RATE = 30, 300, 128, 2e-3  # epochs and steps: at least so many


@dataclass(frozen=True)
class Mlp:
    """``x @ first + bias``, rectified, then ``@ second + intercept``; of features that are standardised."""

    first: Tensor  # (width, HIDDEN)
    bias: Tensor
    second: Tensor  # (HIDDEN, outputs)
    intercept: Tensor
    loss: float  # on the texts to choose by, at the epoch that was kept

    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.first + self.bias) @ self.second + self.intercept

    def salience(self, x: Tensor) -> Tensor:
        """Mean over texts of the squared gradient of the scores, summed over outputs, ``(width,)``.

        Of a linear probe that is the squared weight summed over classes: SPIN's salience.
        """
        active = (x @ self.first + self.bias > 0).float()
        total = torch.zeros(len(self.first), device=x.device)
        for column in self.second.T:
            total += ((active * column) @ self.first.T).square().mean(0)
        return total


def train(x: Tensor, y: Tensor, loss: Loss, fits: Sequence[Tensor], choose: Tensor, seeds: Sequence[int]) -> list[Mlp]:
    """One MLP for each of some sets of rows, of the decay and epoch with the least loss on ``choose``.

    Args:
        x: standardised features ``(texts, width)`` of all rows.
        y: targets ``(texts, outputs)``.
        fits: row numbers to train on, one tensor for each MLP.
        choose: row numbers that choose.
        seeds: of the first weights and the order of the texts, one for each MLP. Those of a seed start alike.
    """
    n, width, outputs, decays = len(x), x.shape[1], y.shape[1], len(DECAYS)
    count = len(fits) * decays
    first, second = torch.empty(count, width, HIDDEN), torch.empty(count, HIDDEN, outputs)
    member = torch.zeros(count, n)
    for i, (rows, seed) in enumerate(zip(fits, seeds, strict=True)):
        draw = torch.Generator().manual_seed(seed)
        same = slice(i * decays, (i + 1) * decays)
        first[same] = torch.randn(width, HIDDEN, generator=draw) * (2 / width) ** 0.5
        second[same] = torch.randn(HIDDEN, outputs, generator=draw) * (1 / HIDDEN) ** 0.5
        member[same, rows.cpu()] = 1.0
    bias, intercept = torch.zeros(count, 1, HIDDEN), torch.zeros(count, 1, outputs)
    parameters = [each.to(x.device).requires_grad_() for each in (first, bias, second, intercept)]
    member = member.to(x.device)
    decay = torch.tensor(DECAYS, device=x.device).repeat(len(fits))[:, None, None]
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    used = torch.cat(list(fits)).unique()
    steps = -(-len(used) // BATCH)
    epochs = max(EPOCHS, -(-STEPS // steps))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, epochs * steps)
    order = torch.Generator().manual_seed(seeds[0])
    kept = [each.detach().clone() for each in parameters]
    least = torch.full((count,), torch.inf, device=x.device)
    for _ in range(epochs):
        for rows in used[torch.randperm(len(used), generator=order).to(used.device)].chunk(steps):
            own = member[:, rows, None]
            value = loss.value(_scores(x[rows], *parameters), y[rows], own)
            value = value.sum(-1) / own.sum((1, 2)).clamp_min(1)
            penalty = (decay * parameters[0].square()).sum((1, 2)) / 2
            optimiser.zero_grad()
            (value + penalty).sum().backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            z = _scores(x[choose], *parameters)
            value = loss.value(z, y[choose], torch.ones_like(z[..., :1]))
            value = value.sum(-1) / len(choose)
            better = value < least
            least = torch.where(better, value, least)
            for place, each in zip(kept, parameters, strict=True):
                place[better] = each.detach()[better]
    found = []
    for i in range(len(fits)):
        which = i * decays + int(least[i * decays : (i + 1) * decays].argmin())
        w, b, v, c = (each[which] for each in kept)
        found.append(Mlp(w, b[0], v, c[0], float(least[which])))
    return found


def _scores(x: Tensor, first: Tensor, bias: Tensor, second: Tensor, intercept: Tensor) -> Tensor:
    """``(MLPs, texts, outputs)``."""
    return torch.relu(x @ first + bias) @ second + intercept
