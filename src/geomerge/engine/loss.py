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

from geomerge.checkpoint.dtypes import out_of_range

if TYPE_CHECKING:
    from torch import Tensor


SAMPLE = 1 << 10
"""Elements of a tile that are looked at: fewer than any tile has, so that the estimate does not depend on the tile's size."""

RESIDUE = 2.0**-44
"""Of an element: sums of a few float64 numbers are closer than this to what they should be."""


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
        with np.errstate(all="ignore"):
            self.add_differences(result, result - before, near - result)

    def add_differences(self, merged: np.ndarray, change: np.ndarray, error: np.ndarray) -> None:
        """The same, from θ, θ − reference and round(θ) − θ. What float64's own rounding leaves of no change is none."""
        with np.errstate(all="ignore"):
            changed, lost = _squared(change), _squared(error)
            if 4 * lost > changed:  # else there is a change beside which that is nothing
                none = (np.abs(change) <= RESIDUE * np.abs(merged)) & np.isfinite(merged)
                changed, lost = _squared(np.where(none, 0.0, change)), _squared(np.where(none, 0.0, error))
        self.add_sums(changed, lost, change.size)

    def add_sums(self, change: float, error: float, elements: int) -> None:
        """The same, from the sums of squares."""
        self.change += change
        self.error += error
        self.elements += elements

    def __add__(self, other: RoundingLoss) -> RoundingLoss:
        return RoundingLoss(self.change + other.change, self.error + other.error, self.elements + other.elements)

    def checked(self, name: str, dtype: str) -> RoundingLoss:
        """The same; raises `OutOfRange` where rounding a tensor's elements to a dtype has made them infinite."""
        if not math.isfinite(self.error):
            raise out_of_range(name, dtype)
        return self

    @property
    def share(self) -> float | None:
        """‖round(θ) − θ‖ / ‖θ − reference‖, or `None` when the merge changes nothing."""
        return math.sqrt(self.error / self.change) if self.change > 0 else None


def _float64(x: Tensor) -> np.ndarray:
    found: np.ndarray = x.detach().cpu().double().reshape(-1).numpy()
    return found


def _squared(x: np.ndarray) -> float:
    # In the order of `geomerge_change`, and not by the linear algebra library, whose last bit depends on its number of threads.
    squares = np.zeros(-(-x.size // _PARALLEL) * _PARALLEL)
    np.square(x, out=squares[: x.size])
    # One after the other: Python's own `sum` makes up for rounding from 3.12 on.
    return float(np.add.accumulate(np.add.reduce(squares.reshape(-1, _PARALLEL), axis=0))[-1])


_PARALLEL = 8
"""As in `places.h`."""
