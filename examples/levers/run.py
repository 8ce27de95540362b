"""Levers of accuracy on a frozen backbone, each against mean and max alone: the table of ``findings/levers.md``.

Five folds of train and validation; test is never read. Gains are in points with their paired standard error over texts.

    python examples/levers/run.py --data DATA --cache CACHE --sets trec sst2 --levers attention std
    python examples/levers/run.py --data DATA --cache CACHE --model PATH/TO/SmolLM2-135M --device cuda --sets sst2 \\
        --levers "last token" prompt
    python examples/levers/run.py --show
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import Attention, Moments, pooled, train
from heads import FOLDS, Features, Folds, Outcome, Selector, head
from selections import group_lasso, joint_probe, scaled, stability_selection
from states import LAST, Backbone, Texts, extract, read_of
from torch import Tensor

from spin_hf.demo import backbone_folder

sys.path.append(str(Path(__file__).parents[1]))
import common
from accuracy_table import SETS, load, read_results

MAX_LENGTH = 256
REVIEW = "Review: {text}\nQuestion: Is this review positive or negative?\nAnswer:"
PROMPTS = {
    "sst2": REVIEW,
    "imdb": REVIEW,
    "edos": "Message: {text}\nQuestion: Is this message sexist?\nAnswer:",
    "trec": "Question: {text}\nWhat does it ask for: an abbreviation, an entity, a description, a person, a place or a "
    "number?\nAnswer:",
}
PLAIN = "{text}"
KINDS = ("hidden", "ffn")


class Trial:
    """One data set and backbone: what levers share, made once and kept."""

    def __init__(
        self,
        path: str,
        dataset: str,
        texts: Texts,
        given: list[str],
        device: str,
        seed: int,
        validation: int,
        kinds: tuple[str, ...],
        variance: float,
    ) -> None:
        self.given = given  # the texts themselves
        self.kinds = kinds
        self.variance = variance
        self.validation = validation  # texts that choose in an ordinary calibration
        self.path, self.dataset, self.texts, self.device = path, dataset, texts, device
        self.folds = Folds(texts.labels, SETS[dataset], device, seed)
        self.selector = Selector(self.folds)
        self.hidden = texts.places("hidden") + texts.places("norm")
        self._kept: dict[str, Any] = {}

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def places(
        self, kinds: tuple[str, ...] | None = None, statistics: tuple[str, ...] = ("mean", "max")
    ) -> dict[str, Features]:
        names = [
            tap
            for kind in kinds or self.kinds
            for tap in (self.hidden if kind == "hidden" else self.texts.places(kind))
        ]
        return {f"{tap} {s}": _stored(self.texts, tap, s) for tap in names for s in statistics if s in read_of(tap)}

    def outcome(self, lever: str) -> Outcome:
        """Of a lever, kept beside the token states, so that another run can compare with it."""
        kinds = "" if lever.endswith("joint head") else f"-{'-'.join(self.kinds)}"
        file = self.texts.folder / f"outcome-{lever}{kinds}-{self.folds.seed}-{self.variance:g}.pt"
        if file.exists():
            return Outcome(*torch.load(file, weights_only=True))
        found = self.keep(f"outcome {lever}", lambda: LEVERS[lever](self))
        torch.save((found.scores, found.features), file)
        return found

    def base(self) -> Outcome:
        return self.keep("base", lambda: self.selector.fit(self.places()))

    @property
    def moments(self) -> Moments:
        return self.keep("moments", lambda: Moments.of(self.texts, self.hidden))

    def attention(self, **options: Any) -> Attention:
        name = f"attention {options}"
        return self.keep(
            name, lambda: train(self.texts, self.folds, self.hidden, self.moments, variance=self.variance, **options)
        )

    def attended(self, *, ffn: int | None = 0, **options: Any) -> dict[str, Features]:
        """Places of attention-pooled features; FFN neurons take the weights of a hidden tap so many blocks below."""

        def make() -> dict[str, Tensor]:
            weights = self.attention(**options).weights(self.texts, self.moments)
            found = {tap: pooled(self.texts, weights, tap, i, self.device) for i, tap in enumerate(self.hidden)}
            return found if ffn is None else {**found, **self._of_ffn(weights, ffn)}

        found = self.keep(f"attended {ffn} {options}", make)
        return {
            f"{tap} attention {options}" + (f" {ffn}" if tap[0] == "f" else ""): _own(x) for tap, x in found.items()
        }

    def last(self, prompt: str) -> dict[str, Features]:
        """Places of the last token of a prompt around each text."""

        def read() -> Texts:
            folder = self.texts.folder.with_name(f"{self.texts.folder.name}-{'plain' if prompt == PLAIN else 'prompt'}")
            labels = self.texts.labels.tolist()
            return extract(self.path, self.given, labels, folder, self.device, MAX_LENGTH, self.kinds, prompt)

        texts = self.keep(prompt, read)
        names = [tap for kind in (*self.kinds, "norm") for tap in texts.places(kind)]
        return {f"{tap} {LAST} {prompt}": _stored(texts, tap, LAST) for tap in names}

    def _of_ffn(self, weights: Tensor, below: int) -> dict[str, Tensor]:
        backbone, starts = Backbone(self.path, self.device), self.texts.starts
        taps = [tap for tap in backbone.widths if tap.startswith("ffn.")]
        n = len(self.texts.labels)
        found = {tap: torch.zeros(FOLDS, n, backbone.widths[tap], dtype=torch.float16) for tap in taps}

        def read(rows: list[int], tap: str, values: Tensor, mask: Tensor) -> None:
            if tap not in found:
                return
            source = f"hidden.{int(tap.split('.')[1]) - below}"
            place = self.hidden.index(source) if source in self.hidden else -1
            own = torch.zeros(len(rows), values.shape[1], FOLDS)
            for i, row in enumerate(rows):
                own[i, : starts[row + 1] - starts[row]] = weights[starts[row] : starts[row + 1], :, place, 0]
            found[tap][:, rows] = torch.einsum("btf,btd->fbd", own.to(values.device), values.float()).half().cpu()

        for _ in backbone.forwards(self.texts.about["ids"], read):
            pass
        return found


def _stored(texts: Texts, tap: str, statistic: str) -> Features:
    return lambda fold: texts.pooled(tap, statistic)


def _own(values: Tensor) -> Features:
    return lambda fold: values[fold].float()


def beside(statistic: str) -> Callable[[Trial], Outcome]:
    return lambda t: t.selector.fit(t.places() | t.places(statistics=(statistic,)))


def directions(t: Trial) -> Outcome:
    """Tokens projected on heads of each hidden tap's mean, cross-fitted inside the fold; max, min and soft maximum."""
    n, classes = len(t.folds.labels), t.folds.columns
    found = torch.zeros(FOLDS, n, len(t.hidden) * classes * 3)
    for i, tap in enumerate(t.hidden):
        x = t.texts.pooled(tap, "mean")
        x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
        mean, scale = t.texts.pooled(tap, "mean").mean(0), t.texts.pooled(tap, "mean").std(0).clamp_min(1e-6)
        states = t.texts.states(tap)
        owner = np.repeat(np.arange(n), np.diff(t.texts.starts))
        for fold, (rows, held_out) in enumerate(t.folds.parts):
            inner = np.array_split(np.random.default_rng(0).permutation(rows), 3)
            jobs = [(np.setdiff1d(rows, part), part) for part in inner] + [(rows, held_out)]
            weights = torch.stack([_direction(t.folds, x, own) for own, _ in jobs])  # (jobs, classes, width)
            job = np.zeros(n, dtype=int)
            for number, (_, part) in enumerate(jobs):
                job[part] = number
            values = _projected(states, mean, scale, weights)  # (tokens, jobs, classes)
            values = values[torch.arange(len(owner)), torch.from_numpy(job[owner])]
            start = i * classes * 3
            found[fold, :, start : start + classes * 3] = _reduced(values, t.texts.starts)
    return t.selector.fit(t.places(), dense={"directions": lambda fold: found[fold]})


