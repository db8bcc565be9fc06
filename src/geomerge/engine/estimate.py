"""What a plan will cost and lose, measured on a few elements of each kind of work instead of guessed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.dtypes import DTYPES, to_torch
from geomerge.engine.build import Builder
from geomerge.engine.execute import cores
from geomerge.engine.loss import RoundingLoss
from geomerge.engine.plan import Node, Plan
from geomerge.methods.kernel import prepare
from geomerge.methods.tile import TILE, Scan, TensorSource

_SAMPLE = 1 << 19
_TENSORS_SAMPLED = 8
_COPY_RATE = 1.5e9
"""Bytes each second that one core moves from page cache to page cache; only for what is copied without arithmetic."""


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


def estimate(plan: Plan, inputs: Sequence[Checkpoint], *, threads: int | None = None) -> Estimate:
    """Estimate cost and loss by merging half a million elements of up to 8 tensors of the output, spread over its depth.

    Args:
        plan: The plan.
        inputs: Its opened inputs.
        threads: As the run will have them.
    """
    threads = threads or cores()
    nodes = list(plan.output_nodes())
    merged = [n for n in nodes if n.method is not None and n.numel and not n.scales]
    loss = RoundingLoss()
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    builder = Builder(plan, inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        by_size = sorted(merged, key=lambda n: -n.numel)[: 8 * _TENSORS_SAMPLED]
        step = max(len(by_size) // _TENSORS_SAMPLED, 1)
        for node in by_size[::step][:_TENSORS_SAMPLED]:
            seconds, elements, found = _try(builder, node)
            # The second evaluation has its buffers and code paths warm.
            seconds = min(seconds, _try(builder, node)[0])
            spent[plan.stages[node.stage].method][0] += seconds
            spent[plan.stages[node.stage].method][1] += elements
            loss += found
    finally:
        torch.set_num_threads(before)
    total = 0.0
    for node in nodes:
        rate = spent.get(plan.stages[node.stage].method)
        total += node.numel * rate[0] / rate[1] if rate and node.method is not None else node.nbytes / _COPY_RATE
    return Estimate(
        read=sum(_bytes_read(plan, n, inputs) for n in nodes),
        written=plan.nbytes,
        memory=_memory(nodes, threads),
        seconds=total / threads,
        rounding_loss=loss.share,
    )


def _try(builder: Builder, node: Node) -> tuple[float, int, RoundingLoss]:
    """Merge a piece of a tensor as if it were the whole; seconds (reading included), elements, rounding loss."""
    assert node.method is not None
    begun = time.perf_counter()
    rows = node.shape[-1] if len(node.shape) > 1 else 1
    count = min(node.numel, max(_SAMPLE // rows, 1) * rows)
    start = (node.numel - count) // 2 // rows * rows
    pieces = []
    for operand in node.operands:
        piece = torch.empty(count, dtype=torch.float64)
        source = builder.source(operand, node)
        source.read(start, piece)
        pieces.append(piece.to(source.dtype))  # exact: the method then takes the same course as on the whole tensor
    shape = (count // rows, rows) if len(node.shape) > 1 else (count,)
    sources = [TensorSource(p) for p in pieces]

    def open_scan(**tiling: Any) -> Scan:
        return Scan(sources, shape, name=node.name, seed=builder.plan.stages[node.stage].seed, **tiling)

    prepared = prepare(node.method, open_scan, shape, node.scale, to_torch(node.dtype))
    round_ = builder.rounding(node)
    loss = RoundingLoss()
    spent = time.perf_counter() - begun
    for segment in prepared.scan.segments:
        for at, values in prepared.tiles(segment):
            begun = time.perf_counter()
            rounded = round_(at, values)
            spent += time.perf_counter() - begun
            loss.add(values, rounded, pieces[0][at : at + values.numel()])
    return spent, count, loss


def _bytes_read(plan: Plan, node: Node, inputs: Sequence[Checkpoint]) -> int:
    """Bytes of the files that a node reads, with one pass to measure where its method measures."""
    passes = 1
    if node.method is not None and (getattr(node.method, "needs_gram", False) or node.method.family == "elementwise"):
        passes = 2
    total = 0
    for operand in node.operands:
        if operand.node >= 0:
            total += passes * _bytes_read(plan, plan.nodes[operand.node], inputs)
        else:
            total += passes * inputs[operand.input].tensors[operand.tensor].nbytes
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
