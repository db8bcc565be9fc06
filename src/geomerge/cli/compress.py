"""``geomerge compress`` and ``geomerge extract``: many experts in little room, and one of them back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomerge.cli.options import AllowPickle, AsJson, Quiet, Threads

if TYPE_CHECKING:
    from geomerge.compress import Packed


def compress(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What all experts were trained from.")],
    experts: Annotated[list[str], typer.Argument(metavar="EXPERT...", help="Models; NAME=MODEL gives one a name.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to make.")],
    method: Annotated[str, typer.Option(metavar="NAME", help="tall: TALL-masks; emr: EMR-Merging.")] = "tall",
    threshold: Annotated[
        float | None, typer.Option(metavar="X", help="tall: larger makes sparser masks (0.2 to 0.6; by default 0.4).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Of the merged vector; by default the models'.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Store experts as one merged task vector and one bit an element for each of them.

    `geomerge extract` gives an expert back; it needs the base.
    """
    from geomerge.cli.console import Stopped, write_json
    from geomerge.cli.progress import watch
    from geomerge.compress import compress as run

    try:
        with watch("compressing", quiet=quiet) as progress:
            made = run(
                base,
                _named(experts),
                out,
                method=method,
                threshold=threshold,
                dtype=dtype,
                force=force,
                threads=threads,
                allow_pickle=allow_pickle,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise Stopped("nothing was made") from None
    if json:
        shown = {
            "out": str(made.out),
            "bytes": made.nbytes,
            "experts_bytes": made.experts,
            "density": dict(made.density),
        }
        write_json(shown | made.contents.to_json())
    else:
        _show(made)


def extract(
    packed: Annotated[Path, typer.Argument(metavar="DIR", help="What `geomerge compress` made.")],
    task: Annotated[str, typer.Argument(metavar="NAME", help="Which expert: its name, or its number from 1.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model directory to make.")],
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The base that they were compressed against.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing model directory.")] = False,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Give one of the compressed experts back as a model directory."""
    from geomerge.cli.console import Stopped, amount, clean, count, duration, facts, show, write_json
    from geomerge.cli.progress import watch
    from geomerge.compress import extract as run

    try:
        with watch("extracting", quiet=quiet) as progress:
            made = run(
                packed, task, out, base=base, force=force, threads=threads, allow_pickle=allow_pickle, progress=progress
            )
    except KeyboardInterrupt:
        raise Stopped("nothing was made") from None
    if json:
        write_json(
            {"out": str(made.out), "tensors": made.tensors, "bytes": made.nbytes, "seconds": round(made.seconds, 3)}
        )
        return
    size = f"{count(made.tensors, 'tensor')}, {amount(made.nbytes)} in {duration(made.seconds)}"
    show(facts([("extracted", clean(made.out)), ("output", size)]))


def _named(experts: list[str]) -> dict[str, str]:
    """Name → model. What exists as a path is one, also with an ``=`` in it.

    Raises:
        UsageError: Two of one name.
    """
    from geomerge.errors import UsageError

    found: dict[str, str] = {}
    for each in experts:
        name, equals, path = each.partition("=")
        if not equals or _exists(each):
            name, path = Path(each).name, each
        if not name or not path:
            raise UsageError(f"{each!r} has no {'path' if name else 'name'}", hint="give NAME=MODEL, or only MODEL")
        if name in found:
            raise UsageError(
                f"two experts would be called {name!r}", hint="give them names: chat=./a/model code=./b/model"
            )
        found[name] = path
    return found


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long for a file name
        return False


def _show(made: Packed) -> None:
    from geomerge.cli.console import amount, clean, duration, facts, heading, show, table

    rows = [(clean(name), f"{100 * share:.1f} %") for name, share in made.density.items()]
    show(
        facts(
            [
                ("compressed", clean(made.out)),
                ("size", f"{amount(made.nbytes)} in {duration(made.seconds)}; the experts take {amount(made.experts)}"),
            ]
        ),
        heading("experts"),
        table(("name", "elements in its mask"), rows, right=("elements in its mask",)),
    )
