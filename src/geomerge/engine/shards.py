"""One merge on many machines over a shared folder: each makes its shard, any of them finalizes.

Every machine makes the same plan and from it the same layout and the same division, so nobody has to coordinate them: shard
i of n is a piece of the output's tensors, written in place. Shards may be started in any order, killed, repeated on other
machines and run twice. A shard counts when its bytes are with the file server and its journal says so.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.collector import collector_paused
from geomerge.checkpoint.header import read_header
from geomerge.checkpoint.layout import DEFAULT_SHARD_SIZE
from geomerge.checkpoint.output_lock import LOCK
from geomerge.checkpoint.shared_output import (
    PLAN,
    FinalOutput,
    ShardedOutput,
    check_files,
    journal,
    places,
    read_identity,
)
from geomerge.checkpoint.writer import WORK
from geomerge.engine.journal import Journal, Reading, read_journal
from geomerge.engine.manifest import notes, total_loss, versions
from geomerge.engine.plan import Node, Plan
from geomerge.engine.run import (
    MANIFEST_NAME,
    Progress,
    Report,
    carry_out,
    close_all,
    codes_of,
    file_identities,
    layout_of,
    make_builder,
    open_inputs,
    warn,
    write_side_files,
)
from geomerge.engine.sinks import FileSink
from geomerge.errors import RunError, UsageError
from geomerge.version import __version__

logger = logging.getLogger(__name__)

MOST_SHARDS = 100_000


def parse_shard(text: str) -> tuple[int, int]:
    """``"3/16"``: the third of sixteen.

    Raises:
        UsageError: Not of this form, or no such shard.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None:
        raise UsageError(f"{text!r} is not a shard", hint="write it like 3/16: the third of sixteen")
    shard, shards = int(found[1]), int(found[2])
    if not 1 <= shard <= shards <= MOST_SHARDS:
        raise UsageError(f"there is no shard {text}", hint=f"shards are numbered from 1/{max(shards, 1)}")
    return shard, shards


