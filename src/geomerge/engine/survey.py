"""The survey: statistics over the whole model that some methods need before the first tensor can be made.

A survey reads and never writes. Its result goes into the nodes' methods (`Method.known`), so that all that follows is the same
as for any other method, and into the journal: a resumed run goes on after it. Where what is found in a tensor is a few
numbers, and has taken a while (OPCM, and LiNeS of matrix methods, decompose each), that is there tensor by tensor.
Tensors are looked at by threads or, where the run may fork, by workers (`geomerge.engine.processes`), which do not wait for
each other's interpreter.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch

from geomerge.engine.build import Builder
from geomerge.engine.execute import Room, cores
from geomerge.engine.findings import plain, restored
from geomerge.engine.journal import Journal
from geomerge.engine.matrices import ROOM, whole_matrices
from geomerge.engine.memory import keep_freed_memory
from geomerge.engine.plan import Node, Plan
from geomerge.engine.processes import in_workers
from geomerge.late import also_alone, torch_alone, without_gradients
from geomerge.methods.base import Method
from geomerge.methods.kernel import survey_scan
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
    forks: bool = False,
    advance: Callable[[int], None] = lambda nbytes: None,
    journal: Journal | None = None,
) -> Plan:
    """The plan with what its methods have to know of the whole model.

    Args:
        plan: The plan.
        make: Makes a builder.
        threads: By default one for each core that the process may use.
        forks: Whether this process may fork (`geomerge.engine.processes.suitable`).
        advance: Told of bytes, `survey_bytes` in all.
        journal: What an earlier run knew, and takes what this one finds.
    """
    if not survey_bytes(plan):
        return plan
    keep_freed_memory()
    with torch_alone(), _workers(threads or cores()) if forks else _threads(threads or cores()) as crew:
        for stage in range(len(plan.stages)):
            plan = _stage(plan, stage, make(plan), crew, advance, threads or cores(), journal)
            plan = _lifted(plan, stage, make, crew, advance, journal)
    return plan


Crew = Callable[[Callable[[int], Any], Sequence[int], Callable[[int, Any], None]], None]
"""Does a piece of work for each of some indices, in any order, and hands over what came of it."""


@contextlib.contextmanager
def _threads(count: int) -> Iterator[Crew]:
    with ThreadPoolExecutor(count, thread_name_prefix="geomerge-survey", initializer=also_alone) as pool:

        def crew(work: Callable[[int], Any], indices: Sequence[int], done: Callable[[int, Any], None]) -> None:
            futures = {pool.submit(work, i): i for i in indices}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        yield crew


@contextlib.contextmanager
def _workers(count: int) -> Iterator[Crew]:
    def crew(work: Callable[[int], Any], indices: Sequence[int], done: Callable[[int, Any], None]) -> None:
        in_workers(indices, lambda i: (i, work(i)), lambda made: done(*made), workers=count)

    yield crew


def _stage(
    plan: Plan,
    stage: int,
    builder: Builder,
    crew: Crew,
    advance: Callable[[int], None],
    threads: int,
    journal: Journal | None,
) -> Plan:
    """Survey one stage's nodes; the earlier ones know what they have to."""
    groups: dict[Any, list[int]] = {}
    for index, node in enumerate(plan.nodes):
        if node.stage == stage and node.method is not None and node.method.surveys:
            alike = type(node.method), node.method.surveyed_alike, len(node.operands)
            groups.setdefault(alike, []).append(index)
    nodes = list(plan.nodes)
    for members in groups.values():
        mine = [plan.nodes[i] for i in members]
        method = mine[0].method
        assert method is not None
        walk = Walk(
            [_opener(builder, node) for node in mine],
            [node.name for node in mine],
            sum(node.numel for node in mine),
            len(mine[0].operands) - 1,
            _counted(plan, mine, crew, advance, _Looks(journal, members, "survey", method), passes=method.surveys),
            threads,
            [node.method for node in mine if node.method is not None],
        )
        known = _remembered(journal, members[0], method)
        if known is None:
            known = method.survey(walk)
            _remember(journal, members[0], method, known)
        else:
            advance(method.surveys * sum(node.nbytes for node in mine))
        for index, node in zip(members, mine, strict=True):
            assert node.method is not None
            mine_of_it = node.method.known_of(known, node.name)
            nodes[index] = replace(node, method=replace(node.method, known=mine_of_it))
    return replace(plan, nodes=tuple(nodes)) if groups else plan


