"""``geomerge continue``: the next expert into a merge that remembers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomerge.cli.options import AllowPickle, AsJson, Quiet, Threads

if TYPE_CHECKING:
    from geomerge.continual import Step


def continue_(
    state: Annotated[Path, typer.Argument(metavar="STATE", help="The state's directory, which is the merged model's.")],
    experts: Annotated[list[str], typer.Argument(metavar="EXPERT...", help="The next experts, in their order.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What all experts were trained from: at the first step, or if moved."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="At the first step: opcm (the default), average, task_arithmetic, ties."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="opcm: share of the singular values that is protected (0.5).")
    ] = None,
    keep_diagonal: Annotated[
        bool, typer.Option("--keep-diagonal", help="opcm: leave the diagonal, as in the paper's published numbers.")
    ] = False,
    lambda_: Annotated[
        float | None, typer.Option("--lambda", help="task_arithmetic (0.3), ties (0.5): factor of each task vector.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="ties: share of the elements that is kept (0.2).")] = None,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Take the next expert into a continual merge.

    STATE is a model directory that also holds a running sum of task vectors. Each step reads the base, the expert and that
    sum, and replaces STATE as a whole; it takes the same time and memory however many experts went before.
    """
    from geomerge.cli.console import Stopped, write_json
    from geomerge.cli.progress import watch
    from geomerge.continual import continue_merge

    given = {"alpha": alpha, "lambda": lambda_, "density": density, "zero_diagonal": False if keep_diagonal else None}
    try:
        with watch("merging", quiet=quiet) as progress:
            step = continue_merge(
                state,
                experts,
                base=base,
                method=method,
                parameters={name: value for name, value in given.items() if value is not None},
                allow_pickle=allow_pickle,
                threads=threads,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise Stopped("the state is what it was") from None
    if json:
        write_json(
            {
                "out": str(step.out),
                "method": step.state.rule.name,
                "parameters": step.state.rule.values(),
                "experts": step.state.count,
                "norm": step.norm,
                "factor": step.state.factor,
                "change": step.change,
                "bytes": step.nbytes,
                "seconds": round(step.seconds, 3),
                "rounding_loss": step.rounding_loss,
                "notes": list(step.notes),
            }
        )
    else:
        _show(step)


def _show(step: Step) -> None:
    from geomerge.cli.console import amount, clean, count, duration, facts, show

    rows = [
        ("merged", clean(step.out)),
        ("method", f"{step.state.rule.name}: {step.state.rule.title}"),
        ("experts", f"{step.state.count}, the last is {clean(step.state.experts[-1].model)}"),
        ("change", f"{step.change:.4g} from the base (running sum {step.norm:.4g} × {step.state.factor:.4g})"),
        ("output", f"{count(step.tensors, 'tensor')}, {amount(step.nbytes)} in {duration(step.seconds)}"),
    ]
    if step.rounding_loss is not None:
        rows.append(("loss", f"rounding takes {100 * step.rounding_loss:.2g} % of the merged task vector"))
    rows += [("note", clean(note)) for note in step.notes]
    show(facts(rows))
