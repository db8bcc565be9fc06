"""Interpolation between the base and the average at a ratio that the experts' angles give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from geomerge.methods.base import Axis, Span, parameter
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, ROTATION, SCALE, SIGN
from geomerge.methods.registry import register


@register
@dataclass(frozen=True)
class ModelStock(Span):
    """The point of the plane of base and average that lies closest to the centre of the experts' distribution."""

    name: ClassVar[str] = "model_stock"
    title: ClassVar[str] = "Model Stock"
    paper: ClassVar[str] = "Jang et al. 2024, Model Stock, arXiv:2403.19522"
    formula: ClassVar[str] = "θ = s·mean θₖ + (1−s)·θ₀,  s = K c/(1 + (K−1) c),  c = mean cos(τᵢ, τⱼ)"
    when: ClassVar[str] = "Several fine-tunes of one base on the *same* task, to stand in for an average of many more."
    models: ClassVar[tuple[int, int | None]] = (2, None)
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, IDENTICAL, SCALE, SIGN, ROTATION})
    mergekit: ClassVar[dict[str, Any]] = {"clamp_negative": False, "norm_floor": 1e-6}
    example: ClassVar[str] = """\
merge_method: model_stock
base_model: ./base
models: [{model: ./run1}, {model: ./run2}, {model: ./run3}]
dtype: bfloat16
"""

    filter_wise: bool = parameter(False, doc="an angle for each output row instead of one for the tensor")
    clamp_negative: bool = parameter(True, doc="never move away from the experts when their mean cosine is negative")
    norm_floor: float = parameter(0.0, within=(0, 1), doc="smallest product of two norms to divide by (mergekit: 1e-6)")

    @property
    def axis(self) -> Axis:
        return "filter" if self.filter_wise else "tensor"

    def coefficients(self, gram: Gram) -> np.ndarray:
        k = gram.count - 1
        dots = gram.centred[..., 1:, 1:]
        norms = np.sqrt(np.maximum(np.diagonal(dots, axis1=-2, axis2=-1), 0.0))
        cosines = []
        for i in range(k):
            for j in range(i + 1, k):
                size = np.maximum(norms[..., i] * norms[..., j], self.norm_floor)
                cosine = np.where(size > 0, dots[..., i, j] / np.where(size > 0, size, 1.0), 0.0)
                cosines.append(np.clip(cosine, -1.0, 1.0))
        # In this order for however many rows: NumPy's mean adds those of one row by pairs.
        c = sum(cosines) / len(cosines)
        if self.clamp_negative:
            c = np.maximum(c, 0.0)
        below = 1 + (k - 1) * c
        s = np.where(np.abs(below) < 1e-6, 0.0, k * c / np.where(np.abs(below) < 1e-6, 1.0, below))
        return np.stack([1 - s, *[s / k] * k], -1)
