"""Looking for NaN and Inf in a model, tile by tile: bounded memory, threads, every bad tensor with its counts."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.coded import Coded
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.header import TensorInfo
from geomerge.engine.execute import cores
from geomerge.engine.sources import FileSource
from geomerge.engine.stored import stored_source
from geomerge.late import also_alone, torch_alone
from geomerge.methods import native
from geomerge.methods.tile import SEGMENT, TILE, Source, TensorSource, stored_of

if TYPE_CHECKING:
    from torch import Tensor

_Stored = TensorInfo | Coded

_Piece = tuple[_Stored, int, int]
"""A tensor, the first of its elements and how many of them."""


@dataclass(frozen=True)
class NotFinite:
    """What one tensor holds.

    Attributes:
        nan, inf: How many of its elements are NaN and ±Inf (of a complex tensor: of their real and imaginary parts).
    """

    nan: int = 0
    inf: int = 0

    def __add__(self, other: NotFinite) -> NotFinite:
        return NotFinite(self.nan + other.nan, self.inf + other.inf)


def floating_bytes(checkpoint: Checkpoint) -> int:
    """The bytes that `find_not_finite` reads, or that what it decodes would have."""
    return sum(math.prod(t.shape) * DTYPES[t.dtype].itemsize for t in checkpoint.logical.values() if _can_be_bad(t))


def find_not_finite(
    checkpoint: Checkpoint, *, threads: int | None = None, advance: Callable[[int], None] = lambda nbytes: None
) -> dict[str, NotFinite]:
    """Read every tensor of floating numbers and count what is not finite.

    Args:
        checkpoint: An opened model.
        threads: By default one for each core that the process may use.
        advance: Called with the number of bytes read since the last call, from several threads, one at a time.

    Returns:
        The tensors that hold NaN or Inf, in the model's order; none for a good model.

    Raises:
        RunError: A file cannot be read.
    """
    found: dict[str, NotFinite] = {}
    lock = threading.Lock()
    stop = threading.Event()

    def look(pieces: list[_Piece]) -> None:
        for info, start, count in pieces:
            bad = _count(_source(checkpoint, info), start, count, stop)
            with lock:
                if bad != NotFinite():
                    found[info.name] = found.get(info.name, NotFinite()) + bad
                advance(count * DTYPES[info.dtype].itemsize)

    pool = ThreadPoolExecutor(threads or cores(), thread_name_prefix="geomerge-scan", initializer=also_alone)
    try:
        with torch_alone():
            _settle([pool.submit(look, pieces) for pieces in _bundles(checkpoint)])
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return {name: found[name] for name in checkpoint.logical if name in found}


def _settle(futures: list[Future[None]]) -> None:
    finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in finished:
        future.result()


def _can_be_bad(info: _Stored) -> bool:
    return DTYPES[info.dtype].kind in ("float", "float8", "complex")


def _bundles(checkpoint: Checkpoint) -> Iterator[list[_Piece]]:
    """Work for one thread at a time: about a segment of elements, from one tensor or from many small ones."""
    bundle: list[_Piece] = []
    elements = 0
    for stored in checkpoint.logical.values():
        if not _can_be_bad(stored):
            continue
        info, numel = stored, math.prod(stored.shape)
        if isinstance(stored, TensorInfo) and stored.dtype == "C64":
            # A complex number is not finite when one of its two halves is not.
            info, numel = replace(stored, dtype="F32"), 2 * numel
        for start in range(0, numel, SEGMENT):
            count = min(SEGMENT, numel - start)
            bundle.append((info, start, count))
            elements += count
            if elements >= SEGMENT:
                yield bundle
                bundle, elements = [], 0
    if bundle:
        yield bundle


def _source(checkpoint: Checkpoint, info: _Stored) -> Source:
    label = f"{checkpoint.ref}: {info.name}"
    if info.name in checkpoint.changes or not isinstance(info, TensorInfo):
        return stored_source(checkpoint, info.name, label)
    if info.file is not None:
        return FileSource(checkpoint, info, label)
    tensor = checkpoint.memory[info.name]
    return TensorSource(torch.view_as_real(tensor) if tensor.is_complex() else tensor, label)


def _count(source: Source, start: int, count: int, stop: threading.Event) -> NotFinite:
    bad = NotFinite()
    stored = stored_of(source) if native.available() else None
    if stored is not None and native.finite(native.Inputs([stored.at(start)], count)):
        return bad
    buffer = torch.empty(min(TILE, count), dtype=torch.float64)
    for at in range(start, start + count, TILE):
        if stop.is_set():
            break
        values = buffer[: min(TILE, start + count - at)]
        source.read(at, values)
        # A sum is not finite when an element is not: ten times cheaper than a test of each element.
        if not math.isfinite(values.sum().item()):
            bad += _exactly(values)
    return bad


def _exactly(values: Tensor) -> NotFinite:
    return NotFinite(int(torch.isnan(values).sum()), int(torch.isinf(values).sum()))
