"""SLERP with a coefficient for each layer and role, of two models or more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from geomerge.methods.base import parameter, per_model
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN
from geomerge.methods.registry import register
from geomerge.methods.span.karcher import barycentre
from geomerge.methods.span.slerp import ANTIPODAL, Slerp


@register
@dataclass(frozen=True)
class LayerAdaptiveSlerp(Slerp):
    """SLERP whose coefficient follows depth and role; more than two models meet on the sphere.

    For two models it is SLERP with the recipe's schedule (S when the recipe gives neither a schedule nor t). For more, t is
    the share of all models but the first, divided among them by their weights, and `arrangement` says how they meet:
    at the Karcher barycentre (K = 2 is SLERP), each with the first by SLERP and then averaged (star), or one after the
    other, the result so far with the next (iterative).
    """

    name: ClassVar[str] = "layer_adaptive_slerp"
    aliases: ClassVar[tuple[str, ...]] = ("la_slerp",)
    title: ClassVar[str] = "Layer-adaptive SLERP"
    paper: ClassVar[str] = (
        "Rage, Lalain, Escriva et al., Geometric Model Merging for Efficient and Scalable Adaptation of Large Language Models"
    )
    formula: ClassVar[str] = (
        "θ_l = sin((1−c_l)ω_l)/sin ω_l · θ₁_l + sin(c_l ω_l)/sin ω_l · θ₂_l,  c_l = schedule(depth, role)"
    )
    when: ClassVar[str] = (
        "Two fine-tunes of one family that should lead at different depths or in different functions; "
        "`geomerge diagnose` says which schedule fits, and whether a plain SLERP is the safer choice."
    )
    models: ClassVar[tuple[int, int | None]] = (1, None)
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN, ROTATION})
    default_schedule: ClassVar[str | None] = "S"
    example: ClassVar[str] = """\
merge_method: layer_adaptive_slerp
base_model: ./instruct
models:
  - model: ./instruct
  - model: ./maths
schedule:
  preset: H
  default: 0.65
  bias: {attention: 0.1}
dtype: bfloat16
"""

    t: float = parameter(0.5, within=(0, 1), extrapolates=True, doc="0 gives the first model, 1 the others")
    weight: tuple[float, ...] = per_model(1.0, within=(0, math.inf), doc="share of t, when there are several others")
    arrangement: str = parameter(
        "barycentre", choices=("barycentre", "star", "iterative"), doc="how more than two models meet"
    )

    def check(self, count: int, compat: str | None = None) -> None:
        if sum(self.weight) <= 0:
            raise ValueError("the weights sum to 0")

    def coefficients(self, gram: Gram) -> np.ndarray:
        if gram.count == 2:
            return super().coefficients(gram)
        shares = np.array(self.weight) / sum(self.weight)
        start = np.eye(gram.count)[0]
        others = np.eye(gram.count)[1:]
        if self.arrangement == "star":
            return np.asarray(shares @ np.array([self._between(gram, start, x, self.t) for x in others]))
        if self.arrangement == "iterative":
            for other in others:
                start = self._between(gram, start, other, self.t)
            return np.asarray(start)
        return self._barycentre(gram, np.array([1 - self.t, *(self.t * shares)]))

    def _between(self, gram: Gram, start: np.ndarray, end: np.ndarray, t: float) -> np.ndarray:
        """SLERP of two combinations of the inputs, as a combination of the inputs."""
        a, b = super().coefficients(gram.of(np.stack([start, end])))
        return np.asarray(a * start + b * end)

    def _barycentre(self, gram: Gram, weights: np.ndarray) -> np.ndarray:
        norms = np.array([float(gram.norm(i)) for i in range(gram.count)])
        if (norms == 0).any() or 1.0 in weights:
            return weights
        cosines = gram.raw() / np.outer(norms, norms)
        if (cosines < math.cos(math.pi - ANTIPODAL)).any():
            return weights
        return np.asarray(barycentre(cosines, weights) * self._rescaled(norms, weights))
