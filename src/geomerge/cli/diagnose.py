"""``geomerge diagnose``: can these models be merged, and how?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomerge.cli.options import AllowPickle, AsJson, Quiet, Threads

if TYPE_CHECKING:
    from geomerge.diagnose.diagnosis import Diagnosis
    from geomerge.diagnose.thresholds import Thresholds


def diagnose(
    models: Annotated[list[str], typer.Argument(metavar="A B [C...]", help="Model directories or hub ids.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What they were trained from: adds their task vectors.")
    ] = None,
    cka: Annotated[
        bool, typer.Option("--cka", help="Compare hidden states on built-in texts; loads the models.")
    ] = False,
    probe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts for that, one a line or paragraph, in UTF-8.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML page.")] = None,
    write_recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the recipe that the decision recommends.")
    ] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Exit with 4 when the decision is not to merge.")] = False,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Thresholds: a YAML mapping.")] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One threshold, as in angle=0.6. Repeatable.")
    ] = None,
    specialist: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Which of the models is a specialist, if one is.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Count signs and supports of task vectors on every element.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="DEV", help="Where --cka runs the models.")] = "cpu",
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Say whether models can be merged, and how.

    Angles between their weights over depth and role, their tokenizers, a compatibility score, what differs and
    what to do about it; a decision with its reasons, and the recipe for it.
    """
    from geomerge.cli.console import write_json
    from geomerge.cli.diagnose_page import show_diagnosis
    from geomerge.cli.progress import watch
    from geomerge.diagnose.run import diagnose as run

    limits = _thresholds(config, threshold or [])
    _check_places(report, write_recipe)
    with watch("measuring", quiet=quiet) as progress:
        found = run(
            *models,
            base=base,
            cka=cka,
            probe=probe,
            specialist=specialist,
            thresholds=limits,
            exact=exact,
            threads=threads,
            device=device,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if report is not None:
        from geomerge.diagnose.report import write_report

        write_report(found, report)
    if write_recipe is not None and found.decision.merges:
        _write(found, write_recipe)
    if json:
        write_json(found.to_json())
    else:
        show_diagnosis(found)
    _gate(found, write_recipe, gate=gate)


def _thresholds(config: Path | None, said: list[str]) -> Thresholds:
    from geomerge.diagnose.thresholds import Thresholds, parse_threshold, read_thresholds

    limits = Thresholds() if config is None else read_thresholds(config)
    return limits.changed(dict(parse_threshold(text) for text in said))


def _check_places(report: Path | None, recipe: Path | None) -> None:
    """Refuse places that cannot be written before anything is read."""
    from geomerge.report.build import check_file, check_place

    if report is not None:
        check_place(report, None)
    if recipe is not None:
        check_file(recipe, "recipe", b"# geomerge diagnose", "a file, such as recipe.yml")


def _write(found: Diagnosis, path: Path) -> None:
    from geomerge.errors import RunError
    from geomerge.report.build import replace_file

    try:
        replace_file(path, found.recipe().encode())
    except OSError as error:
        raise RunError(f"the recipe cannot be written: {error.strerror}", where=str(path)) from None


def _gate(found: Diagnosis, recipe: Path | None, *, gate: bool) -> None:
    """Fail when there is nothing to merge and the user counts on it.

    Raises:
        GateFailed: The decision is not to merge, and a gate or a recipe was asked for.
    """
    from geomerge.errors import GateFailed

    if found.decision.merges or not (gate or recipe is not None):
        return
    left = f"no recipe was written to {recipe}" if recipe is not None else None
    reasons = "; ".join(found.decision.reasons) or "see above"
    raise GateFailed(f"the decision is not to merge: {reasons}", hint=left)
