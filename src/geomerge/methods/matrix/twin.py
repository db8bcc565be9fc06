"""Twin-Merging without a router: a shared expert, and what is special about each task in few directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import RESTS, Matrix, parameter, per_model
from geomerge.methods.linalg import truncate
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN
from geomerge.methods.registry import register
from geomerge.methods.selection import share

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class Twin(Matrix):
    """The shared expert θ* = θ₀ + λ Σ τₜ, and on it the exclusive knowledge vₜ = θₜ − θ* of each task at low rank.

    The published method chooses the weights of the exclusive vectors for every input with a trained router (Lu et al. 2024);
    a merged checkpoint has fixed ones, as in Wu et al. 2025 (Long-to-Short reasoning, arXiv:2503.20641). By default they
    are 1/T each.

    Tensors that are no matrices are not compressed. The published code leaves biases and classifiers to each task; here they
    are merged as other vectors are (`scale: [{filter: bias, value: 0}, {value: 1}]` among the steps keeps those of the base).
    """

    name: ClassVar[str] = "twin"
    aliases: ClassVar[tuple[str, ...]] = ("twin_merging",)
    title: ClassVar[str] = "Twin-Merging (static)"
    paper: ClassVar[str] = "Lu et al. 2024, Twin-Merging, arXiv:2406.15479"
    formula: ClassVar[str] = "θ = θ* + Σ wₜ·SVDₖ(θₜ − θ*),  θ* = θ₀ + λ Σ τₜ,  k = ⌊density·r⌋"
    when: ClassVar[str] = (
        "When plain task arithmetic loses a task; raise that task's weight. Not for one task's several runs."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: twin
base_model: ./base
models:
  - {model: ./chat, parameters: {weight: 0.3}}
  - {model: ./math, parameters: {weight: 0.7}}
parameters: {lambda: 0.3, density: 0.1}
dtype: bfloat16
"""

    weight: tuple[float | None, ...] = per_model(None, doc="wₜ, the factor of the exclusive vector; by default 1/T")
    density: float = parameter(
        0.1, within=(0, 1), above=0, doc="share of the rank, or of the elements, that exclusive vectors keep"
    )
    compress: str = parameter(
        "svd",
        choices=("svd", "magnitude"),
        doc="what exclusive vectors keep: leading directions, or the largest elements",
    )
    lambda_: float = parameter(0.3, doc="factor of the summed task vectors in the shared expert")
    rest: str = parameter(
        "uncompressed",
        choices=("uncompressed", *RESTS),
        doc="what tensors that are no weight matrices get of the task vectors",
    )

    @property
    def factor(self) -> float:
        return 1.0

    def rest_weights(self, count: int) -> tuple[float, ...]:
        if self.rest != "uncompressed":
            return super().rest_weights(count)
        weights = self._weights()
        return tuple(w + self.lambda_ * (1.0 - sum(weights)) for w in weights)

    def _weights(self) -> list[float]:
        return [1 / len(self.weight) if w is None else w for w in self.weight]

    def merge(self, deltas: Tensor) -> Tensor:
        shared = deltas.sum(0).mul_(self.lambda_)
        merged = shared.clone()
        for w, delta in zip(self._weights(), deltas, strict=True):
            if w:
                merged.add_(self._compressed(delta.sub_(shared)), alpha=w)
        return merged

    def _compressed(self, exclusive: Tensor) -> Tensor:
        if self.compress == "magnitude":
            return largest_elements(exclusive, self.density)
        return truncate(exclusive, ratio=self.density)


def largest_elements(matrix: Tensor, density: float) -> Tensor:
    """The share of a matrix's elements that are largest in magnitude, of equals the first ones; the others are 0."""
    flat = matrix.flatten()
    kept = flat.abs().argsort(descending=True, stable=True)[: share(density, flat.numel())]
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(matrix)
