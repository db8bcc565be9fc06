"""Arcee Fusion: take over only the changes that matter for the rows' distributions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from geomerge.methods import native
from geomerge.methods.base import Elementwise
from geomerge.methods.functions import exp, log_of_ratio, near_log, polynomial
from geomerge.methods.order import nth_smallest
from geomerge.methods.properties import BASE, IDENTICAL
from geomerge.methods.registry import register
from geomerge.methods.sums import lane_sums
from geomerge.methods.tile import Loop, Place, Scan, Tile
from geomerge.methods.watched import watched

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]

_FLOOR = 1e-8
_SIZE, _CHANGE = 0.5, 2.0**-5
"""Of a row's numbers and of their changes: up to where the polynomials below are good ..."""
_LENGTH = 1 << 15
"""... and of rows, up to which the floor is small beside a softmax's shares."""
_CANCELLED = 2.0**-16
"""A divergence of so little of the mean change comes from a difference that has lost too many digits."""
_LANES = 8
# From the highest power down. Interpolated at Chebyshev's points: e^(x/2) and (eˣ − 1)/x; and some terms of e^(−x).
_ROOT = (
    1.552792454257085e-06, 2.174987576902487e-05, 0.00026041624574507194, 0.0026041590883559645,
    0.02083333335438143, 0.12500000037895992, 0.4999999999998356, 0.9999999999970393,
)  # fmt: skip
_LESS_ONE = (
    0.001388925219782528, 0.008333623981369434, 0.04166666665336185,
    0.16666666656022772, 0.5000000000000008, 1.0000000000000058,
)  # fmt: skip
_INVERSE = (-1 / 6, 1 / 2, -1.0, 1.0)


def importance(tile: Tile, divergences: Floats, columns: int) -> Tensor:
    """|Δ| times its row's divergence; leaves the tile's inputs as they are."""
    base, other = tile.inputs
    return (other - base).abs_().mul_(tile.along(divergences, columns))


def row_divergences(scan: Scan) -> Floats:
    """The Kullback–Leibler divergence of each row's softmax from the base's. Never negative: rounding may leave −10⁻¹⁷."""

    def measured(tiles: Iterator[Tile]) -> list[float]:
        return [value for tile in tiles for value in _divergences(*tile.inputs)]

    return np.maximum([value for part in scan.over(measured) for value in part], 0.0)


def _divergences(base: Tensor, other: Tensor) -> list[float]:
    """By rows: where the two are near from sums, elsewhere from every element's logarithm."""
    near = (base.abs().amax(-1) <= _SIZE) & ((other - base).abs_().amax(-1) <= _CHANGE) & (base.shape[1] <= _LENGTH)
    found = torch.empty(len(base), dtype=torch.float64)
    for rows, measure in ((near, _near_divergences), (~near, _far_divergences)):
        if rows.any():
            found[rows.cpu()] = measure(base[rows], other[rows])
    values: list[float] = found.tolist()
    return values


def _near_divergences(base: Tensor, other: Tensor) -> Tensor:
    found, mean = _from_sums(base, other)
    again = found.abs() < mean.abs() * _CANCELLED
    if again.any():  # a softmax does not change when all its row does: so without the mean change
        rows = again.to(base.device)
        found[again] = _from_sums(base[rows], other[rows] - mean[again].to(base.device).unsqueeze(1))[0]
    return found


