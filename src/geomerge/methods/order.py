"""Exact order statistics in bounded memory: which elements of a tensor, or of a model, are the k largest?

No sort of a tensor, ever. A sample predicts a narrow bracket for each threshold; one pass counts what lies above it and
collects the few values inside; a selection among those is exact. When the bracket misses (or more falls into it than
memory should hold), the answer is found by counting the magnitudes' bit patterns 16 bits at a time: a non-negative
float's bits, read as an integer, are in the order of the values.

The k largest are well defined down to the last element: of equal magnitudes the one with the lowest flat index wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from geomerge.methods import native
from geomerge.methods.program import Program, Value, record
from geomerge.methods.tile import Place, Scan, Segment, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from geomerge.methods.walk import Walk

    Floats = NDArray[np.float64]

Over = Callable[[Callable[[Iterator[Tile]], Any]], list[Any]]
"""Runs a function on the tiles of every segment."""

Magnitudes = Callable[[Tile], Sequence["Tensor"]]
"""Computes the magnitudes (float64, not negative) to be ranked, one tensor for each selection."""

Look = Sequence[int] | Program
"""How compiled loops find magnitudes: those of task vectors (for each selection an expert's number, from 0), or recorded."""

_SAMPLE = 1 << 15
_PIECE = 64
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


def _next_below(value: float, *, single: bool) -> float:
    """The largest smaller number of float32 or float64: what is greater than it is at least `value`."""
    number = np.float32(value) if single else np.float64(value)
    return float(np.nextafter(number, number.dtype.type(0)))


def _look(scan: Scan, magnitudes: Magnitudes, experts: Sequence[int] | None, *, recorded: bool) -> Look | None:
    if not scan.compiled or (experts is None and not recorded):
        return None
    return experts if experts is not None else record(len(scan.sources), magnitudes, "bracket")


def largest(
    scan: Scan,
    magnitudes: Magnitudes,
    counts: Sequence[int],
    experts: Sequence[int] | None = None,
    *,
    recorded: bool = False,
) -> list[Selection]:
    """The `counts[i]` largest elements of the i-th magnitude, exactly.

    Args:
        scan: The tensor.
        magnitudes: See `Magnitudes`; called for each tile of one or more passes.
        counts: How many elements to select of each; 0 selects nothing, the number of elements or more everything.
        experts: For each selection the expert (from 0) whose |τ| it ranks, where `magnitudes` gives just that: compiled loops
            then compute it themselves.
        recorded: `magnitudes` can be recorded: see `geomerge.methods.program`.
    """
    n = scan.numel
    look = _look(scan, magnitudes, experts, recorded=recorded)
    found = [NOTHING if k <= 0 else Selection(0.0, n, (n,)) for k in counts]
    wanted = [i for i, k in enumerate(counts) if 0 < k < n]
    if wanted and n <= scan.tile and len(scan.segments) == 1:
        for i, selection in _in_one_tile(scan, magnitudes, {i: counts[i] for i in wanted}, look).items():
            found[i] = selection
    elif wanted:
        brackets = _brackets(scan, magnitudes, {i: counts[i] for i in wanted}, look)
        budget = dict.fromkeys(wanted, 4 * _COLLECT)
        segments = _collect(scan, magnitudes, brackets, budget, look)
        for i in wanted:
            found[i] = _choose([s[i] for s in segments], counts[i]) or _by_counting(scan.over, magnitudes, i, counts[i])
    return found


def placed(scan: Scan, magnitudes: Magnitudes, selections: Sequence[Selection]) -> list[Selection]:
    """The selections with the place of the last of the equal elements that are kept, each found in one segment."""
    found = []
    for i, selection in enumerate(selections):
        if selection.threshold == math.inf or selection.every:
            found.append(selection)
            continue
        reached = np.cumsum(selection.equal)
        index = int(np.searchsorted(reached, selection.keep))
        left = selection.keep - int(reached[index] - selection.equal[index])
        for tile in scan.tiles(scan.segments[index]):
            equal = np.flatnonzero(magnitudes(tile)[i].reshape(-1).cpu().numpy() == selection.threshold)
            if left <= equal.size:
                found.append(replace(selection, last=tile.start + int(equal[left - 1])))
                break
            left -= equal.size
    return found


def largest_of_all(
    walk: Walk, magnitudes: Magnitudes, counts: Sequence[int], experts: Sequence[int] | None = None
) -> dict[str, list[Selection]]:
    """As `largest`, over all tensors of a model together; of equal magnitudes those of earlier tensors win.

    Returns:
        For each tensor its share of each selection.
    """
    found: dict[str, list[Selection]] = {name: [] for name in walk.names}
    chosen = _select(walk, magnitudes, [min(k, walk.numel) for k in counts], experts)
    sizes = walk.over(lambda scan: scan.numel) if any(selection is None for selection in chosen) else []
    for k, selection in zip(counts, chosen, strict=True):
        if selection is None:  # all or nothing
            for name, size in zip(walk.names, sizes, strict=True):
                found[name].append(NOTHING if k <= 0 else Selection(0.0, size, (size,)))
            continue
        threshold, keep, equal = selection
        for name, here in zip(walk.names, equal, strict=True):
            found[name].append(Selection(threshold, min(max(keep, 0), sum(here)), tuple(here)))
            keep -= sum(here)
    return found


def nth_smallest_of_all(
    walk: Walk,
    values: Magnitudes,
    ranks: Sequence[int],
    experts: Sequence[int] | None = None,
    *,
    signed: bool = False,
    recorded: bool = False,
) -> list[float]:
    """The values at the 0-based `ranks` of the ascending order over all tensors of a model.

    Args:
        walk: The tensors.
        values: Gives one tensor for each rank.
        ranks: From 0 to the number of elements minus 1.
        experts, recorded: As in `largest`.
        signed: The values may be negative.
    """
    chosen = _select(walk, values, [walk.numel - r for r in ranks], experts, signed=signed, recorded=recorded)
    if any(c is None for c in chosen):  # the smallest, at which `_select` does not look
        parts = walk.over(lambda scan: scan.over(lambda tiles: [[v.min().item() for v in values(t)] for t in tiles]))
        least = np.min([tile for scan in parts for segment in scan for tile in segment], axis=0)
        return [float(least[i]) if c is None else c[0] for i, c in enumerate(chosen)]
    return [c[0] for c in chosen if c is not None]


def _select(
    walk: Walk,
    values: Magnitudes,
    counts: Sequence[int],
    experts: Sequence[int] | None = None,
    *,
    signed: bool = False,
    recorded: bool = False,
) -> list[tuple[float, int, list[list[int]]] | None]:
    """For each count the threshold, how many equal to it are among the largest, and how many there are: by tensor and segment.

    `None` for a count of nothing or of everything.
    """
    n = walk.numel
    wanted = {i: k for i, k in enumerate(counts) if 0 < k < n}
    found: list[tuple[float, int, list[list[int]]] | None] = [None] * len(counts)
    if not wanted:
        return found
    size = min(max(_SAMPLE, int((3.2 * n / _COLLECT) ** 2)), 1 << 22)

    def look(scan: Scan) -> Look | None:
        return _look(scan, values, experts, recorded=recorded)

    def sample(scan: Scan) -> dict[int, list[Floats]]:
        return _sample(scan, values, wanted, max(size * scan.numel // n, 1), look(scan)) if scan.numel else {}

    samples = walk.over(sample)
    floor = -math.inf if signed else 0.0
    brackets = {
        i: _bracket(np.concatenate([piece for each in samples for piece in each.get(i, ())]), k, n, floor)
        for i, k in wanted.items()
    }
    del samples
    budget = dict.fromkeys(wanted, 16 * _COLLECT)
    parts = walk.over(lambda scan: _collect(scan, values, brackets, budget, look(scan)))
    for i, k in wanted.items():
        selection = _choose([s[i] for scan in parts for s in scan], k)
        if selection is None:
            selection = _by_counting(walk.over_segments, values, i, k, signed=signed)
        equal = iter(selection.equal)
        found[i] = (selection.threshold, selection.keep, [[next(equal) for _ in scan] for scan in parts])
    return found


def _in_one_tile(scan: Scan, magnitudes: Magnitudes, counts: dict[int, int], look: Look | None) -> dict[int, Selection]:
    """The selections of a tensor that one tile holds."""
    found = {}
    for i, (flat,) in _sample(scan, magnitudes, counts, scan.numel, look).items():
        threshold = float(np.partition(flat, flat.size - counts[i])[flat.size - counts[i]])
        greater = int(np.count_nonzero(flat > threshold))
        found[i] = Selection(threshold, counts[i] - greater, (int(np.count_nonzero(flat == threshold)),))
    return found


def _sample(
    scan: Scan, magnitudes: Magnitudes, wanted: Iterable[int], size: int, look: Look | None
) -> dict[int, list[Floats]]:
    """Magnitudes from about so many places (all of them, if there are no more), by selection."""
    taken: dict[int, list[Floats]] = {i: [] for i in wanted}
    if look is not None:
        everything = dict.fromkeys(taken, _EVERYTHING)
        if scan.numel <= size:
            places = [(place, [0]) for segment in scan.segments for place in scan.places(segment)]
        else:
            # What is recorded may depend on the row: then neighbours are alike.
            places = scan.together(scan.sample_places(size, _PIECE if isinstance(look, Program) else 4096))
        for place, starts in places:
            for i, (_, _, values) in _count(place, everything, look, starts).items():
                taken[i].append(values)
        return taken
    for tile in scan.sample(size):
        for i, m in enumerate(magnitudes(tile)):
            if i in taken:
                taken[i].append(m.reshape(-1).cpu().numpy().copy())
    return taken


def nth_smallest(scan: Scan, magnitudes: Magnitudes, ranks: Sequence[int], *, recorded: bool = False) -> list[float]:
    """The values at the 0-based `ranks` of the ascending order; `magnitudes` gives one tensor for each rank."""
    counts = [scan.numel - r for r in ranks]
    found = [s.threshold for s in largest(scan, magnitudes, counts, recorded=recorded)]
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

    def fold(self) -> None:
        """Distinct values in order, and their numbers, in place of the values themselves."""
        values = np.sort(np.concatenate(self._pending or [self.values[:0]]))
        starts = (
            np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if values.size else np.empty(0, int)
        )
        self.values, self.counts = values[starts], np.diff(starts, append=values.size)
        if self.equal:
            at = int(np.searchsorted(self.values, self.common))
            self.values = np.concatenate([self.values[:at], [values.dtype.type(self.common)], self.values[at:]])
            self.counts = np.concatenate([self.counts[:at], [self.equal], self.counts[at:]])
        self._pending = []


def _brackets(
    scan: Scan, magnitudes: Magnitudes, counts: dict[int, int], look: Look | None
) -> dict[int, native.Bounds]:
    """For each selection bounds that very probably hold its threshold, and the value that is common between them (or NaN)."""
    n = scan.numel
    size = min(max(_SAMPLE, int((3.2 * n / _COLLECT) ** 2)), 1 << 20)
    taken = _sample(scan, magnitudes, counts, size, look)
    return {i: _bracket(np.concatenate(taken.pop(i)), k, n, 0.0) for i, k in counts.items()}


def _bracket(values: Floats, k: int, n: int, floor: float) -> native.Bounds:
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


_EVERYTHING: native.Bounds = (-math.inf, math.inf, math.nan)


def _count(
    place: Place, brackets: dict[int, native.Bounds], look: Look, starts: Sequence[int] = (0,)
) -> dict[int, native.Counted]:
    """What lies in and above the brackets at one place (or at others so many elements after it), by a compiled loop."""
    scan = place.scan
    if isinstance(look, Program):
        finite, found = look.count(place, brackets, starts, check=scan.checks)
    else:
        asked = [(look[i], bounds) for i, bounds in brackets.items()]
        inputs = scan.stored(place.start, place.numel)
        finite, counted = native.survey(inputs, asked, starts, single=scan.single, check=scan.checks)
        found = dict(zip(brackets, counted, strict=True))
    if not finite:
        for start in starts:
            scan.look_again(place.start + start, place.numel)
    return found


def _collect(
    scan: Scan,
    magnitudes: Magnitudes,
    brackets: dict[int, native.Bounds],
    budget: dict[int, int],
    look: Look | None,
) -> list[dict[int, _Bracket]]:
    """The brackets of all segments. `budget` says how many values they may still collect together."""

    def from_tiles(tiles: Iterator[Tile]) -> dict[int, _Bracket]:
        found = {i: _Bracket(*bounds) for i, bounds in brackets.items()}
        for tile in tiles:
            for i, m in enumerate(magnitudes(tile)):
                if i in found and budget[i] >= 0:
                    found[i].add(m.reshape(-1).cpu().numpy())
        return closed(found)

    def from_places(segment: Segment, look: Look) -> dict[int, _Bracket]:
        found = {i: _Bracket(*bounds) for i, bounds in brackets.items()}
        for place in scan.places(segment):
            wanted = {i: bounds for i, bounds in brackets.items() if budget[i] >= 0}
            for i, counted in _count(place, wanted, look).items():
                found[i].take(*counted)
        return closed(found)

    def closed(found: dict[int, _Bracket]) -> dict[int, _Bracket]:
        for i, bracket in found.items():
            bracket.fold()
            budget[i] -= bracket.values.size
            bracket.overflow = budget[i] < 0
        return found

    if look is not None:
        return scan.over_segments(lambda segment: from_places(segment, look))
    return scan.over(from_tiles)


def _choose(segments: list[_Bracket], count: int) -> Selection | None:
    """The selection, or `None` when the threshold does not lie in the bracket."""
    above = sum(s.above for s in segments)
    if any(s.overflow for s in segments) or above >= count:
        return None
    values = np.concatenate([s.values for s in segments])
    number = np.concatenate([s.counts for s in segments])
    order = np.argsort(values, kind="stable")  # which merges the segments' runs
    reached = above + np.cumsum(number[order[::-1]])
    at = int(np.searchsorted(reached, count))
    if at >= values.size:
        return None
    threshold = float(values[order[values.size - 1 - at]])
    greater = above + int(number[values > threshold].sum())
    return Selection(threshold, count - greater, tuple(_equal(s, threshold) for s in segments))


def _equal(segment: _Bracket, value: float) -> int:
    at = int(np.searchsorted(segment.values, value))
    return int(segment.counts[at]) if at < segment.values.size and segment.values[at] == value else 0


def _by_counting(over: Over, magnitudes: Magnitudes, which: int, count: int, *, signed: bool = False) -> Selection:
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
