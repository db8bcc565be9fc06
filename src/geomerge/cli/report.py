"""``geomerge report``: merges and scores in, one HTML page out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomerge.cli.options import AsJson

if TYPE_CHECKING:
    from geomerge.report import Inputs

_PAGE = Path("report.html")


def report(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|SCORES...",
            help="Merged models' directories, scores files of `evaluate`, files with the output of `merge --json`.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page to write. [default: report.html, or none with --card]"),
    ] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the figures as PNG, too.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the scores into the README.md of every merged model given.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Show merges and their scores on one HTML page.

    The page stands by itself: nothing is loaded from the network. What was merged and how, scores with intervals beside
    the parents, synergy, coefficients over depth, time, provenance.
    """
    from geomerge.cli.console import clean, facts, show, write_json
    from geomerge.report import build, read_inputs, write

    found = read_inputs(inputs)
    page = out if out is not None or (card and figures is None) else _PAGE
    options = [*(["--out", str(page)] if page else []), *(["--figures", str(figures)] if figures else [])]
    command = shlex.join(["geomerge", "report", *inputs, *options, *(["--card"] if card else [])])
    cards = _cards(found) if card else []
    written: list[Path] = []
    headline = None
    if page is not None:
        made = build(found, command=command)
        headline = made.headline.replace("\u00a0", " ")  # which a terminal would be shown as an escape
        written = write(made, page, figures)
    changed = [str(folder) for folder, scores in cards if _update(folder, scores)]
    told: dict[str, Any] = {
        "out": None if page is None else str(page),
        "headline": headline,
        "bytes": None if page is None else page.stat().st_size,
        "runs": [str(run.path) for run in found.runs],
        "models": [model.name for sheet in found.sheets for model in sheet.scores.models],
        "figures": [str(path) for path in written if path != page],
        "cards": [str(folder) for folder, _ in cards],
    }
    if json:
        write_json(told)
        return
    rows = [] if headline is None else [("result", clean(headline))]
    rows += [] if page is None else [("report", clean(page))]
    rows += [("figures", f"{len(told['figures'])} in {clean(figures)}")] if figures else []
    rows += [
        ("card", clean(folder / "README.md") + ("" if str(folder) in changed else " (as it was)"))
        for folder, _ in cards
    ]
    show(facts(rows))


def _cards(found: Inputs) -> list[tuple[Path, Any]]:
    """Each merged model with the scores that hold it; checked before anything is written.

    Raises:
        UsageError: There is no merged model, or no scores that hold it.
    """
    from geomerge.errors import UsageError
    from geomerge.report.card import find_model

    if not found.runs or not found.sheets:
        raise UsageError("--card needs a merged model's directory and the scores file that holds it")
    pairs = []
    for run in found.runs:
        refused: UsageError | None = None
        for sheet in found.sheets:
            try:
                find_model(run.path, sheet.scores)
            except UsageError as error:
                refused = refused or error
                continue
            pairs.append((run.path, sheet.scores))
            refused = None
            break
        if refused is not None:
            raise refused
    return pairs


def _update(folder: Path, scores: Any) -> bool:
    from geomerge.report import update_card

    return update_card(folder, scores)
