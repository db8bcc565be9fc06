"""KnOTS: low-rank updates in common coordinates, merged there."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods import registry
from geomerge.methods.base import Matrix, parameter, per_model
from geomerge.methods.combine import Surveyed
from geomerge.methods.direct import merge_tensors
from geomerge.methods.linalg import largest, one_thread
from geomerge.methods.properties import BASE, PERMUTATION, SCALE, SIGN
from geomerge.methods.registry import register
from geomerge.methods.selection import Selection
from geomerge.methods.sparsify import TOP_K, Magnitude
from geomerge.methods.tile import Scan, TensorSource
from geomerge.methods.walk import Walk, whole

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

    The published code ranks the coordinates of all weights together (``scope: global``). They are far too many to keep, so that
    each weight is decomposed four times instead of once; ``tensor`` takes each weight's coordinates on their own. Directions
    whose singular value is not above `cutoff`, or is below 10⁻⁶ of the largest, are noise and do not count.
    """

    name: ClassVar[str] = "knots"
    aliases: ClassVar[tuple[str, ...]] = ("knots_ties",)
    title: ClassVar[str] = "KnOTS-TIES"
    paper: ClassVar[str] = "Stoica et al. 2025, Model merging with SVD to tie the Knots, arXiv:2410.19735"
    formula: ClassVar[str] = "θ = θ₀ + λ·U·TIES(ΣV₁ᵀ, …, ΣV_Tᵀ),  [τ₁ … τ_T] = UΣ[V₁ … V_T]ᵀ"
    when: ClassVar[str] = (
        "Low-rank adapters of one base; λ near 0.6 (vision) or 0.5 (language). Whole checkpoints are refused, unless "
        "`full_weights: true` says that they are as good as adapters; for full fine-tunes take ties."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN})
    findings: ClassVar[tuple[type, ...]] = (Selection,)
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
    scope: str = parameter(
        "tensor",
        choices=("tensor", "global"),
        doc="what density is a share of: the coordinates of each weight, or of all weights together (as published)",
    )

    top_k: str = parameter(
        "kth_inclusive",
        choices=TOP_K,
        doc="what density keeps exactly: as in the paper's code, that share and one more, with all equals; or see `ties`",
    )
    cutoff: float = parameter(
        1e-5,
        within=(0, math.inf),
        doc="singular values up to this are noise (as published); 0 for updates that are tiny",
    )
    full_weights: bool = parameter(False, doc="take whole checkpoints, such as those that adapters were merged into")

    @property
    def adapters_only(self) -> bool:
        return not self.full_weights

    @property
    def surveys(self) -> int:
        return 3 if self.scope == "global" and min(self.density) < 1 else 0

    @property
    def surveyed_alike(self) -> Hashable:
        return self.density, self.top_k, self.cutoff

    def survey(self, walk: Walk) -> dict[str, list[Selection]]:
        """The largest coordinates of all weights together, by weight."""
        scan_of = functools.partial(_scan_of_coordinates, cutoff=self.cutoff)
        numel = sum(walk.over(lambda scan: scan_of(scan).numel))
        return Magnitude(self.density, top_k=self.top_k).survey(walk.mapped(scan_of, numel))

    def known_of(self, known: dict[str, list[Selection]], name: str) -> tuple[Selection, ...]:
        return tuple(known.get(name, ()))

    def rest_weights(self, count: int) -> tuple[float, ...]:
        return tuple(w * c for w, c in zip(self.weight, super().rest_weights(count), strict=True))

    def merge(self, deltas: Tensor) -> Tensor:
        basis, coordinates = _coordinates(deltas, self.cutoff)
        if not basis.shape[1]:
            return torch.zeros_like(deltas[0])
        values = {"weight": self.weight, "density": self.density, "top_k": self.top_k}
        ties = registry.get("ties").make(values, count=len(deltas))
        if self.known is not None:
            ties = replace(ties, known=Surveyed({"coordinates": self.known}))
        origin = torch.zeros_like(coordinates[0])
        return torch.mm(basis, merge_tensors(ties, [origin, *coordinates], "coordinates"))


def _coordinates(deltas: Tensor, cutoff: float) -> tuple[Tensor, list[Tensor]]:
    """U, shape ``(rows, k)``, and the Rₜ, each ``(k, columns)``."""
    found = largest(deltas.transpose(0, 1).reshape(deltas.shape[1], -1), deltas.shape[1], cutoff)
    return found.u, list(torch.split(found.s[:, None] * found.vh, deltas.shape[2], dim=1))


def _scan_of_coordinates(scan: Scan, cutoff: float) -> Scan:
    """A scan of the coordinates as experts on a base of zeros, cut as `merge` cuts them."""
    with one_thread():
        _, coordinates = _coordinates(whole(scan, based=True).view(-1, *scan.shape), cutoff)
    sources = [TensorSource(t) for t in (torch.zeros_like(coordinates[0]), *coordinates)]
    return Scan(sources, coordinates[0].shape, name=scan.name, tile=scan.tile, device=scan.device, level=-1)
