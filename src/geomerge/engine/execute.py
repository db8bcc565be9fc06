"""Carrying out a plan's nodes on threads: which tensor when, and what happens when one fails.

Large tensors are made one after the other, all threads on their segments; then the smaller ones, a thread for each, taken from
both ends of their order of size: small ones keep the interpreter busy while large ones compute. Tiny ones are made by one
thread, in bundles. Whole matrices are decomposed by one thread each, as many side by side as fit into
`geomerge.engine.matrices.ROOM`. The bits do not depend on any of this.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

import torch

from geomerge.checkpoint.dtypes import DTYPES, out_of_range, to_torch
from geomerge.engine import codes
from geomerge.engine.build import Builder
from geomerge.engine.loss import RESIDUE, SAMPLE, RoundingLoss
from geomerge.engine.matrices import ROOM, whole_matrices
from geomerge.engine.memory import keep_freed_memory
from geomerge.engine.plan import BUFFER, SCALES, Node
from geomerge.engine.sinks import Sink
from geomerge.engine.sources import FileSource, read_into, staging
from geomerge.errors import GeomergeError, NotFiniteError
from geomerge.late import also_alone, torch_alone, without_gradients
from geomerge.methods import native
from geomerge.methods.buffers import output
from geomerge.methods.kernel import Prepared
from geomerge.methods.native import in_memory
from geomerge.methods.tile import SEGMENT, Loop, Segment

_BUNDLE_ELEMENTS = 1 << 18
_BUNDLE_TENSORS = 256
LARGE = 1 << 24
"""Tensors of more elements are made by all threads together, segment by segment."""

_COPY = 1 << 20
TINY = 1 << 13
"""Tensors up to this size are all made by one thread: their cost is the interpreter's, which threads would only fight for."""
_SAMPLED = 1 << 14
"""Smaller tensors are looked at whole where a sample tells enough of others."""


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


Facts = dict[str, Any]
"""What the manifest says of a tensor: coefficients, rounding loss."""


