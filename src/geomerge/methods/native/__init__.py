"""The compiled loops of `kernels.c`, where they exist: optional, and the same bits as the torch code that they stand for.

`available()` says whether they are used; ``GEOMERGE_NATIVE=0`` turns them off. They read elements where these are `Stored`, in
memory or in files, and write the result where it is to be.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geomerge.methods.native import call
from geomerge.methods.native.call import (
    CODES,
    MOST,
    Doubles,
    Inputs,
    Stored,
    available,
    in_memory,
    missing,
    pages,
    takes,
    turned_off,
    zeros,
)
from geomerge.methods.native.counting import Bounds, Brackets, Counted, bracket, survey, surveyed
from geomerge.methods.native.sorting import largest, ranks, sort

__all__ = [
    "CODES", "MOST", "Bounds", "Brackets", "Counted", "Doubles", "Inputs", "Stored", "available", "bracket", "in_memory",
    "largest", "missing", "pages", "ranks", "sort", "survey", "takes", "turned_off", "zeros",
]  # fmt: skip


def load(stored: Stored, count: int) -> np.ndarray:
    """So many elements in float64."""
    found = np.empty(count)
    Inputs([stored], count).call("load", ctypes.c_int64(count), ctypes.c_void_p(found.ctypes.data))
    return found


def finite(inputs: Inputs) -> bool:
    """Whether all inputs are finite."""
    return inputs.call("finite", ctypes.c_int64(inputs.numel))


def change(stored: Stored, merged: Doubles, code: int, residue: float) -> tuple[float, float]:
    """Of a few merged elements: ‖minus those that are stored‖², and ‖what rounding to a dtype adds to them‖².

    Where the second is more than a quarter of the first, differences up to `residue` of an element are none.
    """
    found = (ctypes.c_double * 2)()
    Inputs([stored], len(merged)).call(
        "change", ctypes.c_int64(len(merged)), merged, ctypes.c_int(code), ctypes.c_double(residue), found
    )
    return found[0], found[1]


def copy(stored: Stored, count: int, out: Stored, *, unbounded: bool) -> bool:
    """Copy elements of one dtype; whether all are finite, or (if `unbounded`) none is NaN."""
    return Inputs([stored], count).call("copy", ctypes.c_int64(count), ctypes.c_int(unbounded), out=out)


def span(inputs: Inputs, coefficients: Sequence[float], out: Stored, beginning: Doubles | None = None) -> bool:
    """Σ cᵢxᵢ, summed in float64 and rounded; whether all of the sum is finite.

    Args:
        inputs: The xᵢ.
        coefficients: The cᵢ.
        out: Where the sum goes.
        beginning: Takes the first elements of the sum before they are rounded.
    """
    return inputs.call("span", ctypes.c_int64(inputs.numel), call.doubles(coefficients), out=out, beginning=beginning)


def gram(inputs: Inputs, block: int, *, single: bool) -> np.ndarray:
    """The sums of products of the inputs centred on the first, over blocks of at most `ROW`: shape ``(pairs, blocks)``."""
    pairs = inputs.count * (inputs.count + 1) // 2
    found = np.empty((pairs, -(-inputs.numel // block)))
    name = "gram_float" if single else "gram_double"
    inputs.call(name, ctypes.c_int64(inputs.numel), ctypes.c_int64(block), ctypes.c_void_p(found.ctypes.data))
    return found


ROW = call.WINDOW
"""Elements of the longest rows (or blocks) whose sums they make."""


def gram_columns(inputs: Inputs, total: np.ndarray) -> None:
    """Add the products of the inputs centred on the first, of rows of ``total.shape[1]`` elements, to `total`, by columns."""
    columns = total.shape[1]
    rows = ctypes.c_int64(inputs.numel // columns)
    inputs.call("gram_columns", rows, ctypes.c_int64(columns), ctypes.c_void_p(total.ctypes.data))


class Thinning(ctypes.Structure):
    """What remains of one task vector: see `task_vectors.h`."""

    _fields_ = (
        ("keep", ctypes.c_double),
        ("equal", ctypes.c_double),
        ("drop", ctypes.c_double),
        ("drop_equal", ctypes.c_double),
        ("left", ctypes.c_int64),
        ("drop_left", ctypes.c_int64),
        ("state", ctypes.c_uint64 * 2),
        ("step", ctypes.c_uint64 * 2),
        ("width", ctypes.c_int32),
        ("limit", ctypes.c_uint32),
    )

    def draw(self, numbers: tuple[int, int, int, int], width: int, limit: int = 0) -> None:
        """Each element draws a word of so many bits, and those below `limit` survive (unless a `Pruning` says which).

        Args:
            numbers: State and increment of the generator (`geomerge.methods.random.numbers_at`).
        """
        self.state[:], self.step[:] = numbers[:2], numbers[2:]
        self.width, self.limit = width, limit


def generator(key: bytes) -> tuple[int, int]:
    """State and increment that NumPy's PCG64DXSM has when it is made of 16 bytes, little end first."""
    state, step = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 2)()
    call.loaded().geomerge_generator(key, state, step)
    return state[1] << 64 | state[0], step[1] << 64 | step[0]


