"""Magnitudes around thresholds, counted and collected by the compiled loops of brackets.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from geomerge.methods.native import call
from geomerge.methods.native.call import Inputs


class _Bracket(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_double),
        ("high", ctypes.c_double),
        ("common", ctypes.c_double * 2),
        ("above", ctypes.c_int64),
        ("equal", ctypes.c_int64 * 2),
        ("collected", ctypes.c_int64),
        ("found", ctypes.c_void_p),
        ("size", ctypes.c_float * 4),
        ("expert", ctypes.c_int32),
    )


Bounds = tuple[float, float, tuple[float, float]]
"""Of a bracket: ``(low, high, common)``; NaN is for a value that is not there."""

Counted = tuple[int, tuple[int, int], "np.ndarray"]
"""How many magnitudes lie above `high`, how many equal each of `common`, and those others that lie between `low` and `high`."""


class Brackets:
    """Brackets that a loop fills.

    Args:
        bounds: Of each.
        size: How many magnitudes they look at, at most.
        single: Whether these are float32.
        experts: Whose magnitudes each looks at, where the loop asks for that (from 0, in ascending order).
    """

    def __init__(
        self, bounds: Sequence[Bounds], size: int, *, single: bool, experts: Sequence[int] | None = None
    ) -> None:
        dtype, width = np.dtype(np.float32 if single else np.float64), size + 16  # a register more is stored
        memory = call.room(len(bounds) * width * dtype.itemsize, "found")
        self._found = memory.view(dtype).reshape(len(bounds), width)
        of = [0] * len(bounds) if experts is None else experts
        first, row_bytes = memory.ctypes.data, width * dtype.itemsize
        rows = range(first, first + len(bounds) * row_bytes, row_bytes)
        self.array = (_Bracket * len(bounds))(
            *(
                _Bracket(*each, 0, (0, 0), 0, row, (0, 0, 0, 0), k)
                for each, row, k in zip(bounds, rows, of, strict=True)
            )
        )

    def address(self, index: int) -> int:
        """Where one of them lies."""
        return ctypes.addressof(self.array) + index * ctypes.sizeof(_Bracket)

    def counted(self) -> list[Counted]:
        """What each has found."""
        pairs = zip(self.array, self._found, strict=True)
        return [(each.above, tuple(each.equal), row[: each.collected].copy()) for each, row in pairs]


def bracket(magnitudes: np.ndarray, bounds: Bounds) -> Counted:
    """Count and collect magnitudes."""
    single = magnitudes.dtype == np.float32
    asked = Brackets([bounds], magnitudes.size, single=single)
    function = call.loaded().geomerge_bracket_float if single else call.loaded().geomerge_bracket_double
    function(ctypes.c_void_p(magnitudes.ctypes.data), ctypes.c_int64(magnitudes.size), asked.array)
    return asked.counted()[0]


def survey(
    inputs: Inputs,
    brackets: Sequence[tuple[int, Bounds]],
    starts: Sequence[int] = (0,),
    *,
    single: bool,
    check: bool,
) -> tuple[bool, list[Counted]]:
    """Count and collect |θₖ − θ₀|.

    Args:
        inputs: The base and the experts.
        brackets: Expert (from 0) and bounds of each.
        starts: From each of these the inputs' number of elements is looked at.
        single: Whether differences are float32.
        check: Look whether all inputs are finite; the first value returned says so.
    """
    name = "survey_float" if single else "survey_double"
    return surveyed(name, inputs, brackets, starts, single=single, check=check)


def surveyed(
    name: str,
    inputs: Inputs,
    brackets: Sequence[tuple[int, Bounds]],
    starts: Sequence[int],
    *arguments: Any,
    single: bool,
    check: bool,
) -> tuple[bool, list[Counted]]:
    """The same by a loop of another name, which takes arguments of its own after the number of elements."""
    order = sorted(range(len(brackets)), key=lambda i: brackets[i][0])
    experts, bounds = [brackets[i][0] for i in order], [brackets[i][1] for i in order]
    asked = Brackets(bounds, inputs.numel * len(starts), single=single, experts=experts)
    finite = inputs.call(
        name, ctypes.c_int64(len(starts)), (ctypes.c_int64 * len(starts))(*starts), ctypes.c_int64(inputs.numel),
        *arguments, ctypes.c_int(len(brackets)), asked.array, ctypes.c_int(check),
    )  # fmt: skip
    found = dict(zip(order, asked.counted(), strict=True))
    return finite, [found[i] for i in range(len(brackets))]
