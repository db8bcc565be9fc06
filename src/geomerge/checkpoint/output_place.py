"""May the output be where the user wants it? Nothing of the user's may be lost, least of all an input."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from geomerge.errors import RunError, UsageError


def check_place(out: Path, partial: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse a bad place for an output.

    Args:
        out: The output, symbolic links resolved.
        partial: Where it is written first.
        inputs: The models' directories and files.
        force: An existing model directory may be replaced.

    Raises:
        UsageError: Saying what stands in the way.
        RunError: The place cannot be looked at.
    """
    try:
        _check(out, partial, inputs, force=force)
    except OSError as error:
        raise RunError(
            f"the output's place cannot be read: {error.strerror}", where=error.filename or str(out)
        ) from None


def check_free(out: Path | str, *, force: bool = False) -> None:
    """Refuse a place that is taken, before work that comes ahead of the writing; errors as in `check_place`."""
    place = Path(out).resolve()
    check_place(place, place.with_name(f"{place.name}.partial") if place.name else place, (), force=force)


def _check(out: Path, partial: Path, inputs: Iterable[Path], *, force: bool) -> None:
    where = str(out)
    if not out.name or os.path.ismount(out):
        raise UsageError("cannot be replaced by a rename", where=where, hint="choose a directory inside it")
    for given in inputs:
        model = given.resolve()
        if model in (out, partial):
            raise UsageError(f"the output is the input {given}", where=where, hint="choose another output")
        if model.is_dir() and out.is_relative_to(model):
            raise UsageError(f"the output lies inside the input {given}", where=where, hint="choose another output")
        if model.is_relative_to(out) or model.is_relative_to(partial):
            raise UsageError(f"the input {given} lies inside the output", where=where, hint="choose another output")
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise UsageError("is in the way: the output is written there first", where=str(partial), hint="move it away")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError("the output exists and is not a directory", where=where, hint="choose another output")
    if not any(out.iterdir()):
        return
    if not force:
        raise UsageError("the output exists", where=where, hint="choose another output, or replace it with --force")
    if not replaceable(out):
        raise UsageError(
            "is not a model directory (it has no config.json and no *.safetensors), so it is not replaced",
            where=where,
            hint="choose another output, or remove it yourself",
        )


def replaceable(out: Path) -> bool:
    """Whether a non-empty directory is a model that ``--force`` may replace."""
    return out.is_dir() and ((out / "config.json").is_file() or any(out.glob("*.safetensors")))
