"""The library of compiled loops: whether it is there, where inputs and output of a loop lie, and how one is called."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from geomerge.checkpoint.dtypes import from_torch
from geomerge.methods.native.build import LIBRARY, WIDE, X86, fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.native.mapped import Mapping


Doubles = ctypes.Array[ctypes.c_double]
"""Float64 numbers that loops read or write, without NumPy."""

CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
"""The dtypes that the loops read and write, by safetensors name."""

_SIZES = (2, 2, 4, 8)
WINDOW, _BATCH, _APART = 1 << 15, 1 << 17, 576
"""As in `places.h`."""

MOST = 32
"""Inputs that they take at once."""

_off = 0


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if os.environ.get("GEOMERGE_NATIVE") == "0":
        return None, "the variable GEOMERGE_NATIVE is 0"
    if sys.byteorder != "little":
        return None, "this processor's numbers begin with their last byte"
    # The loops fuse multiplication and addition where torch does, and torch does on processors that can.
    if X86 and not _fuses():
        return None, "this processor has no AVX2"
    build = f"build them: {sys.executable} -m geomerge.methods.native"
    if not LIBRARY.exists():
        return None, f"they were not built with the package; with a C compiler here, {build}"
    library = (_load(WIDE) if X86 and _has(_WIDE_FLAGS) else None) or _load(LIBRARY)
    return library, None if library is not None else f"they are of another version than the package; {build}"


def _library() -> ctypes.CDLL | None:
    return _found()[0]


def missing() -> str | None:
    """Why the compiled loops are not used, and what to do about it; `None` where they are."""
    return _found()[1]


def _fuses() -> bool:
    """Whether an x86 processor has AVX2 and fused multiplication and addition."""
    return _has(("avx2", "fma")) if _flags() else torch.backends.cpu.get_cpu_capability().startswith("AVX")


_WIDE_FLAGS = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vbmi2")
"""The last one leaves out processors that slow down for such instructions."""


def _has(flags: Sequence[str]) -> bool:
    return _flags().issuperset(flags)


@functools.cache
def _flags() -> frozenset[str]:
    """What Linux says that the processor can do; nothing where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _load(path: Path) -> ctypes.CDLL | None:
    """The library, or `None` where it cannot be loaded or was made of other sources than those beside this file."""
    try:
        library, sources = ctypes.CDLL(str(path)), fingerprint()
        made_of = ctypes.c_char * (len(sources) + 1)
        return library if made_of.in_dll(library, "geomerge_source").value.decode() == sources else None
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
        mapping: The mapping that the memory is of, if it is a file's.
        failed: Raises the error that tells the user that the file could not be read or written. It gets `errno`, or 0 if the
            file ended early.
    """

    code: int
    memory: int = 0
    file: int = -1
    offset: int = 0
    keeps: object = None
    mapping: Mapping | None = None
    failed: Callable[[int], NoReturn] | None = None

    def at(self, start: int) -> Stored:
        """The same from another element on."""
        skipped = start * _SIZES[self.code]
        memory, offset = (self.memory + skipped, 0) if self.memory else (0, self.offset + skipped)
        return Stored(self.code, memory, self.file, offset, self.keeps, self.mapping, self.failed)

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
        ("redone", ctypes.c_int64),
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

    def call(self, name: str, *arguments: Any, out: Stored | None = None, beginning: Doubles | None = None) -> bool:
        """Call a loop of this name with these inputs, and the output as its last argument.

        Returns:
            Whether all numbers that it looked at are finite.
        """
        nbytes = sum(_SIZES[s.code] * WINDOW + _APART for s in self.stored if not s.memory)
        windows = address(nbytes if out is None or out.memory else nbytes + _SIZES[out.code] * _BATCH + _APART)
        first = None if beginning is None else ctypes.addressof(beginning)
        work = _Work(
            ctypes.addressof(self._places),
            windows,
            first,
            0 if beginning is None else len(beginning),
            self.count,
        )
        place = () if out is None else (ctypes.byref(_place(out)),)
        done: int = getattr(loaded(), f"geomerge_{name}")(ctypes.byref(work), *arguments, *place)
        if done < 0:
            place_of = self.stored[work.failed] if work.failed >= 0 else out
            assert place_of is not None
            place_of.refuse(work.error)
        for stored in self.stored:
            error = None if stored.mapping is None else stored.mapping.error
            if error is not None:
                stored.refuse(error)
        return bool(done)


_local = threading.local()


def room(nbytes: int, use: str = "windows") -> np.ndarray:
    """So many bytes of this thread's buffer for a use: its pages need not be got and cleared again and again."""
    return np.frombuffer(_kept(nbytes, use)[0], np.uint8, nbytes)


def address(nbytes: int, use: str = "windows") -> int:
    """Where that buffer begins."""
    return _kept(nbytes, use)[1]


def _kept(nbytes: int, use: str) -> tuple[mmap.mmap, int]:
    found: tuple[mmap.mmap, int] | None = getattr(_local, use, None)
    if found is None or len(found[0]) < nbytes:
        found = pages(nbytes)
        setattr(_local, use, found)
    return found


def pages(nbytes: int) -> tuple[mmap.mmap, int]:
    """Memory that takes room only where it is touched, and where it begins. What is written to it no forked process sees."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


def zeros(count: int) -> Doubles:
    return (ctypes.c_double * count)()


def doubles(values: Sequence[float]) -> Doubles:
    return (ctypes.c_double * len(values))(*values)
