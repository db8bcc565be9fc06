"""A model as one GGUF file, written in pieces of bounded size; it appears whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.output_lock import own_lock
from geomerge.checkpoint.writer import disk_error
from geomerge.engine.adapted import open_model
from geomerge.engine.execute import cores
from geomerge.engine.run import Progress
from geomerge.engine.stored import stored_source
from geomerge.errors import ModelError, NotFiniteError, UsageError, did_you_mean
from geomerge.export.families import Described, Value, describe
from geomerge.export.tensors import Entry, entries
from geomerge.export.vocabulary import tokenizer_metadata
from geomerge.late import also_alone, torch_alone
from geomerge.methods.tile import Source, TensorSource
from geomerge.recipe.references import parse_reference
from geomerge.recipe.values import NOWHERE
from geomerge.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""What matrices can be written as, and llama.cpp's number of such a file (``general.file_type``)."""

_PIECE = 1 << 20
"""Elements that one thread holds at once: 8 MB in float64, about 30 MB with what they become."""

_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
)
_ALIGNMENT = 32


@dataclass(frozen=True)
class Exported:
    """What was made.

    Attributes:
        out: The file.
        architecture: llama.cpp's name.
        kind: The type of its matrices.
        tensors, nbytes: How many tensors it has, and the bytes of the file.
        seconds: How long it took.
        notes: What the user should know.
    """

    out: Path
    architecture: str
    kind: str
    tensors: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...]


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    tokenizer: str | Path | None = None,
    pre_tokenizer: str | None = None,
    force: bool = False,
    threads: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a model as a GGUF file for llama.cpp.

    Args:
        model: A model as a recipe names it; ``base+adapter`` too.
        out: The ``.gguf`` file to make.
        kind: ``f32``, ``f16``, ``bf16`` or ``q8_0`` for the matrices; by default what the model's own dtype is. Vectors and
            routers are float32 in any case.
        tokenizer: A directory whose tokenizer the file gets; by default the model's.
        pre_tokenizer: llama.cpp's name of the expression that cuts text up before byte-level BPE; by default it is recognised.
        force: Replace an existing file.
        threads: By default one for each core that the process may use.
        allow_pickle: Read pickled weights (weights only).
        progress: Told how far it is.

    Raises:
        UsageError: The place is taken, an unknown type, or the gguf package is not installed.
        ModelError: llama.cpp has no such model; its tokenizer is missing or cannot be written; a number does not fit.
    """
    begun = time.perf_counter()
    if kind is not None and kind not in TYPES:
        raise UsageError(
            f"there is no type {kind!r} to write", hint=did_you_mean(kind, TYPES) or f"known: {', '.join(TYPES)}"
        )
    _gguf()
    place = Path(out).resolve()
    with open_model(parse_reference(str(model), NOWHERE), allow_pickle=allow_pickle) as checkpoint:
        _check_place(place, checkpoint, force=force)
        refusal = checkpoint.decoding.refusal
        if refusal is not None:
            raise ModelError(f"cannot be decoded: {refusal}", where=str(model))
        shapes = checkpoint.shapes
        name = next((n for n in _EMBEDDINGS if n in shapes), None)
        described = describe(checkpoint.config, shapes[name][0] if name else 0, str(model))
        chosen = kind or _own_type(checkpoint)
        listed, notes = entries(shapes, described, chosen, str(model))
        folder = checkpoint.tokenizer_folder if tokenizer is None else _tokenizer_folder(Path(tokenizer))
        rows = shapes[name][0] if name else 0
        notes += _foreign(checkpoint.tokenizer_folder, folder, rows) if tokenizer is not None else []
        words, said = tokenizer_metadata(folder, rows, described.config, pre_tokenizer, str(model))
        metadata = _general(checkpoint, chosen) | {
            f"{described.family.architecture}.{key}": value for key, value in described.metadata.items()
        }
        nbytes = _write(place, described, metadata | words, listed, checkpoint, threads or cores(), progress)
    seconds = time.perf_counter() - begun
    every = (*checkpoint.notes, *described.notes, *notes, *said)
    return Exported(place, described.family.architecture, chosen, len(listed), nbytes, seconds, every)


def _foreign(own: Path | None, other: Path | None, rows: int) -> list[str]:
    """What there is to say of a tokenizer that gives other ids than the model's own."""
    if own is None or other is None:
        return []
    try:
        known, given = Vocabulary.load(own), Vocabulary.load(other)
    except ModelError:  # the model's own may be why another one is given
        return []
    if known is None or given is None or "opaque" in (known.kind, given.kind):
        return []
    tokens = known.within(rows)
    alike = sum(given.ids.get(token) == index for token, index in tokens.items())
    if alike == len(tokens):
        return []
    said = (
        f"the tokenizer of {other} gives {len(tokens) - alike:,} of the model's {len(tokens):,} tokens another id, or none: "
        "what the model reads and writes there is something else"
    )
    return [said]


