"""Where a merge's inputs come from: a file, memory, an earlier stage of the recipe, rows in another vocabulary's order.

Each is a `geomerge.methods.tile.Source`, so the mathematics never knows. File contents are read with `preadv` into a
buffer that each thread keeps; compiled loops that walk over them more than once may find them mapped into memory (see
`mappable`). Either way a file that is cut short while it is read gives an error.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from geomerge.checkpoint.dtypes import DTYPES, to_torch
from geomerge.engine.memory import memory
from geomerge.errors import RunError
from geomerge.methods.buffers import empty
from geomerge.methods.kernel import Prepared
from geomerge.methods.native import CODES, Stored, available
from geomerge.methods.native.mapped import Mapping, mapped
from geomerge.methods.tile import TensorSource
from geomerge.tokens.rows import MEAN, OMP, PAD

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.checkpoint.checkpoint import Checkpoint
    from geomerge.checkpoint.coded import Coded
    from geomerge.checkpoint.header import TensorInfo
    from geomerge.engine.mixtures import Mixtures
    from geomerge.methods.tile import Segment, Source
    from geomerge.tokens.rows import RowPlan

_local = threading.local()


def staging(nbytes: int, *, pinned: bool = False) -> Tensor:
    """This thread's byte buffer of at least that size."""
    buffers: dict[bool, Tensor] = _local.__dict__.setdefault("staging", {})
    found = buffers.get(pinned)
    if found is None or found.numel() < nbytes:
        found = buffers[pinned] = empty(max(nbytes, 1 << 17), torch.uint8, pinned=pinned)
    return found[:nbytes]


def read_into(descriptor: int, buffer: Tensor, offset: int, label: str) -> None:
    """Fill a byte tensor from a file, all of it.

    Raises:
        RunError: The file ends too early or cannot be read.
    """
    fill(descriptor, memoryview(buffer.numpy().data), offset, label)


def fill(descriptor: int, view: memoryview, offset: int, label: str) -> None:
    """The same for any memory."""
    while view:
        try:
            got = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise unreadable(error.errno or errno.EIO, label) from error
        if got == 0:
            raise unreadable(0, label)
        view, offset = view[got:], offset + got


def unreadable(error: int, label: str) -> RunError:
    """What to tell the user: `error` is `errno`, or 0 when the file ended early."""
    if error:
        hint = "is the disk or network drive still there?"
        return RunError(f"reading failed: {os.strerror(error)}", where=label, hint=hint)
    return RunError(
        "the file ended early: it was cut short while the merge ran",
        where=label,
        hint="restore it and run again with --resume",
    )


def mappable(checkpoints: Iterable[Checkpoint]) -> bool:
    """Whether files are to be mapped: all together they take no more than a quarter of the memory.

    Then nothing is copied when a tensor is looked at for the second time, and all stays where it is. Of larger models the
    system would have to take pages back all the time, which is dearer than copying. ``GEOMERGE_MAPPED=0`` turns it off.
    """
    if not available() or os.environ.get("GEOMERGE_MAPPED") == "0":
        return False
    files = {file.path: file.size for checkpoint in checkpoints for file in checkpoint.files}
    return 4 * sum(files.values()) <= memory()


_mapping = threading.Lock()


def mapping_of(checkpoint: Checkpoint, info: TensorInfo) -> Mapping | None:
    """The mapping of the file that a tensor is in, made when it is first asked for."""
    path = info.file
    assert path is not None
    with _mapping:
        if path in checkpoint.mappings:
            known: Mapping | None = checkpoint.mappings[path]
            return known
        size = next(file.size for file in checkpoint.files if file.path == path)
        found = checkpoint.mappings[path] = mapped(checkpoint.descriptor(path), size)
        return found


