"""Random numbers that belong to an element, not to a moment.

Every draw is a function of (seed, label, flat index): the same for every tile size, thread count, shard split and
device. The stream is NumPy's counter-based PCG64DXSM, whose `advance` jumps to any tile for free; each 64-bit word gives
the numbers of two elements.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geomerge.methods.tile import Tile


def stream(seed: int, label: str) -> np.random.PCG64DXSM:
    """The generator for one label, at element 0."""
    digest = hashlib.sha256(f"{seed}\0{label}".encode()).digest()
    return np.random.PCG64DXSM(int.from_bytes(digest[:16], "little"))


def words(tile: Tile, label: str) -> NDArray[np.uint32]:
    """One uniform 32-bit word for each element of a tile.

    Args:
        tile: Gives seed, tensor name, place and size.
        label: What the numbers are for, such as ``"dare/1"`` (the method and the model's index).

    Returns:
        Shape ``(tile.numel,)``.
    """
    first, shift = divmod(tile.start, 2)
    need = (tile.numel + shift + 1) // 2
    key = ("random", label)
    generator, at = tile.carry.get(key, (None, -1))
    if generator is None:
        generator, at = stream(tile.scan.seed, f"{label}/{tile.scan.name}"), 0
    if at != first:
        generator.advance(first - at)
    raw: NDArray[np.uint64] = generator.random_raw(need)
    tile.carry[key] = (generator, first + need)
    lanes: NDArray[np.uint32] = raw.astype("<u8", copy=False).view("<u4")
    return lanes[shift : shift + tile.numel]


def bernoulli(tile: Tile, label: str, probability: float | Tensor) -> Tensor:
    """A 0/1 mask of the tile's shape: 1 with the given probability (one for all, or one for each element)."""
    drawn = words(tile, label)
    if isinstance(probability, Tensor):
        limit = np.minimum(np.rint(probability.reshape(-1).cpu().numpy() * 2.0**32), 2.0**32)
        mask = drawn.astype(np.float64) < limit
    else:
        mask = drawn < np.uint64(round(probability * 2**32))
    return torch.from_numpy(mask).view(tile.base.shape).to(tile.base.device)