def _gguf() -> Any:
    """The gguf package.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("writing GGUF files needs the gguf package", hint="pip install 'geomerge[quant]'") from None
    return gguf


def _check_place(place: Path, checkpoint: Checkpoint, *, force: bool) -> None:
    if place.suffix != ".gguf":
        raise UsageError("a GGUF file's name ends in .gguf", where=str(place), hint=f"for example {place.name}.gguf")
    if any(file.path.resolve() == place for file in checkpoint.files):
        raise UsageError("the output is the input", where=str(place), hint="choose another output")
    if not place.parent.is_dir():
        raise UsageError(
            "there is no such directory", where=str(place.parent), hint="make it, or choose another output"
        )
    if place.is_dir() or (place.exists() and not force):
        hint = "choose another output" + ("" if place.is_dir() else ", or replace it with --force")
        raise UsageError("the output exists", where=str(place), hint=hint)


def _tokenizer_folder(folder: Path) -> Path:
    """The directory that `tokenizer` names.

    Raises:
        UsageError: There is none, or it has no tokenizer.
    """
    if not folder.is_dir():
        raise UsageError("there is no such directory", where=str(folder), hint="--tokenizer takes a model's directory")
    if Vocabulary.load(folder) is None:
        raise UsageError(
            "the directory has no tokenizer", where=str(folder), hint="it needs a tokenizer.json or a tokenizer.model"
        )
    return folder


def _own_type(checkpoint: Checkpoint) -> str:
    """The type that holds what most of a model's elements are."""
    elements: dict[str, int] = {}
    for name, shape in checkpoint.shapes.items():
        dtype = checkpoint.dtype(name)
        elements[dtype] = elements.get(dtype, 0) + prod(shape)
    return {"BF16": "bf16", "F16": "f16"}.get(max(elements, key=lambda d: elements[d]), "f32")


def _general(checkpoint: Checkpoint, kind: str) -> dict[str, Value]:
    name = checkpoint.hub_id or (checkpoint.path.name if checkpoint.path else checkpoint.ref)
    found: dict[str, Value] = {"general.type": "model", "general.name": name, "general.file_type": TYPES[kind]}
    return found | ({"general.quantization_version": 2} if kind == "q8_0" else {})