class Executor(Protocol):
    """Makes the nodes of a plan, in any order, each exactly once."""

    def run(
        self,
        nodes: Sequence[tuple[int, Node]],
        done: Callable[[list[tuple[int, Facts]]], None],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the nodes.

        Args:
            nodes: Index (the caller's) and node.
            done: Called, from any thread, with nodes whose bytes are all with the sink.
            begin: Called once, when the workers exist and before the first `done`.
        """


class Interrupted(Exception):
    """Another thread failed or the user stopped the run: leave quietly."""


@dataclass
class Work:
    """Makes single nodes; shared by all threads.

    Attributes:
        builder: Gives the nodes' scans.
        sink: Takes their elements.
        advance: Called with the number of output bytes written since the last call, from any thread.
        stop: Set when the run is over, whatever the reason.
        sampled: Smaller tensors are left out of the estimate of the rounding loss.
    """

    builder: Builder
    sink: Sink
    advance: Callable[[int], None]
    stop: threading.Event
    sampled: int = field(default=_SAMPLED, kw_only=True)

    def make(self, node: Node, run: Callable[..., Iterable[Any]] = map) -> Facts:
        """Compute a node and write all of it; `run` maps over its segments."""
        with without_gradients():
            return self._make(node, run)

    def _make(self, node: Node, run: Callable[..., Iterable[Any]]) -> Facts:
        if node.rule == SCALES:
            return {}  # written with its codes
        if node.method is None:
            self._copy(node)
            return {}
        prepared = self.builder.prepare(node, self._watched(run))
        if node.scales:
            return self._encode(node, prepared)
        losses = list(run(lambda segment: self.segment(node, prepared, segment), prepared.scan.segments))
        facts: Facts = prepared.told()
        if node.lift is not None:
            facts["scale"] = node.scale
        if prepared.coefficients is not None:
            facts["coefficients"] = list(prepared.coefficients)
        loss = sum(losses, RoundingLoss()).checked(node.name, node.dtype)
        if loss.elements:
            facts["loss"] = [loss.change, loss.error, loss.elements]
        return facts

    def _encode(self, node: Node, prepared: Prepared) -> Facts:
        """Write a node's codes and their scales."""
        scales = self.builder.node(node.scales)
        rows = max(scales.numel, 1)

        def write(start: int, values: torch.Tensor) -> None:
            if self.stop.is_set():
                raise Interrupted
            self.sink.write(node, start, values)
            self.advance(values.numel() * DTYPES[node.dtype].itemsize)

        found, cost = codes.encode(
            prepared,
            rows,
            node.numel // rows,
            codes=node.dtype,
            scale=scales.dtype,
            parents=self.builder.parents_as_codes(node),
            write=write,
        )
        self.sink.write(scales, 0, found)
        self.advance(scales.nbytes)
        return {"codes": [cost.error, cost.parents, cost.shrink]}

    def _watched(self, run: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
        """The same map, leaving when the run is over: measuring a large tensor takes its time too."""

        def mapped(work: Callable[[Segment], Any], segments: Iterable[Segment]) -> Iterable[Any]:
            def watched(segment: Segment) -> Any:
                if self.stop.is_set():
                    raise Interrupted
                return work(segment)

            return run(watched, segments)

        return mapped

    def segment(self, node: Node, prepared: Prepared, segment: Segment) -> RoundingLoss:
        """Compute a segment of a node and write it; what a sample of it loses by rounding."""
        loop = prepared.loop(node.dtype) if self.builder.nearest(node) else None
        with without_gradients():
            if loop is not None:
                return self._looped(node, prepared, loop, segment)
            return self._by_tiles(node, prepared, segment)

    def _by_tiles(self, node: Node, prepared: Prepared, segment: Segment) -> RoundingLoss:
        round_ = self.builder.rounding(node)
        itemsize = DTYPES[node.dtype].itemsize
        loss = RoundingLoss()
        sampled = prepared.scan.numel >= self.sampled
        for start, values in prepared.tiles(segment):
            if self.stop.is_set():
                raise Interrupted
            rounded = round_(start, values)
            _check_range(node, rounded)
            self.sink.write(node, start, rounded)
            if sampled and start == segment.start:
                reference = torch.empty_like(values[:SAMPLE])
                prepared.scan.sources[0].read(start, reference)
                loss.add(values, rounded, reference)
            self.advance(rounded.numel() * itemsize)
        return loss

    def _looped(self, node: Node, prepared: Prepared, loop: Loop, segment: Segment) -> RoundingLoss:
        """The same by a compiled loop, which writes the elements itself."""
        loss = RoundingLoss()
        sampled = prepared.scan.numel >= self.sampled
        stored = self.sink.stored(node)
        for place in prepared.scan.places(segment):
            if self.stop.is_set():
                raise Interrupted
            beginning = native.zeros(min(SAMPLE, place.numel)) if sampled and place.start == segment.start else None
            room = output(place.numel, to_torch(node.dtype), prepared.scan.level) if stored is None else None
            out = in_memory(room) if room is not None else stored and stored.at(place.start)
            assert out is not None
            if not loop(place, out, beginning):
                merged = prepared.at(place)
                room = merged.to(to_torch(node.dtype))
                if beginning is not None:
                    beginning[:] = merged[: len(beginning)].tolist()
            if room is not None or self.sink.readable:
                _check_range(node, room if room is not None else native.Inputs([out], place.numel))
            if room is not None:
                self.sink.write(node, place.start, room)
            if beginning is not None:
                before = prepared.scan.stored_one(0, place.start, len(beginning))
                loss.add_sums(*native.change(before, beginning, out.code, RESIDUE), len(beginning))
            self.advance(place.numel * DTYPES[node.dtype].itemsize)
        return loss

    def _copy(self, node: Node) -> None:
        checkpoint, name = self.builder.raw(node)
        info = checkpoint.tensors[name]
        if info.file is None:
            _check_copied(node, checkpoint.memory[name], f"{checkpoint.ref}: {name}")
            self.sink.write(node, 0, checkpoint.memory[name].reshape(-1))
            self.advance(node.nbytes)
            return
        itemsize = DTYPES[info.dtype].itemsize
        descriptor = checkpoint.descriptor(info.file)
        label = f"{checkpoint.ref}: {name}"
        if self._copied(node, FileSource(checkpoint, info, label).stored()):
            return
        for start in range(0, node.numel, _COPY):
            count = min(_COPY, node.numel - start)
            raw = staging(count * itemsize)
            read_into(descriptor, raw, info.offset + start * itemsize, label)
            values = raw.view(to_torch(info.dtype))
            _check_copied(node, values, label)
            self.sink.write(node, start, values)
            self.advance(count * itemsize)

    def _copied(self, node: Node, stored: native.Stored | None) -> bool:
        """Copy by a compiled loop. Whether that could be done, and what was copied holds nothing that is refused."""
        out = self.sink.stored(node)
        if stored is None or out is None or stored.code != out.code or not native.available():
            return False
        itemsize = DTYPES[node.dtype].itemsize
        for start in range(0, node.numel, SEGMENT):
            if self.stop.is_set():
                raise Interrupted
            count = min(SEGMENT, node.numel - start)
            if not native.copy(stored.at(start), count, out.at(start), unbounded=node.rule == BUFFER):
                return False
            self.advance(count * itemsize)
        return True


class Threads:
    """The executor of one machine.

    Args:
        work: Makes the nodes.
        threads: How many; by default one for each core that the process may use.
    """

    def __init__(self, work: Work, threads: int | None = None) -> None:
        self.work = work
        self.threads = threads or cores()

    def run(
        self,
        nodes: Sequence[tuple[int, Node]],
        done: Callable[[list[tuple[int, Facts]]], None],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """See `Executor`."""
        begin()
        weight = {index: whole_matrices(self.work.builder.plan, node) for index, node in nodes}
        heavy = sorted((item for item in nodes if weight[item[0]]), key=lambda item: -weight[item[0]])
        light = [item for item in nodes if not weight[item[0]]]
        large = sorted((item for item in light if item[1].numel > LARGE), key=lambda item: -item[1].numel)
        small = sorted((item for item in light if TINY < item[1].numel <= LARGE), key=lambda item: -item[1].numel)
        tiny = [item for item in light if item[1].numel <= TINY]
        room = Room(ROOM)
        keep_freed_memory()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="geomerge", initializer=also_alone)
        try:
            with torch_alone():
                for index, node in large:
                    done([(index, self.work.make(node, lambda f, segments: _map(pool, f, segments)))])
                futures = [pool.submit(self._in_turn, tiny, done)] if tiny else []
                futures += [pool.submit(self._bundle, bundle, done) for bundle in _from_both_ends(list(bundles(small)))]
                # Last, because who waits for room should keep nobody waiting.
                futures += [pool.submit(self._heavy, item, weight[item[0]], room, done) for item in heavy]
                _gather(futures)
        except BaseException:
            self.work.stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _in_turn(self, tiny: list[tuple[int, Node]], done: Callable[[list[tuple[int, Facts]]], None]) -> None:
        for bundle in bundles(tiny):
            self._bundle(bundle, done)

    def _bundle(self, bundle: list[tuple[int, Node]], done: Callable[[list[tuple[int, Facts]]], None]) -> None:
        made = []
        for index, node in bundle:
            if self.work.stop.is_set():
                raise Interrupted
            made.append((index, self.work.make(node)))
        done(made)

    def _heavy(
        self, item: tuple[int, Node], nbytes: int, room: Room, done: Callable[[list[tuple[int, Facts]]], None]
    ) -> None:
        with room.taken(nbytes):
            self._bundle([item], done)


class Room:
    """Memory that may be taken: a thread that asks for more than is left waits, unless nothing is taken."""

    def __init__(self, nbytes: int) -> None:
        self._left = self._all = nbytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: nbytes <= self._left or self._left == self._all)
            self._left -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._left += nbytes
                self._changed.notify_all()


def _check_range(node: Node, made: torch.Tensor | native.Inputs) -> None:
    """Refuse a result of which the dtype does not hold all; where only absurd weights get there, the sample shows it."""
    if node.dtype not in ("F16", "BF16", "F32") or (node.dtype != "F16" and node.numel >= _SAMPLED):
        return
    if not (native.finite(made) if isinstance(made, native.Inputs) else made.isfinite().all()):
        raise out_of_range(node.name, node.dtype)


def _check_copied(node: Node, values: torch.Tensor, where: str) -> None:
    """Refuse NaN and Inf in what is copied; a mask's −∞ is no damage."""
    if not values.is_floating_point() or values.element_size() == 1:
        return
    good = ~torch.isnan(values) if node.rule == BUFFER else torch.isfinite(values)
    if not bool(good.all()):
        raise NotFiniteError("the tensor holds NaN or Inf", where=where)


def bundles(nodes: Iterable[tuple[int, Node]]) -> Iterator[list[tuple[int, Node]]]:
    """Small nodes together, up to a size that is worth handing to a worker."""
    bundle: list[tuple[int, Node]] = []
    size = 0
    for item in nodes:
        bundle.append(item)
        size += item[1].numel
        if size >= _BUNDLE_ELEMENTS or len(bundle) >= _BUNDLE_TENSORS:
            yield bundle
            bundle, size = [], 0
    if bundle:
        yield bundle


def _from_both_ends(items: Sequence[Any]) -> Iterator[Any]:
    """The first, the last, the second, the last but one, and so on."""
    half = (len(items) + 1) // 2
    for first, last in zip_longest(items[:half], reversed(items[half:])):
        yield first
        if last is not None:
            yield last


def _map(pool: ThreadPoolExecutor, work: Callable[[Segment], Any], segments: Iterable[Segment]) -> list[Any]:
    return _gather([pool.submit(work, segment) for segment in segments])


def _gather(futures: Sequence[Future[Any]]) -> list[Any]:
    """All results in order; the first real failure ends the wait (those that merely left because of it do not count)."""
    finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
    errors = [f.exception() for f in finished if not f.cancelled()]
    for error in sorted((e for e in errors if e is not None), key=lambda e: not isinstance(e, GeomergeError)):
        raise error
    return [future.result() for future in futures]
