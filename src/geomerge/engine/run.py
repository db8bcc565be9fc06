"""Carrying out a plan: the output directory from the first tile to its name."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from geomerge.checkpoint.card import Parent, model_card
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.collector import collector_paused
from geomerge.checkpoint.config import library_of, weights_stem
from geomerge.checkpoint.layout import DEFAULT_SHARD_SIZE, Layout, plan_layout
from geomerge.checkpoint.reader import open_checkpoint
from geomerge.checkpoint.writer import OutputDirectory
from geomerge.devices import check_device
from geomerge.engine.adapted import adapt
from geomerge.engine.build import Builder
from geomerge.engine.execute import Executor, Threads, Work, cores
from geomerge.engine.journal import Journal
from geomerge.engine.manifest import as_text, manifest, notes, total_loss
from geomerge.engine.matrices import whole_matrices
from geomerge.engine.plan import MIXTURE, InputModel, Node, Plan
from geomerge.engine.processes import Processes, interpreted, suitable
from geomerge.engine.sinks import FileSink, MemorySink
from geomerge.engine.survey import survey_bytes, surveyed
from geomerge.errors import ModelError, OutOfRange, RunError, UsageError, did_you_mean
from geomerge.methods import native, registry
from geomerge.methods.tile import TILE
from geomerge.version import __version__

if TYPE_CHECKING:
    from torch import Tensor


logger = logging.getLogger(__name__)

RECIPE_NAME = "geomerge.yml"
MANIFEST_NAME = "geomerge.json"
EXECUTORS = ("threads", "processes", "ray")


class Progress(Protocol):
    """Watches a run. Called from several threads, one at a time."""

    def start(self, total: int, done: int) -> None:
        """The run begins: bytes to write in all, and bytes that an earlier run has written."""

    def advance(self, nbytes: int) -> None:
        """So many more bytes were written."""

    def finish(self) -> None:
        """The run is over."""


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        out: The output directory.
        seconds: From opening the output to its name, measured by a monotonic clock.
        nbytes: Bytes of tensors in the output.
        tensors, resumed: How many tensors it has, and how many of them an earlier run had written.
        codes: For each tensor that was written as codes: its name, their error, and what its parents' codes lose, as shares
            of the tensor's norm.
        rounding_loss: The share of the task vectors' norm that rounding took, estimated on a sample.
        notes: What the user should know.
    """

    out: Path
    seconds: float
    nbytes: int
    tensors: int
    resumed: int
    rounding_loss: float | None
    codes: tuple[tuple[str, float, float], ...]
    notes: tuple[str, ...]


@collector_paused()
def run_plan(
    plan: Plan,
    out: Path | str,
    *,
    inputs: Sequence[Checkpoint] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    tile: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    resume: bool = False,
    force: bool = False,
    durable: bool = False,
    progress: Progress | None = None,
    executor: str | Callable[[Work], Executor] | None = None,
) -> Report:
    """Write the output of a plan as a model directory.

    Args:
        plan: The plan.
        out: The directory to make. It appears whole or not at all.
        inputs: The opened inputs, if the caller has them; they are closed in any case.
        threads: By default one for each core that the process may use.
        device: ``cpu``, or a torch device to compute on.
        tile: Elements in a tile; the result does not depend on it.
        shard_size: The most bytes in one file of the output.
        resume: Continue what an interrupted run left.
        force: Replace an existing model directory.
        durable: Flush to the disk before a tensor counts as finished, so that even a power cut can be resumed from.
        progress: Told how far the run is.
        executor: ``threads``, ``processes`` or ``ray`` (a cluster: see `geomerge.engine.ray_tasks`), in place of this
            module's own choice; or what makes one.

    Raises:
        UsageError: The output's place is taken or unsafe.
        ModelError: A parent holds NaN or Inf, or is not the one that the plan was made for.
        RunError: The disk is full, an input changed, a file cannot be read.
    """
    begun = time.perf_counter()
    opened = list(inputs) if inputs is not None else open_inputs(plan)
    try:
        if isinstance(executor, str):
            executor = named(executor, threads, shard_size)
        if threads is not None and threads < 1:
            raise UsageError(f"there must be 1 thread at least, not {threads}")
        builder = make_builder(plan, opened, device, tile)
        nodes = list(plan.output_nodes())
        layout = layout_of(plan, shard_size)
        places = [Path(p) for i in plan.inputs for p in (i.path, i.adapter) if p]
        with OutputDirectory(out, force, resume, inputs=places, durable=durable) as output:
            output.create(layout)
            journal = Journal(
                output.journal,
                _identity(plan, shard_size, builder.device),
                inputs=file_identities(opened),
                resume=output.resumed,
                durable=durable,
            )
            try:
                facts = carry_out(
                    plan,
                    range(len(nodes)),
                    lambda p: builder if p is plan else make_builder(p, opened, device, tile),
                    FileSink(output, layout),
                    journal,
                    progress,
                    threads=threads,
                    executor=executor,
                    flush=output.flush,
                )
            except (ModelError, OutOfRange, UsageError) as error:
                # Nothing that a resumed run could go on with: the parent, or the recipe, has to be another one first.
                if not (isinstance(error, UsageError) and output.resumed):
                    output.abandon()
                raise
            finally:
                journal.close()
            for checkpoint in opened:
                checkpoint.verify_unchanged()
            write_side_files(plan, output, facts)
            warn(plan, facts)
            final = output.finish()
    finally:
        close_all(opened)
    return Report(
        out=final,
        seconds=time.perf_counter() - begun,
        nbytes=plan.nbytes,
        tensors=len(nodes),
        resumed=len(journal.finished),
        rounding_loss=total_loss(facts).share,
        codes=codes_of(dict(enumerate(nodes)), facts),
        notes=notes(plan, facts),
    )


