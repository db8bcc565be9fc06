"""Tensors that are folded and rotated while they are read: W·diag(g)·Q for readers, Qᵀ·W for writers.

Rows are made in blocks that the shape fixes, so the same bits come out wherever a tile begins and whichever thread asks. A
thread holds one block and a few rows of the input, never a whole matrix.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from geomerge.methods.buffers import empty
from geomerge.methods.tile import Source

if TYPE_CHECKING:
    from torch import Tensor


READ = 1 << 17
"""Elements in a block of a reader."""

WRITE = 1 << 18
"""Elements in a block of a writer; for each, the whole matrix is read once."""


class ConstantSource:
    """A tensor of equal elements: a norm's gain after it was folded into the readers."""

    dtype = "F64"

    def __init__(self, value: float, label: str) -> None:
        self.label = label
        self._value = value

    def read(self, start: int, out: Tensor) -> None:
        out.fill_(self._value)


class Once:
    """A tensor that is made when first asked for, and once for each device.

    Args:
        make: Makes it on the CPU.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._held: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """It, on a device."""
        with self._lock:
            if device not in self._held:
                cpu = torch.device("cpu")
                if cpu not in self._held:
                    with torch.inference_mode(False):
                        self._held[cpu] = self._make()
                if device not in self._held:
                    self._held[device] = self._held[cpu].to(device)
            return self._held[device]


def vector(source: Source, size: int, offset: float = 0.0) -> Once:
    """All of a short tensor, with a number added to each element."""

    def make() -> Tensor:
        values = empty(size, torch.float64)
        source.read(0, values)
        return values + offset

    return Once(make)


class BlockSource(ABC):
    """A matrix that is made in blocks of a fixed number of rows."""

    dtype = "F64"

    def __init__(self, source: Source, rows: int, columns: int, height: int) -> None:
        self.label = source.label
        self._source, self._rows, self._columns = source, rows, max(columns, 1)
        self._height = min(max(height, 1), max(rows, 1))
        self._place = threading.local()

    def read(self, start: int, out: Tensor) -> None:
        filled, size = 0, self._height * self._columns
        while filled < out.numel():
            at = start + filled
            index = at // size
            values = self._block(index, out.device)
            piece = values[at - index * size :][: out.numel() - filled]
            out[filled : filled + piece.numel()].copy_(piece)
            filled += piece.numel()

    def _block(self, index: int, device: torch.device) -> Tensor:
        """A block, flat; this thread's last one is kept."""
        held: tuple[int, torch.device, Tensor] | None = getattr(self._place, "held", None)
        if held is None or held[:2] != (index, device):
            self._place.held = None
            first = index * self._height
            last = min(first + self._height, self._rows)
            held = self._place.held = (index, device, self._make(first, last, device).reshape(-1))
        return held[2]

    @abstractmethod
    def _make(self, first: int, last: int, device: torch.device) -> Tensor:
        """Some rows of the result."""

    def _stored(self, first: int, last: int, device: torch.device) -> Tensor:
        """Some rows as they are stored."""
        values = torch.empty((last - first) * self._columns, dtype=torch.float64, device=device)
        self._source.read(first * self._columns, values)
        return values.view(last - first, self._columns)


class ReaderSource(BlockSource):
    """W·diag(g)·Q: a tensor that reads from the rotated stream, its norm's gain folded in.

    Args:
        source: W.
        rows, columns: Its shape.
        rotation: Q, shape ``(columns, columns)``; `None`: no rotation.
        gain: g, shape ``(columns,)``; `None`: no gain.
        height: Rows in a block, where they are asked for in no order; 0: as suits the width.
    """

    def __init__(
        self, source: Source, rows: int, columns: int, rotation: Once | None, gain: Once | None, height: int = 0
    ) -> None:
        super().__init__(source, rows, columns, height or READ // max(columns, 1))
        self._rotation, self._gain = rotation, gain

    def _make(self, first: int, last: int, device: torch.device) -> Tensor:
        values = self._stored(first, last, device)
        if self._gain is not None:
            values *= self._gain.on(device)
        return values if self._rotation is None else values @ self._rotation.on(device)


class WriterSource(BlockSource):
    """Qᵀ·W: a matrix that writes into the rotated stream.

    Args:
        source: W.
        rows, columns: Its shape.
        rotation: Q, shape ``(rows, rows)``.
    """

    def __init__(self, source: Source, rows: int, columns: int, rotation: Once) -> None:
        super().__init__(source, rows, columns, WRITE // max(columns, 1))
        self._rotation = rotation

    def _make(self, first: int, last: int, device: torch.device) -> Tensor:
        rotation = self._rotation.on(device)
        total = torch.zeros(last - first, self._columns, dtype=torch.float64, device=device)
        for k in range(0, self._rows, self._height):
            stop = min(k + self._height, self._rows)
            total.addmm_(rotation[k:stop, first:last].T, self._stored(k, stop, device))
        return total
