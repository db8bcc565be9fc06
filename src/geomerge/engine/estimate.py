"""What a plan will cost and lose, measured on a few elements of each kind of work instead of guessed."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.dtypes import DTYPES, to_torch
from geomerge.engine.build import Builder
from geomerge.engine.execute import Work, cores
from geomerge.engine.loss import RoundingLoss
from geomerge.engine.matrices import ROOM, whole_matrices
from geomerge.engine.plan import Node, Plan
from geomerge.late import torch_alone
from geomerge.methods import native
from geomerge.methods.chain import thinned
from geomerge.methods.kernel import prepare
from geomerge.methods.rest import is_matrix, merges_whole
from geomerge.methods.tile import TILE, Scan, Source, TensorSource, stored_of

if TYPE_CHECKING:
    from geomerge.engine.run import Progress

_SAMPLE = 1 << 19
_TENSORS_SAMPLED = 8
_SHAPES_SAMPLED = 6
_SIDES = (64, 128, 256, 256)
"""The shorter sides of the corners of a matrix that are tried; the other ones are longer as the matrix's is, ..."""
_LONGEST = 4096
"""... but for this."""
_LONG = 0.5
"""Seconds of an evaluation after which no larger corner is tried."""
_COPY_RATE = 1.5e9
"""Bytes each second that one core moves from page cache to page cache; only for what is copied without arithmetic."""
_WRITE_RATE = 5e9
"""Bytes each second that one core moves into the page cache."""


Kind: TypeAlias = tuple[str, tuple[int, ...]]
"""The name of a method, and the shape of a matrix; none for other tensors."""

Spent: TypeAlias = dict[Kind, list[float]]
"""Seconds, and elements or for matrices operations."""


@dataclass(frozen=True)
class Estimate:
    """What is expected of a run.

    Attributes:
        read: Bytes read from the inputs in all passes (from the second pass on mostly out of the page cache).
        written: Bytes of the output's tensors.
        memory: Anonymous memory in bytes beside the libraries': buffers of all threads.
        seconds: Wall time with warm inputs, extrapolated from the sample; a cold or slow disk adds its own.
        rounding_loss: The share of the task vectors' norm that rounding to the output's dtype takes, on the sample.
    """

    read: int
    written: int
    memory: int
    seconds: float
    rounding_loss: float | None


def estimate(
    plan: Plan, inputs: Sequence[Checkpoint], *, threads: int | None = None, progress: Progress | None = None
) -> Estimate:
    """Estimate cost and loss by merging half a million elements of up to 8 tensors for each method, or corners of matrices of
    up to 6 shapes.

    Args:
        plan: The plan.
        inputs: Its opened inputs.
        threads: As the run will have them.
        progress: Told of each tensor that is tried, where some are matrices: these may take seconds.
    """
    threads = threads or cores()
    nodes = list(plan.output_nodes())
    loss = RoundingLoss()
    spent: Spent = defaultdict(lambda: [0.0, 0.0])
    builder = Builder(plan, inputs)
    sampled = _sampled(plan)
    told = progress if any(map(_is_whole, sampled)) else None
    if told is not None:
        told.start(len(sampled), 0)
    with torch_alone():
        for node in sampled:
            seconds, work, found = _try(builder, node, _SIDES[0])
            for side in _SIDES[1:] if _is_whole(node) else _SIDES[:1]:
                # With buffers and code paths warm, and of matrices a larger piece.
                again, more, found = _try(builder, node, side)
                if again / more < seconds / work:
                    seconds, work = again, more
                if again > _LONG:
                    break
            spent[_kind(node)][0] += seconds
            spent[_kind(node)][1] += work
            loss += found.checked(node.name, node.dtype)
            if told is not None:
                told.advance(1)
    return Estimate(
        read=sum(_bytes_read(plan, n, inputs) for n in nodes),
        written=plan.nbytes,
        memory=_memory(nodes, threads) + _matrix_memory([whole_matrices(plan, n) for n in nodes], threads),
        seconds=sum(_seconds(plan, n, spent) for n in nodes) / threads,
        rounding_loss=loss.share,
    )


