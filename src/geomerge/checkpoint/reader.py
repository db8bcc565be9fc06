"""Opening a model: a directory, a file, a hub id, or tensors in memory. Headers are read and checked, no weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.collector import collector_paused
from geomerge.checkpoint.dtypes import from_torch, to_torch
from geomerge.checkpoint.folder import (
    INDEX_SUFFIX,
    check_contained,
    is_pickle,
    no_weights,
    pickled_files,
    read_index,
    weight_files,
)
from geomerge.checkpoint.header import FileInfo, TensorInfo, read_header
from geomerge.checkpoint.hub import Located, locate
from geomerge.checkpoint.strict_json import read_json
from geomerge.errors import DamagedCheckpoint, ModelError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "FileInfo", "TensorInfo", "from_state_dict", "open_checkpoint"]


@collector_paused()
def open_checkpoint(
    ref: str, revision: str | None = None, *, subfolder: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Open a model: a directory, a single ``.safetensors`` or ``.gguf`` file, an index, or a hub id.

    A single file brings its directory's config and side files along only when it is that directory's
    ``model.safetensors``; for any other name they might belong to another model.

    Args:
        ref: What the user wrote.
        revision: A branch, tag or commit of the hub.
        subfolder: A folder in the model's repository or directory.
        allow_pickle: Read ``pytorch_model.bin`` and the like, weights only, when there is no safetensors file.

    Raises:
        DamagedCheckpoint: A file is truncated, inconsistent or unsafe: named, with the tensor and the values.
        ModelError: There is no such model, or it is nothing that can be merged.
    """
    ref = os.fspath(ref)
    located = locate(ref, revision, subfolder=subfolder, allow_pickle=allow_pickle)
    path = located.path
    # Two revisions or folders of one repository are two models, also by their names.
    ref += (f"@{revision}" if revision else "") + (f":{subfolder}" if subfolder else "")
    weight_map: dict[str, str] | None = None
    folder: Path | None
    try:
        if path.is_dir():
            folder = path
            files, weight_map = weight_files(path)
            if not files and allow_pickle:
                files, weight_map = pickled_files(path)
            if not files:
                model = _open_gguf(ref, located, path)
                if model is None:
                    raise no_weights(path)
                return model
        elif path.name.endswith(INDEX_SUFFIX):
            folder = path.parent
            files, weight_map = read_index(path)
        elif path.suffix == ".gguf" and (model := _open_gguf(ref, located, path)) is not None:
            return model
        else:
            folder = path.parent if path.name in ("model.safetensors", "pytorch_model.bin") else None
            files = [path]
        config = _config_of(folder) if folder is not None else None
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=error.filename or ref) from None
    pickles = [file for file in files if is_pickle(file)]
    if pickles:
        return _open_pickles(ref, located, folder, config, files, weight_map, allow_pickle=allow_pickle)
    tensors, infos, metadata = _read_headers(files)
    if weight_map is not None:
        _check_index(path if path.is_file() else files[0].parent, tensors, weight_map)
    if not tensors:
        raise DamagedCheckpoint("holds no tensors", where=ref)
    return Checkpoint(ref, located, folder=folder, config=config, tensors=tensors, files=infos, metadata=metadata)


def from_state_dict(
    tensors: Mapping[str, Tensor], config: dict[str, Any] | None = None, name: str = "memory"
) -> Checkpoint:
    """A model in memory. Its `TensorInfo`s have no file; the tensors are in `Checkpoint.memory`, not copied.

    Raises:
        ModelError: No tensors, or one that has no ordinary data (sparse, quantised or meta), or an unknown dtype.
    """
    if not tensors:
        raise ModelError("holds no tensors", where=name)
    return _in_memory(name, dict(tensors), config=config)