def _direction(folds: Folds, x: Tensor, rows: np.ndarray) -> Tensor:
    from spin_hf.calibration.ridge import solve_ridge

    own = x[rows].to(folds.device)
    y, s = folds.targets[rows], folds.ones(rows)
    return next(iter(solve_ridge(own, y, s, folds.task.loss, [1.6 / x.shape[1]], tol=1e-2))).weight.cpu()


def _projected(states: np.ndarray, mean: Tensor, scale: Tensor, weights: Tensor, at_once: int = 2**16) -> Tensor:
    columns = weights.flatten(0, 1).T
    parts = [
        ((torch.from_numpy(states[i : i + at_once].astype(np.float32)) - mean) / scale) @ columns
        for i in range(0, len(states), at_once)
    ]
    return torch.cat(parts).unflatten(1, weights.shape[:2])


def _reduced(values: Tensor, starts: np.ndarray) -> Tensor:
    """Max, min and softmax-weighted mean of each text's tokens, ``(texts, 3 x classes)``."""
    lengths = torch.from_numpy(np.diff(starts))
    high = torch.segment_reduce(values, "max", lengths=lengths)
    low = torch.segment_reduce(values, "min", lengths=lengths)
    weight = (values - high.repeat_interleave(lengths, 0)).exp()
    total = torch.segment_reduce(weight, "sum", lengths=lengths)
    soft = torch.segment_reduce(weight * values, "sum", lengths=lengths) / total
    return torch.cat([high, low, soft], 1)


