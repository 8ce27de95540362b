"""The probe solver against its peers: same real features, same objective, same values of C, same certified gap.

Peers are scikit-learn's liblinear and SAGA and, where they are installed (by hand: ``pip install --no-deps skglm celer
numba llvmlite``), skglm and celer. Features are mean-pooled activations of MiniLM, standardised. For each C a peer gets
the loosest tolerance (of 1e-3, 3.2e-4, 1e-4 ...) with which its weights have a relative duality gap of at most 1e-4,
as our solver certifies it, with the best intercept for these weights, and starts from its last solution if it can.
Finding that tolerance is not counted. Then all take turns, and the medians are compared. A peer that needs more than
``--limit`` times our time is stopped: "solved" says how far it came, and the gap is then its worst so far. Where no
tolerance gives the gap, which is no matter of time, "seconds" says so.

Several classes are two problems: one-vs-rest, which all solve, and the multinomial one, which of the peers SAGA alone
has. liblinear and celer have no free intercept: they get a column of 100,000, whose penalty is negligible. "batched" is
our solver for GPUs; on a CPU ``spin_calibrate`` takes the other.

The second part is the schedule of the paper's code: SAGA on the raw features, 16 times 4 iterations for each C of the
paper's table, whatever the gap; ours solves the same problems to 1e-4. With ``--device cuda`` ours solves all taps of a
width at once there, while the schedule has ``--jobs`` processes of the same machine, each with another tap or C.

Seconds are CPU time of one thread, but those with a GPU or with several processes, which are seconds of the clock. What
numba compiles was compiled before.

    python examples/benchmarks/solver.py --data DATA --set sst2 trec --taps hidden.4 ffn.4
    python examples/benchmarks/solver.py --data DATA --parts schedule --device cuda --jobs 16 --taps hidden.1 ffn.1 ...
"""

from __future__ import annotations

import functools
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import results
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from solver_peers import PEERS, Peer, available
from torch import Tensor
from transformers import AutoTokenizer

from spin_hf import SpinForSequenceClassification
from spin_hf.calibration.extraction import encode, extract, plan_batches
from spin_hf.calibration.losses import Logistic, Loss, Multinomial
from spin_hf.calibration.paths import solve_paths
from spin_hf.calibration.probes import standardise
from spin_hf.calibration.recipe import Recipe
from spin_hf.calibration.solver import PathPoint, smallest_useful_C, solve_path
from spin_hf.calibration.store import FeatureStore
from spin_hf.demo import backbone_folder
from spin_hf.taps import Tap, tap_width

sys.path.append(str(Path(__file__).parents[1]))
from common import draw, load

GAP = 1e-4
TOLERANCES = [10.0 ** (-3 - i / 2) for i in range(15)]
PARTS = ("gap", "schedule")
LOSSES = {"logistic": Logistic(), "one-vs-rest": Logistic(), "multinomial": Multinomial()}
RESTARTS, ITERATIONS = 16, 4  # of SAGA for each C in the paper's code


@dataclass(frozen=True)
class Case:
    """One tap of one data set under one loss; ``y`` are the solver's targets ``(n, K)``."""

    about: dict[str, Any]
    raw: Tensor
    x: Tensor
    scale: Tensor  # that the columns of raw were divided by: 1 where they are constant
    labels: np.ndarray
    y: Tensor
    s: Tensor
    loss: Loss

    @property
    def units(self) -> list[slice]:
        """The columns that are one problem: a peer solves them one by one."""
        columns = self.y.shape[1]
        return [slice(columns)] if self.loss.coupled else [slice(k, k + 1) for k in range(columns)]

    def target(self, unit: slice) -> np.ndarray:
        """Classes as numbers."""
        return self.labels if self.loss.coupled else self.y[:, unit.start].numpy().astype(np.int64)

    def gap(self, unit: slice, weight: np.ndarray, C: float, factors: Tensor | None = None) -> float:
        """Certified for weights ``(columns, d)``, with the best intercepts for them."""
        start = torch.from_numpy(np.asarray(weight, dtype=np.float32)).to(self.x.device)
        problem = self.x, self.y[:, unit], self.s, self.loss
        return next(solve_path(*problem, [C], factors=factors, start=start, max_steps=0)).gap


