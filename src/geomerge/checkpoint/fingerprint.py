"""The identity of a model's weights: a quick one for every run, a full one for who asks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from geomerge.checkpoint.header import FileInfo, TensorInfo
from geomerge.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = 256
"""Blocks that are sampled in a file."""

BLOCK = 4096
"""Bytes in a block."""

_BUDGET = 8192
_FEWEST = 16
_CHUNK = 4 << 20


def block_offsets(size: int, blocks: int = BLOCKS) -> list[int]:
    """Where the sampled blocks begin: evenly from the first byte to the last block; all blocks of a small file."""
    if size <= blocks * BLOCK:
        return list(range(0, size, BLOCK))
    return [i * (size - BLOCK) // (blocks - 1) for i in range(blocks)]


def sampled_blocks(files: int) -> int:
    """Blocks to sample in each of so many files: fewer when there are more than 32, so that a model in 600 files, whose
    every block may be a round trip to a file server, is not read 150,000 times before its merge begins."""
    return max(_FEWEST, min(BLOCKS, _BUDGET // max(files, 1)))


def quick(
    files: Sequence[FileInfo],
    descriptor: Callable[[Path], int],
    tensors: Mapping[str, TensorInfo],
    memory: Mapping[str, Tensor],
) -> str:
    """See `Checkpoint.fingerprint`. For a model that came from no file the blocks are taken from each tensor in memory."""
    digest = hashlib.sha256()
    for name, tensor in memory.items() if not files else ():
        data = memoryview(tensor_bytes(tensor))
        digest.update(_describe(tensors[name]))
        for offset in block_offsets(len(data)):
            digest.update(data[offset : offset + BLOCK])
    blocks = sampled_blocks(len(files))
    for file in files:
        digest.update(f"{file.header_sha256} {file.size}\n".encode())
        source = descriptor(file.path)
        for offset in block_offsets(file.size, blocks):
            digest.update(read_exactly(source, min(BLOCK, file.size - offset), offset, file.path))
    return digest.hexdigest()


def joined(files: str, changes: Mapping[str, object]) -> str:
    """The identity of a model that is computed from files: theirs, and how (`changes` are values with a fixed ``repr``)."""
    return hashlib.sha256(
        "\n".join([files, *(f"{name!r} {changes[name]!r}" for name in sorted(changes))]).encode()
    ).hexdigest()


def full(
    files: Sequence[FileInfo],
    descriptor: Callable[[Path], int],
    tensors: Mapping[str, TensorInfo],
    memory: Mapping[str, Tensor],
    progress: Callable[[int], None] | None,
) -> str:
    """See `Checkpoint.content_hash`."""
    lines = []
    for file in files:
        digest = hashlib.sha256()
        source = descriptor(file.path)
        for offset in range(0, file.size, _CHUNK):
            part = read_exactly(source, min(_CHUNK, file.size - offset), offset, file.path)
            digest.update(part)
            if progress is not None:
                progress(len(part))
        lines.append(f"{digest.hexdigest()}  {file.path.name}\n")
    if len(lines) == 1:
        return lines[0].split()[0]
    if lines:
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    digest = hashlib.sha256()
    for name, tensor in memory.items():
        data = tensor_bytes(tensor)
        digest.update(_describe(tensors[name]))
        digest.update(data)
        if progress is not None:
            progress(len(data))
    return digest.hexdigest()


def read_exactly(descriptor: int, length: int, offset: int, path: Path) -> bytes:
    """Read `length` bytes at `offset`.

    Raises:
        RunError: The file ends before, or the device fails.
    """
    parts = []
    while length:
        try:
            part = os.pread(descriptor, length, offset)
        except OSError as error:
            raise RunError(f"cannot be read: {error.strerror}", where=str(path)) from None
        if not part:
            raise RunError("the input became shorter while it was in use", where=str(path))
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's elements in row-major order, as safetensors would hold them."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _describe(info: TensorInfo) -> bytes:
    return f"{info.name!r} {info.dtype} {list(info.shape)}\n".encode()
