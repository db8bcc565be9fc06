"""Which files of a model directory hold its weights, and which paths may be believed at all.

A directory's own files name other files: an index names shards, ``modules.json`` names folders, ``auto_map`` names
code. None of them may lead out of the directory, by ``..``, by an absolute path or by a symbolic link; the links of the
Hugging Face cache, which point into its own blob store, are the one exception.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path, PurePosixPath

from geomerge.checkpoint.strict_json import read_json
from geomerge.errors import DamagedCheckpoint, ModelError

INDEX_LIMIT = 256 << 20
"""Bytes an index may have; 100,000 tensors take about ten million."""

INDEX_SUFFIX = ".index.json"
_STANDARD = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Files with a pickle's suffix that are no weights.
_NOT_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state.*)\.\w+$")


class LoneAdapter(ModelError):
    """A directory that holds an adapter and no whole model."""


def check_name(name: str, where: str, *, what: str) -> None:
    """Refuse a file name from inside a model that could lead out of its directory.

    Raises:
        DamagedCheckpoint: It is empty or absolute, or has ``..``, a backslash, a drive or a NUL in it.
    """
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or any(c in name for c in "\\:\0"):
        raise DamagedCheckpoint(
            f"{what} names the file {name!r}, which leads out of the model's directory",
            where=where,
            hint="do not use this checkpoint unless you know where it comes from",
        )


def check_contained(path: Path, folder: Path) -> None:
    """Refuse a symbolic link that leads nowhere, or out of `folder` unless it is one of the Hugging Face cache's own.

    Raises:
        DamagedCheckpoint: Naming the link and its target.
    """
    # Unlike `Path.resolve`, this does not raise for a circle.
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if not _belongs(target, home):
        raise DamagedCheckpoint(
            f"is a symbolic link to {target}, outside of the model's directory",
            where=str(path),
            hint="put the file itself in its place, or give that file as the model",
        )
    broken = broken_link(path)
    if broken is not None:
        raise DamagedCheckpoint(broken, where=str(path), hint="put the file itself in its place")


def _belongs(target: Path, home: Path) -> bool:
    if target.is_relative_to(home):
        return True
    # .../models--owner--name/snapshots/<commit> links to .../models--owner--name/blobs or to the cache's shared blobs.
    # The model may be a subfolder of the snapshot.
    snapshots = next((place for place in home.parents if place.name == "snapshots"), None)
    if snapshots is None:
        return False
    repository = snapshots.parent
    return target.is_relative_to(repository / "blobs") or target.is_relative_to(repository.parent / "blobs")


def broken_link(path: Path) -> str | None:
    """What is wrong with a symbolic link that leads to no file; ``None`` for anything else."""
    try:
        path.stat()
    except FileNotFoundError:
        return f"is a symbolic link to {path.readlink()}, which does not exist" if path.is_symlink() else None
    except OSError as error:
        return "is a symbolic link that leads in a circle" if error.errno == errno.ELOOP else None
    return None


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a model directory.

    Returns:
        The files in the order of their names, and the index's map from tensor to file name (``None`` without an index).

    Raises:
        ModelError: There are no weights, or more than one set of them, or they are only an adapter.
        DamagedCheckpoint: The index is wrong, or a shard is missing.
    """
    names = sorted(p.name for p in folder.iterdir())
    single = [n for n in names if n.endswith(".safetensors")]
    indices = [n for n in names if n.endswith(".safetensors" + INDEX_SUFFIX)]
    standard = [i for s in _STANDARD if (i := s + INDEX_SUFFIX) in indices]
    index = standard[0] if standard else indices[0] if len(indices) == 1 else None
    if index is not None:
        files, weight_map = read_index(folder / index)
        whole = index.removesuffix(INDEX_SUFFIX)
        if whole in single and folder / whole not in files:
            raise ModelError(
                f"holds both {whole} and {index}, which names other files: which of them is the model?",
                where=str(folder),
                hint="remove the stale one, or give one of the two as the model",
            )
        shard = re.compile(re.escape(whole.removesuffix(".safetensors")) + r"-\d+-of-\d+\.safetensors")
        strange = [n for n in single if shard.fullmatch(n) and folder / n not in files]
        if strange:
            raise DamagedCheckpoint(
                f"has the shard {strange[0]}, which {index} does not name",
                where=str(folder),
                hint="remove it if it is left over from another download, or fetch the index again",
            )
        return files, weight_map
    if len(indices) > 1:
        raise _ambiguous(folder, indices)
    full = [n for n in single if n not in ("adapter_model.safetensors", "adapters.safetensors")]
    if not full and ("adapter_config.json" in names or single):
        raise LoneAdapter(
            "is a LoRA adapter, not a whole model", where=str(folder), hint="name it behind its base: BASE+ADAPTER"
        )
    chosen = next((s for s in _STANDARD if s in full), full[0] if len(full) == 1 else None)
    if chosen is not None:
        path = folder / chosen
        check_contained(path, folder)
        return [path], None
    if full:
        if all(_SHARD.search(n) for n in full):
            raise DamagedCheckpoint(
                f"has the shards {full[0]} to {full[-1]} but no index",
                where=str(folder),
                hint="fetch model.safetensors.index.json too",
            )
        raise _ambiguous(folder, full)
    return [], None


