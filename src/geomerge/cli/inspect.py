"""``geomerge inspect``: what a model is made of, and whether its numbers are sound."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomerge.cli.options import AllowPickle, AsJson, Quiet, Threads

if TYPE_CHECKING:
    from geomerge.anatomy import Anatomy
    from geomerge.checkpoint.checkpoint import Checkpoint


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A directory, a .safetensors file, or a hub id; BASE+ADAPTER with a LoRA adapter."
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the hub.")] = None,
    checksum: Annotated[
        bool, typer.Option("--checksum", help="Read everything and show the sha256, as sha256sum prints it.")
    ] = False,
    scan: Annotated[bool, typer.Option("--scan/--no-scan", help="Read everything and look for NaN and Inf.")] = True,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Show what a model is made of, and look for NaN and Inf.

    Its family, blocks, roles, shapes, dtypes, tied weights, vocabulary, checksums.
    The exit code is 3 when a tensor holds NaN or Inf.
    """
    from geomerge import anatomy
    from geomerge.cli.console import write_json
    from geomerge.cli.inspect_page import show_model
    from geomerge.engine.adapted import open_model
    from geomerge.errors import NotFiniteError
    from geomerge.recipe.references import parse_reference
    from geomerge.recipe.values import Where

    ref = parse_reference(model, Where("inspect", 1))
    with open_model(replace(ref, revision=revision or ref.revision), allow_pickle=allow_pickle) as checkpoint:
        found = anatomy.read(checkpoint.shapes, checkpoint.config)
        described = _describe(checkpoint, found)
        if scan:
            described["not_finite"] = _scan(checkpoint, threads, quiet=quiet)
        if checksum:
            described["sha256"] = _sum(checkpoint, quiet=quiet)
        checkpoint.verify_unchanged()
    if json:
        write_json(described)
    else:
        show_model(described)
    bad = described["not_finite"]
    if bad:
        first = next(iter(bad))
        raise NotFiniteError(
            f"{len(bad)} of {len(checkpoint.logical)} tensors hold NaN or Inf, the first is {first}",
            where=model,
            hint="a merge with this model would be refused",
        )


def _describe(checkpoint: Checkpoint, found: Anatomy) -> dict[str, Any]:
    """The model as plain data: the anatomy's summary and what the files say."""
    from geomerge.anatomy import summary
    from geomerge.checkpoint.dtypes import recipe_name
    from geomerge.cli.patterns import grouped
    from geomerge.engine.adapted import describe

    shapes = checkpoint.shapes
    dtypes = {name: recipe_name(dtype) for name, dtype in checkpoint.dtypes.items()}

    def alike(name: str) -> tuple[Any, ...]:
        return shapes[name], dtypes[name], found.parts[name].role

    groups = grouped(shapes, lambda name: name, alike)
    config = checkpoint.config or {}
    return {
        "model": checkpoint.ref,
        "path": None if checkpoint.path is None else str(checkpoint.path),
        "hub_id": checkpoint.hub_id,
        "revision": checkpoint.revision,
        "architectures": config.get("architectures"),
        "model_type": config.get("model_type"),
        "files": [{"name": f.path.name, "bytes": f.size} for f in checkpoint.files],
        "bytes": checkpoint.nbytes,
        **summary(found, shapes, dtypes),
        "shapes": [
            {
                "pattern": group.pattern,
                "tensors": len(group.items),
                "shape": list(shapes[group.items[0]]),
                "dtype": dtypes[group.items[0]],
                "role": found.parts[group.items[0]].role,
            }
            for group in groups
        ],
        "quantization": checkpoint.quantization,
        "adapter": describe(checkpoint),
        "undecodable": checkpoint.decoding.refusal,
        "fingerprint": checkpoint.fingerprint(),
        "sha256": None,
        "not_finite": None,
    }


def _scan(checkpoint: Checkpoint, threads: int | None, *, quiet: bool) -> dict[str, dict[str, int]]:
    from dataclasses import asdict

    from geomerge.cli.progress import watch
    from geomerge.engine.finite import find_not_finite, floating_bytes

    with watch("scanning", quiet=quiet) as progress:
        progress.start(floating_bytes(checkpoint), 0)
        bad = find_not_finite(checkpoint, threads=threads, advance=progress.advance)
    return {name: asdict(counts) for name, counts in bad.items()}


def _sum(checkpoint: Checkpoint, *, quiet: bool) -> str:
    from geomerge.cli.progress import watch

    with watch("checksum", quiet=quiet) as progress:
        progress.start(sum(f.size for f in checkpoint.files) or checkpoint.nbytes, 0)
        return checkpoint.content_hash(progress.advance)
