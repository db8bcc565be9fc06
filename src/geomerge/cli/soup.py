"""``geomerge soup``: average only what helps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomerge.cli.options import AllowPickle, AsJson, Quiet

if TYPE_CHECKING:
    from geomerge.search.soup import Soup, Tried


def soup(
    models: Annotated[list[str], typer.Argument(metavar="A B [C...]", help="Fine-tunes of one architecture.")],
    tasks: Annotated[
        list[str], typer.Option("--tasks", metavar="T", help="What a good model is; as for `evaluate`. Repeatable.")
    ],
    write_recipe: Annotated[
        Path | None, typer.Option("--write-recipe", metavar="FILE", help="Write the soup's recipe.")
    ] = None,
    merge: Annotated[Path | None, typer.Option("--merge", metavar="OUT", help="Write the soup here.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Samples of each task in each half.")] = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Greedy soup: start with the best model, add each of the others if the average gets no worse.

    Averages are blended in memory. The result is scored on samples that played no part in the choice.
    """
    from dataclasses import asdict

    from geomerge.checkpoint.output_place import check_free
    from geomerge.cli.console import write_json
    from geomerge.errors import RunError
    from geomerge.report.build import check_file, replace_file
    from geomerge.search.soup import greedy_soup
    from geomerge.search.study import Objective

    if merge is not None:
        check_free(merge, hint="name another directory for --merge")
    if write_recipe is not None:
        check_file(write_recipe, "recipe", b"# geomerge soup", "a file, such as soup.yml")
    wanted = tuple(name for each in tasks for name in each.split(",") if name)
    found = greedy_soup(
        models, Objective(wanted, limit=limit), progress=None if quiet else _tell, allow_pickle=allow_pickle
    )
    if write_recipe is not None:
        try:
            replace_file(write_recipe, found.recipe.encode())
        except OSError as error:
            raise RunError(f"the recipe cannot be written: {error.strerror}", where=str(write_recipe)) from None
    if merge is not None:
        from geomerge.api import merge as write

        write(found.recipe, merge, allow_pickle=allow_pickle)
    if json:
        write_json(asdict(found))
    else:
        _show(found, write_recipe, merge)


def _tell(tried: Tried) -> None:
    said = "kept" if tried.kept else "left out"
    typer.echo(f"{tried.model}: {tried.alone:.4f} alone, the soup with it {tried.together:.4f}: {said}", err=True)


def _show(found: Soup, recipe: Path | None, merged: Path | None) -> None:
    from geomerge.cli.console import clean, facts, heading, show, table

    value, low, high = found.difference
    rows = [(clean(t.model), f"{t.alone:.4f}", f"{t.together:.4f}", "kept" if t.kept else "") for t in found.tried]
    held = [(clean(h.name), f"{h.value:.4f}") for h in found.held_out]
    after = [("against the best", f"{value:+.4f} on held-out samples, 95 % interval [{low:+.4f}, {high:+.4f}]")]
    if any(h.value < 0 for h in found.held_out):
        after += [("below zero", "a score that is better when it is lower, such as a perplexity, counts negatively")]
    after += [("recipe", clean(recipe))] if recipe else []
    after += [("merged", clean(merged))] if merged else []
    show(
        heading("the models, best first"),
        table(("model", "alone", "soup with it", ""), rows, right=("alone", "soup with it")),
        heading("on samples that played no part"),
        table(("model", "score"), held, right=("score",)),
        facts(after),
    )
