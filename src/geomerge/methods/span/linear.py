"""Weighted averaging of models (model soups)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from geomerge.methods.base import BaseUse, Span, parameter, per_model
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, ROTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register


@register
@dataclass(frozen=True)
class Linear(Span):
    """Weighted average of any number of models: θ = Σ wᵢθᵢ / Σ wᵢ."""

    name: ClassVar[str] = "linear"
    aliases: ClassVar[tuple[str, ...]] = ("average", "uniform_soup", "soup")
    title: ClassVar[str] = "Linear averaging (model soup)"
    paper: ClassVar[str] = "Wortsman et al. 2022, Model soups, arXiv:2203.05482"
    formula: ClassVar[str] = "θ = Σ wᵢ θᵢ / Σ wᵢ"
    when: ClassVar[str] = (
        "Fine-tunes of one base that stayed close to each other. The baseline that every other method must beat."
    )
    models: ClassVar[tuple[int, int | None]] = (1, None)
    base_use: ClassVar[BaseUse] = "ignored"
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, IDENTICAL, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: linear
models:
  - {model: ./chat, parameters: {weight: 0.6}}
  - {model: ./code, parameters: {weight: 0.4}}
dtype: bfloat16
"""

    weight: tuple[float, ...] = per_model(1.0, doc="the model's share; negative weights are allowed")
    normalize: bool = parameter(True, doc="divide by the sum of the weights")

    @property
    def needs_gram(self) -> bool:
        return False

    def check(self, count: int, compat: str | None = None) -> None:
        if self.normalize and abs(sum(self.weight)) < 1e-8:
            raise ValueError(f"the weights {list(self.weight)} sum to zero; set normalize: false or change them")

    def coefficients(self, gram: Gram) -> list[float]:
        total = math.fsum(self.weight) if self.normalize else 1.0
        return [weight / total for weight in self.weight]
