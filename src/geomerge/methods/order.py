"""Exact order statistics in bounded memory: which elements of a tensor, or of a model, are the k largest?

No sort of a tensor, ever. A sample predicts a narrow bracket for each threshold; one pass counts what lies above it and
collects the few values inside; a selection among those is exact. When the bracket misses, a wider one is tried; when that
does (or more falls into one than memory should hold), the answer is found by counting the magnitudes' bit patterns 16 bits at
a time: a non-negative float's bits, read as an integer, are in the order of the values.

The k largest are well defined down to the last element: of equal magnitudes the one with the lowest flat index wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from geomerge.methods import native
from geomerge.methods.brackets import Bracket, Magnitudes, bounds_of, by_counting, choose
from geomerge.methods.program import record
from geomerge.methods.selection import NOTHING, Selection
from geomerge.methods.tile import SEGMENT, Place, Scan, Segment, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geomerge.methods.walk import Walk

    Floats = NDArray[np.float64]


class Counting(Protocol):
    """A compiled loop that computes magnitudes, such as a `Program`."""

    @property
    def ranked(self) -> Sequence[int]:
        """What each selection ranks, in numbers: selections of the same magnitudes have the same."""

    def count(
        self, place: Place, brackets: dict[int, native.Bounds], starts: Sequence[int] = (0,), *, check: bool
    ) -> tuple[bool, dict[int, native.Counted]]:
        """Count and collect magnitudes, as `native.survey` does; whether all inputs are finite (looked at if `check`)."""


Look = Sequence[int] | Counting
"""How compiled loops find magnitudes: those of task vectors (for each selection an expert's number, from 0), or others."""

_SAMPLE = 1 << 13
"""Elements in a sample, of tensors of up to two million elements; of up to twice as many as these no sample is taken."""
_PIECE = 256
"""Elements of it that follow each other."""
_WIDE = 0.12
"""Bounds that hold a larger share of the values come from too small a sample."""
_MOST = 1 << 20
"""Elements in the largest sample of a tensor; of a model four times as many."""
_SPREADS = (3.0, 8.0)
"""How many standard deviations a tensor's brackets reach to either side: those that missed are looked at once more, wider."""
_OF_ALL = (4.0, 32.0)
"""The same for a model's."""
_COLLECT = 1 << 20
"""Values a bracket of a tensor is meant to hold at most, and one of a model two and a half times as many; beyond four times so
many (of a model, sixteen times), counting takes over."""


def _ranked(look: Look) -> Sequence[int]:
    """What each selection ranks, in numbers."""
    return look if isinstance(look, Sequence) else look.ranked


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
    loop: Counting | None = None,
) -> list[Selection]:
    """The `counts[i]` largest elements of the i-th magnitude, exactly.

    Args:
        scan: The tensor.
        magnitudes: See `Magnitudes`; called for each tile of one or more passes.
        counts: How many elements to select of each; 0 selects nothing, the number of elements or more everything.
        experts: For each selection the expert (from 0) whose |τ| it ranks, where `magnitudes` gives just that: compiled loops
            then compute it themselves.
        recorded: `magnitudes` can be recorded: see `geomerge.methods.program`.
        loop: A quicker loop than what is recorded, for a scan that compiled loops may work on.
    """
    n = scan.numel
    look = loop or _look(scan, magnitudes, experts, recorded=recorded)
    found = [NOTHING if k <= 0 else Selection(0.0, n, (n,)) for k in counts]
    left = {i: k for i, k in enumerate(counts) if 0 < k < n}
    for spread in _SPREADS if left else ():
        small = n <= 2 * _SAMPLE
        brackets = dict.fromkeys(left, _EVERYTHING) if small else _brackets(scan, magnitudes, left, look, spread)
        budget = dict.fromkeys(left, 4 * _COLLECT)
        segments = _collect(scan, magnitudes, brackets, budget, _COLLECT // 2 // len(scan.segments), look)
        missed = {}
        for i, k in left.items():
            inside = [s[i] for s in segments]
            selection = choose(inside, k)
            if selection is None and spread < _SPREADS[-1] and not any(s.overflow for s in inside):
                missed[i] = k
            else:
                found[i] = selection or by_counting(scan.over, magnitudes, i, k)
        left = missed
        if not left:
            break
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
    loops: Callable[[Scan], Counting | None] | None = None,
) -> list[float]:
    """The values at the 0-based `ranks` of the ascending order over all tensors of a model.

    Args:
        walk: The tensors.
        values: Gives one tensor for each rank.
        ranks: From 0 to the number of elements minus 1.
        experts, recorded: As in `largest`.
        signed: The values may be negative.
        loops: A quicker loop than what is recorded, if there is one for a scan that compiled loops may work on.
    """
    counts = [walk.numel - r for r in ranks]
    chosen = _select(walk, values, counts, experts, signed=signed, recorded=recorded, loops=loops)
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
    loops: Callable[[Scan], Counting | None] | None = None,
) -> list[tuple[float, int, list[list[int]]] | None]:
    """For each count the threshold, how many equal to it are among the largest, and how many there are: by tensor and segment.

    `None` for a count of nothing or of everything.
    """
    n = walk.numel
    wanted = {i: k for i, k in enumerate(counts) if 0 < k < n}
    found: list[tuple[float, int, list[list[int]]] | None] = [None] * len(counts)
    if not wanted:
        return found
    size = min(max(_SAMPLE, int((1.6 * n / _COLLECT) ** 2)), 4 * _MOST)

    def look(scan: Scan) -> Look | None:
        own = loops(scan) if loops is not None and scan.compiled else None
        return own or _look(scan, values, experts, recorded=recorded)

    def sample(scan: Scan) -> tuple[int, dict[int, list[Floats]]]:
        own = look(scan)
        piece = scan.columns or 4096 if own is None else _PIECE
        limit = (
            -(-size * scan.numel // (n * piece)) * piece
        )  # whole pieces: not fewer elements than `_in_proportion` takes
        return scan.numel, _sample(scan, values, left, limit, own) if scan.numel else {}

    floor = -math.inf if signed else 0.0
    most = _COLLECT // 2 // (len(walk.names) + n // SEGMENT)
    left = wanted
    for spread in _OF_ALL:
        together = _in_proportion(walk.over(sample), size, n)
        brackets = {
            i: bounds for i, (bounds, _) in _bounds(together, left, n, floor, spread, walk.side_by_side).items()
        }
        del together
        budget = dict.fromkeys(left, 16 * _COLLECT)

        def collect(scan: Scan, brackets: Any = brackets, budget: Any = budget) -> list[dict[int, Bracket]]:
            return _collect(scan, values, brackets, budget, most, look(scan))

        parts = walk.over(collect)
        segments = [s for scan in parts for s in scan]
        inside = {i: [s[i] for s in segments] for i in left}
        chosen = walk.side_by_side(lambda item: choose(item[1], wanted[item[0]]), inside.items())
        missed = {}
        for (i, k), seen in zip(left.items(), chosen, strict=True):
            if seen is None and spread < _OF_ALL[-1] and not any(s.overflow for s in inside[i]):
                missed[i] = k
                continue
            selection = seen or by_counting(walk.over_segments, values, i, k, signed=signed)
            equal = iter(selection.equal)
            found[i] = (selection.threshold, selection.keep, [[next(equal) for _ in scan] for scan in parts])
        left = missed
        if not left:
            break
    return found


def _in_proportion(
    samples: Sequence[tuple[int, dict[int, list[Floats]]]], size: int, n: int
) -> dict[int, list[Floats]]:
    """Of each tensor's sample what its share of all n elements is of `size`.

    A norm gives a piece of 256 elements, of which there should be one: a tenth of the sample, of values that are not a
    thousandth of the model's, and no bracket would hold its threshold.

    Args:
        samples: For each tensor its number of elements and, by selection, pieces as `bounds_of` takes them.
        size, n: As above.
    """
    taken: dict[int, list[Floats]] = {}
    met = 0
    for numel, sampled in samples:
        quota = size * (met + numel) // n - size * met // n  # so that what is rounded down here is given to others
        met += numel
        same: dict[int, list[Floats]] = {}
        for i, pieces in sampled.items():
            if id(pieces) not in same:
                same[id(pieces)] = _thinned(pieces, quota)
            taken.setdefault(i, []).extend(same[id(pieces)])
    return taken


def _thinned(pieces: list[Floats], quota: int) -> list[Floats]:
    """About `quota` elements, as many of each piece."""
    if sum(piece.size for piece in pieces) <= quota:
        return pieces
    rows = pieces[0] if len(pieces) == 1 else np.concatenate([piece.reshape(1, -1) for piece in pieces], axis=1)
    number, length = rows.shape
    each = round(quota / number)
    return [rows[:, np.arange(each) * length // each]] if each else []


def _sample(
    scan: Scan, magnitudes: Magnitudes, wanted: Iterable[int], size: int, look: Look | None
) -> dict[int, list[Floats]]:
    """Magnitudes from about so many places (all of them, if there are no more), by selection: see `bounds_of`.

    Selections of the same magnitudes get the same arrays.
    """
    taken: dict[int, list[Floats]] = {i: [] for i in wanted}
    same: dict[int, int] = {}
    if look is not None:
        of = _ranked(look)
        first: dict[int, int] = {}
        same = {i: first.setdefault(of[i], i) for i in taken}
        everything = dict.fromkeys(first.values(), _EVERYTHING)
        if scan.numel <= size:
            places = [(place, [0]) for segment in scan.segments for place in scan.places(segment)]
        else:
            places = scan.sample_places(size, _PIECE)
        for place, starts in places:
            for i, (_, _, values) in _count(place, everything, look, starts).items():
                taken[i].append(values.reshape(len(starts), -1))
    else:
        for tile in scan.sample(size):
            found = magnitudes(tile)
            same = {i: next(j for j in taken if found[j] is found[i]) for i in taken}
            for i in set(same.values()):
                taken[i].append(found[i].reshape(1, -1).cpu().numpy().copy())
    joined = {i: [np.concatenate(pieces)] if scan.numel > size else pieces for i, pieces in taken.items() if pieces}
    return {i: joined[same.get(i, i)] for i in taken}


def _bounds(
    samples: dict[int, list[Floats]],
    counts: dict[int, int],
    n: int,
    floor: float,
    spread: float,
    run: Callable[[Callable[[list[int]], Any], Iterable[list[int]]], Iterable[Any]] = map,
) -> dict[int, tuple[native.Bounds, float]]:
    """`bounds_of` for each selection; what several have in common is sorted once."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, pieces in samples.items():
        alike.setdefault(tuple(map(id, pieces)), []).append(i)
    found = run(lambda of: bounds_of(samples[of[0]], [counts[i] for i in of], n, floor, spread), alike.values())
    return {
        i: bounds
        for of, all_of in zip(alike.values(), found, strict=True)
        for i, bounds in zip(of, all_of, strict=True)
    }


def nth_smallest(
    scan: Scan, magnitudes: Magnitudes, ranks: Sequence[int], *, recorded: bool = False, loop: Counting | None = None
) -> list[float]:
    """The values at the 0-based `ranks` of the ascending order; `magnitudes` gives one tensor for each rank. See `largest`."""
    counts = [scan.numel - r for r in ranks]
    found = [s.threshold for s in largest(scan, magnitudes, counts, recorded=recorded, loop=loop)]
    if 0 in ranks:  # `largest` answers "all of them" without looking
        parts = scan.over(lambda tiles: [[m.min().item() for m in magnitudes(tile)] for tile in tiles])
        least = np.min([tile for segment in parts for tile in segment], axis=0)
        found = [float(least[i]) if r == 0 else value for i, (r, value) in enumerate(zip(ranks, found, strict=True))]
    return found


def _brackets(
    scan: Scan, magnitudes: Magnitudes, counts: dict[int, int], look: Look | None, spread: float
) -> dict[int, native.Bounds]:
    """For each selection bounds that very probably hold its threshold, and the values that are common between them."""
    n = scan.numel
    each = 1.0 if look is None else len(counts) / len({_ranked(look)[i] for i in counts})  # selections of a magnitude
    size = min(max(_SAMPLE, int((n / 3 * each) ** (2 / 3))), _MOST)  # costs about as much as what is collected by it
    while True:
        found = _bounds(_sample(scan, magnitudes, counts, size, look), counts, n, 0.0, spread)
        share = max(share for _, share in found.values())
        if (share < _WIDE and share * n <= 2 * _COLLECT) or size >= min(n, _MOST):
            return {i: bounds for i, (bounds, _) in found.items()}
        size = min(4 * size, _MOST)  # rows differ much


_EVERYTHING: native.Bounds = (-math.inf, math.inf, (math.nan, math.nan))


def _count(
    place: Place, brackets: dict[int, native.Bounds], look: Look, starts: Sequence[int] = (0,)
) -> dict[int, native.Counted]:
    """What lies in and above the brackets at one place (or at others so many elements after it), by a compiled loop."""
    scan = place.scan
    if not isinstance(look, Sequence):
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
    most: int,
    look: Look | None,
) -> list[dict[int, Bracket]]:
    """The brackets of all segments.

    Args:
        scan, magnitudes, look: As above.
        brackets: Their bounds.
        budget: How many values they may still collect together.
        most: So many of a segment are kept as they are; of more only distinct ones and their numbers.
    """

    def from_tiles(tiles: Iterator[Tile]) -> dict[int, Bracket]:
        found = {i: Bracket(*bounds) for i, bounds in brackets.items()}
        for tile in tiles:
            for i, m in enumerate(magnitudes(tile)):
                if i in found and budget[i] >= 0:
                    found[i].add(m.reshape(-1).cpu().numpy())
        return closed(found)

    def from_places(segment: Segment, look: Look) -> dict[int, Bracket]:
        found = {i: Bracket(*bounds) for i, bounds in brackets.items()}
        for place in scan.places(segment):
            wanted = {i: bounds for i, bounds in brackets.items() if budget[i] >= 0}
            for i, counted in _count(place, wanted, look).items():
                found[i].take(*counted)
        return closed(found)

    def closed(found: dict[int, Bracket]) -> dict[int, Bracket]:
        for i, bracket in found.items():
            bracket.fold(most)
            budget[i] -= bracket.values.size
            bracket.overflow = budget[i] < 0
        return found

    if look is not None:
        return scan.over_segments(lambda segment: from_places(segment, look))
    return scan.over(from_tiles)
