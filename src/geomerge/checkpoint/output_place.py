"""May the output be where the user wants it? Nothing of the user's may be lost, least of all an input."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from geomerge.checkpoint.side_files import side_files
from geomerge.checkpoint.strict_json import read_json
from geomerge.errors import ModelError, RunError, UsageError

MODEL, ADAPTER, COMPRESSED, STATE = "a model", "an adapter", "compressed experts", "the state of a continual merge"
"""Kinds of outputs. None is replaced by one of another kind."""

MARKS = {STATE: "continual/state.json", COMPRESSED: "compressed.json", ADAPTER: "adapter_config.json"}
"""The file by which a directory is known to be more than a model, or something else."""

_REPLACE = "choose another output, or replace it with --force"


def check_place(
    out: Path,
    partial: Path,
    inputs: Iterable[Path],
    *,
    force: bool,
    hint: str = _REPLACE,
    kind: str = MODEL,
) -> None:
    """Refuse a bad place for an output.

    Args:
        out: The output, symbolic links resolved.
        partial: Where it is written first.
        inputs: The models' directories and files.
        force: An existing output of the same kind may be replaced.
        hint: What to do when there is one that may not.
        kind: What the output will be.

    Raises:
        UsageError: Saying what stands in the way.
        RunError: The place cannot be looked at.
    """
    try:
        _check(out, partial, inputs, force=force, hint=hint, kind=kind)
    except OSError as error:
        raise RunError(
            f"the output's place cannot be read: {error.strerror}", where=error.filename or str(out)
        ) from None


def check_free(out: Path | str, *, force: bool = False, hint: str = _REPLACE) -> None:
    """Refuse a place that is taken, before work that comes ahead of the writing; arguments and errors as in `check_place`."""
    place = Path(out).resolve()
    partial = place.with_name(f"{place.name}.partial") if place.name else place
    check_place(place, partial, (), force=force, hint=hint)


def _check(out: Path, partial: Path, inputs: Iterable[Path], *, force: bool, hint: str, kind: str) -> None:
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
        raise UsageError("the output exists", where=where, hint=hint)
    if not _is_model(out):
        raise UsageError(
            "is not a model directory (it has no config.json and no *.safetensors), so it is not replaced",
            where=where,
            hint="choose another output, or remove it yourself",
        )
    if _kind_of(out) != kind:
        raise UsageError(
            f"holds {_kind_of(out)}, so it is not replaced by {kind}",
            where=where,
            hint="choose another output, or remove it yourself",
        )
    strangers = _strangers(out)
    if strangers:
        shown = ", ".join(strangers[:_SHOWN]) + (
            f" and {len(strangers) - _SHOWN} more" if len(strangers) > _SHOWN else ""
        )
        raise UsageError(
            f"holds what is no part of a model, so it is not replaced: {shown}",
            where=where,
            hint="choose another output, or move that away",
        )


_SHOWN = 5
_NAMES = (
    *("config.json", "model_index.json", "scheduler_config.json", "README.md", ".gitattributes"),
    *("geomerge.json", "geomerge.yml", "mergekit_config.yml", *(PurePath(mark).name for mark in MARKS.values())),
    *("*model*.safetensors", "consolidated*.safetensors", "*.safetensors.index.json", "params.json"),
    *("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "tf_model.h5", "flax_model.msgpack"),
)
"""What a model's directory holds beside its side files. Whatever else is there may be somebody's work."""


def _strangers(folder: Path, above: frozenset[Path] = frozenset()) -> list[str]:
    """What lies in a model's directory that no model has: notes, scores, recipes, a training's state, other directories.

    A part of a model has a directory of its own, in which there is a configuration or weights; `above` are side files of
    the whole.
    """
    own = above | _side_files(folder)
    found = []
    for path in sorted(folder.iterdir()):
        if path in own:
            continue
        if path.is_dir() and not path.is_symlink():
            part = any(p in own or p.suffix in (".json", ".safetensors", ".bin") for p in path.iterdir() if p.is_file())
            found += [f"{path.name}/{s}" for s in _strangers(path, own)] if part else [f"{path.name}/"]
        elif not any(fnmatchcase(path.name, pattern) for pattern in _NAMES):
            found.append(path.name)
    return found


def _side_files(folder: Path) -> frozenset[Path]:
    """What a merge copies from a parent, code that its configuration names included."""
    try:
        config = folder / "config.json"
        return frozenset(side_files(folder, read_json(config, what="config.json") if config.is_file() else None))
    except ModelError:  # damaged: then its files are known by their kinds alone
        return frozenset()


def replaceable(out: Path, kind: str) -> bool:
    """Whether a non-empty directory is of that kind, with nothing else in it, so that ``--force`` may replace it."""
    return _is_model(out) and _kind_of(out) == kind and not _strangers(out)


def _kind_of(out: Path) -> str:
    return next((kind for kind, mark in MARKS.items() if (out / mark).is_file()), MODEL)


def _is_model(out: Path) -> bool:
    return out.is_dir() and ((out / "config.json").is_file() or any(out.glob("*.safetensors")))
