"""How much of a merge's effect the output's dtype swallows.

A fine-tune moves weights by 10⁻⁴ where bfloat16 numbers of their size stand 10⁻⁴ apart: rounding the merge loses 10 to 30
per cent of the task vector's norm. It is estimated from a fixed sample of tiles, at no cost worth mentioning, and reported by
`plan` and in the manifest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


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
        """Take in the beginning of one tile: the result, its rounding, the reference's elements."""
        result, near, before = (_float64(x[:SAMPLE]) for x in (merged, rounded, reference))
        self.add_differences(result - before, near - result)

    def add_differences(self, change: np.ndarray, error: np.ndarray) -> None:
        """The same, from θ − reference and round(θ) − θ."""
        self.change += _squared(change)
        self.error += _squared(error)
        self.elements += change.size

    def __add__(self, other: RoundingLoss) -> RoundingLoss:
        return RoundingLoss(self.change + other.change, self.error + other.error, self.elements + other.elements)

    @property
    def share(self) -> float | None:
        """‖round(θ) − θ‖ / ‖θ − reference‖, or `None` when the merge changes nothing."""
        return math.sqrt(self.error / self.change) if self.change > 0 else None


def _float64(x: Tensor) -> np.ndarray:
    found: np.ndarray = x.detach().cpu().double().reshape(-1).numpy()
    return found


def _squared(x: np.ndarray) -> float:
    # Not by the linear algebra library, whose last bit depends on its number of threads.
    return float(np.add.reduce(np.square(x)))
