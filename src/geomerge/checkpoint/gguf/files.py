"""Opening GGUF files as a model with Hugging Face's tensor names."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from geomerge.checkpoint.coded.base import CannotDecode, Coded
from geomerge.checkpoint.coded.find import Decoding
from geomerge.checkpoint.dtypes import recipe_name
from geomerge.checkpoint.gguf.blocks import BlockCoded
from geomerge.checkpoint.gguf.header import Stored, read_header
from geomerge.checkpoint.gguf.names import ARCHITECTURES, DERIVED, heads, model_config, model_name
from geomerge.checkpoint.header import FileInfo, TensorInfo
from geomerge.errors import DamagedCheckpoint, ModelError

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class GgufModel(NamedTuple):
    """What a `geomerge.checkpoint.Checkpoint` is made of."""

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: tuple[FileInfo, ...]
    quantization: dict[str, Any] | None
    decoding: Decoding
    notes: tuple[str, ...]


def gguf_files(path: Path) -> list[Path]:
    """The files of one GGUF model: a file, all parts of a split one, or the only one of a directory.

    Returns:
        No files when the directory has no such files.

    Raises:
        ModelError: The directory holds several models.
        DamagedCheckpoint: A part is missing.
    """
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix == ".gguf" and not p.name.startswith("mmproj"))
        models = [p for p in found if not (split := _SPLIT.fullmatch(p.name)) or split[2] == "00001"]
        if len(models) > 1:
            raise ModelError(
                f"holds several models: {', '.join(p.name for p in models[:5])}",
                where=str(path),
                hint="give one of these files as the model",
            )
        if not models:
            return []
        path = models[0]
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return [path]
    parts = [path.with_name(f"{split[1]}-{i:05d}-of-{split[3]}.gguf") for i in range(1, int(split[3]) + 1)]
    missing = next((p.name for p in parts if not p.is_file()), None)
    if missing is not None:
        raise DamagedCheckpoint(f"the part {missing} of the model is not there", where=str(path.parent))
    return parts


def read_gguf(files: list[Path]) -> GgufModel:
    """Read the headers of a model's files; no weights.

    Raises:
        DamagedCheckpoint: A file is truncated or inconsistent.
        ModelError: Its architecture, or the type of one of its tensors, cannot be read.
    """
    infos, stored = [], list[tuple[Path, Stored]]()
    metadata: dict[str, Any] = {}
    for file in files:
        info, said, tensors = read_header(file)
        infos.append(info)
        metadata = {**said, **metadata}  # of a split model the first file says what it is
        stored += [(file, tensor) for tensor in tensors]
    where = str(files[0])
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ModelError(
            f"is a GGUF file of the architecture {architecture!r:.50}; its tensors' names are known for "
            f"{', '.join(ARCHITECTURES)} only",
            where=where,
            hint="name the model that it was converted from",
        )
    main = _main_dtype([tensor for _, tensor in stored])
    tensors_found: dict[str, TensorInfo] = {}
    coded: dict[str, Coded] = {}
    refusal, notes = None, list[str]()
    for file, tensor in stored:
        if tensor.name in DERIVED:
            notes.append(
                f"{files[0].name} holds factors for its rotary frequencies ({tensor.name}), which a config made from a GGUF "
                "file cannot express: where this model gives the output its config, set rope_scaling as its original has it"
            )
            continue
        try:
            name, found = _tensor(file, tensor, metadata, main, coded)
        except CannotDecode as reason:
            refusal = refusal or str(reason)
            name, found = (
                tensor.name,
                TensorInfo(tensor.name, "U8", (tensor.nbytes,), file, tensor.offset, tensor.nbytes),
            )
        if name in tensors_found:
            raise DamagedCheckpoint(f"tensor {tensor.name!r} is in more than one file", where=str(file))
        tensors_found[name] = found
    if not tensors_found:
        raise DamagedCheckpoint("holds no tensors", where=where)
    decoding = Decoding(refusal=refusal) if refusal else Decoding(coded)
    shapes = {name: info.shape for name, info in tensors_found.items()} | {n: c.shape for n, c in coded.items()}
    types = sorted({tensor.block.name for _, tensor in stored if tensor.block.dtype is None})
    return GgufModel(
        config=model_config(metadata, shapes, recipe_name(main)),
        tensors=tensors_found,
        files=tuple(infos),
        quantization={"quant_method": "gguf", "types": types} if types or refusal else None,
        decoding=decoding,
        notes=tuple(notes),
    )


def _tensor(
    file: Path, tensor: Stored, metadata: dict[str, Any], main: str, coded: dict[str, Coded]
) -> tuple[str, TensorInfo]:
    name = model_name(tensor.name)
    if name is None:
        raise CannotDecode(f"the tensor {tensor.name!r} has no known place in this architecture")
    if not tensor.block.known:
        raise CannotDecode(f"{tensor.name} is stored as {tensor.block.name}, which cannot be decoded")
    count = heads(tensor.name, metadata)
    if count and (count < 0 or not tensor.shape or tensor.shape[0] % (2 * count)):
        raise DamagedCheckpoint(
            f"tensor {tensor.name!r} of the shape {list(tensor.shape)} is not one of {count} heads of an even size",
            where=str(file),
        )
    if count and len(tensor.shape) == 1 and tensor.block.decode is not None:
        raise CannotDecode(f"{tensor.name} is a vector in blocks of {tensor.block.elements}, in another order")
    plain = tensor.block.dtype
    if count or plain != main:
        coded[name] = BlockCoded(name, main, tensor.shape, tensor.block, count)
    if plain is not None:
        return name, TensorInfo(name, plain, tensor.shape, file, tensor.offset, tensor.nbytes)
    shape = (*tensor.shape[:-1], tensor.shape[-1] // tensor.block.elements * tensor.block.nbytes)
    return name, TensorInfo(name, "U8", shape, file, tensor.offset, tensor.nbytes)


def _main_dtype(stored: list[Stored]) -> str:
    """What the model's tensors are said to be: the dtype of most of its elements, and float16 for blocks.

    Converters store vectors, whatever they were, as float32; they are said to be what the matrices are.
    """
    elements: dict[str, int] = {}
    for tensor in stored:
        dtype = tensor.block.dtype or "F16"
        elements[dtype] = elements.get(dtype, 0) + prod(tensor.shape)
    return max(elements, key=lambda d: (elements[d], d), default="F16")