def apart(work: Callable[[], Any], limit: float) -> tuple[float, Any] | None:
    """CPU seconds and result of some work in a process of its own, or ``None`` where it takes longer."""
    forks = multiprocessing.get_context("fork")
    receiver, sender = forks.Pipe(duplex=False)

    def run() -> None:
        most = max(1, round(limit))
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))
        began = time.process_time()
        result = work()
        sender.send((time.process_time() - began, result))

    process = forks.Process(target=run)
    process.start()
    sender.close()
    try:
        found: tuple[float, Any] | None = receiver.recv()
    except EOFError:  # the system ended it
        found = None
    process.join()
    return found


@dataclass
class Found:
    """Tolerances by unit and C as far as they were found; the worst gap with them, and that of the last try."""

    tolerances: list[list[float]]
    gap: float = 0.0
    last: float = float("inf")
    exhausted: bool = False  # no tolerance gave the gap
    complete: bool = False


def search(case: Case, peer: Peer, x: np.ndarray, Cs: Sequence[float], limit: float) -> Found:
    found, spent = Found([]), 0.0
    for unit in case.units:
        found.tolerances.append([])
        before, rung = None, 0
        for C in Cs:
            rung, gap = max(0, rung - 1), float("inf")
            while gap > GAP:
                if rung == len(TOLERANCES):
                    found.exhausted = True
                    return found
                if spent >= limit:
                    return found
                run = apart(
                    functools.partial(peer.fit, x, case.target(unit), C, TOLERANCES[rung], before), limit - spent
                )
                if run is None:
                    return found
                gap, rung = case.gap(unit, run[1].coef_, C), rung + 1
                found.last = gap
            rung -= 1
            spent, before, found.gap = spent + run[0], run[1], max(found.gap, gap)
            found.tolerances[-1].append(TOLERANCES[rung])
    found.complete = True
    return found


def whole_path(case: Case, peer: Peer, x: np.ndarray, Cs: Sequence[float], found: Found) -> None:
    for unit, tolerances in zip(case.units, found.tolerances, strict=True):
        before = None
        for C, tol in zip(Cs, tolerances, strict=True):
            before = peer.fit(x, case.target(unit), C, tol, before)


def ours(case: Case, Cs: Sequence[float], factors: Tensor | None = None) -> list[PathPoint]:
    return list(solve_path(case.x, case.y, case.s, case.loss, Cs, factors=factors, tol=GAP))


def batched(case: Case, Cs: Sequence[float]) -> float:
    """The worst gap."""
    found = solve_paths(case.x[None], case.y, case.s, case.loss, [Cs], [len(Cs)], tol=GAP)
    return max(point.gap for points in found for point in points if point is not None)


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def compare(case: Case, peers: Sequence[str], points: int, rounds: int, limit: float) -> list[dict[str, Any]]:
    """Our solver and all peers on one case."""
    start = smallest_useful_C(case.x, case.y, case.s, case.loss)
    Cs = [start * 2.0 ** (i + 1) for i in range(points)]
    began = time.process_time()
    path = ours(case, Cs)
    most = limit * (time.process_time() - began)
    problems = len(Cs) * len(case.units)
    works: dict[str, Callable[[], Any]] = {"spin_hf": functools.partial(ours, case, Cs)}
    never = set()  # reach the gap
    facts = {"spin_hf": {"gap": max(point.gap for point in path), "solved": f"{problems} of {problems}"}}
    for name in peers:
        if case.loss.coupled and name != "SAGA":
            continue
        x = PEERS[name].layout(case.x.numpy())
        found = search(case, PEERS[name], x, Cs, most)
        facts[name] = {"gap": max(found.gap, found.last), "solved": f"{sum(map(len, found.tolerances))} of {problems}"}
        if found.exhausted:
            never.add(name)
        if found.complete:
            works[name] = functools.partial(whole_path, case, PEERS[name], x, Cs, found)
    together = apart(functools.partial(batched, case, Cs), most)
    if together is None:
        facts["spin_hf, batched"] = {"gap": float("nan"), "solved": ""}
    else:
        works["spin_hf, batched"] = functools.partial(batched, case, Cs)
        facts["spin_hf, batched"] = {"gap": together[1], "solved": f"{problems} of {problems}"}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(seconds_of(work))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    unmeasured = {name: ("gap never reached", "-") for name in never}
    measured = {name: (round(value, 2), round(value / medians["spin_hf"], 2)) for name, value in medians.items()}
    shown = dict.fromkeys(facts, (f"over {most:.1f}", f"over {limit:g}")) | unmeasured | measured
    return [
        {
            **case.about,
            "values_of_C": len(Cs),
            "most_weights": max(int((point.weight != 0).sum()) for point in path),
            "solver": name,
            "seconds": shown[name][0],
            "times_ours": shown[name][1],
            **facts[name],
        }
        for name in facts
    ]


