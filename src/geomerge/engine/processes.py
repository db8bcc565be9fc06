"""The executor that forks: as `Threads`, but each worker has an interpreter of its own.

Threads of one interpreter pass its lock to each other after every operation on a tile, and each pass may put a core to sleep
and wake it again: two threads then do a TIES merge little faster than one. Forked workers share nothing but the open files;
they write their tensors into the output themselves and send back what the manifest shall say.

Used when what torch computes is large (compiled loops leave the lock to the other threads, and so does copying) or tiny tensors
are very many (those cost the interpreter's time, whoever computes them), and only from a process that has no other threads:
forking among threads is not safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from geomerge.engine.execute import LARGE, TINY, Facts, Threads, Work, bundles, cores
from geomerge.engine.memory import keep_freed_memory
from geomerge.engine.plan import Node
from geomerge.errors import RunError
from geomerge.late import load, torch_alone

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

WORTH = 1 << 26
"""Elements of output below which forking is not worth it."""

_REPORT = 32 << 20
"""Bytes after which a worker says how far it is."""

_PR_SET_PDEATHSIG = 1

Done = Callable[[list[tuple[int, Facts]]], None]
Piece = TypeVar("Piece")
Made = TypeVar("Made")


def interpreted(node: Node, *, loops: bool) -> int:
    """The elements of a node for which the interpreter's lock is held.

    A tiny tensor costs the same whatever its size, and whether or not compiled loops make it.
    """
    if node.numel <= TINY:
        return TINY
    return 0 if loops else node.numel


def suitable(elements: int, threads: int | None) -> bool:
    """Whether this process may fork, and whether that is worth it for so many elements of which threads would wait for each
    other."""
    # Python's locks between processes live in /dev/shm.
    alone = sys.platform.startswith("linux") and threading.active_count() == 1 and os.access("/dev/shm", os.W_OK)
    return alone and (threads or cores()) > 1 and elements >= WORTH


class Processes:
    """Makes nodes in forked workers.

    Args:
        work: Makes single nodes, in the workers.
        workers: How many; by default one for each core that the process may use.
        with_torch: Whether the work needs torch, which is then loaded once, before there are workers.
    """

    def __init__(self, work: Work, workers: int | None = None, *, with_torch: bool = True) -> None:
        self.work = work
        self.workers = workers or cores()
        self.with_torch = with_torch

    def run(self, nodes: Sequence[tuple[int, Node]], done: Done, begin: Callable[[], None] = lambda: None) -> None:
        """See `geomerge.engine.execute.Executor`.

        A tensor so large that the others would wait for its worker is made by threads, together; the workers, which were
        forked before there were threads, wait for that.
        """
        total = sum(node.numel for _, node in nodes)
        shared = [item for item in nodes if item[1].numel > LARGE and item[1].numel * self.workers > total]
        taken = {index for index, _ in shared}
        rest = [item for item in nodes if item[0] not in taken]
        if rest:
            self._fork(rest, shared, done, begin)
        else:
            Threads(self.work, self.workers).run(shared, done, begin)

    def _fork(
        self, nodes: list[tuple[int, Node]], shared: list[tuple[int, Node]], done: Done, begin: Callable[[], None]
    ) -> None:
        def make(bundle: list[tuple[int, Node]]) -> list[tuple[int, Facts]]:
            return [(index, self.work.make(node)) for index, node in bundle]

        def enter(report: Callable[[int], None]) -> None:
            self.work.advance = report

        def meanwhile() -> None:
            begin()
            if shared:
                Threads(self.work, self.workers).run(shared, done)

        queue = list(bundles(sorted(nodes, key=lambda item: -item[1].numel)))
        advance = self.work.advance
        try:
            in_workers(
                queue,
                make,
                done,
                workers=self.workers,
                advance=advance,
                enter=enter,
                meanwhile=meanwhile,
                with_torch=self.with_torch,
            )
        except BaseException:
            self.work.stop.set()
            raise


def in_workers(
    pieces: Sequence[Piece],
    make: Callable[[Piece], Made],
    done: Callable[[Made], None],
    *,
    workers: int,
    advance: Callable[[int], None] = lambda nbytes: None,
    enter: Callable[[Callable[[int], None]], None] = lambda report: None,
    meanwhile: Callable[[], None] = lambda: None,
    with_torch: bool = True,
) -> None:
    """Do pieces of work in forked workers, which take turns at them in order.

    Args:
        pieces: The work. Like `make` it is known to the workers because they are copies of this process.
        make: Does a piece, in a worker; what it returns is pickled.
        done: Takes what a piece gave, here, as soon as it is made.
        workers: How many at most.
        advance: Told, here, of the bytes that workers report.
        enter: Called in each worker with what takes its reports of bytes.
        meanwhile: Done here, by threads if need be, once the workers exist; they begin when it is over.
        with_torch: Load torch here, once, before there are workers.

    Raises:
        RunError: A worker died; or whatever error a worker met. All workers are ended then.
    """
    import multiprocessing  # most merges need no processes

    context = multiprocessing.get_context("fork")
    turn = context.Value("q", 0)
    gate = context.Event()
    keep_freed_memory()
    load("numpy")
    if with_torch:
        load("torch")
    pipes: list[Connection] = []
    processes = []
    try:
        with torch_alone():
            for _ in range(min(workers, len(pieces))):
                ours, theirs = context.Pipe(duplex=False)
                life = (pieces, make, enter, turn, gate, theirs, os.getpid())
                process = context.Process(target=_live, args=life, daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            meanwhile()
            gate.set()
            _listen(pipes, done, advance)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()


def _listen(pipes: list[Connection], done: Callable[[Any], None], advance: Callable[[int], None]) -> None:
    """Take in the workers' reports until all have finished.

    Raises:
        RunError: A worker died; or whatever error a worker met.
    """
    from multiprocessing.connection import Connection, wait

    open_pipes = list(pipes)
    while open_pipes:
        for pipe in wait(open_pipes):
            assert isinstance(pipe, Connection)
            try:
                kind, content = pipe.recv()
            except EOFError:
                raise RunError(
                    "a worker process was killed", hint="is there enough memory? continue with --resume"
                ) from None
            if kind == "advance":
                advance(content)
            elif kind == "done":
                done(content)
            elif kind == "error":
                raise content
            else:
                open_pipes.remove(pipe)


def _live(
    pieces: Sequence[Piece],
    make: Callable[[Piece], Made],
    enter: Callable[[Callable[[int], None]], None],
    turn: Any,
    gate: Any,
    pipe: Connection,
    parent: int,
) -> None:
    """One worker's life."""
    _die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    unreported = 0

    def report(nbytes: int) -> None:
        nonlocal unreported
        unreported += nbytes
        if unreported >= _REPORT:
            pipe.send(("advance", unreported))
            unreported = 0

    enter(report)
    gate.wait()
    try:
        while True:
            with turn.get_lock():
                mine = turn.value
                turn.value += 1
            if mine >= len(pieces):
                break
            pipe.send(("done", make(pieces[mine])))
        pipe.send(("advance", unreported))
        pipe.send(("end", None))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        with contextlib.suppress(OSError):
            pipe.send(("error", _sendable(error)))
    # Without the interpreter's farewells: buffers and locks here are copies of the parent's.
    os._exit(0)


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - errors of other libraries may fail to pickle in any way
        return RunError(f"{type(error).__name__}: {error}")
    return error


def _die_with_parent(parent: int) -> None:
    """Ask the system to end this process when its parent is killed: its lock on the output must not outlive it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be asked
        os._exit(1)
