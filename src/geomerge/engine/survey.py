"""The survey: statistics over the whole model that some methods need before the first tensor can be made.

A survey reads and never writes. Its result goes into the nodes' methods (`Method.known`), so that all that follows is the
same as for any other method. An interrupted run makes it again, with the same bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from geomerge.checkpoint.dtypes import to_torch
from geomerge.engine.build import Builder
from geomerge.engine.execute import cores
from geomerge.engine.plan import Node, Plan
from geomerge.methods.base import Elementwise
from geomerge.methods.kernel import elementwise_scan
from geomerge.methods.tile import Scan, block_sums
from geomerge.methods.walk import Walk


def survey_bytes(plan: Plan) -> int:
    """Bytes that the progress counts for the surveys of a plan: those of the output, once for each pass."""
    return sum(
        node.nbytes * (node.method.surveys + (node.lift is not None)) for node in plan.nodes if node.method is not None
    )


def surveyed(
    plan: Plan,
    make: Callable[[Plan], Builder],
    *,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Plan:
    """The plan with what its methods have to know of the whole model.

    Args:
        plan: The plan.
        make: Makes a builder.
        threads: By default one for each core that the process may use.
        advance: Told of bytes, `survey_bytes` in all, from any thread.
    """
    if not survey_bytes(plan):
        return plan
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are the parallelism
    try:
        with ThreadPoolExecutor(threads or cores(), thread_name_prefix="geomerge-survey") as pool:
            for stage in range(len(plan.stages)):
                plan = _stage(plan, stage, make(plan), pool, advance)
                plan = _lifted(plan, stage, make, pool, advance)
    finally:
        torch.set_num_threads(before)
    return plan


def _stage(plan: Plan, stage: int, builder: Builder, pool: ThreadPoolExecutor, advance: Callable[[int], None]) -> Plan:
    """Survey one stage's nodes; the earlier ones know what they have to."""
    groups: dict[Any, list[int]] = {}
    for index, node in enumerate(plan.nodes):
        if node.stage == stage and node.method is not None and node.method.surveys:
            groups.setdefault((type(node.method), node.method.surveyed_alike), []).append(index)
    nodes = list(plan.nodes)
    for members in groups.values():
        mine = [plan.nodes[i] for i in members]
        method = mine[0].method
        assert method is not None
        walk = Walk(
            [_opener(builder, node) for node in mine],
            [node.name for node in mine],
            sum(node.numel for node in mine),
            _counted(mine, pool, method.surveys, advance),
        )
        known = method.survey(walk)
        for index, node in zip(members, mine, strict=True):
            assert node.method is not None
            nodes[index] = replace(node, method=replace(node.method, known=known))
    return replace(plan, nodes=tuple(nodes)) if groups else plan


def _opener(builder: Builder, node: Node) -> Callable[[], Scan]:
    method = node.method
    assert isinstance(method, Elementwise)
    open_scan = builder.opener(node, node.operands, map)

    def opened() -> Scan:
        # What a step has decomposed is as large as the tensor: not to be kept for the whole model.
        anew = any(step.whole for step in node.chain)
        each = builder.opener(node, node.operands, map) if anew else open_scan
        return elementwise_scan(method, each, node.shape, node.scale, to_torch(node.dtype))

    return opened


def _counted(
    nodes: list[Node], pool: ThreadPoolExecutor, passes: int, advance: Callable[[int], None]
) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]:
    """A map over the tensors, the largest first, that tells how far it is (a method may go on for longer than it said)."""
    seen: Counter[int] = Counter()

    def run(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        listed = list(items)

        @torch.inference_mode()
        def one(index: int) -> Any:
            result = work(listed[index])
            seen[index] += 1
            if seen[index] <= passes:
                advance(nodes[index].nbytes)
            return result

        order = sorted(range(len(listed)), key=lambda i: -nodes[i].numel)
        futures = {i: pool.submit(one, i) for i in order}
        return [futures[i].result() for i in range(len(listed))]

    return run


def _lifted(
    plan: Plan, stage: int, make: Callable[[Plan], Builder], pool: ThreadPoolExecutor, advance: Callable[[int], None]
) -> Plan:
    """LiNeS with `alpha: auto` (Wang et al. 2024): α = ‖Σ τₜ‖₁ / (T·‖τ_merged‖₁), 1/T for the sum of task vectors."""
    members = [i for i, n in enumerate(plan.nodes) if n.stage == stage and n.lift is not None]
    if not members:
        return plan
    builder = make(plan)
    mine = [replace(plan.nodes[i], scale=1.0, columns=()) for i in members]
    run = _counted(mine, pool, 1, advance)
    found = list(run(lambda node: _norms(builder, node), mine))
    summed, merged = (math.fsum(column) for column in zip(*found, strict=True))
    count = max(len(mine[0].operands) - 1, 1)
    alpha = summed / (count * merged) if merged > 0 else 1 / count
    nodes = list(plan.nodes)
    for i in members:
        lift = nodes[i].lift
        assert lift is not None
        nodes[i] = replace(nodes[i], scale=nodes[i].scale * (alpha + lift))
    return replace(plan, nodes=tuple(nodes))


def _norms(builder: Builder, node: Node) -> tuple[float, float]:
    """‖Σ τₜ‖₁ and ‖τ_merged‖₁ of one tensor."""
    prepared = builder.prepare(node)
    sources = [builder.source(operand, node) for operand in node.operands]
    sums: tuple[list[float], list[float]] = ([], [])
    for segment in prepared.scan.segments:
        for start, values in prepared.tiles(segment):
            merged = values.to(torch.float64, copy=True)
            base, total, each = (
                torch.empty(merged.numel(), dtype=torch.float64, device=merged.device) for _ in range(3)
            )
            sources[0].read(start, base)
            total.zero_()
            for source in sources[1:]:
                source.read(start, each)
                total.add_(each.sub_(base))
            for into, part in zip(sums, (total, merged.sub_(base)), strict=True):
                into.extend(block_sums(part.abs_()))
    return math.fsum(sums[0]), math.fsum(sums[1])
