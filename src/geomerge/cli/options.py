"""Options that several verbs have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass
class Settings:
    """What holds for the whole program.

    Attributes:
        debug: Show tracebacks.
    """

    debug: bool = False


settings = Settings()


def _set_debug(value: bool) -> bool:
    settings.debug = settings.debug or value
    return value


Debug = Annotated[
    bool, typer.Option("--debug", help="Show a traceback when something fails.", callback=_set_debug, is_eager=True)
]
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
