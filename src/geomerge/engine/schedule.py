"""Interpolation coefficients over depth: geomerge's own `schedule:`.

A schedule gives the method's interpolation parameter `t` for every tensor from its depth u (0: embeddings and the first
block, 1: the last block) and what it is. In a recipe it is the name of a preset, or a mapping from a role, a piece of a
tensor's name, a glob or a /regular expression/ to a number or to anchors over the depth:

    schedule:
      attention: [0, 0.5, 0.3, 0.7, 1]
      mlp: [1, 0.5, 0.7, 0.3, 0]
      default: 0.5

or a preset with changes; a bias is added to what the curves say, and the sum clipped to [0, 1]:

    schedule:
      preset: S
      default: 0.6
      bias: {attention: 0.1, head: -0.2}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from geomerge.anatomy.roles import ROLES
from geomerge.errors import RecipeError, did_you_mean
from geomerge.recipe.patterns import classify, searcher

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

WORDS = ("preset", "default", "t", "bias", "post_depth")
"""Keys of a schedule that are not curves; ``t`` is another word for ``default``."""

ALIASES = {"embed": "embedding"}

Curve = tuple[str, Callable[["Part"], bool], list[float]]


class Schedule:
    """A schedule that was checked. Calling it gives a tensor's coefficient.

    The embeddings stand at depth 0. So do the final norm and the head, as in mergekit, unless ``post_depth: 1`` says
    otherwise: it matters where their curve is not a single number.

    Raises:
        RecipeError: An unknown preset, an empty mapping, a value that is no number or list of numbers, no `default`.
    """

    def __init__(self, said: Mapping[str, Any] | str, where: Where) -> None:
        self._where = where
        said = {"preset": said} if isinstance(said, str) else dict(said)
        if "t" in said:
            said["default"] = said.pop("t")
        self._own = {str(key) for key in said}
        name = said.pop("preset", None)
        if name is not None:
            if name not in PRESETS:
                raise self._refuse(f"there is no schedule {name!r}", did_you_mean(str(name), PRESETS))
            # What the recipe says itself goes before, and over, what the preset says.
            said |= {key: value for key, value in PRESETS[name].items() if key not in said}
        if "default" not in said:
            raise self._refuse("a schedule needs a `default` for the tensors that its other keys do not name")
        post = said.pop("post_depth", 0)
        if isinstance(post, bool) or post not in (0, 1):
            raise self._refuse(f"the schedule's 'post_depth' must be 0 or 1, not {post!r}")
        self._post_depth = float(post)
        bias = said.pop("bias", {})
        if not isinstance(bias, Mapping):
            raise self._refuse(f"the schedule's 'bias' must be a mapping from roles to numbers, not {bias!r}")
        self._default = self._anchors("default", said.pop("default"))
        self._curves = [self._curve(key, value) for key, value in said.items()]
        self._biases = [self._curve(key, value) for key, value in bias.items()]
        self._used: set[str] = set()
        self._roles: set[str] = set()

    def __call__(self, part: Part) -> float:
        u = self._depth(part)
        self._roles.add(part.role)
        value = _interpolate(self._find(self._curves, part) or self._default, u)
        bias = self._find(self._biases, part)
        return value if bias is None else min(max(value + _interpolate(bias, u), 0.0), 1.0)

    def at(self, role: str, u: float) -> float:
        """The coefficient of a role at a depth, of a tensor without a name: for figures."""
        anchors = next((a for key, _, a in self._curves if ALIASES.get(key, key) == role), self._default)
        bias = next((a for key, _, a in self._biases if ALIASES.get(key, key) == role), None)
        value = _interpolate(anchors, u)
        return value if bias is None else min(max(value + _interpolate(bias, u), 0.0), 1.0)

    def check_used(self) -> None:
        """Refuse keys that no tensor had; presets may name roles that a model lacks.

        Raises:
            RecipeError: Naming the first of them.
        """
        asked = [key for key, _, _ in self._curves if key in self._own] + [key for key, _, _ in self._biases]
        for key in asked:
            if key not in self._used:
                known = ALIASES.get(key, key) in ROLES
                raise self._refuse(
                    f"the schedule's {key!r} is neither the role of a tensor nor a piece of its name",
                    f"the merged tensors' roles are: {', '.join(sorted(self._roles))}"
                    if known
                    else did_you_mean(key, (*ROLES, *WORDS)),
                )

    def _find(self, curves: list[Curve], part: Part) -> list[float] | None:
        for key, matches, anchors in curves:
            if matches(part):
                self._used.add(key)
                return anchors
        return None

    def _depth(self, part: Part) -> float:
        return self._post_depth if part.position == "post" else part.depth or 0.0

    def _curve(self, key: str, value: Any) -> Curve:
        role = ALIASES.get(key, key)
        if role in ROLES:
            return key, lambda part: part.role == role, self._anchors(key, value)
        try:
            pattern, kind = classify(str(key))
        except ValueError as error:
            raise self._refuse(str(error)) from None
        if kind == "substring":
            return key, lambda part: pattern in part.name, self._anchors(key, value)
        search = searcher(kind, pattern)
        return key, lambda part: search(part.name) is not None, self._anchors(key, value)

    def _anchors(self, key: str, value: Any) -> list[float]:
        anchors = value if isinstance(value, list | tuple) else [value]
        if not anchors or any(isinstance(a, bool) or not isinstance(a, int | float) for a in anchors):
            raise self._refuse(f"the schedule's {key!r} must be a number or a list of numbers, not {value!r}")
        return [float(a) for a in anchors]

    def _refuse(self, what: str, hint: str | None = None) -> RecipeError:
        return RecipeError(what, where=str(self._where), hint=hint)


def _interpolate(anchors: list[float], u: float) -> float:
    """Piecewise linear: x = u·(m − 1), i = ⌊x⌋, v_i + (x − i)(v_{i+1} − v_i); exact at the anchors."""
    x = u * (len(anchors) - 1)
    i = min(int(x), len(anchors) - 1)
    if i == x or i + 1 == len(anchors):
        return anchors[i]
    return (1 - (x - i)) * anchors[i] + (x - i) * anchors[i + 1]
