"""The Gram matrix of the inputs, centred on the first of them.

A linear combination of K tensors whose coefficients depend on norms and angles needs nothing of the tensors but their
K×K inner products: however many iterations a method makes, it makes them on this small matrix. Stored are the inner
products of (x₀, x₁ − x₀, …, x_{K−1} − x₀): for parents that share an ancestor the differences are a thousand times
smaller than the tensors, and angles computed from the raw products would be noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from geomerge.errors import UsageError
from geomerge.methods import native
from geomerge.methods.sums import lane_sums, sums_of_blocks
from geomerge.methods.tile import BLOCK, Scan, Segment, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray


COLLINEAR = 1e-15
"""Vectors whose Gram determinant is below this share of the product of their squared norms are collinear up to rounding."""


@dataclass(frozen=True)
class Gram:
    """Inner products of (x₀, x₁ − x₀, …): shape ``(K, K)``, or ``(slices, K, K)`` when measured slice by slice."""

    centred: NDArray[np.float64]

    @property
    def count(self) -> int:
        """K, the number of inputs."""
        return int(self.centred.shape[-1])

    def dot(self, i: int, j: int) -> NDArray[np.float64]:
        """⟨xᵢ, xⱼ⟩."""
        c = self.centred
        value = c[..., 0, 0]
        if i:
            value = value + c[..., 0, i]
        if j:
            value = value + c[..., 0, j]
        if i and j:
            value = value + c[..., i, j]
        return np.asarray(value)

    def norm(self, i: int) -> NDArray[np.float64]:
        """‖xᵢ‖."""
        return np.sqrt(np.maximum(self.dot(i, i), 0.0))

    def raw(self) -> NDArray[np.float64]:
        """The inner products of the inputs themselves: shape ``(…, K, K)``."""
        k = self.count
        return np.stack([np.stack([self.dot(i, j) for j in range(k)], -1) for i in range(k)], -2)

    def angle(self, i: int, j: int) -> NDArray[np.float64]:
        """The angle between xᵢ and xⱼ in radians, 0 where one of them is zero.

        ω = atan2(√(‖x‖²‖δ‖² − ⟨x, δ⟩²), ⟨x, x⟩ + ⟨x, δ⟩) with δ = xⱼ − xᵢ: Lagrange's identity on the difference,
        which keeps its relative precision down to angles that arccos in float32 would call zero.
        """
        c = self.centred
        if i == 0:
            n, e, f = c[..., 0, 0], c[..., 0, j], c[..., j, j]
        else:
            n, e, f = self.dot(i, i), self.dot(i, j) - self.dot(i, i), self._squared_distance(i, j)
        apart = n * f - e * e
        return np.arctan2(np.sqrt(np.where(apart > COLLINEAR * n * f, apart, 0.0)), n + e)

    def _squared_distance(self, i: int, j: int) -> NDArray[np.float64]:
        c = self.centred
        return np.asarray(c[..., j, j] - 2 * c[..., i, j] + c[..., i, i])

    def of(self, combinations: NDArray[np.float64]) -> Gram:
        """The Gram matrix of linear combinations of the inputs: `combinations` has shape ``(number, K)``."""
        change = np.asarray(combinations, dtype=np.float64).copy()
        change[:, 0] = change.sum(1)  # x₀, x₁, … in the coordinates of x₀, x₁ − x₀, …
        change[1:] -= change[0]
        return Gram(change @ self.centred @ change.T)

    def task_vectors(self) -> Gram:
        """The Gram matrix of the task vectors x₁ − x₀, x₂ − x₀, …, itself centred on the first of them."""
        c = self.centred[..., 1:, 1:]
        k = c.shape[-1]
        change = np.eye(k)
        change[1:, 0] = -1.0
        return Gram(change @ c @ change.T)


class Unmeasured(Gram):
    """Of so many inputs that nobody has looked at: NaN throughout."""

    def __init__(self, count: int) -> None:
        object.__setattr__(self, "_count", count)

    @property
    def count(self) -> int:
        found: int = self.__dict__["_count"]
        return found

    @functools.cached_property
    def centred(self) -> NDArray[np.float64]:
        return np.full((self.count, self.count), np.nan)


def together(grams: Sequence[Gram]) -> Gram:
    """The Gram matrix of tensors laid end to end, from that of each."""
    total = [
        [math.fsum(each) for each in zip(*rows, strict=True)] for rows in zip(*(g.centred for g in grams), strict=True)
    ]
    return Gram(np.array(total))


def measure(scan: Scan, axis: str, statistics: int = 0) -> Gram:
    """The Gram matrix of a scan's inputs over whole tensors (`axis` ``tensor``) or over each column (``column``).

    Args:
        scan: The inputs.
        axis: What one matrix is measured over.
        statistics: So many of the inputs, the last ones, are no models: their sum weights the inner products.

    Raises:
        UsageError: A statistic is negative.
    """
    if axis == "column":
        return _measure_columns(scan)
    k = len(scan.sources) - statistics
    if scan.compiled and not statistics:
        parts = scan.over_segments(lambda segment: _compiled_products(scan, segment))
    else:
        parts = scan.over(lambda tiles: _block_products(tiles, k))
    totals = np.zeros((k, k))
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    for p, (i, j) in enumerate(pairs):
        totals[i, j] = totals[j, i] = math.fsum(v for part in parts for v in part[p])
    return Gram(totals)


def of_rows(tile: Tile) -> Gram:
    """The Gram matrices of each row of a tile; leaves the tile's inputs as they are."""
    stacked = torch.stack([tile.inputs[0], *(x - tile.inputs[0] for x in tile.inputs[1:])], 1)
    k = stacked.shape[1]
    centred = np.empty((stacked.shape[0], k, k))
    for i in range(k):
        for j in range(i, k):
            centred[:, i, j] = centred[:, j, i] = lane_sums(stacked[:, i] * stacked[:, j])
    return Gram(centred)


