"""Where every output tensor will lie, decided before the first byte is read.

A safetensors file's header depends on names, dtypes and shapes only. So the output's shards, headers, offsets and sizes
are known when the plan is, and every tile of a tensor can be written straight to its final place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from geomerge.checkpoint.collector import collector_paused
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.header import HEADER_LIMIT
from geomerge.errors import UsageError

DEFAULT_SHARD_SIZE = 5_000_000_000
_PAGE = 1 << 12
"""Where the tensors begin is a multiple of it: the system writes and reads whole pages in less time."""

MODEL = "model"
"""How weight files are called, before any number and suffix."""

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
# A shard's header must stay below the format's limit; an entry takes its name and at most so much beside it.
_ENTRY_BYTES = 200


class LayoutFile(NamedTuple):
    """One output file: its name, the bytes it begins with, and its whole size in bytes."""

    name: str
    header: bytes
    size: int


class Place(NamedTuple):
    """Where a tensor goes: the index of its file in `Layout.files`, the absolute offset in it, its length in bytes."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The output's weight files.

    Attributes:
        files: The shards.
        place: Every tensor's place, in the order of the files and of the bytes in them.
        nbytes: The bytes of all tensors together (the index's ``total_size``).
        stem: How the files are called: ``model``, or ``diffusion_pytorch_model`` for a part of a diffusers pipeline.
    """

    files: tuple[LayoutFile, ...]
    place: dict[str, Place]
    nbytes: int
    stem: str = MODEL

    @property
    def index_name(self) -> str:
        """The name of the index, where there are several files."""
        return f"{self.stem}.safetensors.index.json"

    @property
    def size(self) -> int:
        """The bytes of all files together: what the disk must hold."""
        return sum(file.size for file in self.files)

    def index(self) -> dict[str, Any] | None:
        """The content of the file `index_name`, or ``None`` for a single file."""
        if len(self.files) == 1:
            return None
        weight_map = {name: self.files[place.file].name for name, place in self.place.items()}
        return {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}


@collector_paused()
def plan_layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    shard_size: int = DEFAULT_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
    stem: str = MODEL,
) -> Layout:
    """Lay tensors out in shards.

    The tensors keep the given order. Only where that would put a tensor at an offset that is no multiple of its
    element size (a float32 after an odd number of bytes) is its shard ordered by falling element size instead, as the
    safetensors library does, because readers that map the file expect aligned elements.

    Args:
        tensors: Name, safetensors dtype and shape of each.
        shard_size: The most tensor bytes in one file; a single larger tensor has a file of its own.
        metadata: Strings for the header beside ``{"format": "pt"}``.
        stem: How the files are called.

    Raises:
        UsageError: A name twice, no tensors at all, or a shard size below 1.
    """
    if shard_size < 1:
        raise UsageError(f"the shard size must be at least 1 byte, not {shard_size}")
    if not tensors:
        raise UsageError("there are no tensors to write")
    shards = _split(tensors, shard_size)
    count = len(shards)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    files = []
    place: dict[str, Place] = {}
    total = 0
    for i, (name, shard) in enumerate(zip(names, shards, strict=True)):
        ordered = _aligned(shard)
        header, size = _header(ordered, metadata or {})
        start = position = len(header)
        for tensor, _, _, nbytes in ordered:
            place[tensor] = Place(i, position, nbytes)
            position += nbytes
        total += position - start
        files.append(LayoutFile(name, header, size))
    if len(place) != len(tensors):
        seen: set[str] = set()
        twice = next(t[0] for t in tensors if t[0] in seen or seen.add(t[0]))  # type: ignore[func-returns-value]
        raise UsageError(f"the tensor {twice!r} would be written twice")
    return Layout(tuple(files), place, total, stem)


_Sized = tuple[str, str, tuple[int, ...], int]


def _split(tensors: Sequence[tuple[str, str, tuple[int, ...]]], shard_size: int) -> list[list[_Sized]]:
    shards: list[list[_Sized]] = [[]]
    data, header = 0, _PAGE  # of which the padding is a part
    for name, dtype, shape in tensors:
        nbytes = prod(shape) * DTYPES[dtype].itemsize
        entry = 6 * len(name) + _ENTRY_BYTES
        if shards[-1] and (data + nbytes > shard_size or header + entry > HEADER_LIMIT):
            shards.append([])
            data, header = 0, _PAGE
        shards[-1].append((name, dtype, shape, nbytes))
        data += nbytes
        header += entry
    return shards


def _aligned(shard: list[_Sized]) -> list[_Sized]:
    position = 0
    for _, dtype, _, nbytes in shard:
        if position % DTYPES[dtype].itemsize:
            return sorted(shard, key=lambda t: -DTYPES[t[1]].itemsize)
        position += nbytes
    return shard


def _header(shard: list[_Sized], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, dtype, shape, nbytes in shard:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (position, position + nbytes)}
        position += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + position


def parse_size(text: str | int) -> int:
    """Bytes: ``"5GB"``, ``"200MB"``, ``"2GiB"``, ``"1.5G"``, ``5000000000``.

    Raises:
        UsageError: Not a positive size; or ``"5B"``, which is five bytes here and five billion in other tools.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?(b)?", str(text).strip().lower().replace("_", ""))
    hint = "write it like 5GB, 200MB or 2GiB"
    if found is None:
        raise UsageError(f"{text!r} is not a size", hint=hint)
    number, unit, byte = found.groups()
    if byte and not unit:
        raise UsageError(f"{text!r} could mean bytes or billions", hint=hint)
    size = int(float(number) * _UNITS[unit or ""]) if "." in number else int(number) * _UNITS[unit or ""]
    if size < 1:
        raise UsageError(f"{text!r} is not a positive size", hint=hint)
    return size
