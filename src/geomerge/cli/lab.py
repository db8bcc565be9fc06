"""``geomerge lab``: suites of small experts that share a base, made on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomerge.cli.options import AsJson, Quiet

if TYPE_CHECKING:
    from rich.console import RenderableType

    from geomerge.lab.build import Scores
    from geomerge.lab.suite import Suite

lab_app = typer.Typer(
    help="Suites of small experts that share a base: something to merge, and tasks to judge it by.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@lab_app.command("list")
def list_suites(json: AsJson = False) -> None:
    """List the suites: what they hold, which ship with geomerge, which have been built."""
    from geomerge.cli.console import show, table, write_json
    from geomerge.lab.kinds import get_kind
    from geomerge.lab.suite import suites

    found = suites()
    if json:
        write_json(
            [
                {
                    "suite": s.name,
                    "size": s.size,
                    "title": s.title,
                    "kind": s.kind,
                    "tasks": list(get_kind(s.name).tasks(s.size, 0)),
                    "shipped": None if s.shipped is None else str(s.shipped),
                    "built": {str(seed): str(place) for seed, place in s.built.items()},
                }
                for s in found
            ]
        )
        return
    rows = []
    for s in found:
        there = ["ships with geomerge"] if s.shipped is not None else []
        if s.built:
            seeds = "seed" if len(s.built) == 1 else "seeds"
            there.append(f"built: {seeds} {', '.join(str(seed) for seed in s.built)}")
        rows.append((s.name, s.size, str(len(get_kind(s.name).tasks(s.size, 0))), s.title, "; ".join(there) or "-"))
    show(
        table(("suite", "size", "tasks", "what", "where"), rows, right=("tasks",)),
        "",
        "`geomerge lab build SUITE` trains one. Name it as NAME, NAME:SIZE or NAME:SIZE:SEED, or by its directory.",
    )


@lab_app.command()
def build(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="skills, glyphs or mlp.")],
    size: Annotated[str | None, typer.Option(metavar="SIZE", help="By default the smallest, `tiny`.")] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same models.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Copy the suite into this directory, too.")] = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Experts trained at the same time.")] = 2,
    force: Annotated[bool, typer.Option("--force", help="Replace another suite at DIR.")] = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Train a suite's base and experts, and show what they can do.

    Models that an interrupted build has finished are used again. Fails (exit code 1) when the
    experts are not worth merging: no better than their base, or no better than their average.
    """
    from geomerge.cli.console import Stopped, write_json
    from geomerge.cli.steps import watch_steps
    from geomerge.lab.build import NotWorthMerging
    from geomerge.lab.build import build as make

    try:
        with watch_steps("training", quiet=quiet or json) as progress:
            built = make(suite, size, seed, out, progress, workers, force)
    except KeyboardInterrupt:
        raise Stopped("the models that are finished are kept", "run the same command again to go on") from None
    except NotWorthMerging as error:
        if not json:
            _show_scores(error.scores, error.experts)
        raise
    if json:
        write_json(_as_json(built))
    else:
        _show_scores(built.scores, tuple(built.experts), f"written to {built.root}")


def _as_json(suite: Suite) -> dict[str, Any]:
    from geomerge.lab.build import AVERAGE, experts_mean, mean
    from geomerge.lab.kinds import get_kind

    required = get_kind(suite.name).requirement(suite.size)
    return {
        "suite": suite.name,
        "size": suite.size,
        "seed": suite.seed,
        "kind": suite.kind,
        "path": str(suite.root),
        "scores": suite.scores,
        "base": mean(suite.scores["base"]),
        "experts": experts_mean(suite.scores, tuple(suite.experts)),
        "average": mean(suite.scores[AVERAGE]),
        "required": {"gain": required.gain, "gap": required.gap},
    }


def _show_scores(scores: Scores, experts: Sequence[str], last: str = "") -> None:
    """The table that says whether the experts are worth merging: a line for each task, and the means."""
    from geomerge.cli.console import clean, show, table
    from geomerge.lab.build import AVERAGE, experts_mean, mean

    def points(share: float) -> str:
        return f"{100 * share:.1f}"

    others = [m for m in scores if m not in ("base", AVERAGE, *experts)]
    heads = ("task", "base", "expert", "gain", "average", *map(clean, others))
    rows = []
    for task in experts:
        base, own = scores["base"][task], scores[task][task]
        rest = [points(scores[m][task]) for m in (AVERAGE, *others)]
        rows.append((clean(task), points(base), points(own), f"{100 * (own - base):+.1f}", *rest))
    base, own = mean(scores["base"]), experts_mean(scores, tuple(experts))
    rest = [points(mean(scores[m])) for m in (AVERAGE, *others)]
    rows.append(("mean", points(base), points(own), f"{100 * (own - base):+.1f}", *rest))
    parts: list[RenderableType] = [table(heads, rows, right=heads[1:])]
    show(
        *parts,
        "",
        "Accuracy in % on the test split. Each expert on its own task; the average is the plain mean of their weights.",
        *([clean(last)] if last else []),
    )
