"""The compiled loops of `kernels.c`, where they exist: optional, and the same bits as the torch code that they stand for.

`available()` says whether they are used; ``GEOMERGE_NATIVE=0`` turns them off. They read elements where these are `Stored`, in
memory or in files, and write the result where it is to be.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from geomerge.checkpoint.dtypes import from_torch
from geomerge.methods.native.build import LIBRARY, fingerprint

if TYPE_CHECKING:
    from torch import Tensor


CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
"""The dtypes that the loops read and write, by safetensors name."""

_SIZES = (2, 2, 4, 8)
_WINDOW, _BATCH, _APART = 1 << 15, 1 << 17, 576
"""As in `kernels.c`."""

MOST = 32
"""Inputs that they take at once."""

_off = 0


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("GEOMERGE_NATIVE") == "0" or not LIBRARY.exists() or sys.byteorder != "little":
        return None
    # The loops fuse multiplication and addition where torch does, and torch does on processors that can.
    if platform.machine() in ("x86_64", "AMD64") and not _fuses():
        return None
    return _load(LIBRARY)


def _fuses() -> bool:
    """Whether an x86 processor has AVX2 and fused multiplication and addition."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return " avx2" in flags and " fma" in flags


def _load(path: Path) -> ctypes.CDLL | None:
    """The library, or `None` where it cannot be loaded or was made of another `kernels.c` than the one beside this file."""
    try:
        library = ctypes.CDLL(str(path))
        made_of = ctypes.c_char * (len(fingerprint()) + 1)
        return library if made_of.in_dll(library, "geomerge_source").value.decode() == fingerprint() else None
    except (OSError, ValueError):
        return None


def available() -> bool:
    """Whether the compiled loops are used."""
    return not _off and _library() is not None


@contextlib.contextmanager
def turned_off() -> Iterator[None]:
    """Within, torch does all."""
    global _off  # noqa: PLW0603 - a switch of the process, as the variable is
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def takes(dtypes: Sequence[str]) -> bool:
    """Whether the loops are there and can work on inputs (or outputs) of these dtypes."""
    return len(dtypes) <= MOST and all(d in CODES for d in dtypes) and available()


@dataclass(frozen=True, slots=True)
class Stored:
    """Where elements lie: in memory, or in an open file.

    Attributes:
        code: Their dtype, from `CODES`.
        memory: The address of the first, if they are in memory.
        file, offset: Else a descriptor, and where in the file the first lies.
        keeps: What must live as long.
        failed: Raises the error that tells the user that the file could not be read or written. It gets `errno`, or 0 if the
            file ended early.
    """

    code: int
    memory: int = 0
    file: int = -1
    offset: int = 0
    keeps: object = None
    failed: Callable[[int], NoReturn] | None = None

    def at(self, start: int) -> Stored:
        """The same from another element on."""
        skipped = start * _SIZES[self.code]
        memory, offset = (self.memory + skipped, 0) if self.memory else (0, self.offset + skipped)
        return Stored(self.code, memory, self.file, offset, self.keeps, self.failed)

    def refuse(self, error: int) -> NoReturn:
        """Raise what `failed` does."""
        if self.failed is not None:
            self.failed(error)
        raise OSError(error, os.strerror(error))


def in_memory(tensor: Tensor) -> Stored | None:
    """Where a flat, contiguous tensor of the CPU lies, if the loops know its dtype."""
    code = CODES.get(from_torch(tensor.dtype))
    if code is None or tensor.device.type != "cpu":
        return None
    return Stored(code, memory=tensor.data_ptr() or _NOWHERE, keeps=tensor)


_NOWHERE = 64
"""For the address of no elements, which is not looked at."""


