"""What conformance checks feed a method, and how they run it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomerge.checkpoint.dtypes import from_torch
from geomerge.methods import native
from geomerge.methods.base import Method
from geomerge.methods.kernel import prepare
from geomerge.methods.tile import TILE, Scan, Segment, TensorSource

KINDS = ("dense", "grid", "wide")
"""The kinds of models that `models` makes."""
_KEPT = 32
"""So many families of models are not drawn again."""


def models(count: int, shape: Sequence[int], kind: str = "dense", *, seed: int = 0) -> list[Tensor]:
    """Random models around a common base.

    Args:
        count: How many, the base included.
        shape: Of each.
        kind: ``dense``: changes of ordinary size. ``grid``: multiples of 1/64, as bfloat16 has them, with many zeros, equal
            magnitudes and exact cancellations. ``wide``: changes of any size from 10⁻⁷ to 0.3.
        seed: Another seed gives other models.

    Returns:
        float64 tensors (whose values float32 can hold), the base first.
    """
    return [m.clone() for m in _drawn(count, tuple(shape), kind, seed)]


@functools.lru_cache(_KEPT)
def _drawn(count: int, shape: tuple[int, ...], kind: str, seed: int) -> tuple[Tensor, ...]:
    random = np.random.default_rng([seed, count, *shape])
    base = random.integers(-64, 65, shape) / 64 if kind == "grid" else random.standard_normal(shape)
    made = [base]
    for k in range(1, count):
        if kind == "grid":
            change = random.integers(-2, 3, shape) / 64
        elif kind == "wide":
            change = random.choice([-1.0, 1.0], shape) * 10 ** random.uniform(-7, -0.5, shape)
        else:
            change = random.standard_normal(shape) * 0.05 * k
        made.append(base + change)
    return tuple(torch.from_numpy(np.asarray(m, dtype=np.float32)).to(torch.float64) for m in made)


def merge(
    method: Method,
    tensors: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    name: str = "tensor",
    seed: int = 0,
    tile: int = TILE,
    run: Callable[[Callable[[Segment], Any], Iterable[Segment]], Iterable[Any]] = map,
    read_ahead: bool = False,
) -> Tensor:
    """Merge tensors in memory with every choice that must not change the result left open.

    Args:
        method: The method with its parameters.
        tensors: Its inputs, base first.
        dtype: Of the result.
        name: The tensor's name, a key of random draws.
        seed: The other key.
        tile: Elements in a tile.
        run: Maps a function over segments, such as a thread pool's ``map``.
        read_ahead: Read the next tile while one is computed.
    """
    shape = tuple(tensors[0].shape)
    sources = [TensorSource(t, f"model {i}: {name}") for i, t in enumerate(tensors)]

    def open_scan(**tiling: Any) -> Scan:
        return Scan(sources, shape, name=name, seed=seed, tile=tile, run=run, read_ahead=read_ahead, **tiling)

    out = torch.empty(shape, dtype=dtype)
    flat = out.view(-1)
    prepared = prepare(method, open_scan, shape, dtype=from_torch(dtype))

    def write(segment: Segment) -> None:
        loop, out = prepared.loop(from_torch(dtype)), native.in_memory(flat)
        if loop is None or out is None:
            for start, values in prepared.tiles(segment):
                flat[start : start + values.numel()] = values
            return
        for place in prepared.scan.places(segment):
            if not loop(place, out.at(place.start), None):
                flat[place.start : place.start + place.numel] = prepared.at(place)

    list(run(write, prepared.scan.segments))
    return out
