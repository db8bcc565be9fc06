"""DELLA: drop task-vector elements at random, small ones more often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from geomerge.methods.base import parameter, per_model
from geomerge.methods.elementwise.task_vectors import TaskVectors
from geomerge.methods.properties import BASE, IDENTICAL, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register
from geomerge.methods.sparsify import Everything, MagPrune, Sparsifier


@dataclass(frozen=True)
class _Della(TaskVectors):
    paper: ClassVar[str] = "Deep et al. 2024, DELLA-Merging, arXiv:2406.11617"
    mergekit: ClassVar[dict[str, Any]] = {"rescale_norm": "l1"}

    rescale: bool = parameter(True, doc="make up for what was dropped; `l1`: with that norm")
    epsilon: tuple[float, ...] = per_model(
        0.15, within=(0, 1), doc="keep probabilities run from density − ε to density + ε along a row's ranks"
    )

    def check(self, count: int, compat: str | None = None) -> None:
        super().check(count, compat)
        for d, e in zip(self.density, self.epsilon, strict=True):
            if 0 < d < 1 and not (d - e > 0 and d + e < 1):
                raise ValueError(f"density ± epsilon must lie inside (0, 1), not [{d - e:g}, {d + e:g}]")

    def sparsifier(self) -> Sparsifier:
        return MagPrune(self.density, self.epsilon, self.rescaling) if min(self.density) < 1 else Everything()


@register
@dataclass(frozen=True)
class Della(_Della):
    """Sign election and disjoint merge on task vectors thinned by MagPrune."""

    name: ClassVar[str] = "della"
    aliases: ClassVar[tuple[str, ...]] = ("magprune",)
    title: ClassVar[str] = "DELLA"
    formula: ClassVar[str] = "τ̂ = τ ⊙ m/q,  m ~ Bernoulli(q),  q = density − ε + 2ε·rank/(n−1);  then as TIES"
    when: ClassVar[str] = "As DARE-TIES, when large task-vector elements should survive more often than small ones."
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SINGLE, IDENTICAL, SCALE})
    elect: ClassVar[bool] = True
    chain: ClassVar[str] = "della → ties"
    example: ClassVar[str] = """\
merge_method: della
base_model: ./base
seed: 42
models:
  - {model: ./chat, parameters: {weight: 1.0, density: 0.7, epsilon: 0.1}}
  - {model: ./code, parameters: {weight: 1.0, density: 0.7, epsilon: 0.1}}
dtype: bfloat16
"""

    normalize: bool = parameter(True, doc="divide each element by the weights that agree on its sign")


@register
@dataclass(frozen=True)
class DellaLinear(_Della):
    """Task arithmetic on task vectors thinned by MagPrune."""

    name: ClassVar[str] = "della_linear"
    title: ClassVar[str] = "DELLA (linear)"
    formula: ClassVar[str] = "θ = θ₀ + λ Σ wₖ τₖ ⊙ mₖ/qₖ,  q = density − ε + 2ε·rank/(n−1)"
    when: ClassVar[str] = "As DARE, when large task-vector elements should survive more often than small ones."
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SINGLE, SCALE, SIGN})
    elect: ClassVar[bool] = False
    chain: ClassVar[str] = "della → task_arithmetic"
    example: ClassVar[str] = """\
merge_method: della_linear
base_model: ./base
seed: 42
models:
  - {model: ./chat, parameters: {weight: 0.5, density: 0.7, epsilon: 0.1}}
  - {model: ./code, parameters: {weight: 0.5, density: 0.7, epsilon: 0.1}}
dtype: bfloat16
"""
