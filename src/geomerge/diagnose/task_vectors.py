"""Where two task vectors agree: the signs of their elements, and the places of their largest.

Both are shares of elements, so a sample estimates them: by default `SAMPLE` elements of each tensor, in pieces spread evenly,
which bounds the error of a tensor's share by about one point (two standard errors: 0.4 points for independent elements).
Tensors of no more elements are counted whole. `exact` counts every tensor whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from geomerge.methods.order import largest
from geomerge.methods.tile import Scan, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SAMPLE = 1 << 16
"""Elements of a tensor that are looked at."""

Shares = dict[tuple[int, int], tuple[float | None, float | None]]
"""Pair of models → sign agreement and overlap of the supports."""


@dataclass(frozen=True)
class _Counts:
    """Of one pair: elements in which both move, in which they move the same way, and in both supports."""

    moving: int = 0
    agreeing: int = 0
    common: int = 0

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(self.moving + other.moving, self.agreeing + other.agreeing, self.common + other.common)


def compare(scan: Scan, top: float, *, exact: bool = False) -> Shares:
    """Compare the task vectors of a scan whose first source is the base.

    Args:
        scan: The base and the models; it must not refuse numbers that are not finite (see `Scan.check`) twice.
        top: The share of a tensor's elements that counts as a task vector's support: the largest in magnitude, of equal
            ones those of the lowest flat index, never zeros.
        exact: Look at every element.

    Returns:
        For each pair of models the share of elements with the same sign among those that both moved, and the size of the
        common support over that of the smaller one; `None` where nothing moved.
    """
    return _whole(scan, top) if exact or scan.numel <= SAMPLE else _sampled(scan, top)


def _sampled(scan: Scan, top: float) -> Shares:
    pieces = [np.stack([_numpy(t).copy() for t in tile.task_vectors()]) for tile in scan.sample(SAMPLE)]
    return _of_array(np.concatenate(pieces, axis=1), top)


def _whole(scan: Scan, top: float) -> Shares:
    if scan.numel <= scan.tile:
        return _of_array(np.stack([_numpy(t) for t in next(scan.tiles(scan.segments[0])).task_vectors()]), top)
    experts = scan.experts
    k = _size(scan.numel, top)
    selections = largest(scan, lambda tile: [t.abs() for t in tile.task_vectors()], [k] * experts)

    def count(tiles: Iterator[Tile]) -> tuple[dict[tuple[int, int], _Counts], list[int]]:
        found = {pair: _Counts() for pair in combinations(range(experts), 2)}
        sizes = [0] * experts
        for tile in tiles:
            vectors = tile.task_vectors()
            masks = []
            for i, (selection, t) in enumerate(zip(selections, vectors, strict=True)):
                magnitude = t.abs()
                mask = _numpy(selection.mask(magnitude, tile, i)).astype(bool) & (_numpy(magnitude) > 0)
                sizes[i] += int(np.count_nonzero(mask))
                masks.append(mask)
            for i, j in found:
                found[i, j] += _count(_numpy(vectors[i]), _numpy(vectors[j]), masks[i], masks[j])
        return found, sizes

    parts = scan.over(count)
    sizes = [sum(part[1][i] for part in parts) for i in range(experts)]
    return {pair: _shares(sum((p[0][pair] for p in parts), _Counts()), sizes, pair) for pair in parts[0][0]}


def _of_array(vectors: NDArray[np.floating], top: float) -> Shares:
    """The same for task vectors in memory: shape ``(experts, elements)``."""
    k = _size(vectors.shape[1], top)
    masks = [_support(np.abs(v), k) for v in vectors]
    sizes = [int(np.count_nonzero(m)) for m in masks]
    return {
        (i, j): _shares(_count(vectors[i], vectors[j], masks[i], masks[j]), sizes, (i, j))
        for i, j in combinations(range(len(vectors)), 2)
    }


def _support(magnitudes: NDArray[np.floating], k: int) -> NDArray[np.bool_]:
    """Where the k largest are that are not zero; of equal ones the first."""
    threshold = np.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k]
    mask = magnitudes > threshold
    if threshold > 0:
        equal = np.flatnonzero(magnitudes == threshold)
        mask[equal[: k - int(np.count_nonzero(mask))]] = True
    return np.asarray(mask)


def _count(
    a: NDArray[np.floating], b: NDArray[np.floating], mask_a: NDArray[np.bool_], mask_b: NDArray[np.bool_]
) -> _Counts:
    both = (a != 0) & (b != 0)
    return _Counts(
        int(np.count_nonzero(both)),
        int(np.count_nonzero(both & ((a > 0) == (b > 0)))),
        int(np.count_nonzero(mask_a & mask_b)),
    )


def _shares(counts: _Counts, sizes: list[int], pair: tuple[int, int]) -> tuple[float | None, float | None]:
    smaller = min(sizes[pair[0]], sizes[pair[1]])
    return (
        counts.agreeing / counts.moving if counts.moving else None,
        counts.common / smaller if smaller else None,
    )


def _size(numel: int, top: float) -> int:
    return min(max(round(top * numel), 1), numel)


def _numpy(values: Tensor) -> NDArray[np.floating]:
    return values.reshape(-1).cpu().numpy()
