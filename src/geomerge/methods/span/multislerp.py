"""Barycentre of many models on the sphere, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from geomerge.errors import UsageError
from geomerge.methods.base import BaseUse, Span, parameter, per_model
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, ROTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register

_RESOLVED = 1e-7
"""Unit vectors that cancel leave 10⁻⁸ of rounding in the square root of their Gram matrix's sum: shorter is zero."""

_TINY = 5e-324


@register
@dataclass(frozen=True)
class MultiSlerp(Span):
    """The weighted mean direction at the weighted mean norm.

    mergekit writes this as a step on the tangent space at the mean direction; that step is identically zero, because
    the tangent vectors of a mean's own summands cancel.
    """

    name: ClassVar[str] = "multislerp"
    title: ClassVar[str] = "Multi-SLERP"
    paper: ClassVar[str] = "Goddard 2024 (mergekit); closed form shown in the specification, section A4"
    formula: ClassVar[str] = "θ = [θ₀ +] u/‖u‖ · Σ wᵢ‖xᵢ‖,  u = Σ wᵢ xᵢ/‖xᵢ‖"
    when: ClassVar[str] = "Three or more models whose directions differ enough that averaging would shrink the norm."
    base_use: ClassVar[BaseUse] = "optional"
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, IDENTICAL, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: multislerp
models:
  - {model: ./chat, parameters: {weight: 0.5}}
  - {model: ./code, parameters: {weight: 0.3}}
  - {model: ./maths, parameters: {weight: 0.2}}
dtype: bfloat16
"""

    weight: tuple[float, ...] = per_model(doc="the model's share")
    normalize_weights: bool = parameter(True, doc="divide the weights by their sum")
    eps: float = parameter(
        1e-8, within=(0, 1), doc="added to each norm; below it the mean direction counts as undefined"
    )

    def check(self, count: int, compat: str | None = None) -> None:
        if self.normalize_weights and abs(sum(self.weight)) < 1e-8:
            raise ValueError(f"the weights {list(self.weight)} sum to zero")

    def coefficients(self, gram: Gram) -> np.ndarray:
        based = gram.count > len(self.weight)
        vectors = gram.task_vectors() if based else gram
        c = self._barycentre(vectors)
        return np.concatenate([[1 - c.sum()], c]) if based else c

    def _barycentre(self, vectors: Gram) -> np.ndarray:
        w = np.array(self.weight, dtype=np.float64)
        if len(w) == 1:
            return np.ones(1)
        if self.normalize_weights:
            w = w / w.sum()
        norms = np.array([float(vectors.norm(i)) for i in range(len(w))])
        # A zero vector has no direction; left in, its coefficient w/ε would only bring in the base's rounding errors.
        u = np.where(norms > 0, w / np.maximum(norms + self.eps, _TINY), 0.0)
        length = math.sqrt(max(float(u @ vectors.raw() @ u), 0.0))
        if length < max(self.eps, _RESOLVED):
            if not norms.any():
                return w
            if len(w) == 2:
                return w
            raise UsageError(
                "multislerp: the weighted directions cancel out: there is no mean", hint="change the weights"
            )
        result: np.ndarray = u / length * float(w @ norms)
        return result