def schedule(cases: Sequence[Case], jobs: int) -> dict[str, Any]:
    """Ours, run before and after, and the schedule of the paper's code, of taps of one width. All take raw features."""
    Cs, first = Recipe.make("paper").Cs, cases[0]
    assert not isinstance(Cs, int)
    clock = time.perf_counter if jobs > 1 or first.x.is_cuda else time.process_time
    factors = [1 / case.scale for case in cases]
    if first.x.is_cuda:
        together(cases, factors, Cs)  # loads the libraries
    began = clock()
    together(cases, factors, Cs)
    seconds = [clock() - began]
    places = [(case, C) for case in cases for C in Cs]
    raw = {id(case): case.raw.cpu().numpy() for case in cases}
    runs = [joblib.delayed(repeated)(raw[id(case)], case.labels, C) for case, C in places]
    parallel, few = joblib.Parallel(n_jobs=jobs, max_nbytes="1M"), np.eye(8, dtype=np.float32)
    parallel([joblib.delayed(repeated)(few, np.arange(8) % 2, 1.0)] * jobs)  # starts the processes
    began = clock()
    found = list(parallel(runs))
    theirs = clock() - began
    scales = {id(case): scale for case, scale in zip(cases, factors, strict=True)}
    gaps = []
    for (case, C), weight in zip(places, found, strict=True):
        (unit,), scale = case.units, scales[id(case)]
        gaps.append(case.gap(unit, weight / scale.cpu().numpy(), C, scale))
    began = clock()
    points = together(cases, factors, Cs)
    seconds.append(clock() - began)
    mine = statistics.median(seconds)
    return {
        **first.about,
        "tap": " ".join(str(case.about["tap"]) for case in cases),
        "values_of_C": len(Cs),
        "processes of the schedule": jobs,
        "seconds": {"spin_hf": round(mine, 2), "schedule": round(theirs, 2)},
        "ratio": round(theirs / mine, 2),
        "least gap": {"schedule": min(gaps)},
        "worst gap": {"spin_hf": max(point.gap for path in points for point in path), "schedule": max(gaps)},
        "weights at the last C": {
            "spin_hf": sum(int((path[-1].weight != 0).sum()) for path in points),
            "schedule": sum(int((weight != 0).sum()) for weight in found[len(Cs) - 1 :: len(Cs)]),
        },
    }


def together(cases: Sequence[Case], factors: Sequence[Tensor], Cs: Sequence[float]) -> list[list[PathPoint]]:
    """The paths of taps of one width as ``spin_calibrate`` solves them: on a GPU all at once, on a CPU one by one."""
    first = cases[0]
    if not first.x.is_cuda:
        return [ours(case, Cs, scale) for case, scale in zip(cases, factors, strict=True)]
    x, every = torch.stack([case.x for case in cases]), [list(Cs)] * len(cases)
    sure = [len(Cs)] * len(cases)
    found = list(solve_paths(x, first.y, first.s, first.loss, every, sure, factors=torch.stack([*factors]), tol=GAP))
    torch.cuda.synchronize()
    return [[point for point in path if point is not None] for path in zip(*found, strict=True)]


def repeated(x: np.ndarray, labels: np.ndarray, C: float) -> np.ndarray:
    """The weights that SAGA has after as many restarts as the paper's code gives it for one C."""
    warnings.simplefilter("ignore", ConvergenceWarning)
    model = LogisticRegression(l1_ratio=1.0, solver="saga", C=C, max_iter=ITERATIONS, warm_start=True)
    for _ in range(RESTARTS):
        model.fit(x, labels)
    weight: np.ndarray = model.coef_
    return weight


