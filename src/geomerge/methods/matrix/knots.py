"""KnOTS: low-rank updates in common coordinates, merged there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods import registry
from geomerge.methods.base import Matrix, per_model
from geomerge.methods.direct import Function
from geomerge.methods.linalg import largest
from geomerge.methods.properties import BASE, PERMUTATION, SCALE, SIGN
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class Knots(Matrix):
    """Write all updates of a weight in one basis of output directions, and merge their coordinates with TIES.

    Updates that say the same in other bases, as low-rank adapters do, disagree element by element. The joint decomposition
    [Δ₁ … Δ_T] = UΣ[V₁ … V_T]ᵀ gives all of them one basis U; what TIES merges are the coordinates Rₜ = ΣVₜᵀ = UᵀΔₜ, each
    thinned to its largest elements, with signs elected by their sum (Stoica et al. 2025). A merge that is linear in the
    task vectors would not change.

    TIES works on one weight at a time; the published code ranks the coordinates of all weights together. Directions below
    10⁻⁶ of the strongest do not count (published: below 10⁻⁵, whatever the scale).
    """

    name: ClassVar[str] = "knots"
    aliases: ClassVar[tuple[str, ...]] = ("knots_ties",)
    title: ClassVar[str] = "KnOTS-TIES"
    paper: ClassVar[str] = "Stoica et al. 2025, Model merging with SVD to tie the Knots, arXiv:2410.19735"
    formula: ClassVar[str] = "θ = θ₀ + λ·U·TIES(ΣV₁ᵀ, …, ΣV_Tᵀ),  [τ₁ … τ_T] = UΣ[V₁ … V_T]ᵀ"
    when: ClassVar[str] = (
        "Low-rank adapters of one base; λ near 0.6 (vision) or 0.5 (language). For full fine-tunes take ties."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN})
    example: ClassVar[str] = """\
merge_method: knots
base_model: ./base
models:
  - {model: {model: ./base, lora: ./cars-lora}}
  - {model: {model: ./base, lora: ./digits-lora}}
parameters: {density: 0.2, lambda: 0.6}
dtype: bfloat16
"""

    weight: tuple[float, ...] = per_model(1.0, doc="the update's weight")
    density: tuple[float, ...] = per_model(0.2, within=(0, 1), above=0.0, doc="share of the coordinates that is kept")

    def rest_weights(self, count: int) -> tuple[float, ...]:
        return tuple(w * c for w, c in zip(self.weight, super().rest_weights(count), strict=True))

    def merge(self, deltas: Tensor) -> Tensor:
        found = largest(deltas.transpose(0, 1).reshape(deltas.shape[1], -1), deltas.shape[1])
        if not len(found.s):
            return torch.zeros_like(deltas[0])
        coordinates = list(torch.split(found.s[:, None] * found.vh, deltas.shape[2], dim=1))
        ties = Function(registry.get("ties"))
        merged = ties(
            torch.zeros_like(coordinates[0]), coordinates, weight=list(self.weight), density=list(self.density)
        )
        return torch.mm(found.u, merged)
