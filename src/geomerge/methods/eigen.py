"""Eigenvalues and products of symmetric matrices, by the LAPACK and BLAS that SciPy brings.

torch's `eigh` always finds all eigenvectors, for what five products of matrices cost. This LAPACK finds an eighth of them for
two, and all for four. SciPy's own functions hold the interpreter's lock; called through the pointers that it exports for
Cython, they work beside each other.

Small matrices, and those of a device, are left to torch: there SciPy is not even loaded.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    Rows = tuple[Tensor, Tensor]
    """The largest eigenvalues of a tridiagonal matrix in ascending order, and their vectors as rows."""

_SMALL = 256
"""Matrices with fewer rows are not worth a library that takes a fifth of a second to load."""
_LARGE = 32_000
"""With more, LAPACK's sizes do not fit into 32 bits."""
_FEW = 3
"""At most one in so many eigenvectors is looked for apart; to find more of them costs what all do."""
_FEWEST = 16
"""At most one in so many is looked for without the values of all others."""
_ORTHOGONAL = 1e-12
"""The largest product of two eigenvectors that are taken for orthogonal."""
_TINY = 1e-300
"""What a pivot of zero is taken for."""


def eigh(matrix: Tensor, k: int | None = None, form: Tridiagonal | None = None) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of a symmetric, positive semidefinite matrix, and their vectors.

    Args:
        matrix: Shape ``(n, n)``; only the upper triangle is looked at.
        k: From 1 to n; by default all.
        form: Its tridiagonal form, if that is known; it is used up.

    Returns:
        The values, the largest first, and the vectors as orthonormal columns: shapes ``(k,)`` and ``(n, k)``. All NaN where
        the matrix is not finite.
    """
    n = len(matrix)
    k = n if k is None else k
    if not math.isfinite(float(matrix.trace())):
        return matrix.new_full((k,), math.nan), matrix.new_full((n, k), math.nan)
    form = form or tridiagonal(matrix)
    found = form.largest(k) if form else None
    if found is not None:
        return found[0][:k], found[1][:, :k]
    values, vectors = torch.linalg.eigh(matrix, UPLO="U")
    return values.flip(0)[:k], vectors.flip(1)[:, :k]


def gram(matrix: Tensor, *, upper: bool = False) -> Tensor:
    """AAᵀ for half the work of a product, or only its upper triangle: what lies below it is undefined then."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    # Fortran sees every matrix transposed.
    flipped = across == 1 and down >= columns
    if not _ours(matrix) or not columns or not (flipped or (down == 1 and across >= rows)):
        return matrix @ matrix.T
    made, transposed, lead = matrix.new_empty(rows, rows), b"T" if flipped else b"N", down if flipped else across
    _call(
        "blas", "dsyrk", b"L", transposed, _int(rows), _int(columns), _double(1.0), matrix.data_ptr(), _int(lead),
        _double(0.0), made.data_ptr(), _int(rows),
    )  # fmt: skip
    return made if upper else mirrored(made)


def symmetric_product(upper: Tensor, matrix: Tensor, *, first: bool) -> Tensor:
    """SA, or AS where S is not to be the `first`, of a symmetric S of which only the upper triangle is looked at.

    It is no small matrix and none of a device. It costs what any product does: the triangle need not be mirrored.
    """
    (rows, columns), matrix = matrix.shape, matrix.contiguous()
    made, side = torch.empty_like(matrix), b"R" if first else b"L"  # to Fortran, all are transposed
    _call(
        "blas", "dsymm", side, b"L", _int(columns), _int(rows), _double(1.0), upper.data_ptr(), _int(len(upper)),
        matrix.data_ptr(), _int(columns), _double(0.0), made.data_ptr(), _int(columns),
    )  # fmt: skip
    return made


def mirrored(matrix: Tensor) -> Tensor:
    """A square matrix whose lower triangle is made its upper one, in place."""
    for first in range(0, len(matrix), _PANEL):
        last = min(first + _PANEL, len(matrix))
        block = matrix[first:last, first:last]
        block.copy_(block.triu() + block.triu(1).T)
        matrix[first:last, :first] = matrix[:first, first:last].T
    return matrix


_PANEL = 64
"""Rows that are mirrored at a time."""


def _ours(matrix: Tensor) -> bool:
    return _SMALL <= len(matrix) <= _LARGE and matrix.device.type == "cpu" and matrix.dtype == torch.float64


