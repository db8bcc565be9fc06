"""``geomerge moe``: a mixture of experts from dense models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geomerge.cli.options import AllowPickle, AsJson, Quiet, Threads


def moe(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file with mergekit-moe's keys.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make. It appears whole or not at all.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue what an interrupted run left.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing model directory.")] = False,
    threads: Threads = None,
    device: Annotated[str, typer.Option(metavar="DEV", help="Where the base is run for gates from prompts.")] = "cpu",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most bytes in one file, like 5GB.")] = "5GB",
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Build a mixture of experts from dense models.

    The experts' feed-forward layers are copies, everything else is the base model's; the router is made from prompts
    or at random. The output is a Mixtral, Qwen2-MoE, Qwen3-MoE or DeepSeek-style model that transformers loads.
    """
    from geomerge.checkpoint.layout import parse_size
    from geomerge.checkpoint.output_place import check_free
    from geomerge.cli.merge import write_output
    from geomerge.moe.build import plan_moe

    size = parse_size(shard_size)
    check_free(out, force=force)
    plan, opened = plan_moe(config, allow_pickle=allow_pickle, device=device)
    write_output(
        "building",
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
