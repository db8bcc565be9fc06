"""Weights in pickles (``pytorch_model.bin`` and the like), for those who allow them.

They are opened with ``weights_only=True``: torch then builds tensors and containers and nothing else, so no code from
the file is run. A pickle has no header to check beforehand and its tensors come as a model in memory; files in the
format of torch 1.6 and later are mapped, so their pages are read when they are needed and can be dropped again.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge.checkpoint.header import FileInfo, open_regular
from geomerge.errors import DamagedCheckpoint, first_line

if TYPE_CHECKING:
    from torch import Tensor

_REFUSED = re.compile(r"(?:Unsupported|Trying to load unsupported) .+?(?=\. |\.?$)", re.MULTILINE)
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_pickles(files: Sequence[Path]) -> tuple[tuple[FileInfo, ...], dict[str, Tensor]]:
    """Read all tensors of the files.

    Returns:
        The files and the tensors by name, in the files' order.

    Raises:
        DamagedCheckpoint: A file is not a pickle of tensors, wants to run code, or repeats another file's tensor.
    """
    tensors: dict[str, Tensor] = {}
    infos = []
    for path in files:
        infos.append(_file_info(path))
        for name, tensor in _load(path).items():
            if name in tensors:
                raise DamagedCheckpoint(f"tensor {name!r} is in more than one file", where=str(path))
            tensors[name] = tensor
    return tuple(infos), tensors


def _file_info(path: Path) -> FileInfo:
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        digest = hashlib.sha256(os.pread(descriptor, 1 << 16, 0)).hexdigest()
    finally:
        os.close(descriptor)
    return FileInfo(path, status.st_size, status.st_mtime_ns, status.st_ino, digest, status.st_ctime_ns)


def _load(path: Path) -> dict[str, Tensor]:
    import torch

    where = str(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # noqa: BLE001  a hostile or truncated pickle can make torch raise almost anything
        raise DamagedCheckpoint(
            f"cannot be read as weights only: {_reason(error):.300}",
            where=where,
            hint="convert it to safetensors where you trust it",
        ) from None
    for _ in range(2):  # a trainer's checkpoint may hold a model's
        if isinstance(found, dict):
            found = next((found[w] for w in _WRAPPERS if isinstance(found.get(w), dict)), found)
    if not isinstance(found, dict) or not found:
        raise DamagedCheckpoint(f"holds {type(found).__name__}, not a state dict", where=where)
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise DamagedCheckpoint(f"entry {name!r:.100} is {type(value).__name__}, not a tensor", where=where)
    return found


def _reason(error: Exception) -> str:
    """What torch found, without its advice to run the file's code after all."""
    if "weights_only" not in str(error):
        return first_line(error)
    found = _REFUSED.search(str(error))
    return found[0] if found else "it holds more than tensors and containers"
