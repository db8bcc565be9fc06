"""Writing a merge as 8-bit codes with scales: the scheme of the model that it came from, or one that the recipe asks for.

A row's scale is its largest magnitude over the largest code, rounded to the scales' dtype; a code is the element over the
scale, rounded to nearest. The error ‖decoded − θ‖/‖θ‖ of each tensor is compared with what the parents' own codes cost them,
which their scales tell: rounding to a grid of step s costs s²/12 for an element (for parents that are no codes: with what they
would lose in this scheme). Where the merge would lose more than
`ALLOWED` times as much, smaller scales are tried (a few outliers are then clipped for the sake of all others).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from geomerge.checkpoint.dtypes import to_torch
from geomerge.methods.tile import TILE, Source, block_sums

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.kernel import Prepared

ALLOWED = 1.5
"""A merge may lose so many times what its parents' codes lose."""

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Scales that are tried, as shares of the one that clips nothing."""

LARGEST = {"I8": 127.0, "F8_E4M3": 448.0, "F8_E5M2": 57344.0}


@dataclass(frozen=True)
class Coded:
    """What requantising one tensor cost.

    Attributes:
        error: ‖decoded − θ‖/‖θ‖.
        parents: The same for the parents' codes, estimated from their scales; the largest of them.
        shrink: The scale that was taken, as a share of the one that clips nothing.
    """

    error: float
    parents: float
    shrink: float

    @property
    def within(self) -> bool:
        """Whether the error keeps to `ALLOWED` times the parents'."""
        return self.error <= ALLOWED * self.parents


def encode(
    prepared: Prepared,
    rows: int,
    columns: int,
    *,
    codes: str,
    scale: str,
    parents: Sequence[Tensor | float],
    write: Callable[[int, Tensor], None],
) -> tuple[Tensor, Coded]:
    """Compute a tensor and write its codes.

    Args:
        prepared: The merge of the tensor.
        rows, columns: How many scales it has, and how many elements share one.
        codes: The codes' dtype by safetensors name.
        scale: The scales' dtype.
        parents: The scales of each parent that is stored as codes, or what one that is not would lose.
        write: Takes the start and the codes of each tile.

    Returns:
        The scales, and what it cost.
    """
    largest = torch.zeros(rows, dtype=torch.float64)
    squares: list[float] = []

    def look(start: int, values: Tensor) -> None:
        squares.extend(_squares(values))
        for row, piece in _by_row(start, values, columns):
            largest[row : row + len(piece)] = torch.maximum(largest[row : row + len(piece)], piece.abs().amax(1))

    _walk(prepared, look)
    squared = math.fsum(squares)
    # What the grid costs an element is s²/12 for whole numbers; a float's step grows with it, on average as computed here.
    losses = [p if isinstance(p, float) else _grid(p, columns, codes, squared) for p in parents]
    own = max(losses, default=math.inf)
    chosen, best = None, math.inf
    for shrink in SHRINK:
        scales = (largest * (shrink / LARGEST[codes])).to(to_torch(scale)).double()
        errors: list[float] = []

        def weigh(start: int, values: Tensor, scales: Tensor = scales, errors: list[float] = errors) -> None:
            errors.extend(_errors(start, values, scales, columns, codes))

        _walk(prepared, weigh)
        error = math.fsum(errors)
        if error < best:
            chosen, best = (scales, shrink), error
        if math.sqrt(best) <= ALLOWED * own * math.sqrt(squared):
            break
    assert chosen is not None
    scales, shrink = chosen

    def store(start: int, values: Tensor) -> None:
        for row, piece in _by_row(start, values, columns):
            at = max(row * columns, start)
            write(at, _code(piece, scales[row : row + len(piece), None], codes).reshape(-1))

    _walk(prepared, store)
    norm = math.sqrt(squared) or 1.0
    return scales.to(to_torch(scale)), Coded(math.sqrt(best) / norm, own, shrink)


def own_error(source: Source, rows: int, columns: int, codes: str) -> float:
    """‖decoded − θ‖/‖θ‖ of a tensor that would be stored in this scheme, clipping nothing."""
    largest = torch.zeros(rows, dtype=torch.float64)
    for start, values in _read(source, rows * columns):
        for row, piece in _by_row(start, values, columns):
            largest[row : row + len(piece)] = torch.maximum(largest[row : row + len(piece)], piece.abs().amax(1))
    scales = largest / LARGEST[codes]
    errors: list[float] = []
    squares: list[float] = []
    for start, values in _read(source, rows * columns):
        squares.extend(_squares(values))
        errors.extend(_errors(start, values, scales, columns, codes))
    squared = math.fsum(squares)
    return math.sqrt(math.fsum(errors) / squared) if squared else 0.0


def _squares(values: Tensor) -> list[float]:
    """Sums of squares. (Not `torch.dot`: its last bit depends on how many threads the library takes for it.)"""
    return block_sums(values.square())


def _errors(start: int, values: Tensor, scales: Tensor, columns: int, codes: str) -> Iterator[float]:
    """Sums of the squared errors of a tile."""
    for row, piece in _by_row(start, values, columns):
        step = scales[row : row + len(piece), None]
        yield from block_sums((_code(piece, step, codes).double() * step - piece).square_().reshape(-1))


def _read(source: Source, numel: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, numel, TILE):
        values = torch.empty(min(TILE, numel - start), dtype=torch.float64)
        source.read(start, values)
        yield start, values


def _walk(prepared: Prepared, look: Callable[[int, Tensor], None]) -> None:
    for segment in prepared.scan.segments:
        for start, values in prepared.tiles(segment):
            look(start, values.double())


def _code(values: Tensor, scale: Tensor, codes: str) -> Tensor:
    """The codes of some elements; rows of zeros have the scale 0."""
    x = torch.where(scale > 0, values / torch.where(scale > 0, scale, 1.0), 0.0).clamp_(-LARGEST[codes], LARGEST[codes])
    return x.round_().to(torch.int8) if codes == "I8" else x.float().to(to_torch(codes))


def _grid(scales: Tensor, columns: int, codes: str, squared: float) -> float:
    """The relative error of codes with these scales, were the elements of the merge's size."""
    if codes == "I8":
        return math.sqrt(float((scales.double() ** 2).sum()) * columns / 12 / max(squared, 1e-300))
    # A float of p mantissa bits errs by 2^-(p+1)/sqrt(3) of itself, uniformly over a binade on average by 0.72 of that.
    bits = 3 if codes == "F8_E4M3" else 2
    return 2.0 ** -(bits + 1) / math.sqrt(3) * 0.72


def _by_row(start: int, values: Tensor, columns: int) -> list[tuple[int, Tensor]]:
    """A tile cut at rows: first row and ``(rows, columns)`` pieces; partial rows are pieces of one row."""
    pieces = []
    at, stop = start, start + values.numel()
    while at < stop:
        row = at // columns
        whole = (stop - at) // columns if at % columns == 0 else 0
        end = at + whole * columns if whole else min((row + 1) * columns, stop)
        pieces.append((row, values[at - start : end - start].view(max(whole, 1), -1)))
        at = end
    return pieces
