"""The settings of a calibration, and the presets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..attention import ATTENTION
from ..pooling import POOLINGS
from .errors import CalibrationError, demand_whole
from .selection import KINDS

Preset = Literal["default", "paper"]


@dataclass(frozen=True)
class Recipe:
    """What is tried. See :func:`spin_hf.spin_calibrate` for the meaning of each field."""

    kinds: tuple[str, ...] = ("hidden", "ffn")
    poolings: tuple[str, ...] = (ATTENTION,)
    Cs: int | tuple[float, ...] = 10
    etas: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    depths: tuple[int, ...] | None = None
    combine: bool = True
    shared_C: bool = False
    raw: bool = False
    head: str = "l2"
    max_features: int = 3072
    max_depth: int | None = None

    @classmethod
    def make(cls, preset: Preset, **changes: Any) -> Recipe:
        """A preset with some fields changed; ``None`` keeps the preset's. Raises :class:`CalibrationError`."""
        if preset not in _PRESETS:
            raise CalibrationError(f"preset must be one of {', '.join(_PRESETS)}; got {preset!r}.")
        given = {name: _frozen(value) for name, value in changes.items() if value is not None}
        recipe = replace(_PRESETS[preset], **given)
        _check_names("kinds", recipe.kinds, KINDS)
        _check_names("poolings", recipe.poolings, (*POOLINGS, ATTENTION))
        for name in ("Cs", "etas", "depths"):
            value = getattr(recipe, name)
            if not (value is None or isinstance(value, tuple) or (name == "Cs" and isinstance(value, int))):
                raise CalibrationError(f"{name} must be a list; got {value!r}.")
        if not all(isinstance(depth, (int, np.integer)) for depth in recipe.depths or ()):
            raise CalibrationError(f"depths must be whole numbers of blocks; got {list(recipe.depths or ())}.")
        for name in ("Cs", "etas"):
            value = getattr(recipe, name)
            if isinstance(value, tuple) and not all(isinstance(item, (int, float, np.number)) for item in value):
                raise CalibrationError(f"{name} must be numbers; got {list(value)!r}.")
        for name in ("max_features", "max_depth"):
            value = getattr(recipe, name)
            if value is not None:
                demand_whole(name, value, least=1)
        if recipe.shared_C and not recipe.etas:
            raise CalibrationError("The paper's preset has no single probes: give it etas.")
        if not all(0 < eta <= 1 for eta in recipe.etas):
            raise CalibrationError(f"Every eta must lie in (0, 1]; got {list(recipe.etas)}.")
        grid = (recipe.Cs,) if isinstance(recipe.Cs, int) else recipe.Cs
        if not grid or not all(C > 0 for C in grid):
            raise CalibrationError(f"Cs must be a positive number of values, or positive values; got {recipe.Cs}.")
        if recipe.shared_C and isinstance(recipe.Cs, int):
            raise CalibrationError("The paper's preset has one C for all layers: give Cs as a list of values.")
        ordered = recipe.Cs if isinstance(recipe.Cs, int) else tuple(sorted(recipe.Cs))
        return replace(recipe, etas=tuple(sorted(set(recipe.etas))), Cs=ordered)

    def without_token_weights(self) -> Recipe:
        """What is tried by default where token weights can't be learned."""
        return replace(self, poolings=("mean", "max"))

    def depths_of(self, blocks: int) -> list[int]:
        """Depths to try in a backbone of so many blocks."""
        top = min(blocks, self.max_depth or blocks)
        if self.depths is None:
            return sorted({max(1, round(blocks * share)) for share in (0.4, 0.6, 0.8, 1.0)} & set(range(top)) | {top})
        outside = [depth for depth in self.depths if not 1 <= depth <= blocks]
        if outside:
            raise CalibrationError(f"depths must lie between 1 and the backbone's {blocks} blocks; got {outside}.")
        return sorted({depth for depth in self.depths if depth <= top}) or [top]


_PRESETS: dict[str, Recipe] = {
    "default": Recipe(),
    "paper": Recipe(
        poolings=POOLINGS,
        Cs=(0.01, 0.1, 1.0, 5.0, 10.0),
        etas=(0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
        combine=False,
        shared_C=True,
        raw=True,
        head="l1",
    ),
}


def _frozen(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _check_names(field: str, names: Any, known: Sequence[str]) -> None:
    if isinstance(names, str) or not names or not set(names) <= set(known) or len(set(names)) != len(names):
        raise CalibrationError(f"{field} must be a list of one or more of {', '.join(known)}; got {names!r}.")
