"""Interpolation coefficients over depth: geomerge's own `schedule:`.

A schedule gives the method's interpolation parameter `t` for every tensor from its depth u (0: embeddings and the first
block, 1: the last block, the final norm and the head) and what it is. In a recipe it is the name of a preset, or a mapping
from a role, a piece of a tensor's name, or ``default`` to a number or to anchors over the depth:

    schedule:
      attention: [0, 0.5, 0.3, 0.7, 1]
      mlp: [1, 0.5, 0.7, 0.3, 0]
      default: 0.5
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from geomerge.anatomy.roles import ROLES
from geomerge.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from geomerge.anatomy import Part
    from geomerge.recipe.values import Where

PRESETS: dict[str, dict[str, Any]] = {
    "H": {"attention": [0, 0.25, 0.5, 0.75, 1], "mlp": [1, 0.75, 0.5, 0.25, 0], "default": 0.5},
    "H65": {"attention": [0, 0.25, 0.5, 0.75, 1], "mlp": [1, 0.75, 0.5, 0.25, 0], "default": 0.65},
    "R": {"attention": [1, 0.75, 0.5, 0.25, 0], "mlp": [0, 0.25, 0.5, 0.75, 1], "default": 0.5},
    "L": {"attention": [0, 0.1, 0.2, 0.3, 0.4], "mlp": [0, 0.15, 0.3, 0.45, 0.6], "default": 0.2},
    "H+": {"default": 0.7},
    "S": {"attention": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0], "default": 0.5},
    "Q": {"attention": [0, 0.25, 0.5, 0.75, 1], "mlp": [1, 0.75, 0.5, 0.25, 0], "default": 0.5},
}
"""The named schedules of Geometric Model Merging (Layer-Adaptive SLERP)."""


class Schedule:
    """A schedule that was checked. Calling it gives a tensor's coefficient.

    Raises:
        RecipeError: An unknown preset, an empty mapping, a value that is no number or list of numbers, no `default`.
    """

    def __init__(self, said: Mapping[str, Any] | str, where: Where) -> None:
        if isinstance(said, str):
            if said not in PRESETS:
                raise RecipeError(f"there is no schedule {said!r}", where=str(where), hint=did_you_mean(said, PRESETS))
            said = PRESETS[said]
        if "default" not in said:
            raise RecipeError(
                "a schedule needs a `default` for the tensors that its other keys do not name", where=str(where)
            )
        self._curves = [(key, _anchors(key, value, where)) for key, value in said.items() if key != "default"]
        self._default = _anchors("default", said["default"], where)
        self._where = where
        self._used: set[str] = set()

    def __call__(self, part: Part) -> float:
        for key, anchors in self._curves:
            if part.role == key if key in ROLES else key in part.name:
                self._used.add(key)
                return _interpolate(anchors, part.depth or 0.0)
        return _interpolate(self._default, part.depth or 0.0)

    def check_used(self) -> None:
        """Refuse keys that no tensor had.

        Raises:
            RecipeError: Naming the first of them.
        """
        for key, _ in self._curves:
            if key not in self._used:
                raise RecipeError(
                    f"the schedule's {key!r} is neither the role of a tensor nor a piece of its name",
                    where=str(self._where),
                    hint=did_you_mean(key, ROLES),
                )


def _anchors(key: str, value: Any, where: Where) -> list[float]:
    anchors = value if isinstance(value, list | tuple) else [value]
    if not anchors or any(isinstance(a, bool) or not isinstance(a, int | float) for a in anchors):
        raise RecipeError(
            f"the schedule's {key!r} must be a number or a list of numbers, not {value!r}", where=str(where)
        )
    return [float(a) for a in anchors]


def _interpolate(anchors: list[float], u: float) -> float:
    """Piecewise linear: x = u·(m − 1), i = ⌊x⌋, v_i + (x − i)(v_{i+1} − v_i); exact at the anchors."""
    x = u * (len(anchors) - 1)
    i = min(int(x), len(anchors) - 1)
    if i == x or i + 1 == len(anchors):
        return anchors[i]
    return (1 - (x - i)) * anchors[i] + (x - i) * anchors[i + 1]