class FileSource:
    """A tensor in a safetensors file.

    Args:
        checkpoint: The model.
        info: The tensor.
        label: Model and tensor, for messages.
        mapped: Compiled loops find it mapped into memory, if it can be.
    """

    def __init__(self, checkpoint: Checkpoint, info: TensorInfo, label: str, *, mapped: bool = False) -> None:
        assert info.file is not None
        self.label = label
        self._checkpoint, self._info, self._mapped = checkpoint, info, mapped
        self._descriptor = checkpoint.descriptor(info.file)
        self._offset = info.offset
        self._itemsize = DTYPES[info.dtype].itemsize
        self.dtype = info.dtype

    def mapped(self) -> FileSource:
        """The same, mapped."""
        return FileSource(self._checkpoint, self._info, self.label, mapped=True)

    def read(self, start: int, out: Tensor) -> None:
        pinned = out.device.type == "cuda"
        if pinned:
            # The copy before from this thread's buffer must be over.
            torch.cuda.current_stream(out.device).synchronize()
        raw = staging(out.numel() * self._itemsize, pinned=pinned)
        read_into(self._descriptor, raw, self._offset + start * self._itemsize, self.label)
        out.copy_(raw.view(to_torch(self.dtype)), non_blocking=pinned)

    def whole(self, numel: int) -> bytearray:
        """The bytes of all of the tensor."""
        found = bytearray(numel * self._itemsize)
        fill(self._descriptor, memoryview(found), self._offset, self.label)
        return found

    def stored(self) -> Stored | None:
        code = CODES.get(self.dtype)
        if code is None:
            return None
        if self._mapped and self._offset % self._itemsize == 0:
            mapping = mapping_of(self._checkpoint, self._info)
            if mapping is not None:
                return Stored(code, memory=mapping.address + self._offset, mapping=mapping, failed=self._failed)
        return Stored(code, file=self._descriptor, offset=self._offset, failed=self._failed)

    def _failed(self, error: int) -> NoReturn:
        raise unreadable(error, self.label)


class HeldSource:
    """A small tensor that is read from its source once, however often it is walked over.

    What a method measures and then blends moves three times its bytes instead of five.
    """

    def __init__(self, source: Source, numel: int) -> None:
        self.label, self.dtype = source.label, source.dtype
        self._source, self._numel = source, numel
        self._lock = threading.Lock()
        self._held: bytearray | None = None

    def read(self, start: int, out: Tensor) -> None:
        if out.numel():
            out.copy_(torch.frombuffer(self._whole(), dtype=to_torch(self.dtype))[start : start + out.numel()])

    def stored(self) -> Stored | None:
        code, held = CODES.get(self.dtype), self._whole()
        if code is None or not held:
            return None
        first = ctypes.c_char.from_buffer(held)  # which keeps it
        return Stored(code, memory=ctypes.addressof(first), keeps=first)

    def _whole(self) -> bytearray:
        with self._lock:
            if self._held is None and isinstance(self._source, FileSource):
                self._held = self._source.whole(self._numel)
            elif self._held is None:
                values = empty(self._numel, to_torch(self.dtype))
                self._source.read(0, values)
                self._held = bytearray(values.view(torch.uint8).numpy())
            return self._held


