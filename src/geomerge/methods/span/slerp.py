"""Spherical linear interpolation between two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from geomerge.methods.base import BaseUse, Span, parameter
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, IDENTICAL, ROTATION, SCALE, SIGN
from geomerge.methods.registry import register

ANTIPODAL = 1e-3
"""Closer than this to π radians the great circle is not determined and its coefficients explode: interpolate linearly."""


def great_circle(omega: Any, t: Any, epsilon: float) -> tuple[Any, Any]:
    """The two coefficients a = sin((1−t)ω)/sin ω, b = sin(tω)/sin ω; ω is clipped to [ε, π − ε]. Works on arrays."""
    omega = np.clip(omega, epsilon, math.pi - epsilon)
    return np.sin((1 - t) * omega) / np.sin(omega), np.sin(t * omega) / np.sin(omega)


@register
@dataclass(frozen=True)
class Slerp(Span):
    """Interpolation of two models along the great circle, tensor by tensor (Shoemake 1985).

    Within 10⁻³ radians of opposite directions the circle is not determined: there it is linear interpolation.
    """

    name: ClassVar[str] = "slerp"
    title: ClassVar[str] = "Spherical linear interpolation (SLERP)"
    paper: ClassVar[str] = "Shoemake 1985, Animating rotation with quaternion curves, SIGGRAPH"
    formula: ClassVar[str] = "θ = sin((1−t)ω)/sin ω · θ₁ + sin(tω)/sin ω · θ₂,  ω = ∠(θ₁, θ₂)"
    when: ClassVar[str] = (
        "Two models, to be blended at any ratio without the loss of norm that averaging has when they point in different "
        "directions. For close fine-tunes of one base it is averaging to four digits."
    )
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    base_use: ClassVar[BaseUse] = "required"
    interpolates: ClassVar[bool] = True
    properties: ClassVar[frozenset[str]] = frozenset({BASE, IDENTICAL, SCALE, SIGN, ROTATION})
    mergekit: ClassVar[dict[str, Any]] = {"lerp_threshold": 0.9995, "zero_angle": True}
    takes_statistics: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: slerp
base_model: ./chat
models:
  - model: ./chat
  - model: ./code
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: bfloat16
"""

    t: float = parameter(within=(0, 1), extrapolates=True, doc="0 gives the base (of adapters: the first), 1 the other")
    epsilon: float = parameter(1e-6, within=(0, 0.1), doc="ω is clipped to [ε, π − ε]")
    lerp_threshold: float | None = parameter(
        None, within=(0, 1), doc="interpolate linearly where |cos ω| exceeds this (mergekit: 0.9995)"
    )
    zero_angle: bool = parameter(
        False,
        doc="a tensor of zeros stands at a right angle to any other (mergekit), instead of interpolating linearly",
    )
    norm: str = parameter(
        "raw",
        choices=("raw", "geo", "lin"),
        doc="the combination acts on the tensors themselves (raw), or on their directions, which get the geometric (geo) "
        "or the linear (lin) mean of their norms",
    )
    angle_scope: str = parameter(
        "tensor",
        choices=("tensor", "group", "model"),
        doc="one angle for each tensor, one for all tensors of a block that have the same role, or one for the whole model",
    )

    @property
    def grouped(self) -> str:
        return "" if self.angle_scope == "tensor" else self.angle_scope

    def coefficients(self, gram: Gram) -> np.ndarray:
        t = self.t
        linear = np.array([1 - t, t])
        if t in (0.0, 1.0):
            return linear
        norms = float(gram.norm(0)), float(gram.norm(1))
        if 0 in norms:
            return np.array(great_circle(math.pi / 2, t, self.epsilon)) if self.zero_angle else linear
        omega = float(gram.angle(0, 1))
        if self.lerp_threshold is not None and abs(math.cos(omega)) > self.lerp_threshold:
            return linear
        if omega > math.pi - ANTIPODAL:
            return linear
        return np.asarray(np.array(great_circle(omega, t, self.epsilon)) * self._rescaled(np.array(norms), linear))

    def _rescaled(self, norms: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """What turns coefficients of the tensors into coefficients of directions at the mean norm."""
        if self.norm == "geo":
            return np.asarray(np.exp(weights @ np.log(norms)) / norms)
        if self.norm == "lin":
            return np.asarray((weights @ norms) / norms)
        return np.ones(len(norms))