def _sampled(plan: Plan) -> list[Node]:
    """Nodes to try: some of each method, of the larger ones, or a matrix of each of the shapes that have most elements; none
    that would have to decompose earlier stages' matrices."""
    outputs = set(plan.outputs)
    by_kind: dict[Kind, list[Node]] = defaultdict(list)
    for index, node in enumerate(plan.nodes):
        wanted = index in outputs or _is_whole(node)
        if node.method is not None and node.numel and not node.scales and wanted and not _stages(plan, node):
            by_kind[_kind(node)].append(node)
    matrices = [nodes for (_, shape), nodes in by_kind.items() if shape]
    matrices.sort(key=lambda alike: -sum(n.numel for n in alike))
    chosen = [nodes[len(nodes) // 2] for nodes in matrices[:_SHAPES_SAMPLED]]
    for (_, shape), nodes in by_kind.items():
        if not shape:
            by_size = sorted(nodes, key=lambda n: -n.numel)[: 8 * _TENSORS_SAMPLED]
            chosen += by_size[:: max(len(by_size) // _TENSORS_SAMPLED, 1)][:_TENSORS_SAMPLED]
    return chosen


def _is_whole(node: Node) -> bool:
    return merges_whole(node.method, node.shape) or (is_matrix(node.shape) and any(step.whole for step in node.chain))


def _kind(node: Node) -> Kind:
    """What nodes have in common that cost alike: the method, and of whole matrices the shape."""
    assert node.method is not None
    return node.method.name, tuple(node.shape) if _is_whole(node) else ()


def _rate(node: Node, spent: Spent) -> tuple[float, float] | None:
    """Seconds and work of what was tried of a node's kind; of matrices of other shapes, where it was none of this one."""
    if node.method is None:
        return None
    name, shape = _kind(node)
    tried = [spent[name, shape]] if (name, shape) in spent else []
    tried = tried or [found for (each, other), found in spent.items() if each == name and bool(other) == bool(shape)]
    seconds, work = (sum(column) for column in zip(*tried, strict=True)) if tried else (0.0, 0.0)
    return (seconds, work) if work else None


def _stages(plan: Plan, node: Node) -> list[Node]:
    """The earlier stages' nodes that decompose matrices when this node reads them."""
    made = (plan.nodes[o.node] for o in node.operands if o.node >= 0)
    return [n for n in made if whole_matrices(plan, n)]


def _seconds(plan: Plan, node: Node, spent: Spent) -> float:
    """What one core needs for a node: for matrices, operations grow with the elements times the shorter side."""
    total = sum(_seconds(plan, n, spent) for n in _stages(plan, node))
    rate = _rate(node, spent)
    if rate is None:
        return total + node.nbytes / _COPY_RATE
    work = node.numel * (min(node.shape) if _is_whole(node) else 1)
    return total + work * rate[0] / rate[1] + node.nbytes / _WRITE_RATE


def _matrix_memory(needs: list[int], threads: int) -> int:
    """The largest matrices side by side, as `geomerge.engine.execute.Threads` lets them."""
    return max(max(needs, default=0), min(sum(sorted(needs)[-threads:]), ROOM))


def _try(builder: Builder, node: Node, side: int) -> tuple[float, int, RoundingLoss]:
    """Merge a piece of a tensor as if it were the whole, as a run does.

    Returns:
        Seconds (reading included, but for matrices), elements or for matrices operations, rounding loss.
    """
    assert node.method is not None
    width = node.shape[-1] if len(node.shape) > 1 else 1
    corner = _corner_of(node.shape, side) if _is_whole(node) else None
    count = min(node.numel, max(_SAMPLE // width, 1) * width) if corner is None else corner[0] * width
    start = (node.numel - count) // 2 // width * width
    shape = corner or ((count // width, width) if len(node.shape) > 1 else (count,))
    whole = [builder.source(operand, node) for operand in node.operands]
    sources: list[Source] = [_Piece(source, start) for source in whole]
    if corner is not None:  # of whole rows, of which a matrix method reads no more than it computes with
        sources = [_corner(source, start, (corner[0], width), corner[1]) for source in whole]
    begun = time.perf_counter()

    def open_scan(**tiling: Any) -> Scan:
        return Scan(sources, shape, name=node.name, seed=builder.plan.stages[node.stage].seed, **tiling)

    prepared = prepare(
        node.method, thinned(open_scan, node.chain, shape, len(sources) - 1), shape, node.scale, node.dtype
    )
    work = Work(builder, _Nowhere(math.prod(shape), node.dtype), lambda nbytes: None, threading.Event(), sampled=1)
    loss = sum((work.segment(node, prepared, segment) for segment in prepared.scan.segments), RoundingLoss())
    done = count if corner is None else corner[0] * corner[1] * min(corner)
    return time.perf_counter() - begun, done, loss


def _corner_of(shape: Sequence[int], side: int) -> tuple[int, int]:
    """Rows and columns of a piece of a matrix in its proportions, of which the shorter is at most `side`."""
    share = min(side / min(shape), 1.0)
    rows, columns = (min(max(round(length * share), 1), _LONGEST) for length in shape)
    return rows, columns


def _corner(source: Source, start: int, shape: tuple[int, int], columns: int) -> TensorSource:
    """The first columns of some whole rows."""
    piece = torch.empty(shape[0] * shape[1], dtype=torch.float64)
    source.read(start, piece)
    # Exact: the method then takes the same course as on the whole tensor.
    return TensorSource(piece.view(shape)[:, :columns].reshape(-1).to(to_torch(source.dtype)))


class _Piece:
    """A source's elements from one on."""

    def __init__(self, source: Source, start: int) -> None:
        self.label, self.dtype = source.label, source.dtype
        self._source, self._start = source, start

    def read(self, start: int, out: torch.Tensor) -> None:
        self._source.read(self._start + start, out)

    def stored(self) -> native.Stored | None:
        whole = stored_of(self._source)
        return None if whole is None else whole.at(self._start)


class _Nowhere:
    """Takes elements and forgets them."""

    readable = False

    def __init__(self, numel: int, dtype: str) -> None:
        self._code, self._nbytes = native.CODES.get(dtype), numel * DTYPES[dtype].itemsize

    def write(self, node: Node, start: int, values: torch.Tensor) -> None:
        pass

    def stored(self, node: Node) -> native.Stored | None:
        if self._code is None or not native.available():
            return None
        room, first = native.pages(self._nbytes)
        return native.Stored(self._code, first, keeps=room)


def _bytes_read(plan: Plan, node: Node, inputs: Sequence[Checkpoint]) -> int:
    """Bytes of the files that a node reads, with one pass to measure where its method measures."""
    passes = 1
    if node.method is not None and (getattr(node.method, "needs_gram", False) or getattr(node.method, "looks", False)):
        passes = 2
    if node.method is not None:
        passes += node.method.surveys + (node.lift is not None) + sum(not s.free for s in node.chain)
    total = 0
    for operand in node.operands:
        if operand.node >= 0:
            total += passes * _bytes_read(plan, plan.nodes[operand.node], inputs)
        else:
            total += passes * inputs[operand.input].stored_bytes(operand.tensor)
    return total


def _memory(nodes: Sequence[Node], threads: int) -> int:
    """Buffers: for each thread one tile of float64 an input, and about as much again for intermediate results."""
    most = max((len(n.operands) for n in nodes), default=1)
    widest = max((_row(n) for n in nodes if n.method is not None and n.method.rows and n.shape), default=0)
    tile = max(TILE, widest)
    itemsize = max((DTYPES[n.dtype].itemsize for n in nodes), default=2)
    return threads * tile * (8 * (2 * most + 4) + itemsize)


def _row(node: Node) -> int:
    """Elements in what a method that needs whole rows takes for one."""
    by_filter = getattr(node.method, "axis", None) == "filter"
    return node.numel // max(node.shape[0], 1) if by_filter else node.shape[-1]
