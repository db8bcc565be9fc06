"""The header of a safetensors file, read as if its author meant harm.

A file is ``8 bytes: n | n bytes: JSON | data``. The JSON maps each tensor's name to its dtype, shape and
``data_offsets`` relative to the data. Before anything believes it, this module has checked that the file is a regular
file, that the header fits into it and into 100 MB, that no key occurs twice, that every shape, dtype and length agree,
and that the tensors cover the data exactly: no overlap, no hole, nothing beyond the end.

The loop over tensors is written flat: files of 100,000 tensors (unfused mixtures of experts) are common enough.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from geomerge.checkpoint.collector import collector_paused
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.strict_json import parse_json
from geomerge.errors import DamagedCheckpoint, ModelError

HEADER_LIMIT = 100_000_000
"""Bytes: the limit of the safetensors library itself."""

_RANK_LIMIT = 64
_DIMENSION_LIMIT = 1 << 63
_ITEMSIZE = {name: d.itemsize for name, d in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: Its name in the checkpoint.
        dtype: The safetensors name of its element type, a key of `geomerge.checkpoint.dtypes.DTYPES`.
        shape: Its shape; ``()`` for a scalar.
        file: The file that holds it, or ``None`` for a model in memory.
        offset: The absolute offset of its first byte in the file; 0 for a model in memory.
        nbytes: Its length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | None
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One weight file as it was when its header was read; a later difference means that it changed under us.

    Attributes:
        path: The file.
        size: Bytes.
        mtime_ns: Time of the last modification, nanoseconds.
        inode: The file's number on its device.
        header_sha256: Over the length field and the header (over the first 64 KiB of a pickled file).
        ctime_ns: Time of the last change of any kind, nanoseconds: the one that nobody can set, for a copy that is put back
            may have all else in common with the file that it replaces.
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int
    header_sha256: str
    ctime_ns: int = 0


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file. A pipe or a device is refused, and opening it does not block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ModelError(f"cannot be opened: {error.strerror}", where=str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedCheckpoint("is not a regular file", where=str(path))
    return descriptor


@collector_paused()
def read_header(path: Path) -> tuple[FileInfo, list[TensorInfo], dict[str, str]]:
    """Read and check a safetensors header.

    Returns:
        The file, its tensors in the order of their bytes, and the ``__metadata__`` strings.

    Raises:
        DamagedCheckpoint: Anything about the header is wrong. The error names the file, the tensor and the values.
        ModelError: The file cannot be opened.
    """
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        size = status.st_size
        if size < 8:
            raise DamagedCheckpoint(
                f"the file has {size} bytes: too short for a safetensors file", where=str(path), hint=_TRUNCATED
            )
        prefix = _read(descriptor, 8, 0, path)
        length = int.from_bytes(prefix, "little")
        if length > HEADER_LIMIT:
            raise DamagedCheckpoint(
                f"the header claims {length:,} bytes; at most {HEADER_LIMIT:,} are allowed",
                where=str(path),
                hint="this is not a safetensors file, or it is damaged",
            )
        if length > size - 8:
            raise DamagedCheckpoint(
                f"the header claims {length:,} bytes, but the file ends after {size - 8:,}",
                where=str(path),
                hint=_TRUNCATED,
            )
        text = _read(descriptor, length, 8, path)
    finally:
        os.close(descriptor)
    if not text.startswith(b"{"):
        raise DamagedCheckpoint("the header does not begin with '{'", where=str(path), hint="not a safetensors file?")
    entries = parse_json(text, str(path), what="the header")
    # A lone surrogate can be written as an escape in JSON but never be encoded again.
    if b"\\ud" in text or b"\\uD" in text:
        for name in entries:
            if any("\ud800" <= c <= "\udfff" for c in name):
                raise DamagedCheckpoint(f"the tensor name {name!r} is not valid Unicode", where=str(path))
    metadata = _metadata(entries.pop("__metadata__", None), path)
    tensors = _tensors(entries, path, start=8 + length, room=size - 8 - length)
    digest = hashlib.sha256(prefix + text).hexdigest()
    return FileInfo(path, size, status.st_mtime_ns, status.st_ino, digest, status.st_ctime_ns), tensors, metadata


_TRUNCATED = "the file is truncated or its download was interrupted: fetch it again"


def _read(descriptor: int, length: int, offset: int, path: Path) -> bytes:
    parts = []
    while length:
        try:
            part = os.pread(descriptor, length, offset)
        except OSError as error:
            raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from None
        if not part:
            raise DamagedCheckpoint("the file ends inside the header", where=str(path), hint=_TRUNCATED)
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def _metadata(found: Any, path: Path) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise DamagedCheckpoint("the header's __metadata__ must map strings to strings", where=str(path))
    return found


def _tensors(entries: dict[str, Any], path: Path, *, start: int, room: int) -> list[TensorInfo]:
    """Check every entry against the `room` bytes of data that begin at `start`, and the entries against each other."""
    spans: list[tuple[int, int, str, str, tuple[int, ...]]] = []
    for name, entry in entries.items():
        try:
            dtype = entry["dtype"]
            itemsize = _ITEMSIZE[dtype]
            dimensions = entry["shape"]
            shape = tuple(dimensions)
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise _malformed(name, entry, path) from None
        if type(dimensions) is not list:
            raise _malformed(name, entry, path)
        for n in shape:
            if type(n) is not int or not 0 <= n < _DIMENSION_LIMIT:
                raise DamagedCheckpoint(f"tensor {name!r} has the impossible shape {shape!r:.200}", where=str(path))
        if len(shape) > _RANK_LIMIT:
            raise DamagedCheckpoint(f"tensor {name!r} has {len(shape)} dimensions", where=str(path))
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
            raise DamagedCheckpoint(f"tensor {name!r} has the offsets {begin!r:.50}, {end!r:.50}", where=str(path))
        if end > room:
            raise DamagedCheckpoint(
                f"tensor {name!r} ends at byte {end:,} of the data, but the file has only {room:,}",
                where=str(path),
                hint=_TRUNCATED,
            )
        if prod(shape) * itemsize != end - begin:
            raise DamagedCheckpoint(
                f"tensor {name!r}: shape {list(shape)} of {dtype} needs {prod(shape) * itemsize:,} bytes, "
                f"its offsets span {end - begin:,}",
                where=str(path),
            )
        spans.append((begin, end, name, dtype, shape))
    spans.sort()
    tensors: list[TensorInfo] = []
    position, before = 0, None
    # The parents have the same names and few shapes: each is held once, not once a model.
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    for begin, end, name, dtype, shape in spans:
        if begin != position:
            if begin < position:
                problem = f"tensors {before!r} and {name!r} overlap: bytes {begin:,} to {position:,} belong to both"
            else:
                problem = f"bytes {position:,} to {begin:,} before tensor {name!r} belong to no tensor"
            raise DamagedCheckpoint(problem, where=str(path), hint="the file was not written by safetensors")
        known = shapes.setdefault(shape, shape)
        tensors.append(TensorInfo(sys.intern(name), sys.intern(dtype), known, path, start + begin, end - begin))
        position, before = end, name
    if position != room:
        raise DamagedCheckpoint(
            f"the last tensor ends at byte {position:,} of the data, but the file has {room:,}",
            where=str(path),
            hint="the file holds bytes that its header does not describe",
        )
    return tensors


def _malformed(name: str, entry: Any, path: Path) -> DamagedCheckpoint:
    """Say which part of a header's entry is wrong."""
    where = str(path)
    if not isinstance(entry, dict):
        return DamagedCheckpoint(f"tensor {name!r} is described by {type(entry).__name__}, not an object", where=where)
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        return DamagedCheckpoint(f"tensor {name!r} has no {' and no '.join(missing)}", where=where)
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return DamagedCheckpoint(
            f"tensor {name!r} has the unknown dtype {dtype!r:.50}", where=where, hint=f"known: {', '.join(DTYPES)}"
        )
    key = "shape" if not isinstance(entry["shape"], list) else "data_offsets"
    return DamagedCheckpoint(f"tensor {name!r} has the {key} {entry[key]!r:.100}", where=where)
