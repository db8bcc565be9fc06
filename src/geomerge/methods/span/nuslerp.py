"""SLERP with weights in place of t, on models or on task vectors, whole or slice by slice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from geomerge.methods.base import Axis, BaseUse, Span, parameter, per_model
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, ROTATION, SCALE, SIGN
from geomerge.methods.registry import register
from geomerge.methods.span.slerp import ANTIPODAL, great_circle


@register
@dataclass(frozen=True)
class NuSlerp(Span):
    """SLERP at t = w₂/(w₁ + w₂); with a base the task vectors are interpolated and added to it.

    Within 10⁻³ radians of opposite directions the circle is not determined: there it is linear interpolation.
    """

    name: ClassVar[str] = "nuslerp"
    title: ClassVar[str] = "NuSLERP"
    paper: ClassVar[str] = "Arcee mergekit, 2024 (method of the tool, no paper)"
    formula: ClassVar[str] = "θ = [θ₀ +] slerp(x₁, x₂; w₂/(w₁+w₂)),  xᵢ = θᵢ [− θ₀]"
    when: ClassVar[str] = "SLERP with mergekit-style weights, of task vectors, or with an angle for each row or column."
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    base_use: ClassVar[BaseUse] = "optional"
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, IDENTICAL, SCALE, SIGN, ROTATION})
    mergekit: ClassVar[dict[str, Any]] = {"zero_angle": True}
    example: ClassVar[str] = """\
merge_method: nuslerp
models:
  - {model: ./chat, parameters: {weight: 0.6}}
  - {model: ./code, parameters: {weight: 0.4}}
dtype: bfloat16
"""

    weight: tuple[float, ...] = per_model(doc="the model's share: t = w₂/(w₁ + w₂)")
    nuslerp_flatten: bool = parameter(True, doc="one angle for the whole tensor")
    nuslerp_row_wise: bool = parameter(
        False, doc="without flatten: an angle for each slice along dimension 0, not the last"
    )
    zero_angle: bool = parameter(
        False,
        doc="a tensor of zeros stands at a right angle to any other (mergekit), instead of interpolating linearly",
    )

    @property
    def axis(self) -> Axis:
        return "tensor" if self.nuslerp_flatten else "column" if self.nuslerp_row_wise else "row"

    def coefficients(self, gram: Gram) -> np.ndarray:
        based = gram.count == 3
        w1, w2 = self.weight
        t = 0.5 if abs(w1 + w2) < 1e-6 else w2 / (w1 + w2)
        pair = gram.task_vectors() if based else gram
        omega = np.asarray(pair.angle(0, 1))
        zero = (pair.norm(0) == 0) | (pair.norm(1) == 0)
        omega = np.where(zero, math.pi / 2, omega)
        known = (omega >= 1e-8) & (omega <= math.pi - ANTIPODAL) & ~(zero & (not self.zero_angle))
        a, b = great_circle(np.where(known, omega, 1.0), t, 1e-9)
        a, b = np.where(known, a, 1 - t), np.where(known, b, t)
        return np.stack([1 - a - b, a, b] if based else [a, b], -1)