def no_weights(folder: Path) -> ModelError:
    """The error for a directory without safetensors: pickles are named, and what to do about them."""
    pickles = [p.name for p in sorted(folder.iterdir()) if is_pickle(p) and not _NOT_WEIGHTS.match(p.name)]
    if pickles:
        return ModelError(
            f"has its weights in a pickle ({pickles[0]}), which can run any code when it is opened",
            where=str(folder),
            hint="convert it to safetensors, or allow it: pickles are then read with weights only, no code is run",
        )
    if (folder / "model_index.json").is_file():
        return ModelError(
            "is a whole diffusers pipeline",
            where=str(folder),
            hint="give one of its components, such as its unet/; the merge takes that component's place",
        )
    return ModelError("holds no *.safetensors file", where=str(folder), hint="is this the model's directory?")


def read_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Read ``*.safetensors.index.json`` or ``*.bin.index.json``.

    ``metadata.total_size`` is not compared: published indices count tied tensors twice or another dtype's bytes.

    Returns:
        The shards in the order of their names, and the map from tensor to shard name.

    Raises:
        DamagedCheckpoint: Not an index, a name that leads out of the directory, or a shard that is missing.
    """
    where = str(path)
    check_contained(path, path.parent)
    index = read_json(path, what="the index", limit=INDEX_LIMIT)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedCheckpoint("the index has no weight_map", where=where)
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise DamagedCheckpoint("the index's weight_map must map tensor names to file names", where=where)
    files = []
    for name in sorted(set(weight_map.values())):
        check_name(name, where, what="the index")
        file = path.parent / name
        if not file.exists():
            raise DamagedCheckpoint(
                f"the index names {name}, which is not there",
                where=where,
                hint="was a download interrupted? fetch the missing file",
            )
        check_contained(file, path.parent)
        files.append(file)
    return files, weight_map


def pickled_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The pickled weight files of a directory, in the order of their names, and the map of its index if it has one.

    Raises:
        DamagedCheckpoint: The index is wrong, or a shard is missing.
    """
    indices = [p for p in sorted(folder.iterdir()) if p.name.endswith(tuple(s + INDEX_SUFFIX for s in _PICKLES))]
    if indices:
        index = next((p for p in indices if p.name.startswith("pytorch_model.")), indices[0])
        return read_index(index)
    found = [p for p in sorted(folder.iterdir()) if is_pickle(p) and not _NOT_WEIGHTS.match(p.name)]
    standard = [p for p in found if p.name.startswith("pytorch_model")]
    return standard or found, None


def is_pickle(path: Path) -> bool:
    """Whether the file's suffix says that it is a pickle."""
    return path.suffix in _PICKLES


def _ambiguous(folder: Path, names: list[str]) -> ModelError:
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return ModelError(f"holds several models: {listed}", where=str(folder), hint="give one of these files as the model")
