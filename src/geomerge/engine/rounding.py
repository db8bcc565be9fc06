"""The one rounding at the end: float64 to the output's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from geomerge.methods.random import stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def nearest(dtype: torch.dtype) -> Callable[[int, Tensor], Tensor]:
    """Round to nearest, ties to even."""

    def rounded(_start: int, values: Tensor) -> Tensor:
        return values.to(dtype)

    return rounded


def stochastic(dtype: torch.dtype, *, seed: int, name: str) -> Callable[[int, Tensor], Tensor]:
    """Round up or down at random so that the expected value is kept; the draw belongs to the element.

    Args:
        dtype: bfloat16 or float16 (wider dtypes are rounded to nearest: there is nothing to gain).
        seed: The recipe's seed.
        name: The output tensor's name.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return nearest(dtype)

    def rounded(start: int, values: Tensor) -> Tensor:
        generator = stream(seed, f"round/{name}")
        first, shift = divmod(start, 2)
        generator.advance(first)
        words = generator.random_raw((values.numel() + shift + 1) // 2).astype("<u8", copy=False).view("<u4")
        u = torch.from_numpy(words[shift : shift + values.numel()].astype(np.float64)).to(values.device).mul_(2.0**-32)
        near = values.to(dtype)
        exact = near.to(torch.float64)
        error = values - exact
        # The neighbour on the other side of the exact value.
        towards = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
        other = torch.nextafter(near, towards)
        gap = (other.to(torch.float64) - exact).abs()
        moves = (error != 0) & (u < error.abs() / gap) & torch.isfinite(other)
        return torch.where(moves, other, near)

    return rounded


def make(kind: str, dtype: torch.dtype, *, seed: int, name: str) -> Callable[[int, Tensor], Tensor]:
    """The rounding that a recipe asks for: ``nearest`` or ``stochastic``."""
    return nearest(dtype) if kind == "nearest" else stochastic(dtype, seed=seed, name=name)