class _Place(ctypes.Structure):
    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
        ("file", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


def _place(stored: Stored) -> _Place:
    return _Place(stored.memory or None, stored.offset, stored.file, stored.code)


class _Work(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
        ("beginning", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("count", ctypes.c_int32),
        ("failed", ctypes.c_int32),
        ("error", ctypes.c_int32),
    )


class Inputs:
    """The same elements of several inputs.

    Args:
        stored: Where those of each begin.
        numel: How many.
    """

    def __init__(self, stored: Sequence[Stored], numel: int) -> None:
        self.stored, self.numel = stored, numel
        self.count = len(stored)
        self._places = (_Place * self.count)(*map(_place, stored))

    def call(self, name: str, *arguments: Any, out: Stored | None = None, beginning: np.ndarray | None = None) -> bool:
        """Call a loop of this name with these inputs, and the output as its last argument.

        Returns:
            Whether all numbers that it looked at are finite.
        """
        room = sum(_SIZES[s.code] * _WINDOW + _APART for s in self.stored if not s.memory)
        room = _room(room if out is None or out.memory else room + _SIZES[out.code] * _BATCH).ctypes.data
        first = None if beginning is None else beginning.ctypes.data
        work = _Work(
            ctypes.addressof(self._places), room, first, 0 if beginning is None else len(beginning), self.count
        )
        place = () if out is None else (ctypes.byref(_place(out)),)
        done: int = getattr(_loaded(), f"geomerge_{name}")(ctypes.byref(work), *arguments, *place)
        if done < 0:
            place_of = self.stored[work.failed] if work.failed >= 0 else out
            assert place_of is not None
            place_of.refuse(work.error)
        return bool(done)


_local = threading.local()


def _room(nbytes: int, use: str = "windows") -> np.ndarray:
    """So many bytes of this thread's buffer for a use: its pages need not be got and cleared again and again."""
    found: np.ndarray | None = getattr(_local, use, None)
    if found is None or found.size < nbytes:
        found = np.empty(nbytes, dtype=np.uint8)
        setattr(_local, use, found)
    return found[:nbytes]


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


def _doubles(values: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(values))(*values)


def load(stored: Stored, count: int) -> np.ndarray:
    """So many elements in float64."""
    found = np.empty(count)
    Inputs([stored], count).call("load", ctypes.c_int64(count), ctypes.c_void_p(found.ctypes.data))
    return found


def finite(inputs: Inputs) -> bool:
    """Whether all inputs are finite."""
    return inputs.call("finite", ctypes.c_int64(inputs.numel))


def change(stored: Stored, merged: np.ndarray, code: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a few merged elements (float64): minus those that are stored, and what rounding to a dtype adds to them."""
    found = np.empty((2, len(merged)))
    pointers = [ctypes.c_void_p(each.ctypes.data) for each in (merged, found[0], found[1])]
    Inputs([stored], len(merged)).call(
        "change", ctypes.c_int64(len(merged)), pointers[0], ctypes.c_int(code), pointers[1], pointers[2]
    )
    return found[0], found[1]


def copy(stored: Stored, count: int, out: Stored, *, unbounded: bool) -> bool:
    """Copy elements of one dtype; whether all are finite, or (if `unbounded`) none is NaN."""
    return Inputs([stored], count).call("copy", ctypes.c_int64(count), ctypes.c_int(unbounded), out=out)


def span(inputs: Inputs, coefficients: Sequence[float], out: Stored, beginning: np.ndarray | None = None) -> bool:
    """Σ cᵢxᵢ, summed in float64 and rounded; whether all of the sum is finite.

    Args:
        inputs: The xᵢ.
        coefficients: The cᵢ.
        out: Where the sum goes.
        beginning: Takes the first elements of the sum before they are rounded.
    """
    return inputs.call("span", ctypes.c_int64(inputs.numel), _doubles(coefficients), out=out, beginning=beginning)


def gram(inputs: Inputs, block: int, *, single: bool) -> np.ndarray:
    """The sums of products of the inputs centred on the first, over blocks of at most `ROW`: shape ``(pairs, blocks)``."""
    pairs = inputs.count * (inputs.count + 1) // 2
    found = np.empty((pairs, -(-inputs.numel // block)))
    name = "gram_float" if single else "gram_double"
    inputs.call(name, ctypes.c_int64(inputs.numel), ctypes.c_int64(block), ctypes.c_void_p(found.ctypes.data))
    return found


ROW = _WINDOW
"""Elements of the longest rows (or blocks) whose sums they make."""


def gram_columns(inputs: Inputs, total: np.ndarray) -> None:
    """Add the products of the inputs centred on the first, of rows of ``total.shape[1]`` elements, to `total`, by columns."""
    columns = total.shape[1]
    rows = ctypes.c_int64(inputs.numel // columns)
    inputs.call("gram_columns", rows, ctypes.c_int64(columns), ctypes.c_void_p(total.ctypes.data))


class _Bracket(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_double),
        ("high", ctypes.c_double),
        ("common", ctypes.c_double),
        ("above", ctypes.c_int64),
        ("equal", ctypes.c_int64),
        ("collected", ctypes.c_int64),
        ("found", ctypes.c_void_p),
        ("expert", ctypes.c_int32),
    )


Bounds = tuple[float, float, float]
"""Of a bracket: ``(low, high, common)``."""

Counted = tuple[int, int, np.ndarray]
"""How many magnitudes lie above `high`, how many equal `common`, and those others that lie between `low` and `high`."""


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
        # The loops store eight at a time.
        dtype = np.dtype(np.float32 if single else np.float64)
        self._found = _room(len(bounds) * (size + 8) * dtype.itemsize, "found").view(dtype).reshape(len(bounds), -1)
        of = [0] * len(bounds) if experts is None else experts
        rows = [row.ctypes.data for row in self._found]
        self.array = (_Bracket * len(bounds))(
            *(_Bracket(*each, 0, 0, 0, row, k) for each, row, k in zip(bounds, rows, of, strict=True))
        )

    def address(self, index: int) -> int:
        """Where one of them lies."""
        return ctypes.addressof(self.array) + index * ctypes.sizeof(_Bracket)

    def counted(self) -> list[Counted]:
        """What each has found."""
        pairs = zip(self.array, self._found, strict=True)
        return [(each.above, each.equal, row[: each.collected].copy()) for each, row in pairs]


def bracket(magnitudes: np.ndarray, bounds: Bounds) -> Counted:
    """Count and collect magnitudes."""
    single = magnitudes.dtype == np.float32
    asked = Brackets([bounds], magnitudes.size, single=single)
    function = _loaded().geomerge_bracket_float if single else _loaded().geomerge_bracket_double
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
    order = sorted(range(len(brackets)), key=lambda i: brackets[i][0])
    experts, bounds = [brackets[i][0] for i in order], [brackets[i][1] for i in order]
    asked = Brackets(bounds, inputs.numel * len(starts), single=single, experts=experts)
    finite = inputs.call(
        "survey_float" if single else "survey_double",
        ctypes.c_int64(len(starts)), (ctypes.c_int64 * len(starts))(*starts), ctypes.c_int64(inputs.numel),
        ctypes.c_int(len(brackets)), asked.array, ctypes.c_int(check),
    )  # fmt: skip
    found = dict(zip(order, asked.counted(), strict=True))
    return finite, [found[i] for i in range(len(brackets))]


class Thinning(ctypes.Structure):
    """What remains of one task vector: see `kernels.c`."""

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

    def draw(self, generator: np.random.PCG64DXSM, width: int, limit: int = 0) -> None:
        """Each element draws a word of so many bits, and those below `limit` survive (unless a `Pruning` says which)."""
        inner: Any = generator.state["state"]
        low = 2**64 - 1
        self.state[:] = (inner["state"] & low, inner["state"] >> 64)
        self.step[:] = (inner["inc"] & low, inner["inc"] >> 64)
        self.width, self.limit = width, limit


class _Combination(ctypes.Structure):
    _fields_ = (
        ("elect", ctypes.c_int32),
        ("alike", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
        ("clamp", ctypes.c_int32),
        ("floor", ctypes.c_double),
        ("factor", ctypes.c_double),
        ("limit", ctypes.c_double),
    )


@dataclass(frozen=True)
class Combination:
    """How thinned task vectors are combined: the arguments of `weighted_sum` (`elect` false) or `disjoint_merge`."""

    elect: bool
    coefficients: Sequence[float]
    weights: Sequence[float]
    normalize: bool
    lambda_: float

    def packed(self, limit: float = 0.0) -> _Combination:
        """For the loops; `limit` as `geomerge.methods.combine.cancelled` gives it."""
        weights = self.weights
        alike = self.elect and len(set(self.coefficients)) == len(set(weights)) == 1 and self.coefficients[0] > 0
        clamp = alike or min(weights) > 0
        scale = self.coefficients[0] if alike else 1.0
        scale = scale / weights[0] if alike and self.normalize else scale
        return _Combination(
            self.elect, alike, self.normalize, clamp, 0.5 if alike else min(weights) / 2, self.lambda_ * scale, limit
        )


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
    beginning: np.ndarray | None = None,
) -> bool:
    """θ₀ + the combination of the thinned task vectors, rounded; whether all inputs are finite (looked at if `check`)."""
    return inputs.call(
        "task_vectors_float" if single else "task_vectors_double",
        ctypes.c_int64(inputs.numel), thinned, ctypes.byref(rule.packed(limit)), _doubles(rule.coefficients),
        _doubles(rule.weights), ctypes.c_int(check), out=out, beginning=beginning,
    )  # fmt: skip


def program(
    inputs: Inputs,
    first: int,
    steps: ctypes.Array[Any],
    starts: Sequence[int] = (0,),
    out: Stored | None = None,
    beginning: np.ndarray | None = None,
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
    """Which elements of a row survive, by their ranks: see `kernels.c`."""

    _fields_ = (
        ("shares", ctypes.c_void_p),
        ("limits", ctypes.c_void_p),
        ("spare", ctypes.c_uint32),
        ("spared", ctypes.c_int32),
    )


def pruned(
    inputs: Inputs,
    columns: int,
    thinned: ctypes.Array[Thinning],
    prunings: ctypes.Array[Pruning],
    rule: Combination,
    out: Stored,
    beginning: np.ndarray | None = None,
    *,
    check: bool,
) -> bool:
    """As `task_vectors` in float64, after pruning by rows of at most `ROW` columns.

    Args:
        inputs, rule, out, beginning, check: As for `task_vectors`.
        columns: Elements in a row.
        thinned: Task vectors that draw numbers of 32 bits are pruned.
        prunings: How.
    """
    some = max(_TOGETHER // columns, 1)
    experts = inputs.count - 1
    scratch = _room(some * columns * (8 * inputs.count + 4 * experts) + 32 * columns, "scratch")
    return inputs.call(
        "pruned", ctypes.c_int64(inputs.numel), ctypes.c_int64(columns), ctypes.c_int64(some), thinned, prunings,
        ctypes.byref(rule.packed()), _doubles(rule.coefficients), _doubles(rule.weights),
        ctypes.c_void_p(scratch.ctypes.data), ctypes.c_int(check), out=out, beginning=beginning,
    )  # fmt: skip


_TOGETHER = 1 << 13
"""Elements of each input that rows are put together to, where they are shorter."""


def divergences(inputs: Inputs, columns: int, floor: float, *, check: bool) -> tuple[bool, np.ndarray]:
    """Σ p ln(p/q) of each row of at most `ROW` columns, where p and q are the second and first input's softmax plus `floor`."""
    found = np.empty(inputs.numel // columns)
    room = ctypes.c_void_p(_room(16 * columns, "scratch").ctypes.data)
    return inputs.call(
        "divergences", ctypes.c_int64(len(found)), ctypes.c_int64(columns), ctypes.c_double(floor), room,
        ctypes.c_int(check), ctypes.c_void_p(found.ctypes.data),
    ), found  # fmt: skip
