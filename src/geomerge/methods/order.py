"""Exact order statistics of magnitudes in bounded memory: which elements are the k largest?

No sort of a tensor, ever. A sample predicts a narrow bracket for each threshold; one pass counts what lies above it and
collects the few values inside; a selection among those is exact. When the bracket misses (or more falls into it than
memory should hold), the answer is found by counting the magnitudes' bit patterns 16 bits at a time: a non-negative
float's bits, read as an integer, are in the order of the values.

The k largest are well defined down to the last element: of equal magnitudes the one with the lowest flat index wins.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from geomerge.methods.tile import Scan, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]

Magnitudes = Callable[[Tile], Sequence["Tensor"]]
"""Computes the magnitudes (float64, not negative) to be ranked, one tensor for each selection."""

_SAMPLE = 1 << 15
_COLLECT = 1 << 20
"""Values a bracket is meant to hold at most; beyond four times that, counting takes over."""


@dataclass(frozen=True)
class Selection:
    """The k largest magnitudes of a tensor.

    Attributes:
        threshold: The k-th largest magnitude (``inf`` for k = 0).
        keep: How many of the elements equal to the threshold are among the k.
        equal: How many elements equal it, in each segment.
        every: All elements equal to the threshold are kept, or all of them are zeros.
    """

    threshold: float
    keep: int
    equal: tuple[int, ...]

    @property
    def every(self) -> bool:
        return self.keep >= sum(self.equal) or self.threshold == 0.0

    def shrink_(self, values: Tensor, tile: Tile, label: object) -> Tensor:
        """Set the elements of `values` that are not among the k largest to zero, in place.

        Args:
            values: The signed values whose magnitudes were ranked, one tile of them.
            tile: The tile; tiles of a segment must come in order, as the engine's do.
            label: Names this selection among those applied to the same tile.
        """
        if self.threshold == math.inf:
            return values.zero_()
        if self.threshold == 0.0:
            return values
        below = _next_below(self.threshold, values.dtype)
        if self.every:
            return torch.hardshrink(values, below, out=values)
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

    def mask(self, magnitudes: Tensor, tile: Tile, label: object) -> Tensor:
        """1.0 where an element is among the k largest, else 0.0 (zeros count as selected only above threshold 0)."""
        return self.shrink_(magnitudes.clone(), tile, label).ne_(0.0) if self.threshold else torch.ones_like(magnitudes)


NOTHING = Selection(math.inf, 0, ())


def _next_below(value: float, dtype: torch.dtype) -> float:
    """The largest smaller number of the dtype: what is greater than it is at least `value`."""
    number = np.float32(value) if dtype == torch.float32 else np.float64(value)
    return float(np.nextafter(number, number.dtype.type(0)))


def largest(scan: Scan, magnitudes: Magnitudes, counts: Sequence[int]) -> list[Selection]:
    """The `counts[i]` largest elements of the i-th magnitude, exactly.

    Args:
        scan: The tensor.
        magnitudes: See `Magnitudes`; called for each tile of one or more passes.
        counts: How many elements to select of each; 0 selects nothing, the number of elements or more everything.
    """
    n = scan.numel
    found = [NOTHING if k <= 0 else Selection(0.0, n, (n,)) for k in counts]
    wanted = [i for i, k in enumerate(counts) if 0 < k < n]
    if wanted and n <= scan.tile and len(scan.segments) == 1:
        for i, selection in _in_one_tile(scan, magnitudes, {i: counts[i] for i in wanted}).items():
            found[i] = selection
    elif wanted:
        brackets = _brackets(scan, magnitudes, {i: counts[i] for i in wanted})
        budget = dict.fromkeys(wanted, 4 * _COLLECT)
        segments = scan.over(lambda tiles: _collect(tiles, magnitudes, brackets, budget))
        for i in wanted:
            found[i] = _choose([s[i] for s in segments], counts[i]) or _by_counting(scan, magnitudes, i, counts[i])
    return found


def _in_one_tile(scan: Scan, magnitudes: Magnitudes, counts: dict[int, int]) -> dict[int, Selection]:
    """The selections of a tensor that one tile holds."""

    def select(tiles: Iterator[Tile]) -> dict[int, Selection]:
        found = {}
        for i, m in enumerate(magnitudes(next(tiles))):
            if i in counts:
                flat: Floats = m.reshape(-1).cpu().numpy()
                threshold = float(np.partition(flat, flat.size - counts[i])[flat.size - counts[i]])
                greater = int(np.count_nonzero(flat > threshold))
                found[i] = Selection(threshold, counts[i] - greater, (int(np.count_nonzero(flat == threshold)),))
        return found

    return scan.over(select)[0]


def nth_smallest(scan: Scan, magnitudes: Magnitudes, ranks: Sequence[int]) -> list[float]:
    """The values at the 0-based `ranks` of the ascending order; `magnitudes` gives one tensor for each rank."""
    found = [s.threshold for s in largest(scan, magnitudes, [scan.numel - r for r in ranks])]
    if 0 in ranks:  # `largest` answers "all of them" without looking
        parts = scan.over(lambda tiles: [[m.min().item() for m in magnitudes(tile)] for tile in tiles])
        least = np.min([tile for segment in parts for tile in segment], axis=0)
        found = [float(least[i]) if r == 0 else value for i, (r, value) in enumerate(zip(ranks, found, strict=True))]
    return found


class _Bracket:
    """What one segment knows of one bracket: how many values lie above it, and which lie in it.

    Task vectors of bfloat16 models live on a coarse grid: one value may make up a tenth of a tensor. Such a `common` value
    is counted apart, so that what is collected stays little.
    """

    def __init__(self, low: float, high: float, common: float) -> None:
        self.low, self.high = low, high
        self.common = common
        self.above = 0
        self.equal = 0
        self.overflow = False
        self.values: Floats = np.empty(0)
        self.counts: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._pending: list[Floats] = []

    def add(self, magnitudes: Floats) -> None:
        """Take in one tile."""
        not_above = magnitudes <= self.high
        self.above += magnitudes.size - int(np.count_nonzero(not_above))
        if not math.isnan(self.common):
            equal = magnitudes == self.common
            self.equal += int(np.count_nonzero(equal))
            if self.low == self.high == self.common:
                return  # nothing else can lie between
        inside = np.logical_xor(not_above, magnitudes < self.low, out=not_above)
        if not math.isnan(self.common):
            np.logical_and(inside, np.logical_not(equal, out=equal), out=inside)
        found = magnitudes[np.flatnonzero(inside)]
        self._pending.append(found)

    def fold(self) -> None:
        """Distinct values and their numbers in place of the values themselves."""
        values, counts = np.unique(np.concatenate(self._pending or [self.values[:0]]), return_counts=True)
        if self.equal:
            at = int(np.searchsorted(values, self.common))
            values, counts = np.insert(values, at, self.common), np.insert(counts, at, self.equal)
            self.equal = 0
        if self.values.size:
            both = np.concatenate([self.values, values])
            values, place = np.unique(both, return_inverse=True)
            counts = np.bincount(place, np.concatenate([self.counts, counts]), values.size).astype(np.int64)
        self.values, self.counts = values, counts
        self._pending = []


def _brackets(scan: Scan, magnitudes: Magnitudes, counts: dict[int, int]) -> dict[int, tuple[float, float, float]]:
    """For each selection bounds that very probably hold its threshold, and the value that is common between them (or NaN)."""
    n = scan.numel
    size = min(max(_SAMPLE, int((3.2 * n / _COLLECT) ** 2)), 1 << 20)
    taken: dict[int, list[Floats]] = {i: [] for i in counts}
    for tile in scan.sample(size):
        for i, m in enumerate(magnitudes(tile)):
            if i in taken:
                taken[i].append(m.reshape(-1).cpu().numpy().copy())
    brackets = {}
    for i, k in counts.items():
        values = np.concatenate(taken.pop(i))
        size = len(values)
        centre = size * (1 - k / n)
        spread = 4 * math.sqrt(size * (k / n) * (1 - k / n)) + 16
        low, high = int(centre - spread), int(centre + spread)
        values.sort()
        inner, number = np.unique(values[max(low, 0) : high + 1], return_counts=True)
        common = float(inner[number.argmax()]) if inner.size and number.max() > size // 256 else math.nan
        bounds = (float(values[low]) if low > 0 else 0.0, float(values[high]) if high < size else math.inf)
        brackets[i] = (*bounds, common)
    return brackets


def _collect(
    tiles: Iterator[Tile],
    magnitudes: Magnitudes,
    brackets: dict[int, tuple[float, float, float]],
    budget: dict[int, int],
) -> dict[int, _Bracket]:
    """One segment's brackets. `budget` says how many values all segments may still collect."""
    found = {i: _Bracket(*bounds) for i, bounds in brackets.items()}
    for tile in tiles:
        for i, m in enumerate(magnitudes(tile)):
            if i in found and budget[i] >= 0:
                found[i].add(m.reshape(-1).cpu().numpy())
    for i, bracket in found.items():
        bracket.fold()
        budget[i] -= bracket.values.size
        bracket.overflow = budget[i] < 0
    return found


