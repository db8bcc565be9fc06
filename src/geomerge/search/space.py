"""What a search may vary: families of schedules, each a box of a few numbers.

| space | numbers | coefficients at depth u |
|---|---|---|
| ``six_scalars`` | t, a_off, a_slope, m_off, m_slope, o_off | attention t + a_off + a_slope(u − ½), mlp t + m_off + m_slope(u − ½), all else t + o_off; clipped to [0, 1] |
| ``anchors:m`` | 2m + 1 | attention and mlp piecewise linear through m anchors each, all else one number |
| ``global`` | t | t everywhere |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geomerge.engine.schedule import PRESETS
from geomerge.errors import UsageError, did_you_mean

SIX = ("t", "a_off", "a_slope", "m_off", "m_slope", "o_off")

EXACT: Mapping[str, tuple[float, ...]] = {
    "global": (0.5, 0, 0, 0, 0, 0),
    "H": (0.5, 0, 1, 0, -1, 0),
    "R": (0.5, 0, -1, 0, 1, 0),
    "L": (0.2, 0, 0.4, 0.1, 0.6, 0),
    "H65": (0.65, -0.15, 1, -0.15, -1, 0),
    "H+": (0.7, 0, 0, 0, 0, 0),
}
"""The presets that the six scalars express exactly; S is not among them."""

FIRST = ("global", "H", "R", "L", "H65", "S")
"""The schedules that every search evaluates before it searches, so that its result is never worse than the best of them."""

Schedule = dict[str, Any]


def preset(name: str) -> Schedule:
    """A preset's schedule; ``global`` is 0.5 everywhere."""
    return {"default": 0.5} if name == "global" else {"preset": name}


@dataclass(frozen=True)
class Space:
    """A box of numbers and the schedules in it.

    Attributes:
        name: As the study file says it.
        box: Lowest and highest value of each number.
        anchors: Anchors of each curve; 0 for the six scalars, -1 for one number everywhere.
    """

    name: str
    box: Mapping[str, tuple[float, float]]
    anchors: int = 0

    def point(self, preset_name: str) -> dict[str, float] | None:
        """Where a preset lies in the space; `None` when it does not."""
        if self.anchors == 0:
            found = EXACT.get(preset_name)
            point = None if found is None else dict(zip(SIX, map(float, found), strict=True))
        elif self.anchors < 0:
            point = {"t": EXACT[preset_name][0]} if preset_name in ("global", "H+") else None
        else:
            said: dict[str, Any] = {"default": 0.5} if preset_name == "global" else PRESETS[preset_name]
            t = float(said["default"])
            curves: dict[str, list[float]] = {
                kind: said.get(role, [t]) for kind, role in (("a", "attention"), ("m", "mlp"))
            }
            point = {"t": t}
            for kind, curve in curves.items():
                if len(curve) not in (1, self.anchors):
                    return None
                point |= {f"{kind}{i}": float(curve[i if len(curve) > 1 else 0]) for i in range(self.anchors)}
        if point is None or any(not low <= point[key] <= high for key, (low, high) in self.box.items()):
            return None
        return point

    def schedule(self, point: Mapping[str, float], blocks: int) -> Schedule:
        """The schedule at a point, with one anchor a block for the six scalars (they are clipped block by block).

        Args:
            point: A value for each number.
            blocks: The model's number of blocks.
        """
        if self.anchors < 0:
            return {"default": point["t"]}
        if self.anchors:
            curves = {
                role: [point[f"{kind}{i}"] for i in range(self.anchors)]
                for kind, role in (("a", "attention"), ("m", "mlp"))
            }
            return {**curves, "default": point["t"]}
        depths = [i / (blocks - 1) if blocks > 1 else 0.0 for i in range(max(blocks, 1))]
        t = point["t"]

        def curve(kind: str) -> list[float]:
            return [_clip(t + point[f"{kind}_off"] + point[f"{kind}_slope"] * (u - 0.5)) for u in depths]

        return {"attention": curve("a"), "mlp": curve("m"), "default": _clip(t + point["o_off"])}


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def space(said: str) -> Space:
    """The space that a study file names.

    Raises:
        UsageError: There is none of that name.
    """
    if said == "six_scalars":
        off, slope = (-0.3, 0.3), (-1.0, 1.0)
        return Space(said, dict(zip(SIX, ((0.2, 0.8), off, slope, off, slope, off), strict=True)))
    if said == "global":
        return Space(said, {"t": (0.0, 1.0)}, anchors=-1)
    kind, _, number = said.partition(":")
    if kind == "anchors" and number.isdigit() and 2 <= int(number) <= 32:
        keys = ["t", *(f"{kind}{i}" for kind in "am" for i in range(int(number)))]
        return Space(said, dict.fromkeys(keys, (0.0, 1.0)), anchors=int(number))
    raise UsageError(
        f"there is no search space {said!r}",
        hint=did_you_mean(kind, ("six_scalars", "anchors:5", "global")),
    )
