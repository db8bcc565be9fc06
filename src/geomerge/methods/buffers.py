"""Buffers of each thread for tiles and outputs: allocating anew for each would cost more than the sums."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


_local = threading.local()


def empty(count: int, dtype: torch.dtype, device: torch.device | str = "cpu", *, pinned: bool = False) -> Tensor:
    """A buffer that may be written both inside and outside of `torch.inference_mode`."""
    with torch.inference_mode(False):
        return torch.empty(count, dtype=dtype, device=device, pin_memory=pinned)


def output(count: int, dtype: torch.dtype, level: int) -> Tensor:
    """This thread's buffer for an output of compiled loops that has no place of its own."""
    return buffer((level, -1), count, dtype, "cpu")


def buffer(level: int | tuple[int, int], count: int, dtype: torch.dtype, device: str) -> Tensor:
    """This thread's input buffer for a level: allocating anew for each tile would cost more than the sums."""
    buffers: dict[tuple[int | tuple[int, int], torch.dtype, str], Tensor] = _local.__dict__.setdefault("buffers", {})
    key = (level, dtype, device)
    found = buffers.get(key)
    if found is None or found.numel() < count:
        found = buffers[key] = empty(count, dtype, device)
    return found[:count]
