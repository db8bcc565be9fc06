"""Bounds around a threshold: what lies above and between them is counted and collected, and the threshold chosen from that.

A sample gives bounds that very probably hold the k-th largest value; one pass over all values narrows that down to a few. Where
the bounds missed it, values are counted by 16 bits of their patterns at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from geomerge.methods import native
from geomerge.methods.selection import Selection
from geomerge.methods.tile import Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]

Over = Callable[[Callable[[Iterator[Tile]], Any]], list[Any]]
"""Runs a function on the tiles of every segment."""

Magnitudes = Callable[[Tile], Sequence["Tensor"]]
"""Computes the magnitudes (float64, not negative) to be ranked, one tensor for each selection."""


class Bracket:
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
        self.counts: NDArray[np.int64] | None = None
        """How often each of `values` is there; `None`: once, and they are in no order."""
        self._pending: list[Floats] = []

    def add(self, magnitudes: Floats) -> None:
        """Take in one tile."""
        if native.available():
            self.take(*native.bracket(magnitudes, (self.low, self.high, self.common)))
            return
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

    def take(self, above: int, equal: int, inside: Floats) -> None:
        """Take in what was counted and collected elsewhere."""
        self.above, self.equal = self.above + above, self.equal + equal
        self._pending.append(inside)

    def fold(self, most: int) -> None:
        """Make `values` of what lies inside: all, if these are at most so many, or else distinct ones and their numbers."""
        values = self._pending[0] if len(self._pending) == 1 else np.concatenate(self._pending or [self.values])
        if values.size > most:
            values = np.sort(values)
            starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
            values, self.counts = values[starts], np.diff(starts, append=values.size)
        self.values = values
        self._pending = []


def bounds_of(values: Floats, k: int, n: int, floor: float) -> native.Bounds:
    """Bounds from a sample, for the k-th largest of n values; no value lies below `floor`."""
    size = len(values)
    centre = size * (1 - k / n)
    spread = 4 * math.sqrt(size * (k / n) * (1 - k / n)) + 16
    low, high = int(centre - spread), int(centre + spread)
    first, last = max(low, 0), min(high, size - 1)
    values.partition(first)  # one place after the other: both at once take seven times as long
    if last > first:
        values[first + 1 :].partition(last - first - 1)
    inner, number = np.unique(values[first : last + 1], return_counts=True)
    common = float(inner[number.argmax()]) if inner.size and number.max() > size // 256 else math.nan
    return float(values[low]) if low > 0 else floor, float(values[high]) if high < size else math.inf, common


def choose(segments: list[Bracket], count: int) -> Selection | None:
    """The selection, or `None` when the threshold does not lie in the bracket."""
    above = sum(s.above for s in segments)
    if any(s.overflow for s in segments) or above >= count:
        return None
    equal, common = sum(s.equal for s in segments), segments[0].common
    values = np.concatenate([s.values for s in segments])
    number = [s.counts for s in segments]
    weights = None
    if any(counts is not None for counts in number):
        weights = np.concatenate(
            [np.ones(s.values.size, np.int64) if c is None else c for s, c in zip(segments, number, strict=True)]
        )
    found = _threshold(values, weights, equal, common, count - above)
    if found is None:
        return None
    threshold, greater = found
    return Selection(threshold, count - above - greater, tuple(_equal(s, threshold) for s in segments))


def _threshold(
    values: Floats, weights: NDArray[np.int64] | None, equal: int, common: float, count: int
) -> tuple[float, int] | None:
    """The `count`-th largest of values (each so many times as its weight says) and of `equal` times `common`, and how many
    are greater; `None` if there are not so many."""

    def greater(than: float) -> int:
        larger = values > than
        return int(np.count_nonzero(larger) if weights is None else weights[larger].sum())

    before = greater(common) if equal else 0
    if equal and before < count <= before + equal:
        return common, before
    left = count - equal if equal and count > before else count
    if weights is None:
        if left > values.size:
            return None
        threshold = float(np.partition(values, values.size - left)[values.size - left])
    else:
        order = np.argsort(values, kind="stable")[::-1]  # which merges the segments' runs
        at = int(np.searchsorted(np.cumsum(weights[order]), left))
        if at >= values.size:
            return None
        threshold = float(values[order[at]])
    return threshold, greater(threshold) + (equal if common > threshold else 0)


def _equal(segment: Bracket, value: float) -> int:
    inside = segment.values == value
    found = np.count_nonzero(inside) if segment.counts is None else segment.counts[inside].sum()
    return int(found) + (segment.equal if segment.common == value else 0)


def by_counting(over: Over, magnitudes: Magnitudes, which: int, count: int, *, signed: bool = False) -> Selection:
    """The same answer from four passes that count 16 bits of the magnitudes' patterns each, and one that counts equals."""
    prefix, greater = 0, 0
    for shift in (48, 32, 16, 0):

        def count_bits(tiles: Iterator[Tile], shift: int = shift, prefix: int = prefix) -> tuple[Any, Any]:
            total = np.zeros(1 << 16, dtype=np.int64)
            for tile in tiles:
                bits = _ordered_bits(magnitudes(tile)[which].reshape(-1).cpu().numpy(), signed=signed)
                if shift < 48:
                    bits = bits[bits >> np.uint64(shift + 16) == prefix]
                total += np.bincount((bits >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16)
            there = np.flatnonzero(total)
            return there, total[there]

        total = np.zeros(1 << 16, dtype=np.int64)
        for there, counts in over(count_bits):
            total[there] += counts
        reached = greater + np.cumsum(total[::-1])
        at = int(np.searchsorted(reached, count))
        greater = int(reached[at - 1]) if at else greater
        prefix = prefix << 16 | (0xFFFF - at)
    if signed:
        prefix = prefix ^ _SIGN if prefix & _SIGN else prefix ^ (2**64 - 1)
    threshold = float(np.array(prefix, dtype=np.uint64).view(np.float64))

    def equal(tiles: Iterator[Tile]) -> int:
        return sum(int(np.count_nonzero(magnitudes(t)[which].reshape(-1).cpu().numpy() == threshold)) for t in tiles)

    return Selection(threshold, count - greater, tuple(over(equal)))


_SIGN = 1 << 63


def _ordered_bits(values: Floats, *, signed: bool) -> NDArray[np.uint64]:
    """Patterns that are in the order of the values."""
    bits = (values.astype(np.float64) + 0.0).view(np.uint64)
    if not signed:
        return bits
    return np.where(bits >> np.uint64(63) == 1, ~bits, bits | np.uint64(_SIGN))
