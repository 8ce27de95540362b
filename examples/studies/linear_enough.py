"""Whether linear probes are enough: small MLPs against linear probes of each tap, and as the head of the classifier.

Per tap (mean pooling): a fifth of train chooses (C; decay and epoch), validation scores. An L1 probe as in SPIN, a
dense L2 probe, and an MLP of 32 hidden units with three seeds. Which neurons are salient is asked on two halves of the
training texts: the overlap of the most salient ones between linear probes of the two halves, between MLPs of the two
halves, and between a linear probe and an MLP, of the same half or not. By chance it is k / width.

At the end: a calibrated classifier, and MLPs in place of its linear head, on the same kept neurons. They are chosen on
validation, and test is scored once.

    python examples/studies/linear_enough.py --data DATA --models minilm PATH/TO/SmolLM2-135M --sets sst2 trec edos mrpc
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mlps import train
from shared import METRICS, SEEDS, Features, Source, Study, calibrated, extracted, load, parser, sizes
from sklearn.model_selection import train_test_split
from tables import Rows, mean, of, pairs, points, spread, table
from torch import Tensor

from spin_hf.calibration.probes import Labelled, fit_probes, standardise
from spin_hf.calibration.resampling import paired_error
from spin_hf.calibration.ridge import solve_ridge
from spin_hf.calibration.solver import PathPoint
from spin_hf.calibration.task import Task
from spin_hf.explain.charts import Chart, Series
from spin_hf.scoring import predict_rows
from spin_hf.training import store_features

MOST_SALIENT = 50
VARIANCES = (0.1, 0.4, 1.6, 6.4, 25.6)  # of a logit, as for the heads of a calibration
SETS = ("sst2", "trec", "edos", "mrpc")


def overlap(one: Tensor, another: Tensor, k: int) -> float:
    """Share of the ``k`` most salient neurons that two saliences have in common."""
    if not k:
        return float("nan")
    first, second = (set(each.topk(k).indices.tolist()) for each in (one, another))
    return len(first & second) / k


def dense(x: Tensor, y: Tensor, data: Labelled, rows: np.ndarray, choose: np.ndarray) -> PathPoint:
    """An L2 probe of standardised features, of the C with the least loss on ``choose``."""
    Cs = [variance / x.shape[1] for variance in VARIANCES]
    points = solve_ridge(x[rows], y[rows], torch.ones_like(y[rows, :1]), data.task.loss, Cs)
    held_out = y[choose], torch.ones_like(y[choose, :1])
    return min(points, key=lambda p: float(data.task.loss.value(scores(p, x[choose]), *held_out).sum()))


def scores(point: Any, x: Tensor) -> Tensor:
    return x @ point.weight.T + point.intercept


class Trial:
    """The rows of a data set by what they are for."""

    def __init__(self, features: Features) -> None:
        self.data, self.device = features.data, features.device
        rows, self.score_rows = self.data.folds[0]
        fit, self.choose = train_test_split(rows, test_size=0.2, random_state=0)
        halves = train_test_split(fit, test_size=0.5, random_state=0)
        self.fits = [np.sort(fit), *map(np.sort, halves)]  # all, one half, the other

    def labelled(self, rows: np.ndarray) -> Labelled:
        return replace(self.data, folds=((rows, self.choose),), refit=rows)

    def predict(self, z: Tensor) -> np.ndarray:
        return self.data.task.predict(z)

    def compare(self, first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
        """Score of the first, its gain over the second, and the paired standard error of that."""
        task, labels = self.data.task, self.data.labels[self.score_rows]
        own, other = (task.score(labels, each) for each in (first, second))
        return own, own - other, paired_error(task.metric, labels, first, second)


def tap_rows(trial: Trial, group: list[Any], values: list[Tensor]) -> list[dict[str, Any]]:
    """The results of taps that are solved together."""
    sparse = [
        fit_probes(values, group, trial.labelled(rows), Cs=8, tol=1e-3)  # [fit][tap][C]
        for rows in trial.fits
    ]
    found = []
    for i, ((tap, _), features) in enumerate(zip(group, values, strict=True)):
        fit, target = trial.fits[0], trial.data.targets.to(features.device)
        x = torch.empty(len(fit), features.shape[1], device=features.device)
        _, mean, scale = standardise(features, fit, fit[:0], out=x)
        x = (features - mean) / scale
        linear = [dense(x, target, trial.data, rows, trial.choose) for rows in trial.fits]
        numbers = [torch.from_numpy(rows).to(x.device) for rows in (*[fit] * len(SEEDS), *trial.fits[1:])]
        seeds = (*SEEDS, SEEDS[0], SEEDS[1])
        mlps = train(x, target, trial.data.task.loss, numbers, torch.from_numpy(trial.choose).to(x.device), seeds)
        held_out = x[trial.score_rows]
        l2 = trial.predict(scores(linear[0], held_out))
        best = sparse[0][i][0].fits[-1]
        l1 = trial.predict(scores(best, (features[trial.score_rows] - best.mean) / best.scale))
        compared = [trial.compare(trial.predict(mlp(held_out)), l2) for mlp in mlps[: len(SEEDS)]]
        over_sparse = [trial.compare(trial.predict(mlp(held_out)), l1) for mlp in mlps[: len(SEEDS)]]
        salience = {
            "L1": [path[i][0].fits[-1].salience for path in sparse],
            "L2": [point.weight.square().sum(0) for point in linear],
            "MLP": [mlp.salience(x[rows]) for mlp, rows in zip(mlps[-3:], trial.fits, strict=True)],
        }
        k = min(MOST_SALIENT, *(int((each > 0).sum()) for each in salience["L1"]))  # an L1 probe may have fewer
        between = {
            f"{a}, {b}": (overlap(salience[a][1], salience[b][2], k) + overlap(salience[b][1], salience[a][2], k)) / 2
            for a, b in (("L1", "L1"), ("L2", "L2"), ("MLP", "MLP"), ("L1", "MLP"), ("L2", "MLP"), ("L1", "L2"))
        }
        for a, b in (("L1", "L2"), ("L1", "MLP")):
            own = [overlap(salience[a][half], salience[b][half], k) for half in (1, 2)]
            between[f"{a}, {b}, same texts"] = float(np.mean(own))
        between["MLP, another seed"] = overlap(*(mlp.salience(x[fit]) for mlp in mlps[:2]), k)
        between["chance"] = k / features.shape[1]
        found.append(
            {
                "tap": str(tap),
                "l1": trial.compare(l1, l2)[0],
                "l2": trial.compare(l2, l1)[0],
                "mlp": [score for score, _, _ in compared],
                "gain": float(np.mean([gain for _, gain, _ in compared])),
                "error": float(np.mean([error for _, _, error in compared])),
                "gain over l1": float(np.mean([gain for _, gain, _ in over_sparse])),
                "error over l1": float(np.mean([error for _, _, error in over_sparse])),
                "k": k,
                "overlap": between,
            }
        )
    return found


def head(source: Source, parts: Any, metric: str, device: str) -> dict[str, Any]:
    """A calibrated classifier on test, and MLPs on its features."""
    model, tokenizer, result = calibrated(source, parts, metric, device)
    _, labels, prediction = predict_rows(model, tokenizer, parts[2])
    task = Task.make(model.config.problem_type, prediction.names, metric, "multinomial")
    stored = [store_features(model, tokenizer, part).with_format("numpy") for part in parts]
    x = torch.from_numpy(np.concatenate([part["features"][:] for part in stored])).to(device)
    y = task.targets(np.concatenate([part["labels"][:] for part in stored])).to(device)
    fit, choose, test = (part.to(device) for part in torch.arange(len(x)).split(sizes(parts)))
    mlps = train(x, y, task.loss, [fit] * len(SEEDS), choose, SEEDS)
    own = [task.predict(mlp(x[test])) for mlp in mlps]
    return {
        "features": result.chosen.num_features,
        "linear": task.score(labels, prediction.labels),
        "mlp": [task.score(labels, each) for each in own],
        "error": float(np.mean([paired_error(task.metric, labels, each, prediction.labels) for each in own])),
        "validation": {
            "linear": result.chosen.score,
            "mlp": [task.score(y_of(task, y[choose]), task.predict(mlp(x[choose]))) for mlp in mlps],
        },
    }


def y_of(task: Task, targets: Tensor) -> np.ndarray:
    """Class numbers of targets of a task with one label per text."""
    return np.asarray((targets[:, 0] if task.binary else targets.argmax(1)).long().cpu().numpy())


def run(options: Any) -> None:
    study = Study("linear", options.results)
    for given in options.models:
        source = Source.of(given)
        for name in options.sets:
            key = {"model": source.name, "set": name}
            parts = load(options, name)
            known = {**key, "rows": sizes(parts), "metric": METRICS[name]}
            if not study.done(**key, tap="head"):
                study.add(**known, tap="head", **head(source, parts, METRICS[name], options.device))
            if study.done(**key, tap="end"):
                continue
            with extracted(source, parts, METRICS[name], options.device) as features:
                trial = Trial(features)
                for group in features.groups():
                    if all(study.done(**key, tap=str(tap)) for tap, _ in group):
                        continue
                    for row in tap_rows(trial, group, features.read(group)):
                        study.add(**known, **row)
            study.add(**key, tap="end")  # so that a later run need not read the backbone


def shown(rows: Rows) -> tuple[list[str], list[Chart]]:
    """The tables and pictures of these rows."""
    taps = [row for row in rows if row["tap"] not in ("head", "end")]
    between = (
        *("L1, L1", "L2, L2", "MLP, MLP", "L1, L2", "L1, MLP", "L2, MLP"),
        *("L1, L2, same texts", "L1, MLP, same texts", "MLP, another seed", "chance"),
    )
    by_tap, charts = [], []
    for kind in ("hidden", "ffn"):
        series = []
        for i, (model, name) in enumerate(pairs(taps)):
            own = [
                row for row in of(taps, model=model, set=name) if (row["tap"].split(".")[0] == "ffn") == (kind == "ffn")
            ]
            if not own:
                continue
            gains, over = [row["gain"] for row in own], [row["gain over l1"] for row in own]
            clear = (
                sum(row["gain"] > 2 * row["error"] for row in own),
                sum(row["gain"] < -2 * row["error"] for row in own),
            )
            seeds = mean([spread(row["mlp"]) for row in own])
            by_tap.append(
                [
                    f"{model}, {name}, {kind}",
                    str(len(own)),
                    points(mean(gains), mean([row["error"] for row in own]), sign=True),
                    points(mean(over), mean([row["error over l1"] for row in own]), sign=True),
                    points(seeds),
                    f"{clear[0]} / {clear[1]}",
                    *(
                        f"{mean([value for r in own if (value := r['overlap'][b]) == value] or [0]):.2f}"
                        for b in between
                    ),
                ]
            )
            blocks = [row for row in own if row["tap"].split(".")[0] == kind]
            xs = tuple(int(row["tap"].split(".")[1]) for row in blocks)
            ys, errors = [100 * row["gain"] for row in blocks], [100 * row["error"] for row in blocks]
            low, high = (tuple(y + s * e for y, e in zip(ys, errors, strict=True)) for s in (-1, 1))
            series.append(Series(f"{model}, {name}", xs, tuple(ys), i, i, low=low, high=high))
        charts.append(
            Chart(
                f"studies-mlp-{kind}",
                f"An MLP's accuracy over a dense linear probe's, {kind} taps",
                "Bars are paired standard errors over texts.",
                "block",
                "points",
                tuple(series),
                x_whole=True,
            )
        )
    heads = [
        [
            f"{row['model']}, {row['set']}",
            f"{row['features']:,}",
            points(row["validation"]["linear"]),
            points(mean(row["validation"]["mlp"]), spread(row["validation"]["mlp"])),
            points(row["linear"]),
            points(mean(row["mlp"]), spread(row["mlp"])),
            points(mean(row["mlp"]) - row["linear"], row["error"], sign=True),
        ]
        for row in of(rows, tap="head")
    ]
    head = ["model, set, kind", "taps", "over L2", "over L1", "spread of seeds", "taps beyond two errors, + / -"]
    own = ["model, set", "features", "validation, linear", "validation, MLP", "test, linear", "test, MLP", "difference"]
    return [table([*head, *between], by_tap), table(own, heads)], charts


if __name__ == "__main__":
    run(parser(__doc__, sets=SETS, rows=3000).parse_args())
