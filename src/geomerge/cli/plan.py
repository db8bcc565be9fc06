"""``geomerge plan``: what a merge would do, before it does it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from geomerge.cli.options import AllowPickle, AsJson, Compat, Requantize, Threads

if TYPE_CHECKING:
    from geomerge.checkpoint.checkpoint import Checkpoint
    from geomerge.engine.plan import Plan

_MARK = '"geomerge_plan"'


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or a saved plan.")],
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan as JSON; `geomerge merge FILE OUT` runs it.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the parameters over depth and role into a PNG.")
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Every tensor in a line of its own.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate/--no-estimate", help="Measure time and rounding loss on a small sample.")
    ] = True,
    threads: Threads = None,
    compat: Compat = None,
    requantize: Requantize = None,
    allow_pickle: AllowPickle = False,
    json: AsJson = False,
) -> None:
    """Show what a recipe would do, without doing it.

    Inputs, the parameters of every tensor, bytes, memory, time, loss by rounding. What is
    wrong with the recipe or its models is found here as `merge` would find it.
    """
    from geomerge.cli.console import write_json
    from geomerge.cli.plan_page import as_json, show_plan, show_tensors
    from geomerge.cli.steps import watch_steps
    from geomerge.engine.estimate import estimate as measure
    from geomerge.errors import UsageError

    if figure is not None and figure.suffix.lower() != ".png":
        raise UsageError("a figure is a .png", where=str(figure))
    if save is not None or figure is not None:
        from geomerge.report.build import check_file

        if save is not None and (save.is_file() or save.is_dir() or not save.exists()):  # and no pipe
            check_file(save, "plan", _MARK.encode(), "a file, such as plan.json")
        if figure is not None:
            check_file(figure, "picture", b"PNG", "a file, such as plan.png")
    made, opened = planned(recipe, compat=compat, requantize=requantize, allow_pickle=allow_pickle, reopen=estimate)
    try:
        expected = None
        if estimate:
            with watch_steps("trying", "pieces") as progress:
                expected = measure(made, opened, threads=threads, progress=progress)
    finally:
        for checkpoint in opened:
            checkpoint.close()
    if save is not None:
        _save(made, save)
    if figure is not None:
        _draw(made, figure)
    if json:
        write_json(as_json(made, expected))
    elif all:
        show_tensors(made)
    else:
        show_plan(made, expected)


def planned(
    recipe: str,
    *,
    compat: str | None = None,
    requantize: Literal["same", "int8", "fp8"] | None = None,
    allow_pickle: bool = False,
    reopen: bool = True,
) -> tuple[Plan, list[Checkpoint]]:
    """The plan of a recipe or of a saved plan's file, with its opened inputs.

    Args:
        recipe: The file.
        compat: The profile that overrides the recipe's.
        requantize: What overrides the recipe's ``requantize``.
        allow_pickle: Read pickled weights.
        reopen: Open a saved plan's inputs; when not, none are returned for it.

    Raises:
        GeomergeError: The recipe, the plan or a model cannot be used.
    """
    from geomerge.diagnose.guarded import guarded_plan
    from geomerge.engine.plan import Plan
    from geomerge.engine.run import open_inputs
    from geomerge.errors import UsageError
    from geomerge.recipe import load

    if not _is_saved(Path(recipe)):
        pipeline = load(recipe, compat=compat)
        if requantize is not None:
            pipeline = pipeline.requantised(requantize)
        return guarded_plan(pipeline, allow_pickle=allow_pickle)
    made = Plan.load(recipe)
    if compat not in (None, made.stages[-1].compat):
        raise UsageError(
            "a saved plan's profile cannot be changed", where=recipe, hint="give --compat when the plan is made"
        )
    if requantize is not None:
        raise UsageError(
            "how a saved plan's tensors are stored cannot be changed",
            where=recipe,
            hint="give --requantize with the recipe, or `requantize` in it",
        )
    return made, open_inputs(made, allow_pickle=allow_pickle) if reopen else []


def _is_saved(path: Path) -> bool:
    """Whether a file is a plan and not a recipe; what cannot be read is left to the recipe's reader to complain about.

    What comes through a pipe can be read once only: it is a recipe.
    """
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except (OSError, ValueError):
        return False
    return start.lstrip().startswith(b"{") and _MARK.encode() in start


def _save(made: Plan, path: Path) -> None:
    from geomerge.errors import RunError

    try:
        made.save(path)
    except OSError as error:
        raise RunError(f"the plan cannot be saved: {error.strerror}", where=str(path)) from None


def _draw(made: Plan, path: Path) -> None:
    """Draw the parameters that differ over depth or role.

    Raises:
        UsageError: None does.
        RunError: The file cannot be written.
    """
    from geomerge.errors import RunError, UsageError
    from geomerge.report.build import replace_file
    from geomerge.report.coefficients import plan_figure
    from geomerge.report.drawing import to_png

    found = plan_figure(made, "coefficients")
    if found is None:
        raise UsageError(
            f"there is nothing to draw: no parameter of {made.stages[-1].method} differs over depth or role",
            where=str(path),
            hint="--figure is for recipes with a schedule, a list of values or filters",
        )
    try:
        replace_file(path, to_png(found))
    except OSError as error:
        raise RunError(f"the figure cannot be written: {error.strerror}", where=str(path)) from None
