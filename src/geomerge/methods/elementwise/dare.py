"""DARE: drop task-vector elements at random and rescale the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from geomerge.methods.base import parameter
from geomerge.methods.elementwise.task_vectors import TaskVectors
from geomerge.methods.properties import BASE, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register
from geomerge.methods.sparsify import Random, Sparsifier


@dataclass(frozen=True)
class _Dare(TaskVectors):
    paper: ClassVar[str] = "Yu et al. 2024, Language models are Super Mario (DARE), arXiv:2311.03099"
    mergekit: ClassVar[dict[str, Any]] = {"rescale_norm": "l1"}

    rescale: bool = parameter(True, doc="make up for what was dropped; `l1`: with that norm")

    def sparsifier(self) -> Sparsifier:
        return Random(self.density, self.rescaling)


@register
@dataclass(frozen=True)
class DareLinear(_Dare):
    """Task arithmetic on task vectors whose elements were dropped at random."""

    name: ClassVar[str] = "dare_linear"
    aliases: ClassVar[tuple[str, ...]] = ("dare_ta", "dare")
    title: ClassVar[str] = "DARE (linear)"
    formula: ClassVar[str] = "θ = θ₀ + λ Σ wₖ τₖ ⊙ mₖ/p,  mₖ ~ Bernoulli(p)"
    when: ClassVar[str] = (
        "Fine-tunes with small task vectors (|τ| below about 0.002), of which 10–50 % carry the skill."
    )
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SINGLE, SCALE, SIGN})
    elect: ClassVar[bool] = False
    chain: ClassVar[str] = "dare → task_arithmetic"
    example: ClassVar[str] = """\
merge_method: dare_linear
base_model: ./base
seed: 42
models:
  - {model: ./chat, parameters: {weight: 0.5, density: 0.5}}
  - {model: ./code, parameters: {weight: 0.5, density: 0.5}}
dtype: bfloat16
"""


@register
@dataclass(frozen=True)
class DareTies(_Dare):
    """Sign election and disjoint merge on task vectors whose elements were dropped at random."""

    name: ClassVar[str] = "dare_ties"
    title: ClassVar[str] = "DARE (TIES)"
    formula: ClassVar[str] = "θ = θ₀ + λ Σ{wₖτ̂ₖ : sgn wₖτ̂ₖ = sgn Σ wⱼτ̂ⱼ},  τ̂ = τ ⊙ m/p"
    when: ClassVar[str] = "As DARE, when the experts also disagree about signs."
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SINGLE, SCALE})
    elect: ClassVar[bool] = True
    chain: ClassVar[str] = "dare → ties (normalize: false)"
    example: ClassVar[str] = """\
merge_method: dare_ties
base_model: ./base
seed: 42
models:
  - {model: ./chat, parameters: {weight: 0.5, density: 0.5}}
  - {model: ./code, parameters: {weight: 0.5, density: 0.5}}
dtype: bfloat16
"""
