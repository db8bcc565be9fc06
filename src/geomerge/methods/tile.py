"""Tiles: how a method sees tensors that may be larger than memory.

A `Scan` runs over the same elements of K tensors (`Source`s) piece by piece. It is cut twice:

* into **segments** of about a million elements, fixed by the tensor's shape alone. Segments may be visited by
  different threads; the tiles within one are visited in order.
* each segment into **tiles** that stay in a core's cache. Their size changes speed, never a result: sums are taken over
  fixed `BLOCK`s (or whole rows) and added exactly, so the same bits come out whatever the tile's size.

Values are float64 unless a method asks otherwise (`geomerge.methods.combine` says when that is safe): a difference of two
bfloat16 or float32 numbers is then exact or rounded once at 2⁻⁵³, and nothing is rounded to the output's dtype before the
end. (docs/architecture.md says what that costs.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from geomerge.checkpoint.dtypes import from_torch
from geomerge.errors import NotFiniteError
from geomerge.methods import native
from geomerge.methods.buffers import buffer, empty
from geomerge.methods.program import record
from geomerge.methods.sums import lane_sums, sums_of_blocks

if TYPE_CHECKING:
    from torch import Tensor


TILE = 1 << 17
"""Elements in a tile unless a caller asks otherwise: few enough to stay in the caches, enough to outweigh the calls."""

TOGETHER = 4
"""Tiles that a compiled loop gets at once: the interpreter's part of a call would show."""

BLOCK = 1 << 13
"""Elements summed in one go. Tiles that are not cut by rows hold whole blocks."""

SEGMENT = 1 << 20
"""Elements in a segment (rounded down to whole rows where a method needs rows)."""

Result = TypeVar("Result")


class Source(Protocol):
    """One input tensor, wherever it lives."""

    @property
    def label(self) -> str:
        """Model and tensor, for error messages."""

    @property
    def dtype(self) -> str:
        """The dtype that holds the elements exactly, by safetensors name."""

    def read(self, start: int, out: Tensor) -> None:
        """Fill `out` with the elements ``[start, start + len(out))`` in row-major order.

        `out` is one-dimensional and float64, or float32 where that holds `dtype`.

        A source that has its elements somewhere as they are may also have ``stored()``, which says where: see `stored_of`.
        """


class Thinning(Protocol):
    """What happens to the task vectors of one tensor before a method sees them: see `geomerge.methods.chain`."""

    @property
    def rows(self) -> int:
        """Elements that must be seen together: a row's, or 1."""

    def begin(self) -> None:
        """Called before a piece is read; what it computes may use the thread's tile buffers."""

    def thin_(self, stack: Tensor, start: int, scan: Scan) -> None:
        """Put thinned task vectors in place of the experts' elements: shape ``(K, n)``, whole rows from `start` on."""


class TensorSource:
    """A tensor in memory as a `Source`."""

    def __init__(self, tensor: Tensor, label: str = "tensor") -> None:
        self.label = label
        self.dtype = from_torch(tensor.dtype)
        self.flat = tensor.detach().reshape(-1).contiguous()  # a slice with steps is reshaped as it is

    def read(self, start: int, out: Tensor) -> None:
        out.copy_(self.flat[start : start + out.numel()])

    def stored(self) -> native.Stored | None:
        return native.in_memory(self.flat)


def elements(source: Source, start: int, count: int) -> np.ndarray:
    """Some elements of a source in float64."""
    stored = stored_of(source) if native.available() else None
    if stored is not None:
        return native.load(stored.at(start), count)
    values = torch.empty(count, dtype=torch.float64)
    source.read(start, values)
    return values.numpy()


def stored_of(source: Source) -> native.Stored | None:
    """Where compiled loops find a source's elements, if they lie anywhere as they are and in a dtype that the loops know."""
    stored: Callable[[], native.Stored | None] | None = getattr(source, "stored", None)
    return None if stored is None else stored()


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements ``[start, stop)`` of a tensor, the unit of parallel work. `index` counts over the whole scan."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tile lies, for compiled loops that read it themselves; attributes as those of `Tile`."""

    start: int
    numel: int
    segment: int
    scan: Scan
    carry: dict[Any, Any]


Loop = Callable[[Place, native.Stored, native.Doubles | None], bool]
"""A compiled loop: writes the elements of a place, rounded to nearest, where they are to be, and the first of them as they are
before that into an array, if there is one. `False`: it is left to torch."""


