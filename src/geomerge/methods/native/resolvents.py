"""Sums of resolvents of a tridiagonal matrix, by the compiled loop of resolvents.h."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from geomerge.methods.native import call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def resolvents(
    diagonal: Tensor, beside: Tensor, shifts: Tensor, weights: Tensor, edges: Sequence[int], out: Tensor
) -> tuple[Tensor, Tensor]:
    """As `geomerge.methods.roots` has it without. All tensors are contiguous, float64 and on the CPU."""
    n, count = len(diagonal), len(shifts)
    starts, ends = diagonal.new_empty(count, n), diagonal.new_empty(count, n)
    given = [ctypes.c_void_p(each.data_ptr()) for each in (diagonal, beside, shifts, weights)]
    made = [ctypes.c_void_p(each.data_ptr()) for each in (starts, ends, out)]
    call.loaded().geomerge_resolvents(
        ctypes.c_int64(n), *given[:2], ctypes.c_int64(count), *given[2:], (ctypes.c_int64 * len(edges))(*edges), *made
    )
    return starts, ends
