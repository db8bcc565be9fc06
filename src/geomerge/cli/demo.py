"""``geomerge demo``: what a newcomer runs first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geomerge.cli.options import Quiet


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where recipes, merges, scores and the report go.")
    ] = Path("demo"),
    quiet: Quiet = False,
) -> None:
    """Merge two small experts in several ways, score them beside their parents, write a report.

    The experts ship with geomerge: six skills of a small language model, trained by `geomerge lab build skills`.
    """
    from geomerge.cli.console import clean, duration, facts, heading, show, table
    from geomerge.cli.evaluate_page import watch
    from geomerge.lab.demo import PAIR, run_demo

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    with watch(quiet=quiet) as progress:
        made = run_demo(out, say=say, progress=progress)
    tasks = [t.name for t in made.scores.tasks]
    wanted = [t for t in tasks if t.split("/")[-1] in PAIR]
    others = [t for t in tasks if t not in wanted]
    rows = []
    for model in made.scores.models:
        values = {t: made.scores.value(model.name, t) or 0.0 for t in tasks}
        both = sum(values[t] for t in wanted) / len(wanted)
        rest = sum(values[t] for t in others) / max(len(others), 1)
        seconds = made.seconds.get(model.name)
        rows.append(
            (
                clean(model.name),
                *(f"{values[t]:.1%}" for t in wanted),
                f"{both:.1%}",
                f"{rest:.1%}",
                "" if seconds is None else duration(seconds),
            )
        )
    names = [t.split("/")[-1] for t in wanted]
    show(
        heading("two experts, merged without any training: accuracy on test questions that no model has seen"),
        table(
            ("model", *names, "both", "other skills", "merged in"),
            rows,
            right=(*names, "both", "other skills", "merged in"),
        ),
        facts(
            [
                ("report", clean(made.report)),
                ("recipes", clean(out / "*.yml")),
                ("next", f"geomerge plan {clean(out / 'ties.yml')}"),
            ]
        ),
    )
