"""``geomerge evaluate``: scores of models, beside their parents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomerge.cli.options import AsJson, Quiet

if TYPE_CHECKING:
    from geomerge.evaluate.scores import Scores


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model directories or hub ids.")],
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="T",
            help="A lab suite (skills, skills/arithmetic), a task or group of lm-eval, leaderboard, perplexity:FILE, "
            "classification:DIR, FILE.py:FUNCTION. Several: with commas, or the option again.",
        ),
    ],
    parents: Annotated[
        list[str] | None,
        typer.Option(metavar="MODELS", help="The merge's parents. Several: with commas, or the option again."),
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="The parents' base, to be shown beside.")] = None,
    include: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A directory of lm-eval task files (YAML).")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N samples of each task.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the scores as JSON, for `report`.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Samples in one forward pass; by default what suits the task."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEV", help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16, float16, or auto: the model's own.")
    ] = "float32",
    bootstrap: Annotated[int, typer.Option(min=0, metavar="N", help="Resamples for the intervals.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the resampling and of tasks that draw.")] = 0,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put lm-eval's prompts into the model's chat template.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a model's own Python code run.")
    ] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Score everything again, and keep nothing.")] = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Score models on tasks, with intervals, beside each parent.

    Every finished score is kept, so a second call is instant and an interrupted one goes on where it was.
    """
    from geomerge.cli.console import Stopped, clean, show, write_json
    from geomerge.cli.evaluate_page import page, watch
    from geomerge.evaluate.references import of_harness
    from geomerge.evaluate.run import Interrupted
    from geomerge.evaluate.run import evaluate as run

    def tell(scores: Scores) -> None:
        if out is not None:
            scores.write(out)
        if json:
            write_json(scores.to_json())
        elif scores.scores:
            show(*page(scores))

    _check_out(out)
    theirs = [] if quiet else of_harness(tasks)
    if theirs:
        typer.echo(f"looking for {', '.join(map(clean, theirs))} among the tasks of lm-eval", err=True)
    try:
        with watch(quiet=quiet) as progress:
            scores = run(
                models,
                tasks,
                _separate(parents or []),
                base,
                include=include or [],
                limit=limit,
                batch_size=batch_size,
                device=device,
                dtype=dtype,
                bootstrap=bootstrap,
                seed=seed,
                chat_template=chat_template,
                trust_remote_code=trust_remote_code,
                cache=not no_cache,
                progress=progress,
            )
    except Interrupted as stopped:
        tell(stopped.scores)
        kept = "nothing is kept (--no-cache)" if no_cache else "what is known is kept: the same command goes on"
        raise Stopped(f"{stopped.left} scores are missing", kept) from None
    tell(scores)


def _check_out(out: Path | None) -> None:
    """Refuse a place that cannot be written before hours are spent."""
    from geomerge.report.build import check_file

    if out is not None:
        check_file(out, "file of scores", b'"kind": "scores"', "a file, such as scores.json")


def _separate(models: list[str]) -> list[str]:
    """Models apart from each other; a comma inside of an existing path does not separate."""
    found = []
    for some in models:
        found += [some] if Path(some).exists() else [part.strip() for part in some.split(",") if part.strip()]
    return found
