"""Learned token weights: a scoring vector per block, softmax over a text's tokens, trained with a linear head.

A text's score is ``sum over taps, queries and tokens of weight * (state . w)``: linear in the token states once the
weights are given, so that it splits exactly over tokens and neurons. All folds train together, each on its own rows,
since reading the states is what costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from heads import FOLDS, Folds, Outcome
from states import Texts
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Attention:
    """Scoring vectors ``(folds, taps, queries, width)`` of standardised states, and the joint head's own outcome."""

    taps: list[str]
    queries: Tensor
    joint: Outcome
    epoch: int

    def weights(self, texts: Texts, moments: Moments) -> Tensor:
        """Weight of every token in every fold, tap and query: ``(tokens, folds, taps, queries)``, summing to 1."""
        found = torch.zeros(int(texts.starts[-1]), *self.queries.shape[:3])
        for rows in texts.batches(16384):
            states, mask = load(texts, self.taps, moments, rows, self.queries.device)
            scores = torch.einsum("lbtd,flqd->btflq", states, self.queries) / states.shape[-1] ** 0.5
            own = scores.masked_fill(~mask[:, :, None, None, None], -torch.inf).softmax(1).cpu()
            for i, row in enumerate(rows):
                start, stop = texts.starts[row], texts.starts[row + 1]
                found[start:stop] = own[i, : stop - start]
        return found


@dataclass(frozen=True)
class Moments:
    """Mean and scale of each tap's states over all tokens, ``(taps, width)``."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, texts: Texts, taps: list[str]) -> Moments:
        some = [torch.from_numpy(texts.states(tap)[::7].astype(np.float32)) for tap in taps]
        return cls(torch.stack([x.mean(0) for x in some]), torch.stack([x.std(0).clamp_min(1e-6) for x in some]))


def load(
    texts: Texts, taps: list[str], moments: Moments, rows: list[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Standardised states ``(taps, texts, tokens, width)`` of some texts, and the mask ``(texts, tokens)``."""
    index, mask = texts.padded(rows, device)
    found = torch.zeros(len(taps), *mask.shape, moments.mean.shape[1], device=device)
    for i, tap in enumerate(taps):
        own = texts.on(device, tap)[index].float()
        found[i][mask] = own.sub_(moments.mean[i].to(device)).div_(moments.scale[i].to(device))
    return found, mask


def train(
    texts: Texts,
    folds: Folds,
    taps: list[str],
    moments: Moments,
    *,
    queries: int = 1,
    shared: bool = False,
    learned: bool = True,
    epochs: int = 10,
    rate: float = 0.02,
    variance: float = 1.6,
    batch: int = 96,
    seed: int = 0,
) -> Attention:
    """Train all folds together with Adam; the epoch of the least held-out loss is kept, one for all folds.

    Args:
        shared: one scoring vector for all taps.
        learned: or else every token has the same weight, for comparison.
        variance: prior variance of a logit, as for the heads.
    """
    draw = torch.Generator().manual_seed(seed)
    device, width, classes = torch.device(folds.device), moments.mean.shape[1], folds.columns
    n = len(folds.labels)
    trains = torch.zeros(FOLDS, n)
    for fold, (rows, _) in enumerate(folds.parts):
        trains[fold, rows] = 1.0
    trains = trains.to(device)
    q = torch.zeros(FOLDS, 1 if shared else len(taps), queries, width)
    if queries > 1:
        q += 0.5 * torch.randn(q.shape, generator=draw)
    w = torch.zeros(FOLDS, len(taps), queries, classes, width)
    b = torch.zeros(FOLDS, classes)
    parameters = [each.to(device).requires_grad_() for each in (q, w, b)]
    q, w, b = parameters
    q.requires_grad_(learned)
    size = (len(taps) * queries * width) ** 0.5
    chunks = [chunk for rows in texts.batches(batch * 64) for chunk in np.array_split(rows, max(1, len(rows) // batch))]
    optimiser = torch.optim.Adam([each for each in parameters if each.requires_grad], lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, epochs * len(chunks))
    best: tuple[float, int, Tensor, Tensor] | None = None
    for epoch in range(1, epochs + 1):
        held_out = torch.zeros(n, classes)
        for number in torch.randperm(len(chunks), generator=draw).tolist():
            rows = chunks[number].tolist()
            states, mask = load(texts, taps, moments, rows, device)
            z = _scores(states, mask, q, w, size) + b[:, None]  # (folds, texts, classes)
            y = folds.targets[rows].expand(FOLDS, -1, -1)
            own = trains[:, rows]
            with torch.no_grad():  # before this epoch's own step; folds hold out disjoint rows
                held_out[rows] = ((1 - own)[..., None] * z).sum(0).cpu()
            if folds.task.binary:
                loss = F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(-1)
            else:
                loss = -(y * z.log_softmax(-1)).sum(-1)
            prior = (w.square().sum() / variance + q.square().sum()) / (2 * n * (FOLDS - 1) / FOLDS)
            total = (loss * own).sum() / own.sum(1).mean() + prior
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            schedule.step()
        value = folds.loss(held_out.to(device), np.arange(n))
        if best is None or value < best[0]:
            best = value, epoch, q.detach().clone(), held_out
    assert best is not None
    found = best[2].expand(-1, len(taps), -1, -1)
    return Attention(taps, found, Outcome(best[3], size**2), best[1])


def _scores(states: Tensor, mask: Tensor, q: Tensor, w: Tensor, size: float) -> Tensor:
    """Logits ``(folds, texts, classes)``: one matrix product per tap for all scoring vectors and heads."""
    total = None
    for i, x in enumerate(states):
        own = q[:, min(i, q.shape[1] - 1)]  # (folds, queries, width)
        columns = torch.cat([own[:, :, None], w[:, i]], 2)  # (folds, queries, 1 + classes, width)
        found = (x @ columns.flatten(0, 2).T).unflatten(-1, columns.shape[:3])
        scores = found[..., 0] / x.shape[-1] ** 0.5
        weight = scores.masked_fill(~mask[:, :, None, None], -torch.inf).softmax(1)
        part = torch.einsum("btfq,btfqk->fbk", weight, found[..., 1:]) / size
        total = part if total is None else total + part
    assert total is not None
    return total


def pooled(texts: Texts, weights: Tensor, tap: str, place: int, device: str) -> Tensor:
    """A tap's states averaged by the weights: ``(folds, texts, queries x width)``, float16."""
    where = torch.device(device)
    states, own = texts.on(where, tap), weights[:, :, place]
    found = torch.empty(FOLDS, len(texts.starts) - 1, own.shape[2] * states.shape[1], dtype=torch.float16)
    for rows in texts.batches(16384):
        index, mask = texts.padded(rows, where)
        x = torch.zeros(*mask.shape, states.shape[1], device=where)
        a = torch.zeros(*mask.shape, *own.shape[1:], device=where)
        x[mask], a[mask] = states[index].float(), own[index.cpu()].to(where)
        found[:, rows] = torch.einsum("btfq,btd->fbqd", a, x).flatten(2).half().cpu()
    return found
