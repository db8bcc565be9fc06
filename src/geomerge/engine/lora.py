"""Tensors that an adapter changes while they are read: W + s·B·A, and DoRA's m·(W + s·B·A)/‖W + s·B·A‖.

ΔW is never held whole: rows are made in blocks that the shape fixes (see `geomerge.align.sources.BlockSource`), in float64, so
the same bits come out for every tile size and any number of threads. The factors are held while their tensor is made.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from geomerge.align.sources import READ, BlockSource, Once
from geomerge.checkpoint.change import Change
from geomerge.methods.buffers import empty
from geomerge.methods.tile import Source

if TYPE_CHECKING:
    from torch import Tensor


def whole(source: Source, shape: tuple[int, ...]) -> Once:
    """All of a tensor in float64, as a matrix: shape ``(shape[0], rest)``."""

    def make() -> Tensor:
        values = empty(math.prod(shape), torch.float64)
        source.read(0, values)
        return values.view(shape[0], -1)

    return Once(make)


class LoraSource(BlockSource):
    """A tensor with an adapter's change.

    Args:
        source: W.
        shape: Its shape; dimensions after the first are flattened.
        change: The change.
        b, a: The factors, shapes ``(out, r)`` and ``(r, in)``; for a bias b alone, shape ``(1, out)`` or ``(out, 1)``.
        magnitude: DoRA's magnitudes, `out` numbers.
    """

    def __init__(
        self,
        source: Source,
        shape: tuple[int, ...],
        change: Change,
        b: Once,
        a: Once | None,
        magnitude: Once | None = None,
    ) -> None:
        rows, columns = shape[0], math.prod(shape[1:])
        super().__init__(source, rows, columns, READ // max(columns, 1))
        self._change, self._b, self._a, self._magnitude = change, b, a, magnitude
        self._norms = Once(self._column_norms)

    def _make(self, first: int, last: int, device: torch.device) -> Tensor:
        values = self._sum(first, last, device)
        if self._magnitude is None:
            return values
        magnitude = self._magnitude.on(device).reshape(-1)
        if self._change.transposed:
            return values.mul_(magnitude / _divisor(self._norms.on(device)))
        norms = values.square().sum(1).sqrt_()
        return values.mul_((magnitude[first:last] / _divisor(norms)).unsqueeze(1))

    def _sum(self, first: int, last: int, device: torch.device) -> Tensor:
        """Some rows of W + s·B·A."""
        values = self._stored(first, last, device)
        scale = self._change.scale
        if self._a is None:
            return values.add_(self._b.on(device).reshape(-1)[first:last].unsqueeze(1), alpha=scale)
        b, a = self._b.on(device), self._a.on(device)
        if self._change.transposed:
            return values.addmm_(a[:, first:last].T, b.T, alpha=scale)
        return values.addmm_(b[first:last], a, alpha=scale)

    def _column_norms(self) -> Tensor:
        """The norm of each column of W + s·B·A, where columns are the outputs: one pass over the blocks in order."""
        total = torch.zeros(self._columns, dtype=torch.float64)
        for first in range(0, self._rows, self._height):
            block = self._sum(first, min(first + self._height, self._rows), torch.device("cpu"))
            total += block.square_().sum(0)
        return total.sqrt_()


def _divisor(norms: Tensor) -> Tensor:
    """The norms, 1 for what is zero: it stays zero whatever its magnitude."""
    return torch.where(norms > 0, norms, 1.0)
