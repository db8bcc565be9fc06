"""Sums in one fixed order, which compiled loops share: the same bits for any tile size, and with those loops or without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


def sums_of_blocks(rows: Tensor, block: int) -> list[list[float]]:
    """The sums of each row over its blocks of so many elements, as `lane_sums` adds them."""
    count, n = rows.shape
    blocks = -(-n // block)
    if n < blocks * block:
        rows = torch.nn.functional.pad(rows, (0, blocks * block - n))
    found = lane_sums(rows.view(count * blocks, block))
    return [found[i * blocks : (i + 1) * blocks] for i in range(count)]


_LANES = 256
"""Sums that elements are added to in turn. Compiled loops do the same, so the order is fixed for both."""


def lane_sums(rows: Tensor, lanes_of_row: int = _LANES) -> list[float]:
    """The sum of each row: of every 256th element (or so) in turn, then of those sums in float64, half to half."""
    if rows.shape[1] % lanes_of_row or not rows.shape[1]:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % lanes_of_row or lanes_of_row))
    cut = rows.reshape(len(rows), -1, lanes_of_row)
    # NumPy adds along the second axis from the last in order; a device need not have the same bits.
    lanes = np.add.reduce(cut.numpy(), axis=1) if cut.device.type == "cpu" else cut.sum(1).cpu().numpy()
    lanes = lanes.astype(np.float64)
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    sums: list[float] = lanes[..., 0].tolist()
    return sums