class Tridiagonal(NamedTuple):
    """T = QᵀAQ of a symmetric matrix A, as LAPACK finds it.

    Attributes:
        diagonal, beside: T: shapes ``(n,)`` and ``(n - 1,)``.
        reflections, factors: Q, the product of as many Householder reflections.
    """

    diagonal: Tensor
    beside: Tensor
    reflections: Tensor
    factors: Tensor

    def largest(self, k: int) -> tuple[Tensor, Tensor] | None:
        """As `eigh` finds them, or `None` where LAPACK does not; they use it up."""
        n = len(self.diagonal)
        k = k if _FEW * k <= n else n
        find = _all if k == n else _some if k * _FEWEST > n else _few
        found = find(self.diagonal, self.beside, k)
        if found is None:
            return None
        values, vectors = found
        # The reflections leave the first element alone.
        vectors[:, 1:] = torch.ormqr(self.reflections.T[1:, :-1], self.factors, vectors.T[1:]).T
        return values.flip(0), vectors.flip(0).T

    def above(self, bound: float) -> int:
        """How many eigenvalues are larger: the positive pivots of T − bound·I (Sylvester's law of inertia)."""
        squares = [0.0, *self.beside.square().tolist()]
        pivot, positive = 1.0, 0
        for here, square in zip(self.diagonal.tolist(), squares, strict=True):
            pivot = here - bound - square / (pivot or _TINY)
            positive += pivot > 0.0
        return positive

    def turn(self, matrix: Tensor, rows: Tensor, first: int, end: int) -> None:
        """Apply the reflections that begin in some rows, H of Q = …H…, of which those that begin later were applied before.

        Args:
            matrix: S, of which the upper triangle from `first` on becomes that of HSHᵀ.
            rows: X, whose columns from `first` on become those of XHᵀ.
            first, end: The rows. No reflection begins in the first of all.
        """
        count, n = end - first, len(matrix)
        number, size, lead, one = _int(count), _int(n - first), _int(n), _double(1.0)
        # H = I − VᵀFV; Fᵀ is what Fortran's F is here.
        v, factor = self.reflections[first - 1 : end - 1, first:].triu(), matrix.new_zeros(count, count)
        v.diagonal().fill_(1.0)
        own = self.factors[first - 1 : end - 1].data_ptr()
        _call("lapack", "dlarft", b"F", b"C", size, number, v.data_ptr(), size, own, factor.data_ptr(), number)
        fv = factor.T @ v
        rows[:, first:].addmm_(rows[:, first:] @ fv.T, v, alpha=-1.0)
        # HSHᵀ = S − VᵀW − WᵀV with W = FVS − ½FVS(FV)ᵀV.
        s, w = matrix[first:, first:].data_ptr(), torch.empty_like(v)
        none, less = _double(0.0), _double(-1.0)
        _call("blas", "dsymm", b"L", b"L", size, number, one, s, lead, fv.data_ptr(), size, none, w.data_ptr(), size)
        w.addmm_(w @ fv.T, v, alpha=-0.5)
        _call("blas", "dsyr2k", b"L", b"N", size, number, less, v.data_ptr(), size, w.data_ptr(), size, one, s, lead)


def tridiagonal(matrix: Tensor) -> Tridiagonal | None:
    """The tridiagonal form of a symmetric matrix of which only the upper triangle is looked at.

    Returns:
        `None` of what is left to torch, and where LAPACK finds none.
    """
    if not (_ours(matrix) and math.isfinite(float(matrix.trace()))):
        return None
    n = len(matrix)
    reflections, (diagonal, beside, factors) = _copied(matrix), matrix.new_empty(3, n)
    order = _int(n)
    places = (diagonal.data_ptr(), beside.data_ptr(), factors.data_ptr())
    if not _lapack("dsytrd", b"L", order, reflections.data_ptr(), order, *places):
        return None
    return Tridiagonal(diagonal, beside[:-1], reflections, factors[:-1])


def _all(diagonal: Tensor, beside: Tensor, k: int) -> Rows | None:
    """By halves."""
    vectors, order = diagonal.new_empty(k, k), _int(k)
    done = _lapack(
        "dstedc", b"I", order, diagonal.data_ptr(), beside.data_ptr(), vectors.data_ptr(), order, integers=True
    )
    return (diagonal, vectors) if done else None


