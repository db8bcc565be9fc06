"""Bounds around a threshold: what lies above and between them is counted and collected, and the threshold chosen from that.

A sample gives bounds that very probably hold the k-th largest value; one pass over all values narrows that down to a few. Where
the bounds missed it, wider ones are tried, and where these do, values are counted by 16 bits of their patterns at a time.
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

    Task vectors of bfloat16 models live on a coarse grid: one value may make up a tenth of a tensor, and a bracket may lie
    where two such meet. They are `common` and are counted apart, so that what is collected stays little.
    """

    def __init__(self, low: float, high: float, common: tuple[float, float]) -> None:
        self.low, self.high = low, high
        self.common = common
        self.above = 0
        self.equal = [0, 0]
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
        inside = np.logical_xor(not_above, magnitudes < self.low, out=not_above)
        for k, common in enumerate(self.common):
            if not math.isnan(common):
                equal = magnitudes == common
                self.equal[k] += int(np.count_nonzero(equal))
                np.logical_and(inside, np.logical_not(equal, out=equal), out=inside)
        self._pending.append(magnitudes[np.flatnonzero(inside)])

    def take(self, above: int, equal: tuple[int, int], inside: Floats) -> None:
        """Take in what was counted and collected elsewhere."""
        self.above += above
        self.equal = [have + more for have, more in zip(self.equal, equal, strict=True)]
        self._pending.append(inside)

    def fold(self, most: int) -> None:
        """Make `values` of what lies inside: all, if these are at most so many or mostly distinct; else distinct ones and
        their numbers."""
        values = self._pending[0] if len(self._pending) == 1 else np.concatenate(self._pending or [self.values])
        if values.size > most and _repeats(values):
            values = _sorted(values)
            edges = np.append(_starts(values), values.size)
            values, self.counts = values[edges[:-1]], edges[1:] - edges[:-1]
        self.values = values
        self._pending = []