def warn(plan: Plan, facts: Mapping[int, Mapping[str, Any]]) -> None:
    """Log what the user should know and the plan could not say."""
    for note in notes(plan, facts)[len(plan.notes) :]:
        logger.warning("%s", note)


def carry_out(
    plan: Plan,
    positions: Sequence[int],
    build: Callable[[Plan], Builder],
    sink: FileSink,
    journal: Journal,
    progress: Progress | None,
    *,
    threads: int | None,
    executor: Callable[[Work], Executor] | None = None,
    flush: Callable[[], None],
) -> dict[int, Mapping[str, Any]]:
    """Make those of an output's tensors that the journal does not list.

    Args:
        plan: The plan.
        positions: Which tensors of its output.
        build: Makes a builder.
        sink: Takes their elements.
        journal: Told of each finished tensor.
        progress: Told how far the run is.
        threads: See `run_plan`.
        executor: Makes the executor; by default what suits the work.
        flush: Brings to the disk what was written; called before a tensor counts as finished where the journal is durable.

    Returns:
        What the manifest shall say of each tensor.
    """
    facts: dict[int, Mapping[str, Any]] = dict(journal.finished)
    lock = threading.Lock()
    nodes = list(plan.output_nodes())
    total, written = sum(nodes[i].nbytes for i in positions), sum(nodes[i].nbytes for i in positions if i in facts)
    left = [i for i in positions if i not in facts]
    looking = survey_bytes(plan) if left else 0
    sums = False

    def begin() -> None:
        if progress is not None and (sums or not looking):
            progress.start(total, written)

    def advance(nbytes: int) -> None:
        if progress is not None:
            with lock:
                progress.advance(nbytes)

    def done(entries: list[tuple[int, dict[str, Any]]]) -> None:
        if journal.durable:
            flush()
        journal.record(entries)
        with lock:
            facts.update(entries)

    if looking:
        if progress is not None:
            progress.start(total + looking, written)
        before = build(plan)
        looked_at = [(i, node) for i, node in enumerate(plan.nodes) if survey_bytes(replace(plan, nodes=(node,)))]
        forks = executor is None and _may_fork(before, looked_at, threads)
        plan = surveyed(plan, build, threads=threads, forks=forks, advance=advance, journal=journal)
        nodes = list(plan.output_nodes())
    work = Work(build(plan), sink, advance, threading.Event())
    items = [(i, nodes[i]) for i in left]
    made = (executor or _choice(work.builder, items, threads))(work)
    if isinstance(made, Threads):
        sums = find_sums(work.builder, [node for _, node in items], progress)
    made.run(items, done, begin)
    if progress is not None:
        progress.finish()
    return facts


def find_sums(builder: Builder, nodes: Sequence[Node], progress: Progress | None) -> bool:
    """Find the sparse sums among rows before anything is made with them: a phase with a progress of its own.

    Returns:
        Whether there were any.
    """
    found = builder.mixtures(nodes)
    if progress is not None and found:
        progress.start(sum(each.nbytes for each in found), 0)
    for each in found:
        each.find(progress.advance if progress is not None else lambda nbytes: None)
    if progress is not None and found:
        progress.finish()
    return bool(found)