def all_features(t: Trial, places: dict[str, Features], directions: int = 1536) -> Outcome:
    """L2 on the leading principal directions of all features: what is left out is shrunk anyway.

    Args:
        places: of the features.
        directions: at most so many.
    """

    def project(fold: int) -> Tensor:
        n = len(t.folds.labels)
        kernel, width = torch.zeros(n, n, device=t.device), 0
        for features in places.values():
            x = features(fold).to(t.device).float()
            x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
            kernel += x @ x.T
            width += x.shape[1]
        values, vectors = torch.linalg.eigh(kernel / width)
        count = min(directions, n // 2)
        # Logits of a prior on all weights: each direction keeps its own scale.
        return (vectors[:, -count:] * values[-count:].clamp_min(0).sqrt()).cpu() * count**0.5

    return t.keep(f"all {sorted(places)}", lambda: head(t.folds, [project(fold) for fold in range(FOLDS)]))


def average(t: Trial, lever: str, places: dict[str, Features]) -> Outcome:
    """Half the scores of a lever, half of :func:`all_features` of some places."""
    selected = t.outcome(lever)
    return Outcome((selected.scores + all_features(t, places).scores) / 2, selected.features)


def stacking(t: Trial) -> Outcome:
    """One L2 head per place, cross-fitted three times inside the fold; an L2 head on their scores."""
    places = {name: features for name, features in t.places(("hidden",)).items()}
    n, classes = len(t.folds.labels), t.folds.columns
    found = torch.zeros(FOLDS, n, len(places) * classes)
    for i, features in enumerate(places.values()):
        x = features(0)
        x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
        for fold, (rows, held_out) in enumerate(t.folds.parts):
            inner = np.array_split(np.random.default_rng(0).permutation(rows), 3)
            for own, other in [(np.setdiff1d(rows, part), part) for part in inner] + [(rows, held_out)]:
                weight = _direction(t.folds, x, own)
                found[fold, other, i * classes : (i + 1) * classes] = x[other] @ weight.T
    return head(t.folds, [scaled(found[fold], t.folds.parts[fold][0]) for fold in range(FOLDS)])


def fewer_rows(t: Trial) -> Outcome:
    """What a refit on train and validation is worth: the same neurons, the head without so many of its rows."""
    share = t.validation / len(t.folds.labels)
    return head(t.folds, t.selector.matrices(t.places()), share=1 - share)


def joint(**options: Any) -> Callable[[Trial], Outcome]:
    return lambda t: t.attention(**options).joint


LEVERS: dict[str, Callable[[Trial], Outcome]] = {
    "mean and max": lambda t: t.base(),
    "hidden": lambda t: t.selector.fit(t.places(("hidden",))),
    "mean, joint head": joint(learned=False),
    "attention, joint head": joint(),
    "attention, shared, joint head": joint(shared=True),
    "attention, four queries, joint head": joint(queries=4),
    "attention, hidden": lambda t: t.selector.fit(t.places() | t.attended(ffn=None)),
    "attention": lambda t: t.selector.fit(t.places() | t.attended()),
    "attention only": lambda t: t.selector.fit(t.attended()),
    "attention only, hidden": lambda t: t.selector.fit(t.attended(ffn=None)),
    "attention only, of the input": lambda t: t.selector.fit(t.attended(ffn=1)),
    "attention only, shared": lambda t: t.selector.fit(t.attended(shared=True)),
    "attention and max": lambda t: t.selector.fit(t.places(statistics=("max",)) | t.attended()),
    "attention, shared": lambda t: t.selector.fit(t.places() | t.attended(ffn=None, shared=True)),
    "attention, four queries": lambda t: t.selector.fit(t.places() | t.attended(ffn=None, queries=4)),
    "directions": directions,
    **{name: beside(name) for name in ("std", "min", "top3", "ends", "halves")},
    "attn": lambda t: t.selector.fit(t.places((*t.kinds, "attn"))),
    "all features": lambda t: all_features(t, t.places()),
    "average": lambda t: average(t, "mean and max", t.places()),
    "attention only, all features": lambda t: all_features(t, t.attended()),
    "attention only, average": lambda t: average(t, "attention only", t.attended()),
    "attention only, all hidden features": lambda t: all_features(t, t.attended(ffn=None)),
    "attention only, average with all hidden": lambda t: average(t, "attention only", t.attended(ffn=None)),
    "layers weighted": lambda t: t.selector.fit(t.places(), weighted=True),
    "attention only, layers weighted": lambda t: t.selector.fit(t.attended(), weighted=True),
    "stacking": stacking,
    "fewer rows": fewer_rows,
    "last token": lambda t: t.selector.fit(t.last(PLAIN)),
    "prompt": lambda t: t.selector.fit(t.last(PROMPTS[t.dataset])),
    "prompt beside mean and max": lambda t: t.selector.fit(t.places() | t.last(PROMPTS[t.dataset])),
    "stability selection": lambda t: stability_selection(t.folds, t.places()),
    "joint probe": lambda t: joint_probe(t.folds, t.places()),
    "attention only, joint probe": lambda t: joint_probe(t.folds, t.attended()),
    "attention only, joint probe of the salient": lambda t: joint_probe(t.folds, t.attended(), salient=t.selector),
    "group lasso": lambda t: group_lasso(t.folds, t.places(), {name: name.split()[0] for name in t.places()}),
}


def run(arguments: argparse.Namespace) -> None:
    path = str(backbone_folder()) if arguments.model == "minilm" else arguments.model
    name = "MiniLM" if arguments.model == "minilm" else Path(path).name
    kinds = " ".join(arguments.kinds)
    done = {
        (row["model"], row["set"], row["lever"], row["seed"], row["kinds"]) for row in read_results(arguments.results)
    }
    for dataset in arguments.sets:
        train_rows, validation, _ = load(arguments.data, dataset)
        train_rows, validation = (common.draw(part, arguments.rows) for part in (train_rows, validation))
        rows = train_rows + validation
        texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
        trial = Trial(
            path,
            dataset,
            extract(
                path,
                texts,
                labels,
                arguments.cache / name / (dataset if arguments.rows is None else f"{dataset}-{arguments.rows}"),
                arguments.device,
                MAX_LENGTH,
                arguments.kinds,
            ),
            texts,
            arguments.device,
            arguments.seed,
            len(validation),
            tuple(arguments.kinds),
            arguments.variance,
        )
        for lever in arguments.levers or LEVERS:
            if (name, dataset, lever, arguments.seed, kinds, arguments.against, arguments.variance) in done:
                continue
            base = trial.outcome(arguments.against)
            start = time.process_time()
            outcome = trial.outcome(lever)
            seconds = time.process_time() - start
            gain, error = outcome.gain(base, trial.folds)
            row = {
                "model": name,
                "set": dataset,
                "lever": lever,
                "seed": arguments.seed,
                "kinds": kinds,
                "variance": arguments.variance,
                "against": arguments.against,
                "rows": len(labels),
                **outcome.save(trial.folds),
                "gain": round(gain, 2),
                "error": round(error, 2),
                "seconds": round(seconds, 1),
            }
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def show(path: Path) -> str:
    """Gain and paired standard error of each lever on each set, as Markdown."""
    rows = read_results(path)
    columns = list(dict.fromkeys((row["model"], row["set"], row["kinds"]) for row in rows))
    lines = ["| lever | " + " | ".join(map(", ".join, columns)) + " |", "|" + " --- |" * (len(columns) + 1)]
    for lever in dict.fromkeys(row["lever"] for row in rows):
        cells = []
        for column in columns:
            own = [row for row in rows if (row["model"], row["set"], row["kinds"]) == column and row["lever"] == lever]
            cells.append("; ".join(f"{r['gain']:+.2f} ± {r['error']:.2f} ({r['score']:.1f})" for r in own))
        lines.append(f"| {lever} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument(
        "--cache", type=Path, default=Path("levers-cache"), help="token states are kept here: gigabytes"
    )
    parser.add_argument("--model", default="minilm", help="minilm, or the folder of a model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, help="at most so many of train, and of validation")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of taps, also of mean and max")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--against", choices=LEVERS, default="mean and max", help="what gains are over")
    parser.add_argument("--variance", type=float, default=1.6, help="of a logit, in the prior of token weights' heads")
    parser.add_argument("--levers", nargs="+", choices=LEVERS)
    common.measure_or_show(parser, run, show, "findings/levers.jsonl")
