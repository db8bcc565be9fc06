"""The Riemannian (Karcher) mean of models on the sphere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from geomerge.methods.base import BaseUse, Span, parameter
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, ROTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register


def barycentre(cosines: np.ndarray, weights: np.ndarray, steps: int = 100, tolerance: float = 1e-12) -> np.ndarray:
    """The weighted Karcher mean of unit vectors, as coefficients of them.

    Args:
        cosines: Their inner products, shape ``(K, K)``.
        weights: Non-negative, of sum 1, shape ``(K,)``.
        steps: At most so many.
        tolerance: Stop when a step is shorter, in radians.
    """

    def length(c: np.ndarray) -> float:
        return float(np.sqrt(max(c @ cosines @ c, 0.0)))

    u = weights / length(weights) if length(weights) >= tolerance else np.eye(len(cosines))[0]
    for _ in range(steps):
        d = np.clip(cosines @ u, -1.0, 1.0)
        theta = np.arccos(d)
        # An antipode has no shortest path to follow; it leaves the step to the others.
        moves = (theta >= tolerance) & (np.pi - theta > 1e-7)
        factor = np.where(moves, weights * theta / np.where(moves, np.sin(theta), 1.0), 0.0)
        step = factor - (factor @ d) * u
        size = length(step)
        if size < tolerance:
            break
        u = np.cos(size) * u + np.sin(size) * step / size
        u /= length(u)
    return u


@register
@dataclass(frozen=True)
class Karcher(Span):
    """The point on the sphere with the least sum of squared angles to all models, at their mean norm.

    The iteration never leaves the span of the inputs, so it runs on their K×K Gram matrix: the iterate is a vector of
    coefficients, and the weights are read once however many steps are made.
    """

    name: ClassVar[str] = "karcher"
    title: ClassVar[str] = "Karcher mean"
    paper: ClassVar[str] = "Karcher 1977; Nobari et al. 2025, Karcher-mean merging in mergekit"
    formula: ClassVar[str] = "u ← exp_u(Σ αᵢ log_u xᵢ/‖xᵢ‖) until it stands;  θ = u · Σ αᵢ‖xᵢ‖"
    when: ClassVar[str] = "Three or more models of equal standing that lie far apart; for close ones it is the average."
    base_use: ClassVar[BaseUse] = "ignored"
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, IDENTICAL, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: karcher
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
parameters: {max_iter: 10, tol: 1e-5}
dtype: bfloat16
"""

    max_iter: int = parameter(10, within=(0, 100000), doc="at most so many steps")
    tol: float = parameter(1e-5, within=(0, 1), doc="stop when a step is shorter; tensors of smaller norm are left out")

    def coefficients(self, gram: Gram) -> np.ndarray:
        k = gram.count
        norms = np.array([float(gram.norm(i)) for i in range(k)])
        kept = norms > self.tol
        if not kept.any():
            return np.full(k, 1 / k)
        if k == 1:
            return np.ones(1)
        cosines = gram.raw()[np.ix_(kept, kept)] / np.outer(norms[kept], norms[kept])
        direction = barycentre(cosines, np.full(len(cosines), 1 / len(cosines)), self.max_iter, self.tol)
        result = np.zeros(k)
        result[kept] = direction / norms[kept] * norms.mean()
        return result
