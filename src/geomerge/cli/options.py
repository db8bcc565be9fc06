"""Options that several verbs have."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Compat = Annotated[
    str | None,
    typer.Option(
        metavar="PROFILE",
        help="'mergekit': that tool's numeric choices in place of geomerge's, whatever the recipe says.",
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights, too: weights only, no code is run.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Threads; by default one for each core that the process may use."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