def _choose(segments: list[_Bracket], count: int) -> Selection | None:
    """The selection, or `None` when the threshold does not lie in the bracket."""
    above = sum(s.above for s in segments)
    if any(s.overflow for s in segments) or above >= count:
        return None
    values, place = np.unique(np.concatenate([s.values for s in segments]), return_inverse=True)
    number = np.bincount(place, np.concatenate([s.counts for s in segments]), values.size)
    reached = above + np.cumsum(number[::-1])
    at = int(np.searchsorted(reached, count))
    if at >= values.size:
        return None
    threshold = float(values[values.size - 1 - at])
    greater = above if at == 0 else int(reached[at - 1])
    return Selection(threshold, count - greater, tuple(_equal(s, threshold) for s in segments))


def _equal(segment: _Bracket, value: float) -> int:
    at = int(np.searchsorted(segment.values, value))
    return int(segment.counts[at]) if at < segment.values.size and segment.values[at] == value else 0


def _by_counting(scan: Scan, magnitudes: Magnitudes, which: int, count: int) -> Selection:
    """The same answer from four passes that count 16 bits of the magnitudes' patterns each, and one that counts equals."""
    prefix, greater = 0, 0
    lock = threading.Lock()
    for shift in (48, 32, 16, 0):
        total = np.zeros(1 << 16, dtype=np.int64)
        scan.over(lambda tiles, s=shift, p=prefix, t=total: _count_bits(tiles, magnitudes, which, s, p, t, lock))  # type: ignore[misc]
        reached = greater + np.cumsum(total[::-1])
        at = int(np.searchsorted(reached, count))
        greater = int(reached[at - 1]) if at else greater
        prefix = prefix << 16 | (0xFFFF - at)
    threshold = float(np.array(prefix, dtype=np.uint64).view(np.float64))

    def equal(tiles: Iterator[Tile]) -> int:
        return sum(int(np.count_nonzero(magnitudes(t)[which].reshape(-1).cpu().numpy() == threshold)) for t in tiles)

    return Selection(threshold, count - greater, tuple(scan.over(equal)))


def _count_bits(
    tiles: Iterator[Tile],
    magnitudes: Magnitudes,
    which: int,
    shift: int,
    prefix: int,
    total: NDArray[np.int64],
    lock: threading.Lock,
) -> None:
    for tile in tiles:
        flat: Floats = magnitudes(tile)[which].reshape(-1).cpu().numpy()
        bits = (flat.astype(np.float64) + 0.0).view(np.uint64) >> np.uint64(shift)
        if shift < 48:
            bits = bits[bits >> np.uint64(16) == prefix]
        counted = np.bincount((bits & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16)
        with lock:
            total += counted
