"""The compiled loops of `kernels.c`, where they exist: optional, and the same bits as the torch code that they stand for.

`available()` says whether they are used; ``GEOMERGE_NATIVE=0`` turns them off. Tensors are flat, contiguous and on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geomerge.methods.native.build import LIBRARY, fingerprint

CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
"""The dtypes that the loops read and write."""

MOST = 32
"""Inputs that they take at once."""

_off = 0


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("GEOMERGE_NATIVE") == "0" or not LIBRARY.exists():
        return None
    # The loops fuse multiplication and addition where torch does, and torch does on processors that can.
    if platform.machine() in ("x86_64", "AMD64") and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    return _load(LIBRARY)


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


def takes(dtypes: Sequence[torch.dtype]) -> bool:
    """Whether the loops are there and can work on inputs (or outputs) of these dtypes."""
    return len(dtypes) <= MOST and all(d in CODES for d in dtypes) and available()


class Raw:
    """The same elements of several inputs, as stored."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs  # keeps them
        self.count, self.numel = len(inputs), inputs[0].numel()
        self.pointers = (ctypes.c_void_p * self.count)(*(x.data_ptr() for x in inputs))
        self.dtypes = (ctypes.c_int * self.count)(*(CODES[x.dtype] for x in inputs))


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _doubles(values: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(values))(*values)


def span(raw: Raw, coefficients: Sequence[float], out: Tensor) -> bool:
    """out = Σ cᵢxᵢ, summed in float64 and rounded to its dtype; whether all of the sum is finite."""
    done: int = _loaded().geomerge_span(
        ctypes.c_int(raw.count), raw.pointers, raw.dtypes, _doubles(coefficients), ctypes.c_int64(raw.numel),
        _pointer(out), ctypes.c_int(CODES[out.dtype]),
    )  # fmt: skip
    return bool(done)


def gram(raw: Raw, block: int, *, single: bool) -> np.ndarray:
    """`geomerge.methods.gram.block_products` of the inputs centred on the first: shape ``(pairs, blocks)``."""
    pairs = raw.count * (raw.count + 1) // 2
    found = np.empty((pairs, -(-raw.numel // block)))
    function = _loaded().geomerge_gram_float if single else _loaded().geomerge_gram_double
    function(
        ctypes.c_int(raw.count), raw.pointers, raw.dtypes, ctypes.c_int64(raw.numel), ctypes.c_int64(block),
        ctypes.c_void_p(found.ctypes.data),
    )  # fmt: skip
    return found


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


def bracket(magnitudes: np.ndarray, bounds: Bounds) -> Counted:
    """Count and collect magnitudes."""
    found = np.empty_like(magnitudes)
    one = _Bracket(*bounds, 0, 0, 0, found.ctypes.data, 0)
    single = magnitudes.dtype == np.float32
    function = _loaded().geomerge_bracket_float if single else _loaded().geomerge_bracket_double
    function(ctypes.c_void_p(magnitudes.ctypes.data), ctypes.c_int64(magnitudes.size), ctypes.byref(one))
    return one.above, one.equal, found[: one.collected].copy()


def survey(
    raw: Raw, brackets: Sequence[tuple[int, Bounds]], *, single: bool, check: bool
) -> tuple[bool, list[Counted]]:
    """Count and collect |θₖ − θ₀|.

    Args:
        raw: The base and the experts.
        brackets: Expert (from 0) and bounds of each.
        single: Whether differences are float32.
        check: Look whether all inputs are finite; the first value returned says so.
    """
    order = sorted(range(len(brackets)), key=lambda i: brackets[i][0])
    found = np.empty((len(brackets), raw.numel), dtype=np.float32 if single else np.float64)
    asked = (_Bracket * len(brackets))(
        *(_Bracket(*brackets[i][1], 0, 0, 0, found[i].ctypes.data, brackets[i][0]) for i in order)
    )
    function = _loaded().geomerge_survey_float if single else _loaded().geomerge_survey_double
    finite: int = function(
        ctypes.c_int(raw.count - 1), raw.pointers, raw.dtypes, ctypes.c_int64(raw.numel),
        ctypes.c_int(len(brackets)), asked, ctypes.c_int(check),
    )  # fmt: skip
    counted: list[Counted] = [(0, 0, found[0, :0])] * len(brackets)
    for i, each in zip(order, asked, strict=True):
        counted[i] = (each.above, each.equal, found[i, : each.collected].copy())
    return bool(finite), counted


class Thinning(ctypes.Structure):
    """What remains of one task vector: see `kernels.c`."""

    _fields_ = (
        ("keep", ctypes.c_double),
        ("equal", ctypes.c_double),
        ("drop", ctypes.c_double),
        ("drop_equal", ctypes.c_double),
        ("left", ctypes.c_int64),
        ("drop_left", ctypes.c_int64),
        ("words", ctypes.c_void_p),
        ("width", ctypes.c_int32),
        ("limit", ctypes.c_uint32),
    )


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


def whole(count: int) -> ctypes.Array[Thinning]:
    """So many task vectors that stay whole."""
    nan, inf = float("nan"), float("inf")
    return (Thinning * count)(*(Thinning(-1.0, nan, inf, nan, 0, 0, None, 0, 0) for _ in range(count)))


def task_vectors(
    raw: Raw,
    thinned: ctypes.Array[Thinning],
    rule: Combination,
    out: Tensor,
    *,
    single: bool,
    limit: float,
    check: bool,
) -> bool:
    """θ₀ + the combination of the thinned task vectors, rounded; whether all inputs are finite (looked at if `check`)."""
    weights = rule.weights
    alike = rule.elect and len(set(rule.coefficients)) == len(set(weights)) == 1 and rule.coefficients[0] > 0
    clamp = alike or min(weights) > 0
    scale = rule.coefficients[0] if alike else 1.0
    scale = scale / weights[0] if alike and rule.normalize else scale
    combination = _Combination(
        rule.elect, alike, rule.normalize, clamp, 0.5 if alike else min(weights) / 2, rule.lambda_ * scale, limit
    )
    function = _loaded().geomerge_task_vectors_float if single else _loaded().geomerge_task_vectors_double
    done: int = function(
        ctypes.c_int(raw.count - 1), raw.pointers, raw.dtypes, ctypes.c_int64(raw.numel), thinned,
        ctypes.byref(combination), _doubles(rule.coefficients), _doubles(weights), ctypes.c_int(check),
        _pointer(out), ctypes.c_int(CODES[out.dtype]),
    )  # fmt: skip
    return bool(done)
