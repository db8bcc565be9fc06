"""TIES-Merging: trim, elect sign, disjoint merge."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from geomerge.methods.base import parameter
from geomerge.methods.combine import Surveyed, added, majority
from geomerge.methods.elementwise.task_vectors import TaskVectors
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, SCALE, SINGLE
from geomerge.methods.registry import register
from geomerge.methods.selection import Selection
from geomerge.methods.sparsify import TOP_K, Everything, Magnitude, Sparsifier, measure
from geomerge.methods.tile import Scan, Tile
from geomerge.methods.walk import Walk

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class Ties(TaskVectors):
    """Keep each task vector's largest elements, elect a sign for every position, average what agrees with it."""

    name: ClassVar[str] = "ties"
    title: ClassVar[str] = "TIES-Merging"
    paper: ClassVar[str] = "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708"
    formula: ClassVar[str] = "θ = θ₀ + λ · mean{wₖτ̂ₖ : sgn wₖτ̂ₖ = sgn Σ wⱼτ̂ⱼ},  τ̂ = top-density(τ)"
    when: ClassVar[str] = "Three or more fine-tunes of one base that pull the same weights in different directions."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, IDENTICAL, SCALE})
    findings: ClassVar[tuple[type, ...]] = (Surveyed, Selection)
    mergekit: ClassVar[dict[str, Any]] = {"rescale_norm": "l1", "top_k": "binary_k"}
    elect: ClassVar[bool] = True
    chain: ClassVar[str] = "trim → ties (density: 1)"
    example: ClassVar[str] = """\
merge_method: ties
base_model: ./base
models:
  - {model: ./chat, parameters: {weight: 1.0, density: 0.3}}
  - {model: ./code, parameters: {weight: 1.0, density: 0.3}}
  - {model: ./maths, parameters: {weight: 0.5, density: 0.2}}
parameters: {normalize: true}
dtype: bfloat16
"""

    normalize: bool = parameter(True, doc="divide each element by the weights that agree on its sign")
    merge_func: str = parameter(
        "mean",
        choices=("mean", "sum", "max"),
        doc="of what agrees: the mean, the sum (normalize: false), or the largest",
    )
    scope: str = parameter(
        "tensor",
        choices=("tensor", "global"),
        doc="what density is a share of: each tensor, or the whole model (as in the paper, whose majority sign is then elected "
        "where votes cancel; else +)",
    )
    top_k: str = parameter(
        "auto",
        choices=("auto", *TOP_K),
        doc="what density keeps exactly: that share, but one element at least (0.29 of 100 is 29, or 28 with `binary_k`, as in "
        "mergekit), or one of the two rules of published code, which keep all equals; auto: `exact_k` of a tensor, "
        "`kth_inclusive` of the whole model",
    )

    @property
    def _rule(self) -> str:
        if self.top_k != "auto":
            return self.top_k
        return "exact_k" if self.scope == "tensor" else "kth_inclusive"

    def sparsifier(self) -> Sparsifier:
        if min(self.density) >= 1:
            return Everything()
        known = None if self.known is None else self.known.selections
        return Magnitude(self.density, self.rescaling, top_k=self._rule, known=known)

    def merging(self) -> dict[str, Any]:
        return {
            "normalize": self.normalize and self.merge_func == "mean",
            "furthest": self.merge_func == "max",
            "tie": 1.0 if self.known is None else self.known.majority,
        }

    @property
    def surveys(self) -> int:
        return 0 if self.scope == "tensor" else 2 if min(self.density) < 1 else 1

    @property
    def surveyed_alike(self) -> Hashable:
        return self.density, self._rule, self.weight, self.rescaling

    def survey(self, walk: Walk) -> Surveyed:
        step = self.sparsifier()
        found = Surveyed(step.survey(walk) if isinstance(step, Magnitude) else None)
        if walk.experts < 2:
            return found
        step = replace(self, known=found).sparsifier()

        def voting(scan: Scan) -> Callable[[Tile], Tensor]:
            stats, factors = measure(step, scan)

            def votes(tile: Tile) -> Tensor:
                kept = [step.keep_(delta, k, tile, stats) for k, delta in enumerate(tile.task_vectors())]
                return added([delta.mul_(w * f) for delta, w, f in zip(kept, self.weight, factors, strict=True)])

            return votes

        return found._replace(majority=majority(walk, voting))
