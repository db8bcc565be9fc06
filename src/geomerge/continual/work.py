"""The two passes of a step over the tensors: the sum is taken further and measured, then the merged model is written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.layout import plan_layout
from geomerge.checkpoint.writer import OutputDirectory, disk_error
from geomerge.continual.rules import Rule
from geomerge.continual.state import FOLDER
from geomerge.engine.execute import Facts, Interrupted, Work
from geomerge.engine.loss import SAMPLE, RoundingLoss
from geomerge.engine.plan import Node
from geomerge.engine.sources import FileSource
from geomerge.errors import NotFiniteError
from geomerge.late import without_gradients
from geomerge.methods.tile import BLOCK, Segment, Source, block_sums
from geomerge.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 18
"""Elements of a tensor that are worked on at a time, where a step does not need all of them. A multiple of `BLOCK`."""

assert PIECE % BLOCK == 0


class SumFile:
    """The next running sum, while it is written into the output.

    Args:
        output: The output.
        nodes: The tensors that are merged.
    """

    def __init__(self, output: OutputDirectory, nodes: Sequence[Node]) -> None:
        self._layout = plan_layout([(n.name, "F64", n.shape) for n in nodes], metadata={"geomerge": __version__})
        self._folder = output.partial / FOLDER
        self._folder.mkdir()
        self._descriptors: list[int] = []
        for file in self._layout.files:
            path = self._folder / file.name
            try:
                self._descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666))
                os.ftruncate(self._descriptors[-1], file.size)
                os.pwrite(self._descriptors[-1], file.header, 0)
            except OSError as error:
                self.close()
                raise disk_error(error, path, self._layout.size) from None
        index = self._layout.index()
        if index is not None:
            output.write_json(f"{FOLDER}/{self._layout.index_name}", index)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write a tensor's elements from `start` on: flat float64."""
        place = self._layout.place[name]
        view = memoryview(values.contiguous().view(torch.uint8).numpy().data)
        offset = place.offset + start * 8
        try:
            while view:
                done = os.pwrite(self._descriptors[place.file], view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            path: Path = self._folder / self._layout.files[place.file].name
            raise disk_error(error, path, self._layout.size) from None

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            with suppress(OSError):
                os.close(self._descriptors.pop())


def stored(checkpoint: Checkpoint, name: str) -> Source:
    """A tensor of a running sum."""
    info = checkpoint.tensors[name]
    assert info.file is not None
    return FileSource(checkpoint, info, f"{FOLDER}: {name}")


def pieces(node: Node, *, whole: bool) -> list[Segment]:
    """A tensor in pieces, or as one."""
    size = max(node.numel, 1) if whole else PIECE
    return [Segment(i, s, min(s + size, node.numel)) for i, s in enumerate(range(0, node.numel, size))]


@dataclass
class Accumulate(Work):
    """Takes the sum further by all experts of this call.

    Attributes:
        rule: How.
        count: Experts so far.
        before: The sum so far; `None` at the start.
        after: Takes the next one.
        matrices: The names of weight matrices.
    """

    rule: Rule = field(default_factory=Rule)
    count: int = 0
    before: Checkpoint | None = None
    after: SumFile | None = None
    matrices: frozenset[str] = frozenset()

    @without_gradients()
    def make(self, node: Node, run: Callable[..., Iterable[Any]] = map) -> Facts:
        """One tensor's next sum; its facts are ‖τ‖² of each expert and ‖S‖²."""
        base, *experts = [self.builder.source(operand, node) for operand in node.operands]
        matrix = node.name in self.matrices
        whole = self.rule.whole(matrix)

        def advance(piece: Segment) -> list[list[float]]:
            if self.stop.is_set():
                raise Interrupted
            origin = self._read(base, piece)
            total = (
                torch.zeros_like(origin) if self.before is None else self._read(stored(self.before, node.name), piece)
            )
            squares = []
            for number, expert in enumerate(experts, self.count + 1):
                delta = self._read(expert, piece).sub_(origin)
                squares.append(block_sums(delta.square()))
                if whole:
                    delta, total = delta.view(node.shape), total.view(node.shape)
                total = self.rule.step(total, delta, number, matrix).reshape(-1)
            assert self.after is not None
            self.after.write(node.name, piece.start, total)
            self.advance(total.numel() * DTYPES[node.dtype].itemsize)
            return [*squares, block_sums(total.square())]

        found = list(run(advance, pieces(node, whole=whole)))
        number = len(experts) + 1
        return {"squares": [math.fsum(value for piece in found for value in piece[k]) for k in range(number)]}

    @staticmethod
    def _read(source: Source, piece: Segment) -> Tensor:
        values = torch.empty(piece.stop - piece.start, dtype=torch.float64)
        source.read(piece.start, values)
        if not math.isfinite(values.sum().item()) and not bool(torch.isfinite(values).all()):
            raise NotFiniteError(
                "the tensor holds NaN or Inf",
                where=source.label,
                hint="repair or retrain this parent, or leave it out",
            )
        return values


@dataclass
class Write(Work):
    """Writes θ₀ + S·factor."""

    total: Checkpoint | None = None
    factor: float = 1.0

    @without_gradients()
    def make(self, node: Node, run: Callable[..., Iterable[Any]] = map) -> Facts:
        """One tensor of the merged model, or a copy of the base's where the experts do not change it."""
        if node.method is None:
            return super().make(node, run)
        assert self.total is not None
        base, total = self.builder.source(node.operands[0], node), stored(self.total, node.name)
        round_ = self.builder.rounding(node)

        def write(piece: Segment) -> RoundingLoss:
            if self.stop.is_set():
                raise Interrupted
            values, change = (torch.empty(piece.stop - piece.start, dtype=torch.float64) for _ in range(2))
            base.read(piece.start, values)
            total.read(piece.start, change)
            loss = RoundingLoss()
            origin = values[:SAMPLE].clone()
            values.add_(change, alpha=self.factor)
            rounded = round_(piece.start, values)
            loss.add(values, rounded, origin)
            self.sink.write(node, piece.start, rounded)
            self.advance(values.numel() * DTYPES[node.dtype].itemsize)
            return loss

        loss = sum(run(write, pieces(node, whole=False)), RoundingLoss()).checked(node.name, node.dtype)
        return {"loss": [loss.change, loss.error, loss.elements]}