def _repeats(values: Floats) -> bool:
    """Whether few values make up most of them, by a look at some."""
    some = values[:: -(-values.size // _LOOK)].tolist()
    return 2 * len(set(some)) < len(some)


_LOOK = 128
"""Values that are looked at, at most."""


def bounds_of(
    strata: Sequence[Floats], counts: Sequence[int], n: int, floor: float, spread: float
) -> list[tuple[native.Bounds, float]]:
    """Bounds from a sample, for the k-th largest of n values.

    Args:
        strata: For each tensor its part of the sample: pieces of elements that follow each other, shape ``(pieces, elements)``.
            Neighbours are often alike (a row's): how far the pieces differ says how much the sample is worth.
        counts: Each k, from 1 to n.
        n: Of how many values.
        floor: No value lies below it.
        spread: How many of the sample's standard deviations lie to either side of what it says.

    Returns:
        For each k the bounds, and the share of the values that is to be expected between them.
    """
    values = _sorted(np.concatenate([pieces.reshape(-1) for pieces in strata]))
    return [_bounds(values, strata, k, n, floor, spread) for k in counts]


def _bounds(
    values: Floats, strata: Sequence[Floats], k: int, n: int, floor: float, spread: float
) -> tuple[native.Bounds, float]:
    size = len(values)
    centre = min(max(int(size * (1 - k / n)), 0), size - 1)
    variance = max(size * (k / n) * (1 - k / n), _variance(strata, values[centre]))
    reach = spread * math.sqrt(variance) + 16
    low, high = int(centre - reach), int(centre + reach)
    inner = values[max(low, 0) : high + 1]
    distinct = inner[_starts(inner)]
    number = np.searchsorted(values, distinct, side="right") - np.searchsorted(values, distinct)
    most = [float(distinct[at]) for at in number.argsort()[:-3:-1] if number[at] > size // 256]
    first, second, *_ = *most, math.nan, math.nan
    least, largest = float(values[low]) if low > 0 else floor, float(values[high]) if high < size else math.inf
    return (least, largest, (first, second)), inner.size / size


def _sorted(values: Floats) -> Floats:
    """In ascending order: of many, by a compiled loop that takes half of the time of NumPy's sort, or less."""
    if values.size < _MANY or not native.available():
        return np.sort(values)
    found = np.array(values)
    native.sort(found)
    return found


_MANY = 1 << 11


def _starts(ordered: Floats) -> NDArray[np.int64]:
    """Where each of the distinct values begins."""
    first = np.ones(ordered.size, dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return np.flatnonzero(first)


def _variance(strata: Sequence[Floats], threshold: float) -> float:
    """Of the number of the sample's values above a threshold, from the differences between the pieces of each tensor."""
    total = 0.0
    for pieces in strata:
        n = len(pieces)
        if n > 1:
            above = np.count_nonzero(pieces > threshold, axis=1)
            total += (n * int(above @ above) - int(above.sum()) ** 2) / (n - 1)  # n times the variance
    return total


def choose(segments: list[Bracket], count: int) -> Selection | None:
    """The selection, or `None` when the threshold does not lie in the bracket."""
    above = sum(s.above for s in segments)
    if any(s.overflow for s in segments) or above >= count:
        return None
    values = [s.values for s in segments]
    number = [s.counts for s in segments]
    weights = None
    if any(counts is not None for counts in number):
        weights = np.concatenate(
            [np.ones(s.values.size, np.int64) if c is None else c for s, c in zip(segments, number, strict=True)]
        )
    found = _threshold(values, weights, _common(segments), count - above)
    if found is None:
        return None
    threshold, greater = found
    return Selection(threshold, count - above - greater, tuple(_equal(s, threshold) for s in segments))


def _common(segments: Sequence[Bracket]) -> list[tuple[float, int]]:
    """The common values and how often they are there, the largest first."""
    equal = (sum(s.equal[k] for s in segments) for k in range(2))
    return sorted(((value, n) for value, n in zip(segments[0].common, equal, strict=True) if n), reverse=True)


def _threshold(
    pieces: Sequence[Floats],
    weights: NDArray[np.int64] | None,
    common: Sequence[tuple[float, int]],
    count: int,
) -> tuple[float, int] | None:
    """The `count`-th largest of values (each so many times as its weight says) and of common ones, which are none of these and
    come the largest first; and how many are greater. `None` if there are not so many."""

    def greater(than: float) -> int:
        if weights is None:
            return sum(int(np.count_nonzero(piece > than)) for piece in pieces)
        return int(weights[np.concatenate(pieces) > than].sum())

    passed = 0  # common values that are greater
    for value, number in common:
        before = greater(value) + passed
        if before < count <= before + number:
            return value, before
        if count <= before:
            break
        passed += number
    left = count - passed
    if left > (sum(piece.size for piece in pieces) if weights is None else int(weights.sum())):
        return None
    if weights is None:
        threshold, before = _of_many(pieces, left)
    else:
        values = np.concatenate(pieces)
        order = np.argsort(values, kind="stable")[::-1]  # which merges the segments' runs
        threshold = float(values[order[np.searchsorted(np.cumsum(weights[order]), left)]])
        before = greater(threshold)
    return threshold, before + passed


def _of_many(pieces: Sequence[Floats], count: int) -> tuple[float, int]:
    """The `count`-th largest, and how many are greater."""
    if native.available():
        return native.largest(pieces, count)
    # Not by a partition, which degenerates where few values make up most, as those of bfloat16 models do.
    ordered = np.sort(np.concatenate(pieces))
    threshold = ordered[-count]
    return float(threshold), ordered.size - int(np.searchsorted(ordered, threshold, side="right"))


def _equal(segment: Bracket, value: float) -> int:
    inside = segment.values == value
    found = np.count_nonzero(inside) if segment.counts is None else segment.counts[inside].sum()
    return int(found) + sum(n for common, n in zip(segment.common, segment.equal, strict=True) if common == value)


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