def _remembered(journal: Journal | None, index: int, method: Method) -> Any:
    """What the survey that begins with a tensor found in an earlier run; `None` where that is not known."""
    if journal is None or index not in journal.surveys:
        return None
    try:
        return restored(journal.surveys[index], method.findings)
    except ValueError:
        return None


def _remember(journal: Journal | None, index: int, method: Method, known: Any) -> None:
    """Write it down, unless a method finds what the journal cannot hold: then a resumed run looks again."""
    if journal is not None:
        with contextlib.suppress(TypeError):
            journal.remember_survey(index, plain(known, method.findings))


class _Looks:
    """What looks at single tensors find, in the journal: what is no more than a few numbers is not looked for again.

    Args:
        journal: `None`: there is none.
        indices: The tensors in the plan.
        name: What looks at them.
        method: For what surveys find.
    """

    def __init__(
        self, journal: Journal | None, indices: Sequence[int], name: str, method: Method | None = None
    ) -> None:
        self._journal, self._indices, self._name = journal, indices, name
        self._kinds = () if method is None else method.findings

    def known(self, look: int) -> dict[int, Any]:
        """What an earlier run found in a look (they are numbered), by places in `indices`."""
        there = {} if self._journal is None else self._journal.looks.get(f"{self._name} {look}", {})
        found = {}
        for place, index in enumerate(self._indices):
            if index in there:
                with contextlib.suppress(ValueError):
                    found[place] = restored(there[index], self._kinds)
        return found

    def keep(self, look: int, place: int, found: Any) -> None:
        """Write down what a look found, unless that is too much."""
        if self._journal is not None:
            with contextlib.suppress(TypeError):
                written = plain(found, self._kinds)
                if len(repr(written)) <= _FEW:
                    self._journal.remember_look(f"{self._name} {look}", self._indices[place], written)


_FEW = 2000
"""Characters that are worth a line for each tensor, ..."""
_LONG = 0.05
"""... where the look has taken so many seconds."""


def _opener(builder: Builder, node: Node) -> Callable[[], Scan]:
    method = node.method
    assert method is not None
    open_scan = builder.opener(node, node.operands, map)

    def opened() -> Scan:
        # What a step has decomposed is as large as the tensor: not to be kept for the whole model.
        anew = any(step.whole for step in node.chain)
        each = builder.opener(node, node.operands, map) if anew else open_scan
        return survey_scan(method, each, node.shape, node.scale, node.dtype)

    return opened


def _counted(
    plan: Plan,
    nodes: list[Node],
    crew: Crew,
    advance: Callable[[int], None],
    looks: _Looks,
    *,
    passes: int = 1,
) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]:
    """A map over the tensors, the largest first, that tells how far it is (a method may go on for longer than it said)."""
    weights = [whole_matrices(plan, node) for node in nodes]
    room = Room(ROOM)
    made = 0

    def run(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        nonlocal made
        listed = list(items)
        results: list[Any] = [None] * len(listed)
        known = looks.known(made)

        def one(index: int) -> tuple[Any, float]:
            with without_gradients(), room.taken(weights[index]) if weights[index] else contextlib.nullcontext():
                begun = time.perf_counter()
                return work(listed[index]), time.perf_counter() - begun

        def done(index: int, found: tuple[Any, float]) -> None:
            results[index], seconds = found
            if seconds >= _LONG:
                looks.keep(made, index, results[index])
            if made < passes:
                advance(nodes[index].nbytes)

        for index, result in known.items():
            results[index] = result
        if known and made < passes:
            advance(sum(nodes[index].nbytes for index in known))  # at once: it says nothing about the pace
        left = [i for i in range(len(listed)) if i not in known]
        crew(one, sorted(left, key=lambda i: -nodes[i].numel), done)
        made += 1
        return results

    return run


def _lifted(
    plan: Plan,
    stage: int,
    make: Callable[[Plan], Builder],
    crew: Crew,
    advance: Callable[[int], None],
    journal: Journal | None,
) -> Plan:
    """LiNeS with `alpha: auto` (Wang et al. 2024): α = ‖Σ τₜ‖₁ / (T·‖τ_merged‖₁), 1/T for the sum of task vectors."""
    members = [i for i, n in enumerate(plan.nodes) if n.stage == stage and n.lift is not None]
    if not members:
        return plan
    builder = make(plan)
    mine = [replace(plan.nodes[i], scale=1.0, columns=()) for i in members]
    run = _counted(plan, mine, crew, advance, _Looks(journal, members, "lines"))
    summed, merged = (math.fsum(column) for column in zip(*run(lambda node: _norms(builder, node), mine), strict=True))
    count = max(len(plan.nodes[members[0]].operands) - 1, 1)
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
