"""Sums of resolvents of a tridiagonal matrix, by the compiled loop of resolvents.h."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from geomerge.methods.native import call

if TYPE_CHECKING:
    from torch import Tensor

_STRIP = 16
"""At most so many columns are solved for together."""


def resolvents(diagonal: Tensor, beside: Tensor, shifts: Tensor, weights: Tensor, right: Tensor) -> Tensor:
    """Σ wⱼ (T + tⱼ)⁻¹ C: see `geomerge.methods.roots`. All are contiguous, float64 and on the CPU."""
    (n, columns), count = right.shape, len(shifts)
    out = right.new_empty(n, columns)
    room = call.address(8 * n * (4 * _STRIP + 2 * (count + 1)), "scratch")
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in (diagonal, beside, shifts, weights, right, out)]
    call.loaded().geomerge_resolvents(
        ctypes.c_int64(n), ctypes.c_int64(columns), *pointers[:2], ctypes.c_int64(count), *pointers[2:5],
        ctypes.c_void_p(room), pointers[5],
    )  # fmt: skip
    return out
