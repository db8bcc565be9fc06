"""``geomerge merge``: a recipe (or a saved plan) in, a model directory out."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomerge.cli.options import AllowPickle, AsJson, Compat, Quiet, Requantize, Threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from geomerge.checkpoint.checkpoint import Checkpoint
    from geomerge.cli.progress import Silent
    from geomerge.engine.plan import Plan
    from geomerge.engine.run import Report


def merge(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or a plan saved by `plan --save`.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make. It appears whole or not at all.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue what an interrupted run left.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing model directory.")] = False,
    threads: Threads = None,
    device: Annotated[str, typer.Option(metavar="DEV", help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most bytes in one file, like 5GB.")] = "5GB",
    compat: Compat = None,
    requantize: Requantize = None,
    allow_pickle: AllowPickle = False,
    durable: Annotated[
        bool, typer.Option("--durable", help="Flush to the disk as it goes: even a power cut can be resumed from.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Make the I-th of N shards, in a shared folder; `geomerge finalize` ends it."),
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="threads, processes or ray (a cluster); by default what suits this machine."),
    ] = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Merge the models of a recipe into a model directory.

    The result is written into OUT.partial and gets its name when it is complete. Interrupted at any moment, the same
    command with --resume continues, and the bytes are the same. With --shard the same command, on as many machines as
    there are shards, makes one output; a shard that is repeated continues by itself.
    """
    from geomerge.checkpoint.layout import parse_size
    from geomerge.cli.console import Stopped, write_json
    from geomerge.cli.plan import planned
    from geomerge.cli.progress import watch
    from geomerge.engine.run import run_plan
    from geomerge.errors import UsageError

    size = parse_size(shard_size)
    piece = None
    if shard is not None:
        from geomerge.engine.shards import parse_shard, run_shard

        piece = parse_shard(shard)
    if shard is not None and executor is not None:
        raise UsageError("a shard is made by one machine: give either --shard or --executor")
    try:
        plan, opened = planned(recipe, compat=compat, requantize=requantize, allow_pickle=allow_pickle)
        with watch("merging", quiet=quiet) as progress:
            options: dict[str, Any] = {
                "inputs": opened,
                "threads": threads,
                "device": device,
                "shard_size": size,
                "force": force,
                "durable": durable,
                "progress": progress,
            }
            if piece is not None:
                report = run_shard(plan, out, *piece, **options)
            else:
                report = run_plan(plan, out, resume=resume, executor=executor, **options)
    except KeyboardInterrupt:
        given = {
            "--threads": threads,
            "--device": device,
            "--shard-size": shard_size,
            "--compat": compat,
            "--requantize": requantize,
            "--executor": executor,
        }
        usual = {"--device": "cpu", "--shard-size": "5GB"}
        if piece is not None:
            raise Stopped(
                f"what shard {shard} has finished is kept", "run the same command again to continue"
            ) from None
        words = [str(w) for name, v in given.items() if v != usual.get(name) for w in (name, v)]
        flags = {"--force": force, "--allow-pickle": allow_pickle, "--durable": durable}
        words += [name for name, on in flags.items() if on]
        raise Stopped(*_left(recipe, out, words)) from None
    if json:
        write_json(as_json(plan, report, progress))
    else:
        show_report(plan, report, progress, shard, resume=resume)


def write_output(
    title: str,
    plan: Plan,
    opened: Sequence[Checkpoint],
    out: Path,
    *,
    threads: int | None,
    shard_size: int,
    resume: bool,
    force: bool,
    quiet: bool,
    json: bool,
) -> None:
    """Carry out a plan for a verb that makes a model directory in another way than from a recipe, and tell of it.

    Raises:
        Stopped: The user interrupted it.
    """
    from geomerge.checkpoint.writer import JOURNAL
    from geomerge.cli.console import Stopped, write_json
    from geomerge.cli.progress import watch
    from geomerge.engine.run import run_plan

    try:
        with watch(title, quiet=quiet) as progress:
            report = run_plan(
                plan,
                out,
                inputs=opened,
                threads=threads,
                shard_size=shard_size,
                resume=resume,
                force=force,
                progress=progress,
            )
    except KeyboardInterrupt:
        partial = out.resolve().with_name(out.resolve().name + ".partial")
        if (partial / JOURNAL).is_file():
            raise Stopped(
                f"what is finished is kept in {partial}", "continue with the same command and --resume"
            ) from None
        raise Stopped("nothing was written") from None
    if json:
        write_json(as_json(plan, report, progress))
    else:
        show_report(plan, report, progress, resume=resume)


