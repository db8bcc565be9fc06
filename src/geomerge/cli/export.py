"""``geomerge export``: a model as a GGUF file for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geomerge.cli.options import AllowPickle, AsJson, Quiet, Threads


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or a hub id; BASE+ADAPTER, too.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to make. It appears whole or not at all.")],
    kind: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="f16, bf16, f32 or q8_0; by default the model's own dtype."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Whose tokenizer it gets; by default the model's.")
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="llama.cpp's name for how text is cut up before BPE; by default it is recognised."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Write a model as a GGUF file, for llama.cpp and what is built on it.

    Weights, tokenizer, special tokens and chat template go into the one file. llama, mistral, mixtral, qwen2, qwen2_moe,
    qwen3, qwen3_moe, gemma, gemma2, gemma3 and phi3 can be written.
    """
    from geomerge.cli.console import Stopped, amount, clean, count, duration, facts, show, write_json
    from geomerge.cli.progress import watch
    from geomerge.export import export_gguf

    try:
        with watch("exporting", quiet=quiet) as progress:
            made = export_gguf(
                model,
                out,
                kind=kind,
                tokenizer=tokenizer,
                pre_tokenizer=pre_tokenizer,
                force=force,
                threads=threads,
                allow_pickle=allow_pickle,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise Stopped("nothing was written") from None
    if json:
        write_json(
            {
                "out": str(made.out),
                "architecture": made.architecture,
                "type": made.kind,
                "tensors": made.tensors,
                "bytes": made.nbytes,
                "seconds": round(made.seconds, 3),
                "notes": list(made.notes),
            }
        )
        return
    size = f"{count(made.tensors, 'tensor')}, {amount(made.nbytes)} in {duration(made.seconds)}"
    rows = [("exported", clean(made.out)), ("output", size), ("type", f"{made.kind}, architecture {made.architecture}")]
    show(facts(rows + [("note", clean(note)) for note in made.notes]))
