"""TIES-Merging: trim, elect sign, disjoint merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from geomerge.methods.base import parameter
from geomerge.methods.elementwise.task_vectors import TaskVectors
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, SCALE, SINGLE
from geomerge.methods.registry import register
from geomerge.methods.sparsify import Everything, Magnitude, Sparsifier


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
    mergekit: ClassVar[dict[str, Any]] = {"rescale_norm": "l1"}
    elect: ClassVar[bool] = True
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

    def sparsifier(self) -> Sparsifier:
        return Magnitude(self.density, self.rescaling) if min(self.density) < 1 else Everything()