class StoredParts:
    """The stored tensors of a checkpoint that one tensor is decoded from: see `geomerge.checkpoint.coded.Parts`."""

    def __init__(self, checkpoint: Checkpoint, label: str) -> None:
        self._checkpoint, self._label = checkpoint, label
        self._lock = threading.Lock()
        self._held: dict[str, Tensor] = {}

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        info = self._checkpoint.tensors[name]
        if info.file is None:
            return self._checkpoint.memory[name].reshape(-1)[start:stop]
        itemsize = DTYPES[info.dtype].itemsize
        raw = torch.empty((stop - start) * itemsize, dtype=torch.uint8)
        read_into(self._checkpoint.descriptor(info.file), raw, info.offset + start * itemsize, self._label)
        return raw.view(to_torch(info.dtype))

    def whole(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._held:
                shape = self._checkpoint.tensors[name].shape
                self._held[name] = self.elements(name, 0, math.prod(shape)).view(shape)
            return self._held[name]


class CodedSource:
    """A tensor that is stored as codes, decoded as it is read."""

    def __init__(self, checkpoint: Checkpoint, coded: Coded, label: str) -> None:
        self.label = label
        self.dtype = coded.exact
        self._coded, self._parts = coded, StoredParts(checkpoint, label)

    def read(self, start: int, out: Tensor) -> None:
        out.copy_(self._coded.decode(self._parts, start, start + out.numel()))


def decoded_source(checkpoint: Checkpoint, name: str, label: str) -> Source:
    """A tensor of a checkpoint, decoded where it is stored as codes."""
    coded = checkpoint.coded.get(name)
    if coded is not None:
        return CodedSource(checkpoint, coded, label)
    info = checkpoint.tensors[name]
    if info.file is None:
        return TensorSource(checkpoint.memory[name], label)
    return FileSource(checkpoint, info, label)


class StageSource:
    """The output of an earlier stage, computed tile by tile and rounded as if it had been written.

    Reads that follow each other, as those of a scan do, cost one evaluation of each tile; each thread remembers where it is.
    """

    def __init__(self, prepared: Prepared, round_: Callable[[int, Tensor], Tensor], dtype: str, label: str) -> None:
        self.label = label
        self.dtype = dtype
        self._prepared = prepared
        self._round = round_
        self._place = threading.local()

    def read(self, start: int, out: Tensor) -> None:
        filled = 0
        while filled < out.numel():
            at = start + filled
            place: _Place | None = getattr(self._place, "now", None)
            if place is None or not place.holds(at):
                place = self._place.now = self._find(place, at)
            piece = place.values[at - place.start :][: out.numel() - filled]
            out[filled : filled + piece.numel()].copy_(piece)
            filled += piece.numel()

    def _find(self, place: _Place | None, at: int) -> _Place:
        """The tile that holds the element `at`: the next one if possible, else from the start of its segment."""
        if place is None or not place.segment.start <= place.start < at < place.segment.stop:
            segment = next(s for s in self._prepared.scan.segments if s.start <= at < s.stop)
            place = _Place(segment, self._prepared.tiles(segment))
        while not place.holds(at):
            place.start, values = next(place.tiles)
            # A copy: a later stage may hold this piece while the next tile is computed.
            place.values = self._round(place.start, values).clone()
        return place


class _Place:
    """Where one thread is in a stage's output."""

    def __init__(self, segment: Segment, tiles: Iterator[tuple[int, Tensor]]) -> None:
        self.segment, self.tiles = segment, tiles
        self.start = segment.start
        self.values = torch.empty(0)

    def holds(self, at: int) -> bool:
        return self.start <= at < self.start + self.values.numel()


class RowSource:
    """A matrix over a vocabulary, its rows in the order of the output's vocabulary, missing ones filled in by rule.

    Args:
        models: The matrices of all models, in the token plan's order; `None` for a model without one.
        plan: Where each output row of this model comes from.
        columns: Elements in a row.
        label: Model and tensor.
        sums: Its sparse sums, where the plan has any.
    """

    def __init__(
        self,
        models: Sequence[Source | None],
        plan: RowPlan,
        columns: int,
        label: str,
        sums: Mixtures | None = None,
    ) -> None:
        self.label = label
        self._sums = sums
        self._models = models
        self._plan = plan
        self._columns = max(columns, 1)
        self._lock = threading.Lock()
        self._padding: Tensor | None = None
        self.dtype = "F64"  # means of rows fit nothing narrower

    def read(self, start: int, out: Tensor) -> None:
        columns = self._columns
        first, last = start // columns, -(-(start + out.numel()) // columns)
        rows = self._filled(first, last, pad=True)
        out.copy_(rows.view(-1)[start - first * columns :][: out.numel()])

    def _filled(self, first: int, last: int, *, pad: bool) -> Tensor:
        """Rows `first` to `last` of the output's order: shape ``(last − first, columns)``."""
        part = self._plan.tile(first, last)
        rows = torch.zeros(last - first, self._columns, dtype=torch.float64)
        for begin, end, source, row in part.runs().tolist():
            if source >= 0:
                self._row_source(source).read(row * self._columns, rows[begin:end].view(-1))
            elif source == MEAN:
                for r in range(begin, end):
                    rows[r] = self._mean(part.owners[:, r])
            elif source <= OMP:
                for r in range(begin, end):
                    rows[r] = self._sum(first + r)
            elif source == PAD and pad:
                rows[begin:end] = self._pad_row()
        return rows

    def _row_source(self, model: int) -> Source:
        source = self._models[model]
        if source is None:
            raise RunError("a row is to come from a model that has no such matrix", where=self.label)
        return source

    def _sum(self, row: int) -> Tensor:
        """A sparse sum of the model's own rows."""
        assert self._sums is not None
        total = torch.zeros(self._columns, dtype=torch.float64)
        part = torch.empty(self._columns, dtype=torch.float64)
        for own, coefficient in self._sums.at(row):
            self._row_source(self._plan.model).read(own * self._columns, part)
            total.add_(part, alpha=coefficient)
        return total

    def _mean(self, owners: np.ndarray) -> Tensor:
        total = torch.zeros(self._columns, dtype=torch.float64)
        row = torch.empty(self._columns, dtype=torch.float64)
        having = np.flatnonzero(owners >= 0)
        for k in having.tolist():
            self._row_source(k).read(int(owners[k]) * self._columns, row)
            total += row
        return total / max(len(having), 1)

    def _pad_row(self) -> Tensor:
        """The mean of all rows that are not padding themselves."""
        with self._lock:
            if self._padding is None:
                total = torch.zeros(self._columns, dtype=torch.float64)
                step = max((1 << 18) // self._columns, 1)
                for first in range(0, len(self._plan), step):
                    last = min(first + step, len(self._plan))
                    kept = torch.from_numpy(self._plan.source[first:last] != PAD)
                    total += self._filled(first, last, pad=False)[kept].sum(0)
                self._padding = total / max(int((self._plan.source != PAD).sum()), 1)
            return self._padding