def codes_of(nodes: Mapping[int, Node], facts: Mapping[int, Mapping[str, Any]]) -> tuple[tuple[str, float, float], ...]:
    """What writing tensors as codes cost: see `Report`."""
    return tuple((nodes[i].name, *f["codes"][:2]) for i, f in sorted(facts.items()) if "codes" in f and i in nodes)


def layout_of(plan: Plan, shard_size: int) -> Layout:
    """Where the plan's output tensors will lie."""
    kinds = [(n.name, n.dtype, n.shape) for n in plan.output_nodes()]
    return plan_layout(kinds, _shard_size(plan, shard_size), {"geomerge": __version__}, weights_stem(plan.config))


def file_identities(opened: Sequence[Checkpoint]) -> list[list[int]]:
    """What a journal remembers of the inputs' files: size, modification time, inode, change time."""
    return [[f.size, f.mtime_ns, f.inode, f.ctime_ns] for checkpoint in opened for f in checkpoint.files]


def run_in_memory(
    plan: Plan,
    inputs: Sequence[Checkpoint] | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
    tile: int | None = None,
) -> dict[str, Tensor]:
    """The output of a plan as a state dict, bit for bit what `run_plan` writes. Arguments as there."""
    opened = list(inputs) if inputs is not None else open_inputs(plan)
    try:
        sink = MemorySink(plan)
        known = surveyed(plan, lambda p: make_builder(p, opened, device, tile), threads=threads)
        work = Work(make_builder(known, opened, device, tile), sink, lambda nbytes: None, threading.Event())
        Threads(work, threads).run(list(enumerate(known.output_nodes())), lambda entries: None)
        return sink.tensors
    finally:
        close_all(opened)


def open_inputs(plan: Plan, *, allow_pickle: bool = False) -> list[Checkpoint]:
    """Open a saved plan's inputs.

    Args:
        plan: The plan.
        allow_pickle: Read pickled weights (weights only).

    Raises:
        RunError: An input is not the one that the plan was made for.
    """
    opened: list[Checkpoint] = []
    try:
        for model in plan.inputs:
            opened.append(_open_input(model, allow_pickle=allow_pickle))  # noqa: PERF401 - what is open is to be closed
    except BaseException:
        close_all(opened)
        raise
    return opened


def close_all(opened: Sequence[Checkpoint]) -> None:
    """Close models side by side: to let go of gigabytes that were mapped takes the system a while."""
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(Checkpoint.close, opened))


def _open_input(model: InputModel, *, allow_pickle: bool) -> Checkpoint:
    if not model.path:
        raise UsageError(f"the model {model.ref} was in memory when the plan was made; it cannot be opened again")
    checkpoint = open_checkpoint(model.path, allow_pickle=allow_pickle)
    if model.adapter:
        from geomerge.checkpoint.lora import open_adapter

        checkpoint = adapt(checkpoint, open_adapter(model.adapter, allow_pickle=allow_pickle), model.ref)
    files = tuple((f.path.name, f.size, f.header_sha256) for f in checkpoint.files)
    if files != model.files or checkpoint.fingerprint() != model.fingerprint:
        checkpoint.close()
        raise RunError(
            f"the model {model.ref} is not the one that the plan was made for",
            where=model.path,
            hint="make the plan again",
        )
    return checkpoint


def _choice(builder: Builder, nodes: Sequence[tuple[int, Node]], threads: int | None) -> Callable[[Work], Executor]:
    """Processes where they are safe and worth it, else threads."""
    if not _may_fork(builder, nodes, threads):
        return lambda work: Threads(work, threads)
    with_torch = not all(_by_loops(builder, node) for _, node in nodes)
    return lambda work: Processes(work, threads, with_torch=with_torch)


def _may_fork(builder: Builder, nodes: Sequence[tuple[int, Node]], threads: int | None) -> bool:
    # Whole matrices are kept within bounds by one process, and LAPACK does not fight for the interpreter's lock.
    whole = any(whole_matrices(builder.plan, node) for _, node in nodes)
    # Sparse sums are found once, by whoever needs them first; each process would find them again.
    whole = whole or any(r.plan.pursued for r in builder.plan.rows)
    memory = any(c.memory for c in builder.inputs)
    slow = sum(interpreted(node, loops=_by_loops(builder, node)) for _, node in nodes)
    return builder.device == "cpu" and not whole and not memory and suitable(slow, threads)


