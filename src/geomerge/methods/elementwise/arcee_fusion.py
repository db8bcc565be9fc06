"""Arcee Fusion: take over only the changes that matter for the rows' distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Elementwise
from geomerge.methods.order import nth_smallest
from geomerge.methods.properties import BASE, IDENTICAL
from geomerge.methods.registry import register
from geomerge.methods.tile import Scan, Tile

if TYPE_CHECKING:
    from torch import Tensor

_FLOOR = 1e-8


def importance(base: Tensor, other: Tensor) -> Tensor:
    """|Δ| times the row's Kullback–Leibler divergence; shapes ``(rows, columns)``. Never negative: see `_row_divergence`."""
    return torch.sub(other, base).abs_().mul_(_row_divergence(base, other))


def _row_divergence(base: Tensor, other: Tensor) -> Tensor:
    p = torch.softmax(other, -1).add_(_FLOOR)
    q = torch.softmax(base, -1).add_(_FLOOR)
    # Rounding may leave a divergence of −10⁻¹⁷, which is zero.
    return p.mul_(torch.log(p / q)).sum(-1, keepdim=True).clamp_(min=0.0)


@register
@dataclass(frozen=True)
class ArceeFusion(Elementwise):
    """Take over the other model's weight where its importance is an outlier, keep the base's elsewhere.

    mergekit estimates the quartiles from a million random elements without a seed, and writes float32 whatever dtype was
    asked for. Here the quartiles are exact and the dtype is kept.
    """

    name: ClassVar[str] = "arcee_fusion"
    title: ClassVar[str] = "Arcee Fusion"
    paper: ClassVar[str] = "Arcee AI 2025 (mergekit)"
    formula: ClassVar[str] = "θ = θ₀ + Δ·[I ≥ median(I) + 1.5·IQR(I)],  I = |Δ|·KL(softmax θ₁ ‖ softmax θ₀) by rows"
    when: ClassVar[str] = "To bring the most telling changes of one model into another and leave all else untouched."
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    properties: ClassVar[frozenset[str]] = frozenset({BASE, IDENTICAL})
    example: ClassVar[str] = """\
merge_method: arcee_fusion
base_model: ./chat
models: [{model: ./chat}, {model: ./code}]
dtype: bfloat16
"""

    @property
    def rows(self) -> bool:
        return True

    def measure(self, scan: Scan) -> float:
        last = scan.numel - 1
        if last < 0:
            return 0.0
        ranks = [math.floor(q * last) for q in (0.25, 0.5, 0.75)]
        lower, median, upper = nth_smallest(scan, lambda tile: [importance(*tile.inputs)] * 3, ranks)
        return median + 1.5 * (upper - lower)

    def blend(self, tile: Tile, stats: float) -> Tensor:
        base, other = tile.inputs
        chosen = (importance(base, other) >= stats).to(base.dtype)
        return base.addcmul_(other.sub_(base), chosen)
