"""A chat vector: what instruction tuning changed, added to another model of the same base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from geomerge.methods.base import Span, parameter
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, ROTATION, SCALE, SIGN
from geomerge.methods.registry import register


@register
@dataclass(frozen=True)
class ChatVector(Span):
    """Add to the first model what instruction tuning made of the base (the second minus the base)."""

    name: ClassVar[str] = "chat_vector"
    aliases: ClassVar[tuple[str, ...]] = ("instruct_vector",)
    title: ClassVar[str] = "Chat vector"
    paper: ClassVar[str] = "Huang et al. 2023, Chat Vector, arXiv:2310.04799"
    formula: ClassVar[str] = "θ = θ₁ + λ (θ₂ − θ₀)"
    when: ClassVar[str] = (
        "A base that was pre-trained further (first) is to follow instructions as its instruct model (second) does, without "
        "instruction data. `geomerge diagnose FIRST SECOND --base BASE` tells whether the two changes are independent."
    )
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: chat_vector
base_model: ./base
models:
  - model: ./finance              # the base, pre-trained further
  - model: ./chat                 # the base, instruction-tuned
parameters: {lambda: 0.9}
tokens: ./finance                 # where its vocabulary was extended: new tokens keep its rows
dtype: bfloat16
"""

    lambda_: float = parameter(1.0, doc="how much of the chat vector is added")

    @property
    def needs_gram(self) -> bool:
        return False

    def coefficients(self, gram: Gram) -> np.ndarray:
        return np.array([-self.lambda_, 1.0, self.lambda_])