def _block_products(tiles: Iterator[Tile], k: int) -> list[list[float]]:
    """For each pair of the k centred models the sums of products over the segment's blocks."""
    found: list[list[float]] = []
    for tile in tiles:
        models, statistics = tile.stack[:k], tile.stack[k:]
        if not tile.thinned:
            models[1:].sub_(models[0])
        if len(statistics):
            if bool((statistics < 0).any()):
                raise UsageError("the statistics hold a negative number", where=tile.scan.name)
            models = models * statistics.sum(0).sqrt_()
        sums = [row for i in range(k) for row in sums_of_blocks(models[i:] * models[i], BLOCK)]
        found = [known + new for known, new in zip(found, sums, strict=True)] if found else sums
    return found


def _compiled_products(scan: Scan, segment: Segment) -> list[list[float]]:
    """The same from the inputs as they are stored."""
    found = []
    for place in scan.places(segment):
        found.append(native.gram(scan.stored(place.start, place.numel), BLOCK, single=scan.single))
        if scan.checks and not np.isfinite(found[-1]).all():
            scan.look_again(place.start, place.numel)
    sums: list[list[float]] = np.concatenate(found, 1).tolist()
    return sums


def by_rows(scan: Scan) -> Gram:
    """The Gram matrix of each row of a scan that is cut by rows."""
    width = max(scan.columns or 1, 1)

    def measured(tiles: Iterator[Tile]) -> list[NDArray[np.float64]]:
        return [of_rows(tile).centred for tile in tiles]

    def compiled(segment: Segment) -> list[NDArray[np.float64]]:
        found = []
        for place in scan.places(segment):
            sums = native.gram(scan.stored(place.start, place.numel), width, single=False)
            if scan.checks and not np.isfinite(sums).all():
                scan.look_again(place.start, place.numel)
            found.append(_symmetric(sums, len(scan.sources)))
        return found

    parts = scan.over_segments(compiled) if scan.compiled and width <= native.ROW else scan.over(measured)
    return Gram(np.concatenate([centred for part in parts for centred in part]))


def _symmetric(sums: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Products of pairs i ≤ j, shape ``(pairs, slices)``, as matrices, shape ``(slices, k, k)``."""
    found = np.empty((sums.shape[1], k, k))
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    for row, (first, second) in zip(sums, pairs, strict=True):
        found[:, first, second] = found[:, second, first] = row
    return found


def _measure_columns(scan: Scan) -> Gram:
    """One Gram matrix for each position of the dimensions after the first: products added row after row, in order."""
    k, width = len(scan.sources), max(scan.columns or 1, 1)

    def accumulate(tiles: Iterator[Tile]) -> NDArray[np.float64]:
        """The sums of products of all pairs."""
        sums = [torch.zeros(k - i, width, dtype=torch.float64, device=scan.device) for i in range(k)]
        for tile in tiles:
            tile.task_vectors()
            for row in tile.stack.unbind(1):
                for i, each in enumerate(sums):
                    each.addcmul_(row[i:], row[i])
        return torch.cat(sums).cpu().numpy()

    def compiled(segment: Segment) -> NDArray[np.float64]:
        total = np.zeros((k * (k + 1) // 2, width))
        for place in scan.places(segment):
            native.gram_columns(scan.stored(place.start, place.numel), total)
            if scan.checks and not np.isfinite(total).all():
                scan.look_again(place.start, place.numel)
        return total

    total = np.zeros((k * (k + 1) // 2, width))
    for part in scan.over_segments(compiled) if scan.compiled else scan.over(accumulate):
        total += part
    return Gram(_symmetric(total, k))
