"""The k largest elements of a tensor: the answer of `geomerge.methods.order`, as tiles and compiled loops apply it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from geomerge.methods.program import Value
from geomerge.methods.tile import Place, Tile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The k largest magnitudes of a tensor.

    Attributes:
        threshold: The k-th largest magnitude (``inf`` for k = 0).
        keep: How many of the elements equal to the threshold are among the k.
        equal: How many elements equal it, in each segment.
        every: All elements equal to the threshold are kept, or all of them are zeros.
        last: Flat index of the last element equal to the threshold that is kept, where it was looked for (see `placed`): tiles
            may then come in any order, and cut in any way.
    """

    threshold: float
    keep: int
    equal: tuple[int, ...]
    last: int | None = None

    @property
    def every(self) -> bool:
        return self.keep >= sum(self.equal) or self.threshold == 0.0

    def with_equals(self) -> Selection:
        """The same with all elements that equal the threshold."""
        return Selection(self.threshold, sum(self.equal), self.equal)

    def shrink_(self, values: Tensor, tile: Tile, label: object) -> Tensor:
        """Set the elements of `values` that are not among the k largest to zero, in place.

        Args:
            values: The signed values whose magnitudes were ranked, one tile of them.
            tile: The tile; tiles of a segment must come in order, as the engine's do.
            label: Names this selection among those applied to the same tile.
        """
        if isinstance(values, Value):
            return values.shrink_(self)
        if self.threshold == math.inf:
            return values.zero_()
        if self.threshold == 0.0:
            return values
        below = _next_below(self.threshold, single=values.dtype == torch.float32)
        if self.every:
            return torch.hardshrink(values, below, out=values)
        if self.last is not None:
            flat_values = values.view(-1)
            kept = min(max(self.last + 1 - tile.start, 0), flat_values.numel())
            for piece, limit in ((flat_values[:kept], below), (flat_values[kept:], self.threshold)):
                torch.hardshrink(piece, limit, out=piece)
            return values
        key = ("equal", label)
        left = tile.carry.get(key)
        if left is None:
            left = self.keep - sum(self.equal[: tile.segment])
        if left <= 0:
            return torch.hardshrink(values, self.threshold, out=values)
        if left < self.equal[tile.segment]:  # the last one that is kept lies in this segment: where?
            flat = values.reshape(-1).cpu().numpy()
            equal = np.logical_or(flat == self.threshold, flat == -self.threshold)
            number = int(np.count_nonzero(equal))
            tile.carry[key] = left - number
            if number > left:
                values.view(-1)[torch.from_numpy(np.flatnonzero(equal)[left:]).to(values.device)] = 0.0
        return torch.hardshrink(values, below, out=values)

    def limits(self, place: Place) -> tuple[float, float, int]:
        """What `shrink_` does to a segment, in numbers for compiled loops: ``(limit, equal, left)``.

        Kept are magnitudes above `limit`; of those that equal `equal`, where that is not NaN, only the first `left`.
        """
        if self.threshold in (math.inf, 0.0):
            return (math.inf if self.threshold else -1.0), math.nan, 0
        left = self.keep - sum(self.equal[: place.segment])
        if not self.every and left <= 0:
            return self.threshold, math.nan, 0
        below = _next_below(self.threshold, single=place.scan.single)
        if self.every or left >= self.equal[place.segment]:
            return below, math.nan, 0
        return below, self.threshold, left

    def mask(self, magnitudes: Tensor, tile: Tile, label: object) -> Tensor:
        """1.0 where an element is among the k largest, else 0.0 (zeros count as selected only above threshold 0)."""
        return self.shrink_(magnitudes.clone(), tile, label).ne_(0.0) if self.threshold else torch.ones_like(magnitudes)


NOTHING = Selection(math.inf, 0, ())


def share(part: float, n: int, *, binary: bool = False) -> int:
    """⌊part·n⌋ as a user means it: 0.29 of 100 elements are 29. The product of `binary` fractions is below that: 28."""
    return math.floor(part * n + (0.0 if binary else 1e-9))


def _next_below(value: float, *, single: bool) -> float:
    """The largest smaller number of float32 or float64: what is greater than it is at least `value`."""
    number = np.float32(value) if single else np.float64(value)
    return float(np.nextafter(number, number.dtype.type(0)))