def _left(recipe: str, out: Path, options: list[str]) -> tuple[str, str | None]:
    """What an interruption leaves, and how to go on."""
    from geomerge.checkpoint.writer import JOURNAL

    partial = out.resolve().with_name(out.resolve().name + ".partial")
    if not (partial / JOURNAL).is_file():
        return "nothing was written", None
    command = shlex.join(["geomerge", "merge", recipe, str(out), "--resume", *options])
    return f"what is finished is kept in {partial}", f"continue with: {command}"


def as_json(plan: Plan, report: Report, progress: Silent) -> dict[str, Any]:
    """What a run did, as plain data."""
    return {
        "out": str(report.out),
        "plan": plan.hash,
        "method": plan.stages[-1].method,
        "compat": plan.stages[-1].compat,
        "tensors": report.tensors,
        "resumed": report.resumed,
        "bytes": report.nbytes,
        "seconds": round(report.seconds, 3),
        "bytes_per_second": round(_rate(report, progress)),
        "rounding_loss": report.rounding_loss,
        "codes": [{"tensor": name, "error": error, "parents": parents} for name, error, parents in report.codes],
        "notes": list(report.notes),
    }


def _rate(report: Report, progress: Silent) -> float:
    """Bytes of the output written in a second by this run."""
    return (report.nbytes - progress.before) / max(report.seconds, 1e-9)


def _codes(report: Report) -> str:
    """What writing tensors as codes cost."""
    from geomerge.cli.console import clean, count
    from geomerge.engine.codes import ALLOWED

    errors = [error for _, error, _ in report.codes]
    worst = max(report.codes, key=lambda each: each[1])
    mean = sum(errors) / len(errors)
    text = f"{count(len(errors), 'tensor')}, error {mean:.2%} on average, {worst[1]:.2%} in {clean(worst[0])}"
    beyond = [name for name, error, parents in report.codes if error > ALLOWED * parents]
    return text if not beyond else f"{text}; {len(beyond)} lose more than {ALLOWED} times what their parents lose"


def _codes_table(report: Report) -> RenderableType:
    """What each kind of tensor lost over the blocks, beside what its parents' codes lose, the worst first."""
    from geomerge.cli.console import clean, table
    from geomerge.cli.patterns import split
    from geomerge.engine.codes import ALLOWED

    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, error, parents in report.codes:
        kinds.setdefault("*".join(split(name)[0]), []).append((error, parents))
    rows = []
    for name, found in kinds.items():
        worst = max(found, key=lambda each: each[0] / max(each[1], 1e-300))
        ratio = worst[0] / worst[1] if worst[1] > 0 else math.inf
        mean = sum(error for error, _ in found) / len(found)
        beyond = sum(error > ALLOWED * parents for error, parents in found)
        most = max(error for error, _ in found)
        rows.append((ratio, (clean(name), str(len(found)), f"{mean:.3%}", f"{most:.3%}", f"{ratio:.2f}", str(beyond))))
    columns = ("tensors", "count", "mean error", "worst", "times the parents'", f"beyond {ALLOWED}")
    return table(columns, [cells for _, cells in sorted(rows, key=lambda row: -row[0])], right=columns[1:])


def show_report(
    plan: Plan, report: Report, progress: Silent, shard: str | None = None, *, resume: bool = False
) -> None:
    """Tell the user what a run did."""
    from geomerge.cli.console import amount, clean, count, duration, heading, show, show_facts
    from geomerge.cli.loss import rounding
    from geomerge.methods import native

    speed = f"{amount(report.nbytes)} in {duration(report.seconds)}"
    speed += f" ({amount(_rate(report, progress))}/s)" if report.resumed < report.tensors else ""
    where = clean(report.out)
    rows = [
        ("merged", where) if shard is None else ("shard", f"{shard} in {where}"),
        ("output", f"{count(report.tensors, 'tensor')}, {speed}"),
    ]
    if shard is not None:
        whole = report.out.with_name(report.out.name.removesuffix(".partial"))
        rows.append(("next", f"when all shards are made: geomerge finalize {clean(shlex.quote(str(whole)))}"))
    if report.resumed:
        were = "was" if report.resumed == 1 else "were"
        rows.append(("resumed", f"{count(report.resumed, 'tensor')} {were} finished before"))
    elif resume:
        rows.append(("resumed", "nothing: no tensor of an earlier run could be kept"))
    if plan.stages[-1].compat is not None:
        rows.append(("profile", f"compat: {clean(plan.stages[-1].compat)}"))
    loss = rounding(plan, report.rounding_loss)
    if loss is not None:
        rows.append(("loss", loss))
    if report.codes:
        rows.append(("codes", _codes(report)))
    rows += [("note", clean(note)) for note in report.notes]
    if native.missing() is not None:
        rows.append(("slow", f"without compiled loops most merges take two to five times as long: {native.missing()}"))
    show_facts(rows)
    if report.codes:
        show(heading("codes"), _codes_table(report))
