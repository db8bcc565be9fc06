"""The layers of an adapter as matrices: ΔW = b·a with a row for each output, the scale in b."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geomerge.adapter.low_rank import Factors
from geomerge.checkpoint.lora import Adapter, LowRank
from geomerge.checkpoint.reader import load
from geomerge.errors import NotFiniteError

Kind = Literal["linear", "embedding", "convolution"]


@dataclass(frozen=True)
class Layer:
    """A layer that is adapted.

    Attributes:
        module: Its path.
        kind: What it is: decides how its factors are stored.
        outputs: Rows of ΔW.
        inputs: What a row of ΔW is over: the inputs, and a convolution's kernel.
    """

    module: str
    kind: Kind
    outputs: int
    inputs: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of ΔW as a matrix."""
        return self.outputs, math.prod(self.inputs)

    def stored(self, factors: Factors) -> dict[str, Tensor]:
        """The factors under the names and in the shapes that PEFT gives them."""
        if self.kind == "embedding":
            return {f"{self.module}.lora_embedding_A": factors.a, f"{self.module}.lora_embedding_B": factors.b}
        rank, ones = factors.rank, [1] * (len(self.inputs) - 1)
        return {
            f"{self.module}.lora_A.weight": factors.a.reshape(rank, *self.inputs),
            f"{self.module}.lora_B.weight": factors.b.reshape(self.outputs, rank, *ones),
        }


def layer_of(adapter: Adapter, low: LowRank) -> Layer:
    """What a module of an adapter is."""
    a, b = (adapter.weights.tensors[name].shape for name in (low.a, low.b))
    kind: Kind = "embedding" if low.embedding else "linear" if len(a) == 2 else "convolution"
    return Layer(low.module, kind, b[0], a[1:])


def factors_of(adapter: Adapter, low: LowRank) -> Factors:
    """A module's factors in float64, its scale taken into b.

    Raises:
        NotFiniteError: They hold NaN or Inf.
    """
    made = []
    for name in (low.b, low.a):
        # A copy in any case: products have the same bits only from memory of the same alignment, which torch's own has.
        values = load(adapter.weights, adapter.weights.tensors[name]).to(torch.float64, copy=True).flatten(1)
        if not math.isfinite(values.sum().item()):
            raise NotFiniteError("the tensor holds NaN or Inf", where=f"{adapter.ref}: {name}")
        made.append(values)
    b, a = made
    return Factors(b if low.scale == 1.0 else b * low.scale, a)
