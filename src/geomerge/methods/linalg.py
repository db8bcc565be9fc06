"""Linear algebra of whole weights, in float64 and on one thread.

LAPACK's blocked algorithms split their work by the number of threads, and with it the order of their sums: the same matrix
decomposed by two threads has other last bits than by one. So a matrix is always decomposed by one; the parallelism is over
tensors (`geomerge.engine.execute`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


class _Threads:
    """How many threads torch, BLAS and LAPACK had before the first of those that want one entered."""

    def __init__(self) -> None:
        self._entering = threading.Lock()
        self._inside = 0
        self._before = 1

    def enter(self) -> None:
        with self._entering:
            if not self._inside:
                self._before = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def leave(self) -> None:
        with self._entering:
            self._inside -= 1
            if not self._inside:
                torch.set_num_threads(self._before)


_threads = _Threads()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch, BLAS and LAPACK use one thread; several threads may be inside at a time (the setting is the process's)."""
    _threads.enter()
    try:
        yield
    finally:
        _threads.leave()


def polar(matrix: Tensor) -> Tensor:
    """UVᵀ of the singular values above 10⁻⁶ of the largest."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    result: Tensor = (u * (s > 1e-6 * s[0])) @ vh
    return result
