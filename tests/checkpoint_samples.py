"""Small model files, good and bad, for the checkpoint tests. Written byte by byte, not by the code under test."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: str | bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header and, if given, any claim about the header's length."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(path: Path, content: bytes) -> Path:
    """Write a file, making its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def floats(**values: list[float]) -> bytes:
    """A good file of one-dimensional float32 tensors, in the given order."""
    header: dict[str, Any] = {}
    data = b""
    for name, numbers in values.items():
        part = struct.pack(f"<{len(numbers)}f", *numbers)
        header[name] = {"dtype": "F32", "shape": [len(numbers)], "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    return raw(header, data)


def model(folder: Path, **values: list[float]) -> Path:
    """A model directory with one weight file and a config."""
    write(folder / "model.safetensors", floats(**(values or {"a": [1.0, 2.0], "b": [3.0]})))
    write(folder / "config.json", b'{"model_type": "toy", "num_hidden_layers": 2}')
    return folder


def sharded(folder: Path, shards: dict[str, dict[str, list[float]]], weight_map: dict[str, str] | None = None) -> Path:
    """A sharded model directory; `weight_map` replaces the right one."""
    for file, values in shards.items():
        write(folder / file, floats(**values))
    right = {name: file for file, values in shards.items() for name in values}
    index = {"metadata": {"total_size": 0}, "weight_map": right if weight_map is None else weight_map}
    write(folder / "model.safetensors.index.json", json.dumps(index).encode())
    return folder
