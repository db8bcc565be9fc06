"""Model Breadcrumbs: drop the smallest and the very largest task-vector elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from geomerge.methods.base import parameter, per_model
from geomerge.methods.elementwise.task_vectors import TaskVectors
from geomerge.methods.properties import BASE, PERMUTATION, SCALE, SIGN
from geomerge.methods.registry import register
from geomerge.methods.sparsify import Outliers, RowOutliers, Sparsifier


@dataclass(frozen=True)
class _Breadcrumbs(TaskVectors):
    paper: ClassVar[str] = "Davari & Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795"
    mergekit: ClassVar[dict[str, Any]] = {"rescale_norm": "l1", "outliers_yield": True, "counting": "binary"}

    gamma: tuple[float, ...] = per_model(0.01, within=(0, 1), doc="share of the largest elements that is dropped")
    outliers_yield: bool = parameter(
        False, doc="where density + gamma > 1, keep outliers rather than fewer elements (mergekit)"
    )
    scope: str = parameter(
        "tensor",
        choices=("tensor", "row"),
        doc="what density and gamma are shares of: each tensor (mergekit), or each row along the last dimension (published)",
    )

    counting: str = parameter(
        "decimal",
        choices=("decimal", "binary"),
        doc="what a share of n elements is: 0.29 of 100 is 29, or 28 as in mergekit, which cuts off binary fractions",
    )

    def sparsifier(self) -> Sparsifier:
        step = RowOutliers if self.scope == "row" else Outliers
        return step(self.density, self.gamma, self.outliers_yield, self.rescaling, self.counting == "binary")


@register
@dataclass(frozen=True)
class Breadcrumbs(_Breadcrumbs):
    """Task arithmetic on task vectors without their smallest and very largest elements.

    The published code counts in each row (``scope: row``); a row shorter than 1/density
    then keeps nothing. By default shares are of each tensor, as in mergekit.
    """

    name: ClassVar[str] = "breadcrumbs"
    title: ClassVar[str] = "Model Breadcrumbs"
    formula: ClassVar[str] = "θ = θ₀ + λ Σ wₖ τ̂ₖ,  τ̂ keeps ranks [n − γn − density·n, n − γn) of |τ|"
    when: ClassVar[str] = "Many experts, where outliers of single task vectors spoil the sum."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN})
    elect: ClassVar[bool] = False
    chain: ClassVar[str] = "breadcrumbs → task_arithmetic"
    example: ClassVar[str] = """\
merge_method: breadcrumbs
base_model: ./base
models:
  - {model: ./chat, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
  - {model: ./code, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
dtype: bfloat16
"""


@register
@dataclass(frozen=True)
class BreadcrumbsTies(_Breadcrumbs):
    """Sign election and disjoint merge on task vectors without their smallest and very largest elements."""

    name: ClassVar[str] = "breadcrumbs_ties"
    title: ClassVar[str] = "Model Breadcrumbs (TIES)"
    formula: ClassVar[str] = "τ̂ as in breadcrumbs;  θ = θ₀ + λ Σ{wₖτ̂ₖ : sgn wₖτ̂ₖ = sgn Σ wⱼτ̂ⱼ}"
    when: ClassVar[str] = "As Breadcrumbs, when the experts also disagree about signs."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE})
    elect: ClassVar[bool] = True
    chain: ClassVar[str] = "breadcrumbs → ties (normalize: false)"
    example: ClassVar[str] = """\
merge_method: breadcrumbs_ties
base_model: ./base
models:
  - {model: ./chat, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
  - {model: ./code, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
dtype: bfloat16
"""
