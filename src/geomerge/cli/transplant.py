"""``geomerge transplant``: a model with another model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from geomerge.cli.options import AllowPickle, AsJson, Quiet, Threads


def transplant(
    model: Annotated[str, typer.Argument(metavar="A", help="The model whose weights the output has.")],
    donor: Annotated[str, typer.Argument(metavar="B", help="The model whose tokenizer it gets.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make. It appears whole or not at all.")],
    missing: Annotated[
        Literal["omp", "mean", "zero"],
        typer.Option(help="What tokens that A lacks become: sums of shared tokens' rows, A's mean row, or zeros."),
    ] = "omp",
    sparsity: Annotated[
        int, typer.Option("--sparsity", "-k", min=1, metavar="K", help="The most rows in a token's sum.")
    ] = 64,
    pad_to: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Pad the vocabulary to a multiple of this number.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what an interrupted run left.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing model directory.")] = False,
    threads: Threads = None,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most bytes in one file, like 5GB.")] = "5GB",
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Give a model another model's tokenizer.

    Rows of tokens that both have are A's. Each other token is written as a sparse sum of shared tokens in B's embedding
    (orthogonal matching pursuit), and the same sum is taken of A's rows; likewise in the head.
    """
    from geomerge.api import transplant_recipe
    from geomerge.checkpoint.layout import parse_size
    from geomerge.cli.merge import write_output
    from geomerge.diagnose.guarded import guarded_plan
    from geomerge.recipe import loads

    size = parse_size(shard_size)
    text = transplant_recipe(model, donor, missing=missing, sparsity=sparsity, pad_to=pad_to)
    plan, opened = guarded_plan(loads(text, ""), allow_pickle=allow_pickle)
    write_output(
        "transplanting",
        plan,
        opened,
        out,
        threads=threads,
        shard_size=size,
        resume=resume,
        force=force,
        quiet=quiet,
        json=json,
    )
