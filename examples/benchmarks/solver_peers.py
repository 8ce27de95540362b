"""The solvers that ``solver.py`` compares ours with, each as its authors would have it used for a path of penalties."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

# The value of the column that stands in for a free intercept. Its weight is penalised: with 1000, the intercept of a
# class of 69 texts in 4361 costs so much that no tolerance gives a gap of 1e-4.
INTERCEPT = 100_000.0


@dataclass(frozen=True)
class Peer:
    """``fit`` takes features as ``layout`` gives them, classes, C, tolerance and the last model, and gives a model."""

    package: str
    layout: Callable[[np.ndarray], np.ndarray]
    fit: Callable[[np.ndarray, np.ndarray, float, float, Any], Any]


def fit_liblinear(x: np.ndarray, target: np.ndarray, C: float, tol: float, before: Any) -> Any:
    options = {"solver": "liblinear", "intercept_scaling": INTERCEPT, "max_iter": 10_000}
    return LogisticRegression(l1_ratio=1.0, C=C, tol=tol, **options).fit(x, target)


def fit_saga(x: np.ndarray, target: np.ndarray, C: float, tol: float, before: Any) -> Any:
    options = {"solver": "saga", "max_iter": 100_000, "warm_start": True, "random_state": 0}
    model = copy.deepcopy(before) or LogisticRegression(l1_ratio=1.0, **options)
    return model.set_params(C=C, tol=tol).fit(x, target)


def fit_skglm(x: np.ndarray, target: np.ndarray, C: float, tol: float, before: Any) -> Any:
    from skglm.estimators import SparseLogisticRegression

    model = copy.deepcopy(before) or SparseLogisticRegression(max_iter=1000, warm_start=True)
    return model.set_params(alpha=1 / (C * len(x)), tol=tol).fit(x, target)


def fit_celer(x: np.ndarray, target: np.ndarray, C: float, tol: float, before: Any) -> Any:
    from celer import celer_path

    start = None if before is None else before.whole
    options = {"use_PN": True, "coef_init": start, "max_iter": 1000, "tol": tol}
    weight = celer_path(x, 2.0 * target - 1, "logreg", alphas=np.array([1 / C]), **options)[1][:, 0]
    return SimpleNamespace(whole=weight, coef_=weight[None, :-1])


def _rows(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def _columns(x: np.ndarray) -> np.ndarray:
    return np.asfortranarray(x, dtype=np.float64)


def _columns_and_one(x: np.ndarray) -> np.ndarray:
    return _columns(np.hstack([x, np.full((len(x), 1), INTERCEPT, dtype=x.dtype)]))


PEERS = {
    "liblinear": Peer("sklearn", _rows, fit_liblinear),
    "SAGA": Peer("sklearn", np.ascontiguousarray, fit_saga),
    "skglm": Peer("skglm", _columns, fit_skglm),
    "celer": Peer("celer", _columns_and_one, fit_celer),
}


def available(names: Sequence[str]) -> dict[str, str]:
    """Versions of the peers that are there. Each is run on a little data, which compiles it."""
    found = {}
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 8)).astype(np.float32)
    for name in names:
        peer = PEERS[name]
        try:
            importlib.import_module(peer.package)
        except ImportError:
            print(f"{name} is not installed, and left out", file=sys.stderr)
            continue
        found[name] = version("scikit-learn" if peer.package == "sklearn" else peer.package)
        before = None
        for C in (0.1, 0.3):
            before = peer.fit(peer.layout(x), (x[:, 0] > 0).astype(np.int64), C, 1e-4, before)
    return found