def _few(diagonal: Tensor, beside: Tensor, k: int) -> Rows | None:
    """By relatively robust representations; each value is looked for on its own."""
    n = len(diagonal)
    values, vectors, support = diagonal.new_empty(n), diagonal.new_empty(k, n), torch.empty(2 * k, dtype=torch.int32)
    found, unused = ctypes.c_int(0), _double(0.0)
    done = _lapack(
        "dstemr", b"V", b"I", _int(n), diagonal.data_ptr(), beside.data_ptr(), unused, unused, _int(n - k + 1), _int(n),
        ctypes.byref(found), values.data_ptr(), vectors.data_ptr(), _int(n), _int(k), support.data_ptr(), _int(1),
        integers=True,
    )  # fmt: skip
    return (values[:k], vectors) if done and found.value == k else None


def _some(diagonal: Tensor, beside: Tensor, k: int) -> Rows | None:
    """By inverse iteration, from all values, which take less time than a twentieth of them by `_few`."""
    n = len(diagonal)
    size = float(diagonal.abs().max())
    if not size > 0.0:
        return None
    diagonal, beside = diagonal / size, beside / size
    values, scratch = diagonal.clone(), beside.clone()
    info = ctypes.c_int(0)
    _call("lapack", "dsterf", _int(n), values.data_ptr(), scratch.data_ptr(), ctypes.byref(info))
    if info.value:
        return None
    values, vectors, room = values[n - k :].clone(), diagonal.new_empty(k, n), diagonal.new_empty(5 * n)
    block, end, integers, failed = (torch.full((n,), x, dtype=torch.int32) for x in (1, n, 0, 0))
    _call(
        "lapack", "dstein", _int(n), diagonal.data_ptr(), beside.data_ptr(), _int(k), values.data_ptr(), block.data_ptr(),
        end.data_ptr(), vectors.data_ptr(), _int(n), room.data_ptr(), integers.data_ptr(),
        failed.data_ptr(), ctypes.byref(info),
    )  # fmt: skip
    # It looks at neighbours; that all are orthogonal is to be seen.
    apart = (vectors @ vectors.T).fill_diagonal_(0.0).abs().max()
    return (values * size, vectors) if not info.value and float(apart) < _ORTHOGONAL else None


def _copied(matrix: Tensor) -> Tensor:
    return matrix.clone(memory_format=torch.contiguous_format)


def _lapack(name: str, *arguments: Any, integers: bool = False) -> bool:
    """Call a routine twice, for the room that it needs (for integers, too) and for its work; whether it did that."""
    sizes, info = (ctypes.c_double(0.0), ctypes.c_int(0))[: 1 + integers], ctypes.c_int(0)
    _call(
        "lapack", name, *arguments, *(x for size in sizes for x in (ctypes.byref(size), _int(-1))), ctypes.byref(info)
    )
    room = [
        torch.empty(max(int(size.value), 1), dtype=dtype)
        for size, dtype in zip(sizes, (torch.float64, torch.int32), strict=False)
    ]
    _call("lapack", name, *arguments, *(x for r in room for x in (r.data_ptr(), _int(len(r)))), ctypes.byref(info))
    return not info.value


def _int(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


def _double(value: float) -> Any:
    return ctypes.byref(ctypes.c_double(value))


# -- the library -------------------------------------------------------------------------------------------------------


def _call(library: str, name: str, *arguments: Any) -> None:
    """Call a routine of ``blas`` or ``lapack``, with one thread; it takes pointers to everything."""
    with _one_thread:
        _routine(library, name, len(arguments))(*arguments)


@functools.cache
def _routine(library: str, name: str, count: int) -> Callable[..., None]:
    api = ctypes.pythonapi
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
    capsule = importlib.import_module(f"scipy.linalg.cython_{library}").__pyx_capi__[name]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(pointer_of(capsule, name_of(capsule)))


class _OneThread:
    """One thread for SciPy's library, of which the number is the process's.

    It is set by the first thread that enters, and restored by the last that leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], object]

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                _take_control()
                self._restore = _threads().limit(limits=1).restore_original_limits
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _take_control()
                self._restore()
                _take_control()


def _take_control() -> None:
    """From version 3.8 on threadpoolctl lets the thread that first set a number set it again, as long as it lives.

    In any other it does nothing, without a word.
    """
    for library in _threads().lib_controllers:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)


@functools.cache
def _threads() -> Any:
    """How many threads SciPy's library has; it is loaded by then."""
    from scipy.linalg import cython_lapack  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


_one_thread = _OneThread()