def cases(folder: Path, name: str, taps: Sequence[Tap], rows: int | None, model: Path, device: str) -> list[Case]:
    """Of a data set: its taps under each loss."""
    train = draw(load(folder, name)[0], rows)
    names = sorted({row["label"] for row in train})
    labels = np.array([names.index(row["label"]) for row in train])
    y = torch.from_numpy(labels).float()[:, None]
    if len(names) > 2:
        y = torch.nn.functional.one_hot(torch.from_numpy(labels)).float()
    y, made = y.to(device), []
    for tap, raw in features(taps, [row["text"] for row in train], model, device).items():
        x = torch.empty_like(raw)
        _, _, scale = standardise(raw, np.arange(len(raw)), np.arange(0), out=x)
        for loss in ["one-vs-rest", "multinomial"] if len(names) > 2 else ["logistic"]:
            about = {"set": name, "tap": str(tap), "loss": loss, "n": len(x), "d": x.shape[1], "classes": len(names)}
            made.append(Case(about, raw, x, scale, labels, y, torch.ones(len(x), 1, device=device), LOSSES[loss]))
    return made


def features(taps: Sequence[Tap], texts: list[str], folder: Path, device: str) -> dict[Tap, Tensor]:
    """Mean-pooled features of a backbone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = SpinForSequenceClassification.from_backbone(str(folder), dtype=torch.float32, device_map=device)
    encoded = encode(tokenizer, texts, None, 512)
    widths = {tap: tap_width(model.spin.backbone, model.spin.layout, tap) for tap in taps}
    batches = plan_batches(encoded.lengths, 4096)
    with tempfile.TemporaryDirectory() as place:
        store = FeatureStore(Path(place), widths=widths, poolings=["mean"], batches=batches)
        store.create({})
        extract(model.spin, encoded, store, range(len(batches)), 0, lambda tokens: None)
        return {tap: store.read(tap, "mean", device=torch.device(device)) for tap in taps}


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=["sst2", "trec"])
    parser.add_argument("--taps", nargs="+", type=Tap.parse, default=[Tap("hidden", 4), Tap("ffn", 4)])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rows", type=int, help="most texts of each set (default: all)")
    parser.add_argument("--points", type=int, default=8, help="values of C, each twice the last")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=6.0, help="a peer may take so many times our seconds")
    parser.add_argument("--model", type=Path, default=backbone_folder(), help="folder of a backbone (default: MiniLM)")
    parser.add_argument("--device", default="cpu", help="of ours, in the schedule's part")
    parser.add_argument("--jobs", type=int, default=1, help="processes of the paper's schedule")
    arguments = parser.parse_args()
    if "gap" in arguments.parts and arguments.device != "cpu":
        parser.error("at one gap all solve on a CPU: give --parts schedule with another --device")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # what a peer reached is measured
    peers = available(arguments.peers)
    versions = ", ".join(f"{name} {number}" for name, number in peers.items())
    given = arguments.taps, arguments.rows, arguments.model, arguments.device
    every = [case for name in arguments.set for case in cases(arguments.data, name, *given)]
    shown = "MiniLM" if arguments.model == backbone_folder() else arguments.model.name
    name = f"{shown} on {' '.join(arguments.set)}, {' '.join(map(str, arguments.taps))}"
    if "gap" in arguments.parts:
        rows = []
        for case in every:
            found = compare(case, list(peers), arguments.points, arguments.rounds, arguments.limit)
            results.report(None, "", found)
            rows += [row | {"peers": versions} for row in found]
            results.write_section(arguments.record, f"Solver, at one gap: {name}", rows)
    if "schedule" in arguments.parts:
        groups: dict[tuple[str, int], list[Case]] = {}
        for case in every:
            if case.about["loss"] != "one-vs-rest":
                groups.setdefault((case.about["set"], case.about["d"]), []).append(case)
        rows = [schedule(group, arguments.jobs) for group in groups.values()]
        results.report(arguments.record, f"Solver, the paper's schedule: {name}", rows, on=arguments.device)


if __name__ == "__main__":
    main()
