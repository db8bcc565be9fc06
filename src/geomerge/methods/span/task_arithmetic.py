"""Sums of task vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from geomerge.methods.base import Span, parameter, per_model
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register


@register
@dataclass(frozen=True)
class TaskArithmetic(Span):
    """Add weighted task vectors to the base; negative weights take skills away."""

    name: ClassVar[str] = "task_arithmetic"
    aliases: ClassVar[tuple[str, ...]] = ("ta", "task_vector_sum")
    title: ClassVar[str] = "Task arithmetic"
    paper: ClassVar[str] = "Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089"
    formula: ClassVar[str] = "θ = θ₀ + λ Σ wₖ (θₖ − θ₀)"
    when: ClassVar[str] = (
        "Several fine-tunes of one base whose skills should add up. With many experts take λ near 0.3, or 1/K for their mean."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: task_arithmetic
base_model: ./base
models:
  - {model: ./chat, parameters: {weight: 0.5}}
  - {model: ./code, parameters: {weight: 0.5}}
parameters: {lambda: 1.0}
dtype: bfloat16
"""

    weight: tuple[float, ...] = per_model(doc="the task vector's factor; negative forgets")
    normalize: bool = parameter(False, doc="divide by the sum of the weights")
    lambda_: float = parameter(1.0, doc="factor of the merged task vector")

    @property
    def needs_gram(self) -> bool:
        return False

    def check(self, count: int, compat: str | None = None) -> None:
        if compat is None and self.normalize and abs(sum(self.weight)) < 1e-8:
            raise ValueError(f"the weights {list(self.weight)} sum to zero; set normalize: false or change them")

    def coefficients(self, gram: Gram) -> list[float]:
        total = math.fsum(self.weight)
        divisor = total if self.normalize and abs(total) >= 1e-8 else 1.0
        c = [self.lambda_ * (weight / divisor) for weight in self.weight]
        return [1 - math.fsum(c), *c]