@dataclass(slots=True)
class Tile:
    """The same few elements of all inputs.

    Attributes:
        stack: The elements of all inputs, base first: shape ``(K, n)``, or ``(K, rows, columns)`` for methods that need
            whole rows; float64 (or the scan's `dtype`). They are the tile's own and may be overwritten.
        start: Flat index of the first element.
        segment: Index of the segment.
        scan: Where the tile comes from.
        carry: A dictionary that lives from the first tile of a segment to its last.
        thinned: The experts' elements are task vectors already, those that a chain of steps has thinned.
    """

    stack: Tensor
    start: int
    segment: int
    scan: Scan
    carry: dict[Any, Any] = field(default_factory=dict)
    thinned: bool = False

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs one by one: views of `stack`."""
        if self.thinned:  # the models that have the thinned task vectors
            self.stack[1:].add_(self.stack[0])
            self.thinned = False
        return self.stack.unbind(0)

    @property
    def base(self) -> Tensor:
        """The first input."""
        return self.stack[0]

    def task_vectors(self) -> tuple[Tensor, ...]:
        """θ_k − θ₀ for the inputs after the base, in place of them."""
        return self.stack[1:].unbind(0) if self.thinned else self.stack[1:].sub_(self.stack[0]).unbind(0)

    @property
    def numel(self) -> int:
        """Elements of one input."""
        return self.stack[0].numel()

    def along(self, numbers: np.ndarray, run: int) -> Tensor:
        """Numbers that belong to the rows or columns of the tensor, shaped as the tile's elements.

        Args:
            numbers: One for each column, if `run` is 1, or for each row.
            run: Elements of the tensor that follow each other and have the same number.
        """
        here = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float64)).to(self.base.device)
        place = torch.arange(self.start, self.start + self.numel, device=self.base.device)
        return here[place.div_(run, rounding_mode="floor").remainder_(len(here))].view(self.base.shape)

    def count(self, mask: Tensor, tell: Callable[[int], object]) -> None:
        """Tell how many elements of a mask of 0.0 and 1.0 are 1.0."""
        tell(int(mask.sum().item()))


class Scan:
    """A walk over K tensors of one shape.

    Args:
        sources: The inputs, base first.
        shape: Their common shape.
        name: The output tensor's name: the key of random draws.
        seed: The recipe's seed.
        columns: Cut tiles at row boundaries and shape them ``(rows, columns)``; ``None``: tiles are flat.
        tile: Elements in a tile (rounded to whole blocks or rows).
        run: Maps a function over segments; the engine passes a thread pool's ``map``.
        device: Where tiles live.
        level: 0, or one more than the scans that read this one's output: each level has buffers of its own.
        read_ahead: Read the next tile while this one is computed (two sets of buffers take turns): for devices, whose
            transfers would otherwise wait for the arithmetic.
        single: Tiles are float32.
        check: Refuse inputs that are not finite.
        thinning: Thins the task vectors as they are read. Inputs are then always checked: what is dropped would not show.
        exact: Tiles are to be float64 whatever a method could do with less.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        shape: Sequence[int],
        *,
        name: str = "",
        seed: int = 0,
        columns: int | None = None,
        tile: int = TILE,
        run: Callable[[Callable[[Segment], Any], Iterable[Segment]], Iterable[Any]] = map,
        device: torch.device | str = "cpu",
        level: int = 0,
        read_ahead: bool = False,
        single: bool = False,
        check: bool = True,
        thinning: Thinning | None = None,
        exact: bool = False,
    ) -> None:
        self.sources = list(sources)
        self.shape = tuple(shape)
        self.name = name
        self.seed = seed
        self.columns = columns
        self.device = str(device)
        self.level = level
        self.read_ahead = read_ahead
        self.numel = math.prod(self.shape)
        unit = BLOCK if columns is None else max(columns, 1)
        self.tile = max(tile // unit, 1) * unit
        segment = max(SEGMENT // unit, 1) * unit
        self.single = single
        self.thinning, self.exact = thinning, exact or thinning is not None
        self._finite = not check and thinning is None
        starts = range(0, self.numel, segment)
        self.segments = [Segment(i, s, min(s + segment, self.numel)) for i, s in enumerate(starts)]
        self._run = run
        self._places: list[native.Stored | None] | None = None

    @property
    def experts(self) -> int:
        """The number of inputs after the base."""
        return len(self.sources) - 1

    def over(self, work: Callable[[Iterator[Tile]], Result]) -> list[Result]:
        """Run `work` on each segment's tiles (perhaps in parallel); the results in the segments' order."""
        return self.over_segments(lambda segment: work(self.tiles(segment)))

    def over_segments(self, work: Callable[[Segment], Result]) -> list[Result]:
        """The same for what reads a segment's elements itself."""
        results = list(self._run(work, self.segments))
        self._finite = True  # every element has been looked at
        return results

    def tiles(self, segment: Segment) -> Iterator[Tile]:
        """The tiles of one segment in order. A tile's inputs are valid until the next is asked for."""
        carry: dict[Any, Any] = {}
        starts = range(segment.start, segment.stop, self.tile)
        read = (
            self._ahead(segment, starts)
            if self.read_ahead
            else (self._read(s, self._count(segment, s)) for s in starts)
        )
        for start, inputs in zip(starts, read, strict=True):
            yield Tile(inputs, start, segment.index, self, carry, self.thinning is not None)

    @property
    def compiled(self) -> bool:
        """Whether compiled loops may work on the inputs as they are stored."""
        plain = self.thinning is None and self.device == "cpu"
        return plain and native.takes([source.dtype for source in self.sources])

    @property
    def dtype(self) -> torch.dtype:
        """Of the tiles."""
        return torch.float32 if self.single else torch.float64

    @property
    def checks(self) -> bool:
        """Whether inputs that are not finite are still to be refused."""
        return not self._finite

    def look_later(self) -> None:
        """Whoever reads the tiles will look at what becomes of them (see `look_again`)."""
        self._finite = self.thinning is None

    def places(self, segment: Segment) -> Iterator[Place]:
        """Where the pieces of one segment lie that compiled loops read, in order."""
        carry: dict[Any, Any] = {}
        # What the loops do not read themselves has to be held.
        size = TOGETHER * self.tile if None in self._stored else max(segment.stop - segment.start, 1)
        for start in range(segment.start, segment.stop, size):
            yield Place(start, min(size, segment.stop - start), segment.index, self, carry)

    def stored(self, start: int, count: int, used: Sequence[int] | None = None) -> native.Inputs:
        """Some elements of all inputs (or those that are used), for compiled loops; valid until the next are asked for."""
        slots = range(len(self.sources)) if used is None else used
        return native.Inputs([self.stored_one(slot, start, count) for slot in slots], count)

    def stored_one(self, slot: int, start: int, count: int) -> native.Stored:
        """The same of one input."""
        found = self._stored[slot]
        if found is not None:
            return found.at(start)
        values = buffer((self.level, slot), count, torch.float64, self.device)
        self.sources[slot].read(start, values)
        found = native.in_memory(values)
        assert found is not None
        return found

    @property
    def in_place(self) -> bool:
        """Whether compiled loops read all inputs where they lie."""
        return None not in self._stored

    @property
    def _stored(self) -> list[native.Stored | None]:
        if self._places is None:
            self._places = [stored_of(source) for source in self.sources]
        return self._places

    def tile_at(self, segment: Segment, count: int) -> Tile:
        """The first elements of a segment, as many as asked for or as make whole rows."""
        unit = 1 if self.columns is None else max(self.columns, 1)
        count = min(-(-count // unit) * unit, segment.stop - segment.start)
        return Tile(
            self._read(segment.start, count), segment.start, segment.index, self, thinned=self.thinning is not None
        )

    def _count(self, segment: Segment, start: int) -> int:
        return min(self.tile, segment.stop - start)

    def _ahead(self, segment: Segment, starts: range) -> Iterator[Tensor]:
        """The tiles' inputs, each read by another thread while the caller works on the one before."""
        with ThreadPoolExecutor(1, thread_name_prefix="geomerge-read") as reader:
            sets = [self._fresh_buffers(), self._fresh_buffers()]
            stream = torch.cuda.Stream(self.device) if self.device.startswith("cuda") else None  # type: ignore[no-untyped-call]

            def read(index: int) -> Tensor:
                with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                    stack = self._read(starts[index], self._count(segment, starts[index]), sets[index % 2])
                if stream is not None:
                    stream.synchronize()  # the caller works on another stream
                return stack

            pending = reader.submit(read, 0) if len(starts) else None
            for index in range(len(starts)):
                assert pending is not None
                inputs = pending.result()
                # What the caller queued on the tile before last must be over before its buffers are filled again.
                if stream is not None:
                    torch.cuda.current_stream(self.device).synchronize()
                pending = reader.submit(read, index + 1) if index + 1 < len(starts) else None
                yield inputs

    def _fresh_buffers(self) -> Tensor:
        around = 0 if self.thinning is None else 2 * self.thinning.rows
        size = len(self.sources) * min(self.tile + around, max(self.numel, 1))
        return empty(size, self.dtype, self.device)

    def _read(self, start: int, count: int, into: Tensor | None = None) -> Tensor:
        if self.thinning is None:
            stack = self._fetch(start, count, into)
        else:
            rows = self.thinning.rows
            first, stop = start // rows * rows, min(-(-(start + count) // rows) * rows, self.numel)
            self.thinning.begin()
            around = self._fetch(first, stop - first, into)
            self.thinning.thin_(around, first, self)
            stack = around[:, start - first : start - first + count]
        return stack if self.columns is None else stack.view(len(stack), -1, max(self.columns, 1))

    def _fetch(self, start: int, count: int, into: Tensor | None) -> Tensor:
        """The inputs' elements as they are: shape ``(K, count)``."""
        k = len(self.sources)
        flat = buffer(self.level, k * count, self.dtype, self.device) if into is None else into[: k * count]
        stack = flat.view(k, count)
        for source, out in zip(self.sources, stack.unbind(0), strict=True):
            source.read(start, out)
        # A sum is not finite when an element is not: ten times cheaper than isfinite on each element.
        if not self._finite and not math.isfinite(flat.sum().item()):
            self.refuse_not_finite(stack)
        return stack

    def look_again(self, start: int, count: int) -> None:
        """Read some elements anew to find out whether an input is not finite.

        Raises:
            NotFiniteError: Naming model and tensor.
        """
        stack = torch.empty(len(self.sources), count, dtype=torch.float64, device=self.device)
        for source, out in zip(self.sources, stack.unbind(0), strict=True):
            source.read(start, out)
        self.refuse_not_finite(stack)

    def refuse_not_finite(self, stack: Tensor) -> None:
        """Look for the input that holds NaN or Inf in a tile.

        Raises:
            NotFiniteError: Naming model and tensor.
        """
        for source, values in zip(self.sources, stack, strict=True):
            bad = values[~torch.isfinite(values)]
            if bad.numel():
                what = "NaN" if bool(torch.isnan(bad).any()) else "Inf"
                raise NotFiniteError(
                    f"the tensor holds {what}",
                    where=source.label,
                    hint="repair or retrain this parent, or leave it out",
                )

    def sums(self, quantities: Callable[[Tile], Sequence[Tensor]], *, recorded: bool = False) -> list[float]:
        """Exact sums over all elements of the quantities that a function computes for each tile.

        Args:
            quantities: Gives tensors of the tile's shape (or one column of per-row sums).
            recorded: The function can be recorded: see `geomerge.methods.program`.
        """
        if recorded and self.columns in (None, self.numel) and self.compiled:
            block = BLOCK if self.columns is None else max(self.numel, 1)
            program = record(len(self.sources), quantities, "sums")

            def summed(segment: Segment) -> list[list[list[float]]]:
                found = []
                for place in self.places(segment):
                    finite, sums = program.sums(place, block, check=self.checks)
                    if not finite:
                        self.look_again(place.start, place.numel)
                    found.append(sums)
                return found

            parts = self.over_segments(summed)
        else:
            parts = self.over(lambda tiles: [[block_sums(q) for q in quantities(tile)] for tile in tiles])
        return added_up(part for segment in parts for part in segment)

    def sample(self, limit: int) -> Iterator[Tile]:
        """Tiles of about `limit` elements in all, spread evenly: for estimates that only steer, never for results."""
        if self.numel <= limit:
            for segment in self.segments:
                yield from self.tiles(segment)
            return
        piece, starts = self._sample_starts(limit, self.columns or 4096)
        for start in starts:
            stack = self._read(start, piece)
            yield Tile(stack, start, -1, self, thinned=self.thinning is not None)

    def sample_places(self, limit: int, piece: int) -> list[tuple[Place, list[int]]]:
        """Pieces of so many elements that stand for a tensor of more elements than `limit`, in as few calls of a compiled loop
        as can be: a place, and how far behind it the others are."""
        piece, starts = self._sample_starts(limit, piece)
        if None in self._stored:
            return [(Place(start, piece, -1, self, {}), [0]) for start in starts]
        return [(Place(starts[0], piece, -1, self, {}), [start - starts[0] for start in starts])]

    def _sample_starts(self, limit: int, piece: int) -> tuple[int, list[int]]:
        piece = min(piece, self.tile, self.numel)
        number = max(limit // piece, 1)
        last = (self.numel - piece) // piece
        return piece, [last * i // max(number - 1, 1) * piece for i in range(number)]


def added_up(parts: Iterable[Sequence[Sequence[float]]]) -> list[float]:
    """The exact sum of each of several columns of numbers, of which every part has some."""
    return [math.fsum(value for part in column for value in part) for column in zip(*parts, strict=True)]


def block_sums(values: Tensor) -> list[float]:
    """Sums over the fixed blocks of a flat tile, or over each row of a tile with rows."""
    if values.dim() > 1:
        return lane_sums(values)
    return sums_of_blocks(values.unsqueeze(0), BLOCK)[0]
