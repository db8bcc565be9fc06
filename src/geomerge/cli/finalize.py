"""``geomerge finalize``: the last step of a merge in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geomerge.cli.options import AsJson


def finalize(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory that `merge --shard` was given.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing model directory.")] = False,
    durable: Annotated[bool, typer.Option("--durable", help="Flush the directory to the disk.")] = False,
    json: AsJson = False,
) -> None:
    """Complete an output that was made in shards.

    Checks that every shard is whole, names those that are not, writes the config, the tokenizer and the manifest, and gives
    the directory its name. Run again on a finished output it changes nothing.
    """
    from geomerge.cli.console import amount, clean, count, facts, show, write_json
    from geomerge.engine.shards import finalize as complete

    report = complete(out, force=force, durable=durable)
    if json:
        write_json(
            {
                "out": str(report.out),
                "tensors": report.tensors,
                "bytes": report.nbytes,
                "rounding_loss": report.rounding_loss,
                "notes": list(report.notes),
            }
        )
        return
    rows = [("merged", clean(report.out)), ("output", f"{count(report.tensors, 'tensor')}, {amount(report.nbytes)}")]
    show(facts([*rows, *(("note", clean(note)) for note in report.notes)]))
