"""One model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from geomerge.methods.base import BaseUse, Span, per_model
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, ROTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register


@register
@dataclass(frozen=True)
class Passthrough(Span):
    """Tensors are taken from one model, scaled if asked: the method for stacking layers of models (`slices`)."""

    name: ClassVar[str] = "passthrough"
    title: ClassVar[str] = "Passthrough (layer stacking)"
    paper: ClassVar[str] = "mergekit; depth up-scaling: Kim et al. 2023, SOLAR 10.7B, arXiv:2312.15166"
    formula: ClassVar[str] = "θ = s·θ₁"
    when: ClassVar[str] = "Depth up-scaling and layer surgery with slices, or copying one model through the engine."
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    base_use: ClassVar[BaseUse] = "ignored"
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, IDENTICAL, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: passthrough
slices:
  - sources: [{model: ./chat, layer_range: [0, 24]}]
  - sources: [{model: ./code, layer_range: [8, 32]}]
dtype: bfloat16
"""

    scale: tuple[float | None, ...] = per_model(None, doc="factor of the tensor")

    @property
    def needs_gram(self) -> bool:
        return False

    def coefficients(self, gram: Gram) -> list[float]:
        scale = self.scale[0]
        return [1.0 if scale is None else scale]
