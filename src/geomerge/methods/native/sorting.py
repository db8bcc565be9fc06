"""Numbers in order, by the compiled loops of sort.h: several times faster than NumPy's sort of many."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from geomerge.methods.native import call


def sort(values: np.ndarray) -> None:
    """Sort float32 or float64 numbers, which lie one after the other, in place."""
    single = values.dtype == np.float32
    function = call.loaded().geomerge_sort_float if single else call.loaded().geomerge_sort_double
    room = ctypes.c_void_p(call.address(values.nbytes, "scratch"))
    function(ctypes.c_int64(values.size), ctypes.c_void_p(values.ctypes.data), room)


def largest(pieces: Sequence[np.ndarray], count: int) -> tuple[float, int]:
    """The `count`-th largest of the float32 or float64 numbers in some pieces, and how many are greater."""
    dtype = np.result_type(*pieces)
    pieces, single = [np.ascontiguousarray(piece, dtype) for piece in pieces], dtype == np.float32
    function = call.loaded().geomerge_largest_float if single else call.loaded().geomerge_largest_double
    function.restype = ctypes.c_float if single else ctypes.c_double
    greater, number = ctypes.c_int64(), len(pieces)
    room = ctypes.c_void_p(call.address(sum(piece.nbytes for piece in pieces), "scratch"))
    x = (ctypes.c_void_p * number)(*(piece.ctypes.data for piece in pieces))
    sizes = (ctypes.c_int64 * number)(*(piece.size for piece in pieces))
    found = function(ctypes.c_int64(number), x, sizes, ctypes.c_int64(count), room, ctypes.byref(greater))
    return found, greater.value


def ranks(values: np.ndarray) -> np.ndarray:
    """The place of each of some float64 numbers in ascending order, equal ones by index."""
    values, found = np.ascontiguousarray(values), np.empty(values.size, dtype=np.int64)
    room = ctypes.c_void_p(call.address(32 * values.size, "scratch"))
    pointers = [ctypes.c_void_p(each.ctypes.data) for each in (values, found)]
    call.loaded().geomerge_ranks(ctypes.c_int64(values.size), pointers[0], room, pointers[1])
    return found