class _Combination(ctypes.Structure):
    _fields_ = (
        ("elect", ctypes.c_int32),
        ("alike", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
        ("clamp", ctypes.c_int32),
        ("floor", ctypes.c_double),
        ("factor", ctypes.c_double),
        ("limit", ctypes.c_double),
        ("minus", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Combination:
    """How thinned task vectors are combined: the arguments of `weighted_sum` (`elect` false) or `disjoint_merge`."""

    elect: bool
    coefficients: Sequence[float]
    weights: Sequence[float]
    normalize: bool
    lambda_: float
    tie: float = 1.0
    """What is elected where votes cancel, 1 or −1."""

    def packed(self, limit: float = 0.0) -> _Combination:
        """For the loops; `limit` as `geomerge.methods.combine.cancelled` gives it."""
        weights = self.weights
        alike = self.elect and len(set(self.coefficients)) == len(set(weights)) == 1 and self.coefficients[0] > 0
        clamp = alike or min(weights) > 0
        scale = self.coefficients[0] if alike else 1.0
        scale = scale / weights[0] if alike and self.normalize else scale
        floor = 0.5 if alike else min(weights) / 2 if clamp else nothing(weights)
        return _Combination(self.elect, alike, self.normalize, clamp, floor, self.lambda_ * scale, limit, self.tie < 0)


def nothing(weights: Sequence[float]) -> float:
    """Sums of some of these weights up to this are zero but for float32's rounding (0.1 + 0.2 − 0.3 is none)."""
    return len(weights) * 2.0**-22 * sum(map(abs, weights))


def whole(count: int) -> ctypes.Array[Thinning]:
    """So many task vectors that stay whole."""
    nan, inf = float("nan"), float("inf")
    return (Thinning * count)(*(Thinning(keep=-1.0, equal=nan, drop=inf, drop_equal=nan) for _ in range(count)))


def task_vectors(
    inputs: Inputs,
    thinned: ctypes.Array[Thinning],
    rule: Combination,
    out: Stored,
    *,
    single: bool,
    limit: float,
    check: bool,
    beginning: Doubles | None = None,
) -> bool:
    """θ₀ + the combination of the thinned task vectors, rounded; whether all inputs are finite (looked at if `check`)."""
    return inputs.call(
        "task_vectors_float" if single else "task_vectors_double",
        ctypes.c_int64(inputs.numel), thinned, ctypes.byref(rule.packed(limit)), call.doubles(rule.coefficients),
        call.doubles(rule.weights), ctypes.c_int(check), out=out, beginning=beginning,
    )  # fmt: skip


def norms(
    inputs: Inputs, block: int, thinned: ctypes.Array[Thinning], *, single: bool, check: bool
) -> tuple[bool, np.ndarray]:
    """Whether all inputs are finite (looked at if `check`), and Σ|τₖ| in each block, before and after thinning.

    Returns:
        The sums have the shape ``(2 · experts, blocks)``: of each expert before, then after.
    """
    found = np.empty((2 * (inputs.count - 1), -(-inputs.numel // block)))
    name = "norms_float" if single else "norms_double"
    finite = inputs.call(
        name, ctypes.c_int64(inputs.numel), ctypes.c_int64(block), thinned, ctypes.c_void_p(found.ctypes.data),
        ctypes.c_int(check),
    )  # fmt: skip
    return finite, found


def program(
    inputs: Inputs,
    first: int,
    steps: ctypes.Array[Any],
    starts: Sequence[int] = (0,),
    out: Stored | None = None,
    beginning: Doubles | None = None,
    *,
    check: bool,
) -> bool:
    """Do recorded steps (`geomerge.methods.program`); whether all inputs are finite (looked at if `check`).

    Args:
        inputs: The base and the experts.
        first: The first element's place in the tensor.
        steps: The steps.
        starts: From each of these on the inputs' number of elements is looked at.
        out, beginning: As for `span`, if the steps store something.
        check: Look whether all inputs are finite.
    """
    arguments = (
        ctypes.c_int64(len(starts)), (ctypes.c_int64 * len(starts))(*starts), ctypes.c_int64(inputs.numel),
        ctypes.c_int64(first), steps, ctypes.c_int(len(steps)), ctypes.c_int(check),
    )  # fmt: skip
    if out is None:
        return inputs.call("program", *arguments, None)
    return inputs.call("program", *arguments, out=out, beginning=beginning)


class Pruning(ctypes.Structure):
    """Which elements of a row survive, by their ranks: see `pruned.h`."""

    _fields_ = (
        ("start", ctypes.c_double),
        ("step", ctypes.c_double),
        ("rescale", ctypes.c_int32),
        ("finer", ctypes.c_uint64 * 4),
    )


def pruned(
    inputs: Inputs,
    first: int,
    columns: int,
    thinned: ctypes.Array[Thinning],
    prunings: ctypes.Array[Pruning],
    rule: Combination,
    out: Stored,
    beginning: Doubles | None = None,
    *,
    check: bool,
) -> bool:
    """As `task_vectors` in float64, after pruning by rows of at most `ROW` columns.

    Args:
        inputs, rule, out, beginning, check: As for `task_vectors`.
        first: The first element's place in the tensor.
        columns: Elements in a row.
        thinned: Task vectors that draw words are pruned.
        prunings: How.
    """
    return inputs.call(
        "pruned", *map(ctypes.c_int64, (inputs.numel, first, columns)), thinned, prunings,
        ctypes.byref(rule.packed()), call.doubles(rule.coefficients), call.doubles(rule.weights),
        pruning_room(inputs, columns), ctypes.c_int(check), out=out, beginning=beginning,
    )  # fmt: skip


def pruned_norms(
    inputs: Inputs,
    first: int,
    columns: int,
    thinned: ctypes.Array[Thinning],
    prunings: ctypes.Array[Pruning],
    *,
    check: bool,
) -> tuple[bool, np.ndarray]:
    """As `norms`, after pruning as by `pruned`; a block is a row."""
    rows = inputs.numel // columns
    found = np.empty((2 * (inputs.count - 1), rows))
    finite = inputs.call(
        "pruned_norms", *map(ctypes.c_int64, (rows, first, columns)), thinned, prunings,
        ctypes.c_void_p(found.ctypes.data), pruning_room(inputs, columns), ctypes.c_int(check),
    )  # fmt: skip
    return finite, found


def pruning_room(inputs: Inputs, columns: int) -> ctypes.c_void_p:
    """Where there is room for what the rows need, as `set_up` in pruned.h lays it out."""
    of_all, of_each = 4096 + 42 * columns, 1024 + 6 * columns
    return ctypes.c_void_p(call.address(of_all + (inputs.count - 1) * of_each, "scratch"))


class _Rows(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("divergences", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
        ("floor", ctypes.c_double),
        ("known", ctypes.c_int32),
    )


@dataclass
class Rows:
    """Rows of a tensor, and of each Σ p ln(p/q), where p and q are the second and first input's softmax plus a floor.

    Attributes:
        columns: Elements of a row, at most `ROW`.
        divergences: Float64, at least 0; NaN until a survey has met the row.
        floor: Needed until all are known.
        known: None is NaN: surveys need no whole rows.
    """

    columns: int
    divergences: np.ndarray
    floor: float = 0.0
    known: bool = True

    def packed(self, first: int) -> _Rows:
        """For the loops, which get elements from the `first` on."""
        room = None if self.known else call.address(16 * self.columns + 64, "scratch")
        return _Rows(first, self.columns, self.divergences.ctypes.data, room, self.floor, self.known)


def importance_survey(
    inputs: Inputs, first: int, rows: Rows, brackets: Sequence[Bounds], starts: Sequence[int] = (0,), *, check: bool
) -> tuple[bool, list[Counted]]:
    """As `survey`, of one expert's |θ₁ − θ₀|, each times its row's divergence; `first` is the first element's place."""
    asked = [(0, bounds) for bounds in brackets]
    where = ctypes.byref(rows.packed(first))
    return surveyed("importance_survey", inputs, asked, starts, where, single=False, check=check)


def importance(
    inputs: Inputs,
    first: int,
    rows: Rows,
    least: float,
    out: Stored,
    beginning: Doubles | None = None,
    *,
    check: bool,
) -> bool:
    """θ₁ where that product is at least so much, else θ₀, rounded; whether both are finite (looked at if `check`)."""
    return inputs.call(
        "importance", ctypes.c_int64(inputs.numel), ctypes.byref(rows.packed(first)), ctypes.c_double(least),
        ctypes.c_int(check), out=out, beginning=beginning,
    )  # fmt: skip


def near(inputs: Inputs, most: float, out: Stored, beginning: Doubles | None = None, *, check: bool) -> bool:
    """θ₀ + min(max(θ₁ − θ₀, −most), most), rounded; both are bfloat16. Whether they are finite (looked at if `check`)."""
    return inputs.call(
        "near", ctypes.c_int64(inputs.numel), ctypes.c_double(most), ctypes.c_int(check), out=out, beginning=beginning
    )


AGREEING = 8
"""Experts that `agreement` takes at most: see `agreement.h`."""


class Agreement(ctypes.Structure):
    """What SCE merges by: see `agreement.h`."""

    _fields_ = (("weight", ctypes.c_double * AGREEING), ("floor", ctypes.c_double), ("quick", ctypes.c_int32))


def agreement(inputs: Inputs, rule: Agreement, out: Stored, beginning: Doubles | None = None) -> bool:
    """θ₀ + the weighted mean of what agrees with the majority, rounded; all inputs are bfloat16 and finite."""
    return inputs.call("agreement", ctypes.c_int64(inputs.numel), ctypes.byref(rule), out=out, beginning=beginning)


COMPETITORS = 8
"""Experts that compete at most: see `competition.h`."""


class Competitor(ctypes.Structure):
    """What PCB-Merging knows of an expert: see `competition.h`."""

    _fields_ = (
        ("low", ctypes.c_double),
        ("high", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("least", ctypes.c_double),
        ("most", ctypes.c_double),
        ("shrink", ctypes.c_double),
        ("share", ctypes.c_double),
        ("weight", ctypes.c_double),
        ("counts", ctypes.c_int32),
    )


def competition_survey(
    inputs: Inputs,
    competitors: ctypes.Array[Competitor],
    brackets: Sequence[tuple[int, Bounds]],
    starts: Sequence[int] = (0,),
    *,
    check: bool,
) -> tuple[bool, list[Counted]]:
    """As `survey`, of the experts' scores; all inputs are bfloat16."""
    return surveyed("competition_survey", inputs, brackets, starts, competitors, single=False, check=check)


def competition(
    inputs: Inputs,
    competitors: ctypes.Array[Competitor],
    factor: float,
    out: Stored,
    beginning: Doubles | None = None,
    *,
    check: bool,
) -> bool:
    """θ₀ + factor · Σ wτ̃ / Σ w, rounded; all inputs are bfloat16. Whether they are finite (looked at if `check`)."""
    return inputs.call(
        "competition", ctypes.c_int64(inputs.numel), competitors, ctypes.c_double(factor), ctypes.c_int(check),
        out=out, beginning=beginning,
    )  # fmt: skip
