"""Options that several verbs have."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Compat = Annotated[
    str | None,
    typer.Option(
        metavar="PROFILE",
        help="'mergekit': that tool's numeric choices in place of geomerge's, whatever the recipe says.",
    ),
]
Requantize = Annotated[
    Literal["same", "int8", "fp8"] | None,
    typer.Option(
        help="Store linear layers as 8-bit codes: int8, fp8, or as the base stores them; whatever the recipe says."
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
