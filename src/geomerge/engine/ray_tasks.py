"""The executor on a Ray cluster: the plan's tensors as tasks, over a folder that all nodes share.

A task is told paths and numbers, never tensors: it opens the plan and the inputs (once in each worker process), writes its
tensors into their final places and sends back what the manifest says of them. When a worker or its node dies, Ray runs its
tasks again elsewhere, and they write the same bytes. The journal, and with it ``--resume``, is the driver's, as on one machine.

Needs the extra ``[ray]``; the cluster is the one that ``RAY_ADDRESS`` names, a running local one, or a new local one.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from geomerge.checkpoint.shared_output import OpenFiles
from geomerge.checkpoint.writer import WORK
from geomerge.engine.build import Builder
from geomerge.engine.execute import Facts, Work
from geomerge.engine.manifest import versions
from geomerge.engine.plan import Node, Plan
from geomerge.engine.run import layout_of, open_inputs
from geomerge.engine.sinks import FileSink
from geomerge.engine.survey import surveyed
from geomerge.errors import GeomergeError, RunError, UsageError

RETRIES = 3
"""How often a task is tried again when its worker dies."""

_TASKS_PER_CORE = 8
_SMALLEST = 1 << 22
"""Elements that a task has at the least: below, its cost is Ray's."""


class RayTasks:
    """Makes nodes as Ray tasks. See `geomerge.engine.execute.Executor`.

    Args:
        work: Of this process; its sink names the output's files and its builder the plan.
        shard_size: As the output's layout was made with.

    Raises:
        UsageError: The work cannot leave this process.
    """

    def __init__(self, work: Work, shard_size: int) -> None:
        if not isinstance(work.sink, FileSink) or work.builder.device != "cpu":
            raise UsageError("Ray tasks compute on the CPU and write files", hint="leave --device out")
        if any(c.memory for c in work.builder.inputs):
            raise UsageError("models in memory cannot be merged on a Ray cluster", hint="save them first")
        import ray

        self.work, self.sink, self.shard_size, self._ray = work, work.sink, shard_size, ray

    def run(
        self,
        nodes: Sequence[tuple[int, Node]],
        done: Callable[[list[tuple[int, Facts]]], None],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """See `Executor`."""
        ray = self._ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        plan = self.work.builder.plan
        saved = self.sink.files.partial / WORK / f"plan-{plan.hash[:16]}.json"
        try:
            saved.parent.mkdir(exist_ok=True)
            plan.save(saved)
        except OSError as error:
            raise RunError(f"the plan cannot be saved: {error.strerror}", where=str(saved)) from None
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(make_tensors)
        cores = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        size = max(sum(node.numel for _, node in nodes) // (cores * _TASKS_PER_CORE), _SMALLEST)
        begin()
        nbytes = {position: node.nbytes for position, node in nodes}
        told = (str(saved), self.shard_size, self.work.builder.tile, versions())
        pending = [task.remote(*told, positions) for positions in _pieces(nodes, size)]
        try:
            while pending:
                ready, pending = ray.wait(pending, num_returns=1)
                for made in self._results(ready):
                    done(made)
                    self.work.advance(sum(nbytes[position] for position, _ in made))
        except BaseException:
            for reference in pending:
                ray.cancel(reference, force=True)
            raise

    def _results(self, references: list[Any]) -> Iterator[list[tuple[int, Facts]]]:
        """What tasks sent back.

        Raises:
            GeomergeError: What a task met; or a `RunError` when its workers died again and again.
        """
        for reference in references:
            try:
                yield self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, GeomergeError):
                    raise error.cause from None
                raise RunError(f"a Ray task failed: {error.cause!r}") from error
            except self._ray.exceptions.RayError as error:
                raise RunError(
                    f"a Ray task was lost {RETRIES + 1} times: {type(error).__name__}",
                    hint="is there enough memory on its node? continue with --resume",
                ) from error


def check_installed() -> None:
    """Ask for Ray before anything is written.

    Raises:
        UsageError: It is not installed.
    """
    try:
        importlib.import_module("ray")
    except ImportError:
        raise UsageError("Ray is not installed", hint='pip install "geomerge[ray]"') from None


def make_tensors(
    plan: str, shard_size: int, tile: int, wanted: Mapping[str, str], positions: Sequence[int]
) -> list[tuple[int, Facts]]:
    """The task: make tensors of a plan and write them into the output beside it.

    Args:
        plan: The saved plan, in the output's working directory.
        shard_size, tile: As for the run.
        wanted: The versions of the driver, which this process must have.
        positions: Which of the output's tensors.

    Returns:
        Positions with what the manifest says of them.
    """
    if versions() != dict(wanted):
        raise RunError(f"a node of the cluster has other versions, {versions()}, than the driver, {dict(wanted)}")
    torch.set_num_threads(1)
    work, files, nodes = _opened(plan, shard_size, tile, Path(plan).stat().st_ino)
    made = [(position, work.make(nodes[position])) for position in positions]
    files.flush()
    return made


@functools.lru_cache(maxsize=1)
def _opened(saved: str, shard_size: int, tile: int, _inode: int) -> tuple[Work, OpenFiles, list[Node]]:
    """The plan's inputs and outputs, opened once in each worker process for a run (which the saved plan's inode tells)."""
    plan = Plan.load(saved)
    layout = layout_of(plan, shard_size)
    files = OpenFiles(Path(saved).parent.parent, layout)
    inputs = open_inputs(plan)

    def build(plan: Plan) -> Builder:
        return Builder(plan, inputs, tile=tile, device="cpu")

    # What a survey finds is no part of a saved plan; made here again, it has the same bits.
    known = surveyed(plan, build, threads=1)
    work = Work(build(known), FileSink(files, layout), lambda nbytes: None, threading.Event())
    return work, files, list(known.output_nodes())


def _pieces(nodes: Sequence[tuple[int, Node]], size: int) -> Iterator[list[int]]:
    """Positions of nodes, largest first, together up to about `size` elements."""
    piece: list[int] = []
    elements = 0
    for position, node in sorted(nodes, key=lambda item: -item[1].numel):
        piece.append(position)
        elements += node.numel
        if elements >= size:
            yield piece
            piece, elements = [], 0
    if piece:
        yield piece
