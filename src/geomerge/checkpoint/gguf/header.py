"""The header of a GGUF file, read as if its author meant harm.

A file is ``magic | version | counts | metadata | tensor infos | padding | data``, little-endian. Strings and arrays say how
long they are, so every length is checked against the file before anything of that size is read. Long arrays (a vocabulary's
tokens) are walked over and not kept.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from geomerge.checkpoint.gguf.blocks import TYPES, Block
from geomerge.checkpoint.header import FileInfo, open_regular
from geomerge.errors import DamagedCheckpoint, ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEADER_LIMIT = 1 << 28
_CHUNK = 1 << 20
_KEPT = 1 << 12
"""Elements of the longest array that is kept."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TRUNCATED = "the file is truncated or its download was interrupted: fetch it again"


@dataclass(frozen=True)
class Stored:
    """One tensor of a GGUF file.

    Attributes:
        name: As in the file: ``blk.0.attn_q.weight``.
        block: How its elements are stored.
        shape: Rows first, the other way round than the file lists it.
        offset: The absolute offset of its first byte.
        nbytes: Its length.
    """

    name: str
    block: Block
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Skipped:
    """An array that was not kept."""

    count: int


def read_header(path: Path) -> tuple[FileInfo, dict[str, Any], list[Stored]]:
    """Read and check the header of a GGUF file.

    Returns:
        The file, its metadata, its tensors in the order of their bytes.

    Raises:
        DamagedCheckpoint: It is truncated or inconsistent; the tensor is named.
        ModelError: It cannot be opened, or stores tensors in a way that cannot be decoded.
    """
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        cursor = _Cursor(descriptor, status.st_size, str(path))
        if cursor.take(4) != _MAGIC:
            raise cursor.wrong("does not begin with 'GGUF'")
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            raise cursor.wrong(f"is a GGUF file of version {version}; {' and '.join(map(str, _VERSIONS))} can be read")
        tensors, pairs = cursor.scalar("Q"), cursor.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(cursor.count(pairs, 13)):
            key = cursor.string()
            if key in metadata:
                raise cursor.wrong(f"has the metadata {key!r} twice")
            metadata[key] = cursor.value(cursor.scalar("I"))
        infos = [_info(cursor) for _ in range(cursor.count(tensors, 24))]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise cursor.wrong(f"has the alignment {alignment!r:.20}")
        start = -(-cursor.position // alignment) * alignment
        stored = _place(infos, start, status.st_size, str(path))
        digest = cursor.digest.hexdigest()
    finally:
        os.close(descriptor)
    return (
        FileInfo(path, status.st_size, status.st_mtime_ns, status.st_ino, digest, status.st_ctime_ns),
        metadata,
        stored,
    )


class _Cursor:
    """Reads a header front to back."""

    def __init__(self, descriptor: int, size: int, where: str) -> None:
        self._descriptor, self._size, self._where = descriptor, size, where
        self._data, self._at, self._read = b"", 0, 0
        self.digest = hashlib.sha256()

    @property
    def position(self) -> int:
        """The offset of the next byte in the file."""
        return self._read - len(self._data) + self._at

    def wrong(self, problem: str, hint: str | None = None) -> DamagedCheckpoint:
        return DamagedCheckpoint(problem, where=self._where, hint=hint or "is this a GGUF file, and is it whole?")

    def take(self, length: int) -> bytes:
        if self._at + length > len(self._data):
            self._more(length)
        found = self._data[self._at : self._at + length]
        self._at += length
        return found

    def _more(self, length: int) -> None:
        if self.position + length > min(self._size, _HEADER_LIMIT):
            raise self.wrong("the file ends inside the header", _TRUNCATED)
        parts = [self._data[self._at :]]
        wanted = max(length - len(parts[0]), _CHUNK)
        while wanted > 0:
            try:
                part = os.pread(self._descriptor, wanted, self._read)
            except OSError as error:
                raise ModelError(f"cannot be read: {error.strerror}", where=self._where) from None
            if not part:
                break
            parts.append(part)
            self._read += len(part)
            self.digest.update(part)
            wanted -= len(part)
        self._data, self._at = b"".join(parts), 0
        if len(self._data) < length:
            raise self.wrong("the file ends inside the header", _TRUNCATED)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, said: int, smallest: int) -> int:
        """A number of things, each of which takes at least so many bytes."""
        if said * smallest > self._size:
            raise self.wrong(f"claims to have {said:,} entries in {self._size:,} bytes", _TRUNCATED)
        return said

    def string(self) -> str:
        try:
            return self.take(self.count(self.scalar("Q"), 1)).decode()
        except UnicodeDecodeError:
            raise self.wrong("has a name or a text that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.take(self.count(self.scalar("Q"), 1)).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self._array()
        raise self.wrong(f"has metadata of the unknown type {kind}")

    def _array(self) -> Any:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[kind])
            data = self.take(self.count(count, size) * size)
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", data)) if count <= _KEPT else Skipped(count)
        if kind != _STRING:
            raise self.wrong(f"has an array of the unknown type {kind}")
        for _ in range(self.count(count, 8)):
            self.take(self.count(self.scalar("Q"), 1))
        return Skipped(count)


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    rank = cursor.scalar("I")
    if rank > 4:
        raise cursor.wrong(f"tensor {name!r:.100} has {rank} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(rank))
    return name, shape[::-1], cursor.scalar("I"), cursor.scalar("Q")


def _place(infos: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int, where: str) -> list[Stored]:
    """Check that the tensors lie in the file, each in its own bytes."""
    stored = []
    for name, shape, kind, offset in infos:
        block = TYPES.get(kind)
        if block is None:
            raise DamagedCheckpoint(f"tensor {name!r} has the unknown type {kind}", where=where)
        columns = shape[-1] if shape else 1
        if columns % block.elements:
            raise DamagedCheckpoint(
                f"tensor {name!r}: rows of {columns} elements are no whole blocks of {block.elements} ({block.name})",
                where=where,
            )
        nbytes = prod(shape) // block.elements * block.nbytes
        if start + offset + nbytes > size:
            raise DamagedCheckpoint(
                f"tensor {name!r} ends at byte {start + offset + nbytes:,}, but the file has only {size:,}",
                where=where,
                hint=_TRUNCATED,
            )
        stored.append(Stored(name, block, shape, start + offset, nbytes))
    stored.sort(key=lambda s: (s.offset, s.nbytes))
    names = set()
    for before, after in itertools.pairwise(stored):
        if before.offset + before.nbytes > after.offset:
            raise DamagedCheckpoint(f"tensors {before.name!r} and {after.name!r} overlap", where=where)
    for each in stored:
        if each.name in names:
            raise DamagedCheckpoint(f"tensor {each.name!r} is there twice", where=where)
        names.add(each.name)
    return stored
