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
    """Diagnose two small experts, merge them in several ways, score the merges beside their parents, write a report.

    The experts ship with geomerge: six skills of a small language model, trained by `geomerge lab build skills`.
    """
    from geomerge.cli.console import Stopped, clean, duration, facts, heading, show, table
    from geomerge.cli.evaluate_page import watch
    from geomerge.lab.demo import run_demo

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    try:
        with watch(quiet=quiet) as progress:
            made = run_demo(out, say=say, progress=progress)
    except KeyboardInterrupt:
        raise Stopped(f"what was made lies in {out}", "the same command begins anew there") from None
    tasks = [t.name for t in made.scores.tasks]
    rows = []
    for model in made.scores.models:
        values = [made.scores.value(model.name, task) for task in tasks]
        seconds = made.seconds.get(model.name)
        merged_in = "" if seconds is None else duration(seconds)
        rows.append((clean(model.name), *(f"{v:.1%}" for v in values), f"{sum(values) / len(values):.1%}", merged_in))
    found = made.diagnosis
    score = found.pairs[0].score
    show(
        heading("can the two be merged?"),
        facts(
            [
                ("apart", f"a mean angle of {score.omega_bar:.3f} rad; compatibility score S = {score.value:.2f} of 2"),
                ("decision", clean(found.decision.headline)),
                *(("and" if i else "because", clean(r)) for i, r in enumerate(found.decision.reasons)),
                (
                    "beyond",
                    "it chooses among SLERP's schedules; methods that add task vectors to the base are scored below",
                ),
            ]
        ),
    )
    show(
        heading("two experts, merged without any training: accuracy on test questions that no model has seen"),
        table(("model", *tasks, "both", "merged in"), rows, right=(*tasks, "both", "merged in")),
        facts(
            [
                ("report", clean(made.report)),
                ("diagnosis", clean(made.diagnosis_page)),
                ("recipes", clean(out / "*.yml")),
                ("next", f"geomerge plan {clean(out / 'ties.yml')}"),
            ]
        ),
    )