def resident(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with its tensors in memory; the files are closed.

    Raises:
        ModelError: A tensor cannot be read.
    """
    if checkpoint.memory:
        return checkpoint
    held = _in_memory(
        checkpoint.ref,
        {name: load(checkpoint, info) for name, info in checkpoint.tensors.items()},
        config=checkpoint.config,
        folder=checkpoint.folder,
        quantization=checkpoint.quantization,
        decoding=checkpoint.decoding,
    )
    factors = {name: load(checkpoint, info) for name, info in checkpoint.factors.items()}
    checkpoint.close()
    if not factors:
        return held
    return Checkpoint(
        checkpoint.ref,
        None,
        folder=checkpoint.folder,
        config=checkpoint.config,
        tensors=held.tensors,
        memory={**held.memory, **factors},
        quantization=checkpoint.quantization,
        decoding=checkpoint.decoding,
        changes=checkpoint.changes,
        factors={name: replace(info, file=None, offset=0) for name, info in checkpoint.factors.items()},
        adapter=checkpoint.adapter,
        tokenizer_folder=checkpoint.tokenizer_folder,
        notes=checkpoint.notes,
    )


def load(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
    """A stored tensor in memory, as it is.

    Raises:
        ModelError: It cannot be read.
    """
    import torch

    if info.file is None:
        return checkpoint.memory[info.name]
    if not info.nbytes:
        return torch.empty(info.shape, dtype=to_torch(info.dtype))
    return torch.frombuffer(bytearray(checkpoint.read_bytes(info)), dtype=to_torch(info.dtype)).view(info.shape)


def _in_memory(
    ref: str,
    tensors: dict[str, Tensor],
    *,
    config: dict[str, Any] | None,
    located: Located | None = None,
    folder: Path | None = None,
    files: tuple[FileInfo, ...] = (),
    **coding: Any,
) -> Checkpoint:
    infos = {}
    for name, tensor in tensors.items():
        if str(tensor.layout) != "torch.strided" or tensor.is_quantized or tensor.is_meta:
            raise ModelError("is not an ordinary dense tensor", where=f"{ref}: {name}")
        dtype = from_torch(tensor.dtype)
        infos[name] = TensorInfo(name, dtype, tuple(tensor.shape), None, 0, tensor.numel() * tensor.element_size())
    return Checkpoint(ref, located, folder=folder, config=config, tensors=infos, files=files, memory=tensors, **coding)


def _open_pickles(
    ref: str,
    located: Located,
    folder: Path | None,
    config: dict[str, Any] | None,
    files: list[Path],
    weight_map: dict[str, str] | None,
    *,
    allow_pickle: bool,
) -> Checkpoint:
    if not allow_pickle:
        raise ModelError(
            "is a pickle, which can run any code when it is opened",
            where=str(files[0]),
            hint="convert it to safetensors, or allow it: pickles are then read with weights only, no code is run",
        )
    from geomerge.checkpoint.pickled import read_pickles

    for file in files:
        if folder is not None:
            check_contained(file, folder)
    infos, tensors = read_pickles(files)
    astray = next(iter(tensors.keys() ^ weight_map.keys()), None) if weight_map is not None else None
    if astray is not None:
        place = "in the index and in no file" if astray not in tensors else "in a file and not in the index"
        raise DamagedCheckpoint(f"tensor {astray!r} is {place}", where=str(files[0].parent))
    return _in_memory(ref, tensors, config=config, located=located, folder=folder, files=infos)


def _open_gguf(ref: str, located: Located, path: Path) -> Checkpoint | None:
    """A model of GGUF files, if there are any."""
    from geomerge.checkpoint.gguf import gguf_files, read_gguf

    files = gguf_files(path)
    if not files:
        return None
    folder = path if path.is_dir() else None
    if folder is not None:
        for file in files:
            check_contained(file, folder)
    model = read_gguf(files)
    config = _config_of(folder) if folder is not None else None
    return Checkpoint(
        ref,
        located,
        folder=folder,
        config=model.config if config is None else config,
        tensors=model.tensors,
        files=model.files,
        quantization=model.quantization,
        decoding=model.decoding,
        notes=model.notes,
    )


def _config_of(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not os.path.lexists(path):
        return None
    check_contained(path, folder)
    return read_json(path, what="config.json", constants=True)


def _read_headers(files: list[Path]) -> tuple[dict[str, TensorInfo], tuple[FileInfo, ...], dict[str, str]]:
    tensors: dict[str, TensorInfo] = {}
    infos: list[FileInfo] = []
    first: dict[str, str] = {}
    for file in files:
        info, found, metadata = read_header(file)
        first = first if infos else metadata
        infos.append(info)
        for tensor in found:
            if tensor.name in tensors:
                other = tensors[tensor.name].file
                raise DamagedCheckpoint(f"tensor {tensor.name!r} is in {other} too", where=str(file))
            tensors[tensor.name] = tensor
    return tensors, tuple(infos), first


def _check_index(where: Path, tensors: dict[str, TensorInfo], weight_map: dict[str, str]) -> None:
    """Every tensor must be where the index says, and no shard may hold one that the index does not know."""
    # A path's name is found once for each file, not for each of 100,000 tensors.
    said = {file: Path(file).name for file in set(weight_map.values())}
    found = {id(info.file): info.file.name for info in tensors.values() if info.file is not None}
    for name, file in weight_map.items():
        info = tensors.get(name)
        if info is None or info.file is None or found[id(info.file)] != said[file]:
            place = "in no shard" if info is None or info.file is None else f"in {info.file.name}"
            raise DamagedCheckpoint(f"the index places tensor {name!r} in {file}, but it is {place}", where=str(where))
    if len(tensors) != len(weight_map):
        extra = [name for name in tensors if name not in weight_map]
        raise DamagedCheckpoint(
            f"{len(extra)} tensors of the shards are not in the index, such as {extra[0]!r}",
            where=str(where),
            hint="the index belongs to other files: fetch the model again",
        )
