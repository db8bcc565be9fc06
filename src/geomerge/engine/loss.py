"""How much of a merge's effect the output's dtype swallows.

A fine-tune moves weights by 10⁻⁴ where bfloat16 numbers of their size stand 10⁻⁴ apart: rounding the merge loses 10 to 30
per cent of the task vector's norm. It is estimated from a fixed sample of tiles, at no cost worth mentioning, and reported by
`plan` and in the manifest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geomerge.methods.tile import block_sums

SAMPLE = 1 << 12
"""Elements of a tile that are looked at: fewer than any tile has, so that the estimate does not depend on the tile's size."""


@dataclass
class RoundingLoss:
    """Sums of squares over the sampled elements.

    Attributes:
        change: ‖θ − reference‖², the merged task vector (the reference is the base, or else the first model).
        error: ‖round(θ) − θ‖².
        elements: How many elements were looked at.
    """

    change: float = 0.0
    error: float = 0.0
    elements: int = 0

    def add(self, merged: Tensor, rounded: Tensor, reference: Tensor) -> None:
        """Take in the beginning of one tile: float64 result, its rounding, the reference's float64 elements."""
        merged, rounded, reference = merged[:SAMPLE], rounded[:SAMPLE], reference[:SAMPLE]
        self.change += _squared(merged - reference)
        self.error += _squared(rounded.to(torch.float64) - merged)
        self.elements += merged.numel()

    def __add__(self, other: RoundingLoss) -> RoundingLoss:
        return RoundingLoss(self.change + other.change, self.error + other.error, self.elements + other.elements)

    @property
    def share(self) -> float | None:
        """‖round(θ) − θ‖ / ‖θ − reference‖, or `None` when the merge changes nothing."""
        return math.sqrt(self.error / self.change) if self.change > 0 else None


def _squared(x: Tensor) -> float:
    return math.fsum(
        block_sums(x.square())
    )  # not `torch.dot`, whose last bit depends on the library's number of threads