def _from_sums(base: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The divergences from eight sums, as docs/architecture.md derives it, and the mean changes."""
    n, apart = base.shape[1], other - base
    powers, less_one = polynomial(base, _ROOT).square_(), polynomial(apart, _LESS_ONE).mul_(apart)
    change, inverse = powers * less_one, polynomial(other, _INVERSE)
    first = inverse * less_one
    values = (powers, change, (powers + change) * apart, less_one, apart, inverse, first, first * less_one)
    sums = torch.tensor([lane_sums(value, _LANES) for value in values], dtype=torch.float64)
    before, grown, moved, less_ones, aparts, inverses, firsts, seconds = sums
    after = before + grown
    mean = near_log(grown / (before + after))  # ln(after / before)
    lost, left = grown / after, before / after
    by_floor = aparts - mean * n - left * less_ones + lost * n
    by_square = left * left * seconds - 2 * lost * left * firsts + lost * lost * inverses
    return moved / after - mean + _FLOOR * by_floor + 0.5 * _FLOOR * _FLOOR * after * by_square, mean


def _far_divergences(base: Tensor, other: Tensor) -> Tensor:
    p, q = _softmax(other), _softmax(base)
    return torch.tensor(lane_sums(p * log_of_ratio(p, q)), dtype=torch.float64)


def _softmax(rows: Tensor) -> Tensor:
    powers = exp(rows - rows.amax(-1, keepdim=True))
    shares = torch.tensor(lane_sums(powers), dtype=powers.dtype, device=powers.device).reciprocal_()
    return powers.mul_(shares.unsqueeze(1)).add_(_FLOOR)


class _Important:
    """The compiled loop over importances, of which three quartiles are chosen; it finds rows' divergences as it meets them."""

    ranked = (0, 0, 0)

    def __init__(self, scan: Scan, columns: int) -> None:
        self.rows = native.Rows(columns, np.full(scan.numel // columns, math.nan), _FLOOR, known=False)
        if not scan.in_place:  # a sample's pieces come without the rest of their rows
            scan.over_segments(lambda segment: [self.count(p, {}, check=scan.checks) for p in scan.places(segment)])
            self.rows.known = True

    def count(
        self, place: Place, brackets: dict[int, native.Bounds], starts: Sequence[int] = (0,), *, check: bool
    ) -> tuple[bool, dict[int, native.Counted]]:
        scan, columns = place.scan, self.rows.columns
        inputs, bounds = scan.stored(place.start, place.numel), list(brackets.values())
        finite, counted = native.importance_survey(inputs, place.start, self.rows, bounds, starts, check=check)
        if not finite:  # perhaps in the rest of the rows
            for start in starts:
                first = (place.start + start) // columns * columns
                scan.look_again(first, -(-(place.start + start + place.numel - first) // columns) * columns)
        return finite, dict(zip(brackets, counted, strict=True))


def _own(scan: Scan, columns: int) -> bool:
    """Whether there are compiled loops for rows of such a length: much shorter ones would cost more than they save."""
    return scan.compiled and 64 <= columns <= native.ROW


@register
@dataclass(frozen=True)
class ArceeFusion(Elementwise):
    """Take over the other model's weight where its importance is an outlier, keep the base's elsewhere.

    mergekit estimates the quartiles from a million random elements without a seed, and writes float32 whatever dtype was
    asked for. Here the quartiles are exact and the dtype is kept.
    """

    name: ClassVar[str] = "arcee_fusion"
    title: ClassVar[str] = "Arcee Fusion"
    paper: ClassVar[str] = "Arcee AI 2025 (mergekit)"
    formula: ClassVar[str] = "θ = θ₀ + Δ·[I ≥ median(I) + 1.5·IQR(I)],  I = |Δ|·KL(softmax θ₁ ‖ softmax θ₀) by rows"
    when: ClassVar[str] = "To bring the most telling changes of one model into another and leave all else untouched."
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    interpolates: ClassVar[bool] = True
    properties: ClassVar[frozenset[str]] = frozenset({BASE, IDENTICAL})
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: arcee_fusion
base_model: ./chat
models: [{model: ./chat}, {model: ./code}]
dtype: bfloat16
"""

    @property
    def rows(self) -> bool:
        return True

    def measure(self, scan: Scan) -> tuple[Floats, int, float]:
        last, columns = scan.numel - 1, max(scan.columns or 1, 1)
        if last < 0:
            return np.zeros(1), 1, 0.0
        if columns == 1:  # the softmax of one number is 1: no importances, all of which reach the threshold of 0
            return np.zeros(1), scan.numel, 0.0
        own = _Important(scan, columns) if _own(scan, columns) else None
        divergences = row_divergences(scan) if own is None else own.rows.divergences
        ranks = [math.floor(q * last) for q in (0.25, 0.5, 0.75)]
        lower, median, upper = nth_smallest(
            scan, lambda tile: [importance(tile, divergences, columns)] * 3, ranks, recorded=True, loop=own
        )
        return divergences, columns, median + 1.5 * (upper - lower)

    def blend(self, tile: Tile, stats: tuple[Floats, int, float]) -> Tensor:
        divergences, columns, least = stats
        chosen = importance(tile, divergences, columns).ge_(least)
        base, other = tile.inputs
        return base.addcmul_(other.sub_(base), chosen)

    def compiled(self, scan: Scan, stats: tuple[Floats, int, float]) -> Loop | None:
        divergences, columns, least = stats
        if not _own(scan, columns):
            return None
        rows = native.Rows(columns, divergences)

        def choose(inputs: native.Inputs, place: Place, out: native.Stored, beginning: native.Doubles | None) -> bool:
            return native.importance(inputs, place.start, rows, least, out, beginning, check=scan.checks)

        return watched(scan, choose)