def _write(
    place: Path,
    described: Described,
    metadata: dict[str, Value],
    listed: list[Entry],
    checkpoint: Checkpoint,
    threads: int,
    progress: Progress | None,
) -> int:
    """Write the file beside its place, then give it its name; its size."""
    partial = place.with_name(place.name + ".partial")
    size = 0
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = own_lock(partial)
        if lock is None:
            raise UsageError(
                "another run is writing this output", where=str(place), hint="wait for it, or choose another"
            )
        try:
            start = _header(partial, described.family.architecture, metadata, listed)
            offsets = [start]
            for entry in listed:
                offsets.append(offsets[-1] + -(-_nbytes(entry) // _ALIGNMENT) * _ALIGNMENT)
            size = offsets[-1]
            os.posix_fallocate(lock, 0, size)
            _tensors(lock, listed, offsets, checkpoint, threads, progress)
            checkpoint.verify_unchanged()
            os.fsync(lock)
            partial.replace(place)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(lock)
    except OSError as error:
        raise disk_error(error, place, size) from None
    return size


def _header(path: Path, architecture: str, metadata: dict[str, Value], listed: list[Entry]) -> int:
    """Write what goes before the tensors' bytes; where these begin."""
    gguf = _gguf()
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        kinds = (
            (bool, writer.add_bool),
            (int, writer.add_uint32),
            (float, writer.add_float32),
            (str, writer.add_string),
        )
        add = next((add for kind, add in kinds if isinstance(value, kind)), writer.add_array)
        add(key, value)
    for entry in listed:
        number = gguf.GGMLQuantizationType[entry.kind.upper()]
        # The type is given, so the NumPy dtype says only that the shape is in elements.
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), _nbytes(entry), number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return -(-path.stat().st_size // _ALIGNMENT) * _ALIGNMENT


def _nbytes(entry: Entry) -> int:
    elements = prod(entry.shape)
    return elements // 32 * 34 if entry.kind == "q8_0" else elements * {"f32": 4, "f16": 2, "bf16": 2}[entry.kind]


def _tensors(
    descriptor: int,
    listed: list[Entry],
    offsets: list[int],
    checkpoint: Checkpoint,
    threads: int,
    progress: Progress | None,
) -> None:
    """Convert all tensors and write each piece at its place."""
    if progress is not None:
        progress.start(sum(map(_nbytes, listed)), 0)

    def make(entry: Entry, offset: int, part: int, first: int, last: int) -> int:
        source = _source(entry, part, checkpoint)
        data = encoded(read(entry, source, first, last), entry.kind, source.label)
        row = _nbytes(entry) // (entry.rows * max(len(entry.parts), 1))
        _write_all(descriptor, data, offset + (part * entry.rows + first) * row)
        return len(data)

    pieces = [
        (entry, offset, part, first, last)
        for entry, offset in zip(listed, offsets, strict=False)
        for part in range(max(len(entry.parts), 1))
        for first, last in _cut(entry)
    ]
    with torch_alone(), ThreadPoolExecutor(threads, "geomerge-export", also_alone) as pool:
        waiting = [pool.submit(make, *piece) for piece in pieces]
        try:
            for each in waiting:
                nbytes = each.result()
                if progress is not None:
                    progress.advance(nbytes)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if progress is not None:
        progress.finish()


def _cut(entry: Entry) -> Iterator[tuple[int, int]]:
    """Ranges of rows of one part; where heads are reordered, whole heads."""
    unit = entry.rows // entry.heads if entry.heads else 1
    step = max(_PIECE // (entry.columns * unit), 1) * unit
    for first in range(0, entry.rows, step):
        yield first, min(first + step, entry.rows)


def _source(entry: Entry, part: int, checkpoint: Checkpoint) -> Source:
    if entry.values is not None:
        return TensorSource(entry.values, entry.name)
    return stored_source(checkpoint, entry.parts[part], f"{checkpoint.ref}: {entry.parts[part]}")


def read(entry: Entry, source: Source, first: int, last: int) -> torch.Tensor:
    """Some rows as the file has them: shape ``(rows, columns)``, float64.

    Raises:
        NotFiniteError: They hold NaN or Inf.
    """
    with torch.inference_mode():
        values = torch.empty((last - first) * entry.columns, dtype=torch.float64)
        source.read(first * entry.columns, values)
        if not bool(values.isfinite().all()):
            raise NotFiniteError("holds NaN or Inf", where=source.label, hint="`geomerge inspect` counts them")
        if entry.added:
            values += entry.added
        if entry.heads:
            half = entry.rows // entry.heads // 2
            values = values.view(-1, 2, half, entry.columns).transpose(1, 2).contiguous()
        return values.view(-1, entry.columns)


def encoded(values: torch.Tensor, kind: str, label: str) -> bytes:
    """Rows as bytes of a type.

    Raises:
        ModelError: A number is beyond float16.
    """
    gguf = _gguf()
    array: NDArray[Any] = values.numpy()
    if kind == "f32":
        return array.astype("<f4").tobytes()
    with np.errstate(over="ignore"):
        # A block's scale is a float16, too: its largest number over 127.
        half = array.astype("<f2") if kind == "f16" else (np.abs(array) / 127).astype("<f2")
    if kind in ("f16", "q8_0") and not np.isfinite(half).all():
        raise ModelError(f"has numbers beyond what {kind} holds", where=label, hint="write bf16 or f32")
    if kind == "f16":
        return half.tobytes()
    made = gguf.quantize(array.astype(np.float32), gguf.GGMLQuantizationType[kind.upper()])
    return bytes(made.tobytes())


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