def _by_loops(builder: Builder, node: Node) -> bool:
    """Whether a node is copied or made by compiled loops: these leave the interpreter's lock to the other threads."""
    if node.method is None:
        return True
    plain = node.scale == 1.0 and not node.chain and not node.columns and not node.scales
    return plain and builder.nearest(node) and native.available() and node.method.loops


def named(executor: str, threads: int | None, shard_size: int) -> Callable[[Work], Executor]:
    """An executor by its name.

    Raises:
        UsageError: There is none of this name.
    """
    if executor == "threads":
        return lambda work: Threads(work, threads)
    if executor == "processes":
        return lambda work: Processes(work, threads)
    if executor == "ray":
        from geomerge.engine.ray_tasks import RayTasks, check_installed

        check_installed()
        return lambda work: RayTasks(work, shard_size)
    raise UsageError(f"there is no executor {executor!r}", hint=did_you_mean(executor, EXECUTORS))


def make_builder(plan: Plan, opened: Sequence[Checkpoint], device: str, tile: int | None) -> Builder:
    device = re.sub(r"^cpu:\d+$", "cpu", str(device))
    accelerated = device != "cpu"
    if accelerated:
        check_device(device)
    # A device wants tiles that are worth a transfer; a core wants tiles that stay in its cache.
    return Builder(
        plan,
        opened,
        tile=tile or (1 << 18 if accelerated else TILE),
        device=device,
        read_ahead=accelerated,
    )


def _shard_size(plan: Plan, asked: int) -> int:
    """Without a config there is nobody who would read several files (Stable Diffusion's single files, bare state dicts), so
    the usual size does not cut such a model."""
    return max(plan.nbytes, 1) if plan.config is None and asked == DEFAULT_SHARD_SIZE else asked


def _identity(plan: Plan, shard_size: int, device: str) -> str:
    return f"{plan.hash}/{shard_size}/{device.partition(':')[0]}/{__version__}"


def write_model_files(plan: Plan, output: OutputDirectory) -> None:
    """Config, tokenizer and whatever else of the models belongs to the output."""
    if plan.config is not None:
        output.write_json("config.json", plan.config)
    for name, path in plan.copies.items():
        output.copy(Path(path), name)
    for name, content in plan.texts.items():
        output.write_text(name, content)


def write_side_files(plan: Plan, output: OutputDirectory, facts: Mapping[int, Mapping[str, Any]]) -> None:
    """Everything beside the weights: the models' files, the recipe, the manifest, the model card."""
    write_model_files(plan, output)
    output.write_text(RECIPE_NAME, plan.recipe)
    output.write_text(MANIFEST_NAME, as_text(manifest(plan, facts)))
    output.write_text("README.md", _card(plan, output.out.name, notes(plan, facts)))


def _card(plan: Plan, name: str, said: Sequence[str]) -> str:
    mixture = plan.stages[-1].method == MIXTURE
    method = None if mixture else registry.get(plan.stages[-1].method)
    based = mixture or (method is not None and method.base_use == "required")
    # Files of statistics are inputs, but no parents.
    numbers = {o.input for n in plan.nodes for o in (*n.statistics, *(c.statistics for c in n.columns))}
    bases = {n.operands[0].input for n in plan.output_nodes() if n.method is not None and n.operands}
    parents = [
        Parent(
            name=i.name,
            fingerprint=i.fingerprint,
            hub_id=i.hub_id,
            revision=i.revision,
            licence=i.licence,
            base=based and k in bases,
        )
        for k, i in enumerate(plan.inputs)
        if k not in numbers
    ]
    library = library_of(plan.config) or "safetensors"
    if mixture:  # everything but the experts comes from the first model; the last input are the gates
        parents = [replace(parent, base=k == 0) for k, parent in enumerate(parents[:-1])]
    return model_card(
        name=name,
        method=plan.stages[-1].method if method is None else method.name,
        title="Mixture of experts" if method is None else method.title,
        paper="Sukhbaatar et al. 2024, Branch-Train-MiX, arXiv:2403.07816; mergekit-moe"
        if method is None
        else method.paper,
        parents=parents,
        recipe=plan.recipe,
        version=__version__,
        library=library,
        warnings=said,
        onto_base=mixture or (method is not None and method.adds_to_base()),
        command=f"geomerge {MIXTURE if mixture else 'merge'} recipe.yml output",
    )