def divide(nodes: Sequence[Node], shards: int) -> list[range]:
    """Divide the output's tensors: pieces in the order of the files, the largest as small as possible.

    Neighbours stay together, so that a machine reads few files, front to back, and few places are the border between two
    machines. What is balanced is the bytes that a tensor moves: one reading of each operand and one writing.

    Args:
        nodes: The output's nodes in order.
        shards: How many pieces; those beyond the number of tensors are empty.

    Returns:
        Positions in `nodes`.
    """
    costs = [node.nbytes * (1 + len(node.operands)) for node in nodes]
    low, high = max([*costs, -(-sum(costs) // shards)]), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_cuts(costs, middle)) <= shards:
            high = middle
        else:
            low = middle + 1
    ends = _cuts(costs, low)
    ends += [len(nodes)] * (shards - len(ends))
    return [range(start, end) for start, end in zip([0, *ends], ends)]


def _cuts(costs: Sequence[int], most: int) -> list[int]:
    """Where the pieces end when each is filled up to `most`."""
    ends, load = [], 0
    for i, cost in enumerate(costs):
        if load + cost > most:
            ends.append(i)
            load = 0
        load += cost
    return [*ends, len(costs)]


@collector_paused()
def run_shard(
    plan: Plan,
    out: Path | str,
    shard: int,
    shards: int,
    *,
    inputs: Sequence[Checkpoint] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    tile: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
    durable: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Make one shard of a plan's output. What an earlier run of the same shard finished is not made again.

    Args:
        plan: The plan; the same on all machines.
        out: The directory to make, in a folder that all machines share.
        shard, shards: Which one, from 1, of how many.
        inputs, threads, device, tile, durable, progress: See `geomerge.engine.run.run_plan`.
        shard_size: The most bytes in one file of the output; the same on all machines.
        force: The output may exist: whoever finalizes will replace it.

    Raises:
        UsageError: The output's place is taken, the shard is being made by another process, or the others make another merge.
        ModelError: A parent holds NaN or Inf, or is not the one that the plan was made for.
        RunError: The disk is full, an input changed, a file cannot be read.
    """
    begun = time.perf_counter()
    opened = list(inputs) if inputs is not None else open_inputs(plan)
    try:
        if any(c.memory for c in opened):
            raise UsageError(
                "models in memory cannot be merged in shards",
                hint="save them as safetensors first; what is pickled is in memory, too",
            )
        nodes = list(plan.output_nodes())
        mine = [(i, nodes[i]) for i in divide(nodes, shards)[shard - 1]]
        if finished(plan, out):
            logger.warning("%s is complete: there is nothing left to do for shard %d/%d", out, shard, shards)
            return _report(plan, Path(out), begun, mine, len(mine), {})
        builder = make_builder(plan, opened, device, tile)
        layout = layout_of(plan, shard_size)
        identity = _identity(plan, shards, shard_size, builder.device)
        with ShardedOutput(
            out, shard, shards, force=force, inputs=[Path(p) for i in plan.inputs for p in (i.path, i.adapter) if p]
        ) as output:
            files = output.prepare(layout, identity, plan.save)
            try:
                record = Journal(
                    output.journal,
                    json.dumps(identity, sort_keys=True),
                    inputs=file_identities(opened),
                    resume=True,
                    durable=durable,
                )
                try:
                    facts = carry_out(
                        plan,
                        [i for i, _ in mine],
                        lambda p: builder if p is plan else make_builder(p, opened, device, tile),
                        FileSink(files, layout),
                        record,
                        progress,
                        threads=threads,
                        flush=files.flush,
                    )
                    for checkpoint in opened:
                        checkpoint.verify_unchanged()
                    if not record.complete:
                        files.flush()
                        record.conclude()
                finally:
                    record.close()
            finally:
                files.close()
            return _report(plan, output.partial, begun, mine, len(record.finished), facts)
    finally:
        close_all(opened)


def finalize(out: Path | str, *, force: bool = False, durable: bool = False) -> Report:
    """Give an output whose shards are all made its side files and its name. On a finished output it changes nothing.

    Args:
        out: The output.
        force: Replace an existing model directory.
        durable: Flush the directory to the disk.

    Raises:
        UsageError: There is nothing to finalize, a shard is still running, or the output exists.
        RunError: Shards or tensors are missing (they are named), or the shards saw different inputs.
    """
    begun = time.perf_counter()
    path, partial = places(out)
    if not partial.exists() and (path / MANIFEST_NAME).is_file():
        # An earlier finalize got as far as the name.
        shutil.rmtree(path / WORK, ignore_errors=True)
        (path / LOCK).unlink(missing_ok=True)
        return _finished_report(path, begun)
    with FinalOutput(path, force=force, durable=durable) as output:
        work = output.partial / WORK
        identity = read_identity(work) or {}
        plan = _saved_plan(work / PLAN, identity)
        nodes = list(plan.output_nodes())
        facts = _collect(work, identity, nodes)
        check_files(output.partial, layout_of(plan, int(identity["shard_size"])))
        write_side_files(plan, output, facts)
        warn(plan, facts)
        final = output.finish()
    return _report(plan, final, begun, list(enumerate(nodes)), 0, facts)


def finished(plan: Plan, out: Path | str) -> bool:
    """Whether the output exists and is this plan's."""
    path, partial = places(out)
    try:
        found = json.loads((path / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return not partial.exists() and isinstance(found, dict) and found.get("plan") == plan.hash


def _collect(work: Path, identity: Mapping[str, Any], nodes: Sequence[Node]) -> dict[int, Mapping[str, Any]]:
    """What all journals say of the tensors.

    Raises:
        RunError: A shard is not complete, or saw other inputs than the rest.
    """
    shards = int(identity["shards"])
    head = json.dumps(identity, sort_keys=True)
    facts: dict[int, Mapping[str, Any]] = {}
    missing: list[str] = []
    readings: dict[int, Reading] = {}
    for shard, piece in enumerate(divide(nodes, shards), 1):
        found = read_journal(journal(work, shard))
        if found is None or found.head.get("plan") != head:
            if piece or found is not None:
                missing.append(f"{shard}/{shards} (not begun, {len(piece):,} tensors)")
            continue
        readings[shard] = found
        lacking = [i for i in piece if i not in found.finished]
        if lacking:
            first = nodes[lacking[0]].name
            missing.append(f"{shard}/{shards} ({len(lacking):,} of {len(piece):,} tensors, such as {first})")
        elif not found.complete:
            missing.append(f"{shard}/{shards} (made, but not known to have reached the disk)")
        facts.update({i: found.finished[i] for i in piece if i in found.finished})
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise RunError(
            f"{len(missing)} of {shards} shards are missing: {', '.join(missing[:8])}{more}",
            where=str(work.parent),
            hint="run `geomerge merge RECIPE OUT --shard i/n` for each of them, then finalize again",
        )
    _check_inputs(work, readings, shards)
    return facts


def _check_inputs(work: Path, readings: Mapping[int, Reading], shards: int) -> None:
    """Refuse shards between which an input was changed.

    Machines may have copies of their own, so a file of another number is another file and says nothing; the plan's
    fingerprints have compared those.
    """
    newest: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for shard, reading in readings.items():
        for position, file in enumerate(reading.head.get("inputs", ())):
            known = newest.setdefault((position, file[2]), (shard, file))
            if known[1] != file:
                older = shard if file[3] < known[1][3] else known[0]
                raise RunError(
                    f"an input was changed between the shards {known[0]}/{shards} and {shard}/{shards}",
                    where=str(work.parent),
                    hint=f"run shard {older}/{shards} again: it makes its tensors anew, from the inputs as they are",
                )


def _saved_plan(path: Path, identity: Mapping[str, Any]) -> Plan:
    plan = Plan.load(path)
    if plan.hash != identity.get("plan"):
        raise RunError("is not the plan of these shards", where=str(path), hint="remove OUT.partial and start anew")
    return plan


def _identity(plan: Plan, shards: int, shard_size: int, device: str) -> dict[str, Any]:
    """What all shards must agree on, so that the output is the one that a single machine would write."""
    return {
        "plan": plan.hash,
        "shards": shards,
        "shard_size": shard_size,
        "device": device,
        "geomerge": __version__,
        **versions(),
    }


def _report(
    plan: Plan,
    out: Path,
    begun: float,
    nodes: Sequence[tuple[int, Node]],
    resumed: int,
    facts: Mapping[int, Mapping[str, Any]],
) -> Report:
    return Report(
        out=out,
        seconds=time.perf_counter() - begun,
        nbytes=sum(node.nbytes for _, node in nodes),
        tensors=len(nodes),
        resumed=resumed,
        rounding_loss=total_loss(facts).share,
        codes=codes_of(dict(nodes), facts),
        notes=notes(plan, facts) if len(facts) == len(plan.outputs) else plan.notes,
    )


def _finished_report(out: Path, begun: float) -> Report:
    try:
        found = json.loads((out / MANIFEST_NAME).read_bytes())
        tensors, notes = len(found["tensors"]), tuple(found["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError("holds no output of geomerge", where=str(out)) from None
    nbytes = sum(info.nbytes for path in out.glob("*.safetensors") for info in read_header(path)[1])
    return Report(out, time.perf_counter() - begun, nbytes, tensors, tensors, found.get("rounding_loss"), (), notes)
