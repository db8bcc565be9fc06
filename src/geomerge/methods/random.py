"""Random numbers that belong to an element, not to a moment.

Every draw is a function of (seed, label, flat index): the same for every tile size, thread count, shard split and
device. The stream is NumPy's counter-based PCG64DXSM, whose `advance` jumps to any tile for free; each 64-bit number gives
the words of two elements or of four.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from geomerge.methods import native

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from geomerge.methods.tile import Place, Tile


def stream(seed: int, label: str) -> np.random.PCG64DXSM:
    """The generator for one label, at element 0."""
    return np.random.PCG64DXSM(int.from_bytes(_key(seed, label), "little"))


def _key(seed: int, label: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{label}".encode()).digest()[:16]


Numbers = tuple[int, int, int, int]
"""A generator's state and increment, low words of 64 bits first."""


def numbers_at(place: Place, label: str, number: int) -> Numbers:
    """The generator of a tensor's words, before so many numbers of 64 bits, for a compiled loop.

    The state that `stream` has after `advance`, without a generator.
    """
    state, increment = _beginning(place.scan.seed, f"{label}/{place.scan.name}")
    by, times = _steps(number)
    return (*_words(state * by + increment * times), *_words(increment))


@functools.lru_cache(maxsize=1024)
def _beginning(seed: int, label: str) -> tuple[int, int]:
    return native.generator(_key(seed, label))


_MULTIPLIER = 0xDA942042E4DD58B5
"""Each state is the one before times this, and the increment."""


@functools.lru_cache(maxsize=16)
def _steps(number: int) -> tuple[int, int]:
    """What so many steps multiply a state by, mⁿ, and its increment, Σ mⁱ = (mⁿ − 1) / (m − 1)."""
    by = pow(_MULTIPLIER, number, (_MULTIPLIER - 1) << 128)
    return by, (by - 1) // (_MULTIPLIER - 1)


def _words(x: int) -> tuple[int, int]:
    return x & (1 << 64) - 1, x >> 64 & (1 << 64) - 1


def words(tile: Tile | Place, label: str, width: int = 32) -> NDArray[np.uint32] | NDArray[np.uint16]:
    """One uniform word for each element of a tile.

    Args:
        tile: Gives seed, tensor name, place and size.
        label: What the numbers are for, such as ``"dare/1"`` (the method and the model's index).
        width: Bits of a word, 16 or 32: a 64-bit number serves so many elements the fewer they are.

    Returns:
        Shape ``(tile.numel,)``.
    """
    lanes = 64 // width
    first, shift = divmod(tile.start, lanes)
    need = -(-(tile.numel + shift) // lanes)
    key = ("random", label)
    generator, at = tile.carry.get(key, (None, -1))
    if generator is None:
        generator, at = stream(tile.scan.seed, f"{label}/{tile.scan.name}"), 0
    if at != first:
        generator.advance(first - at)
    raw: NDArray[np.uint64] = generator.random_raw(need)
    tile.carry[key] = (generator, first + need)
    return raw.astype("<u8", copy=False).view(f"<u{width // 8}")[shift : shift + tile.numel]


def keep_(values: Tensor, tile: Tile, label: str, probability: float) -> Tensor:
    """Keep each element with the given probability, set the others to zero, in place.

    A multiple of 2⁻¹⁶ stands for a probability that it meets to 2·10⁻⁵, as it does for 0.3, 0.4 or 0.5; other probabilities
    are met to 2⁻³² at twice the cost.
    """
    width, limit = _resolution(probability)
    drawn = words(tile, label, width)
    mask = drawn < drawn.dtype.type(limit)
    if values.device.type == "cpu":
        flat = values.view(-1).numpy()
        np.multiply(flat, mask, out=flat)
        return values
    return values.mul_(torch.from_numpy(mask).view(values.shape).to(values.device))


def drawing(place: Place, label: str, probability: float) -> tuple[Numbers, int, int]:
    """For a compiled loop that draws as `keep_` does: the generator at a place, the bits of a word, and its limit."""
    width, limit = _resolution(probability)
    number, shift = divmod(place.start, 64 // width)
    assert shift == 0, "segments hold whole numbers of 64 bits"
    return numbers_at(place, label, number), width, limit


def stream_at(place: Tile, label: str, number: int) -> np.random.PCG64DXSM:
    """The generator of a tensor's words, before so many numbers of 64 bits."""
    generator = stream(place.scan.seed, f"{label}/{place.scan.name}")
    generator.advance(number)
    return generator


def _resolution(probability: float) -> tuple[int, int]:
    """The bits of a word, and the limit below which it survives."""
    near = abs(round(probability * 2**16) / 2**16 - probability) <= 2e-5 * min(probability, 1 - probability)
    width = 16 if near else 32
    return width, min(round(probability * 2**width), 2**width - 1)


FINER = "finer/"
"""What the label of the words begins with that decide where those of 16 bits do not."""


def bernoulli(tile: Tile, label: str, probability: Tensor) -> Tensor:
    """A mask of the tile's shape: true with the probability given for each element, to 2⁻³².

    Sixteen bits decide for all elements but one in 2¹⁶, which draw sixteen more from a stream of their own.
    """
    drawn = words(tile, label, 16).astype(np.int64)
    limits = np.rint(probability.reshape(-1).cpu().numpy() * 2.0**32)
    limit = np.minimum(limits, 2.0**32).astype(np.int64)
    mask = drawn < limit >> 16
    for index in np.flatnonzero(drawn == limit >> 16):
        number, lane = divmod(tile.start + int(index), 4)
        finer = int(stream_at(tile, FINER + label, number).random_raw()) >> 16 * lane & 0xFFFF
        mask[index] = finer < limit[index] & 0xFFFF
    return torch.from_numpy(mask).view(tile.base.shape).to(tile.base.device)
