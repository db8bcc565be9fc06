"""Operands that are folded and rotated while they are read, and the rotations, found from the models' own tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from geomerge.align.procrustes import Block, cross_product, solve
from geomerge.align.sources import ConstantSource, Once, ReaderSource, WriterSource, vector
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.engine.plan import Anchor, Operand, Rotation, Transform
from geomerge.engine.stored import stored_source
from geomerge.methods.tile import Source

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.tokens.rows import IntArray


_AT_ONCE = 1 << 21
"""Elements of vectors that are read at once."""


class Transforms:
    """Opens transformed operands.

    Args:
        inputs: The opened models.
        transforms, rotations: Those of the plan, or of the planner, which adds to them.
    """

    def __init__(
        self, inputs: Sequence[Checkpoint], transforms: Sequence[Transform], rotations: Sequence[Rotation]
    ) -> None:
        self._inputs, self._transforms, self._rotations = inputs, transforms, rotations
        self._lock = threading.Lock()
        self._matrices: dict[int, Once] = {}
        self._gains: dict[tuple[int, str, float], Once] = {}

    def shape(self, operand: Operand) -> tuple[int, ...]:
        """The shape of an input's tensor."""
        return self._inputs[operand.input].logical[operand.tensor].shape

    def source(self, operand: Operand) -> Source:
        """An input's tensor as its transform makes it."""
        label = f"{self._inputs[operand.input].ref}: {operand.tensor}"
        stored = stored_source(self._inputs[operand.input], operand.tensor, label)
        if operand.transform < 0:
            return stored
        how = self._transforms[operand.transform]
        if how.constant is not None:
            return ConstantSource(how.constant, label)
        shape = self.shape(operand)
        rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        matrix = self._matrix(how.rotation) if how.rotation >= 0 else None
        if how.writes:
            return stored if matrix is None else WriterSource(stored, rows, columns, matrix)
        gain = self.gain(operand.input, how.gain, how.offset) if how.gain else None
        return ReaderSource(stored, rows, columns, matrix, gain, how.height)

    def gain(self, model: int, name: str, offset: float) -> Once:
        """What a norm of an input multiplies by."""
        key = (model, name, offset)
        with self._lock:
            if key not in self._gains:
                size = self._inputs[model].logical[name].shape[0]
                label = f"{self._inputs[model].ref}: {name}"
                self._gains[key] = vector(stored_source(self._inputs[model], name, label), size, offset)
            return self._gains[key]

    def _matrix(self, index: int) -> Once:
        with self._lock:
            if index not in self._matrices:
                self._matrices[index] = Once(lambda: self.rotation(self._rotations[index]))
            return self._matrices[index]

    # -- finding a rotation --------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Find all rotations now, before a process forks."""
        for index in range(len(self._rotations)):
            self._matrix(index).on(torch.device("cpu"))

    def rotation(self, rotation: Rotation) -> Tensor:
        """Q, shape ``(d, d)``; found once."""
        if not rotation.held:
            self.find(rotation)
        found: Tensor = rotation.held[0]
        return found

    def find(self, rotation: Rotation) -> int:
        """Find a rotation and keep it in its `held`.

        Returns:
            How many dimensions its vectors determine.
        """
        product = None
        for number, anchor in enumerate(rotation.anchors):
            shape = self.shape(anchor.moving)
            width = shape[0] if anchor.columns else shape[-1]
            if number == 0:
                added = cross_product(
                    self._token_blocks(rotation), width, centre=rotation.centre, normalise=rotation.normalise
                )
            else:
                added = cross_product(self._blocks(anchor), width)
            product = added if product is None else product + added
        assert product is not None
        found = solve(product)
        rotation.held[:] = [found.rotation]
        return found.determined

    def _token_blocks(self, rotation: Rotation) -> Callable[[], Iterator[Block]]:
        anchor = rotation.anchors[0]
        weights = None if rotation.weight == "none" else torch.from_numpy(log_frequencies(rotation.fixed))
        step = _step(self.shape(anchor.moving)[-1])

        def blocks() -> Iterator[Block]:
            for first in range(0, len(rotation.moving), step):
                part = slice(first, first + step)
                yield Block(
                    self.vectors(anchor.moving, rotation.moving[part]),
                    self.vectors(anchor.fixed, rotation.fixed[part]),
                    None if weights is None else weights[part],
                )

        return blocks

    def _blocks(self, anchor: Anchor) -> Callable[[], Iterator[Block]]:
        shape = self.shape(anchor.moving)
        count, width = (shape[1], shape[0]) if anchor.columns else (shape[0], shape[1])
        step = _step(width)

        def blocks() -> Iterator[Block]:
            for first in range(0, count, step):
                which = np.arange(first, min(first + step, count), dtype=np.int64)
                yield Block(
                    self.vectors(anchor.moving, which, columns=anchor.columns),
                    self.vectors(anchor.fixed, which, columns=anchor.columns),
                )

        return blocks

    def vectors(self, operand: Operand, which: IntArray, *, columns: bool = False) -> Tensor:
        """Some rows (or columns) of an input's matrix, any gain of its transform folded in, not rotated.

        Returns:
            Shape ``(len(which), d)``, float64.
        """
        source = self.source(operand._replace(transform=-1))
        height, width = self.shape(operand)
        how = self._transforms[operand.transform] if operand.transform >= 0 else Transform()
        if columns:
            return _columns(source, height, width, which)
        out = torch.empty(len(which), width, dtype=torch.float64)
        jumps = np.flatnonzero(np.diff(which) != 1) + 1
        starts: list[int] = [0, *jumps.tolist()] if len(which) else []
        for start, stop in zip(starts, [*starts[1:], len(which)], strict=True):
            source.read(int(which[start]) * width, out[start:stop].view(-1))
        return out if not how.gain else out * self.gain(operand.input, how.gain, how.offset).on(out.device)


def _columns(source: Source, height: int, width: int, which: IntArray) -> Tensor:
    """Columns of a matrix, as rows: the matrix is read once, a few rows at a time."""
    out = torch.empty(len(which), height, dtype=torch.float64)
    index = torch.from_numpy(which)
    step = _step(width)
    for first in range(0, height, step):
        last = min(first + step, height)
        rows = torch.empty((last - first) * width, dtype=torch.float64)
        source.read(first * width, rows)
        out[:, first:last] = rows.view(last - first, width)[:, index].T
    return out


def log_frequencies(ids: IntArray) -> np.ndarray:
    """Weights that fall with a token's rank as the logarithm of its frequency does.

    Vocabularies list tokens in the order in which training found them, the most frequent pairs first; by Zipf's law the
    frequency of rank r is about 1/r, so log(1 + V/r) is the logarithm of how often a token comes for each time the rarest does.
    """
    rank = np.empty(len(ids), dtype=np.float64)
    rank[np.argsort(ids, kind="stable")] = np.arange(1, len(ids) + 1)
    return np.asarray(np.log1p(len(ids) / rank))


def _step(width: int) -> int:
    return max(_AT_ONCE // max(width, 1), 1)
