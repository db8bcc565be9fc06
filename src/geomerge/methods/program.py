"""Arithmetic on tiles that is written once, in torch's words, and done by a compiled loop.

A method's `blend` (and what its `measure` sums up or ranks) is called once with a `Recorded` tile, whose elements are `Value`s:
they note what is done to them instead of doing it. The `Program` that comes of it is carried out by one loop of `native`,
which does each operation to a few hundred elements that stay in the first-level cache, with the bits of torch.

Only what is marked as such is recorded (`Elementwise.recorded`, ``recorded=True``): it must do nothing but what a `Value` can
do, and must not depend on what a tile holds other than by that.
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from geomerge.methods import native

if TYPE_CHECKING:
    from geomerge.methods.order import Selection
    from geomerge.methods.tile import Loop, Place, Scan, Tile

_OPERATIONS = (
    *("load", "differ", "table", "add", "subtract", "multiply", "divide", "larger", "shift", "scale", "over", "plus"),
    *(
        "plus_product",
        "plus_quotient",
        "size",
        "sign",
        "floor",
        "clamp",
        "shrink",
        "less",
        "least",
        "equal",
        "different",
    ),
    *("below", "up_to", "same", "other", "above", "from", "replace", "thin", "count", "sums", "bracket", "store"),
    *("elect", "agree", "distance", "weight", "lighter", "outweighed", "plus_sign", "share", "exp", "tanh"),
)
"""As in `kernels.c`, which says what each does."""

_FUSED = {
    ("shift", "sign", 0): "elect",
    ("multiply", "floor", 0): "agree",
    ("subtract", "size", 0): "distance",
    ("size", "scale", 0): "weight",
    ("weight", "less", 0): "lighter",
    ("size", "lighter", 1): "outweighed",
    ("sign", "plus", 1): "plus_sign",
}
"""What does an operation and the one that alone takes its result, as which operand. At most one of the two has a number."""

_CODE = {name: code for code, name in enumerate(_OPERATIONS)}
_REGISTERS, _LANES = 40, 256

_INFINITY = float("inf")


@dataclass(eq=False)
class _Note:
    """One operation: its operands are the numbers of earlier notes."""

    operation: str
    operands: tuple[int, ...] = ()
    x: float = 0.0
    y: float = 0.0
    data: Any = None


class Value:
    """Elements that are not there yet: the part of `torch.Tensor` that can be recorded.

    Each operation exists under torch's name, and with an underscore in place.
    """

    dtype = "recorded"
    """What `to` takes: all is float64."""

    def __init__(self, tile: Recorded, at: int) -> None:
        self._tile, self._at = tile, at

    def __getattr__(self, name: str) -> Any:
        found = _OUT_OF_PLACE.get(name[:-1]) if name.endswith("_") else _OUT_OF_PLACE.get(name)
        if found is None:
            raise AttributeError(f"{name!r} cannot be recorded: {__name__} knows no such operation")
        if not name.endswith("_"):
            return functools.partial(found, self)

        def in_place(*arguments: Any, **options: Any) -> Value:
            self._at = found(self, *arguments, **options)._at
            return self

        return in_place

    def _noted(self, operation: str, *operands: Value, x: float = 0.0, y: float = 0.0, data: Any = None) -> Value:
        return Value(self._tile, self._tile.note(operation, (self._at, *(o._at for o in operands)), x, y, data))

    def _either(self, other: Value | float, value: str, number: str) -> Value:
        if not isinstance(other, Value | int | float):
            raise TypeError(f"recorded elements and {type(other).__name__} do not go together: see `Tile.along`")
        return self._noted(value, other) if isinstance(other, Value) else self._noted(number, x=float(other))

    def __bool__(self) -> bool:
        raise TypeError("recorded elements have no value yet: what is done must not depend on them")

    def element_size(self) -> int:
        """Bytes of an element."""
        return 8

    def clone(self) -> Value:
        """Another name for the same elements, to be changed in place."""
        return Value(self._tile, self._at)

    def to(self, dtype: object) -> Value:
        """The same: masks are numbers already."""
        if dtype != self.dtype:
            raise TypeError(f"recorded elements are float64, not {dtype}")
        return self.clone()

    def add(self, other: Value | float, *, alpha: float = 1.0) -> Value:
        if not isinstance(other, Value):
            return self._noted("shift", x=float(other) * alpha)
        return self._noted("add", other) if alpha == 1.0 else self._noted("plus", other, x=float(alpha))

    def sub(self, other: Value | float) -> Value:
        return self._noted("subtract", other) if isinstance(other, Value) else self._noted("shift", x=-float(other))

    def mul(self, other: Value | float) -> Value:
        return self._either(other, "multiply", "scale")

    def div(self, other: Value | float) -> Value:
        return self._either(other, "divide", "share")

    def reciprocal(self) -> Value:
        return self._noted("over", x=1.0)

    def addcmul(self, a: Value, b: Value, *, value: float = 1.0) -> Value:
        return self._noted("plus_product", a, b, x=float(value))

    def addcdiv(self, a: Value, b: Value, *, value: float = 1.0) -> Value:
        return self._noted("plus_quotient", a, b, x=float(value))

    def zero(self) -> Value:
        return self._noted("shrink", x=_INFINITY)

    def square(self) -> Value:
        return self._noted("multiply", self)

    def abs(self) -> Value:
        return self._noted("size")

    def sign(self) -> Value:
        return self._noted("sign")

    def exp(self) -> Value:
        """`geomerge.methods.functions.exp`, whose bits are not torch's."""
        return self._noted("exp")

    def tanh(self) -> Value:
        """`geomerge.methods.functions.tanh`."""
        return self._noted("tanh")

    def maximum(self, other: Value) -> Value:
        return self._noted("larger", other)

    def clamp(self, min: float = -_INFINITY, max: float = _INFINITY) -> Value:  # noqa: A002 - torch's names
        return self._noted("floor" if max == _INFINITY else "clamp", x=float(min), y=float(max))

    def hardshrink(self, lambd: float) -> Value:
        return self._noted("shrink", x=float(lambd))

    def lt(self, other: Value | float) -> Value:
        return self._either(other, "less", "below")

    def le(self, other: Value | float) -> Value:
        return self._either(other, "least", "up_to")

    def eq(self, other: Value | float) -> Value:
        return self._either(other, "equal", "same")

    def ne(self, other: Value | float) -> Value:
        return self._either(other, "different", "other")

    def gt(self, other: Value | float) -> Value:
        return other.lt(self) if isinstance(other, Value) else self._noted("above", x=float(other))

    def ge(self, other: Value | float) -> Value:
        return other.le(self) if isinstance(other, Value) else self._noted("from", x=float(other))

    def masked_fill(self, mask: Value, value: float) -> Value:
        return self._noted("replace", mask, x=float(value))

    def shrink(self, selection: Selection) -> Value:
        """What `Selection.shrink_` does."""
        return self._noted("thin", data=selection)

    __add__, __sub__, __mul__, __truediv__ = add, sub, mul, div
    __lt__, __le__, __gt__, __ge__, __eq__, __ne__ = lt, le, gt, ge, eq, ne  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


_OUT_OF_PLACE = {
    name: function for name, function in vars(Value).items() if callable(function) and not name.startswith("_")
}


class Recorded:
    """A tile of values to be: what `Tile` has, as far as it can be recorded."""

    def __init__(self, inputs: int) -> None:
        self.notes: list[_Note] = []
        self._known: dict[tuple[Any, ...], int] = {}
        self.inputs = tuple(Value(self, self.note("load", (), x=float(k))) for k in range(inputs))

    @property
    def base(self) -> Value:
        """See `Tile.base`."""
        return self.inputs[0]

    def task_vectors(self) -> tuple[Value, ...]:
        """See `Tile.task_vectors`."""
        return tuple(x.sub_(self.base) for x in self.inputs[1:])

    def along(self, numbers: np.ndarray, run: int) -> Value:
        """See `Tile.along`."""
        table = np.ascontiguousarray(numbers, dtype=np.float64)
        return Value(self, self.note("table", (), float(table.size), float(run), table))

    def count(self, mask: Value, tell: Callable[[int], object]) -> None:
        """See `Tile.count`."""
        mask._noted("count", data=tell)

    def note(self, operation: str, operands: tuple[int, ...], x: float = 0.0, y: float = 0.0, data: Any = None) -> int:
        """Note an operation, or find that it was noted before; its number."""
        key = (operation, operands, x, y)
        if data is None and key in self._known:
            return self._known[key]
        self.notes.append(_Note(operation, operands, x, y, data))
        if data is None:
            self._known[key] = len(self.notes) - 1
        return len(self.notes) - 1


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("operation", "to", "a", "b", "c", "unused")),
        ("x", ctypes.c_double),
        ("y", ctypes.c_double),
        ("data", ctypes.c_void_p),
    )


@dataclass(frozen=True, eq=False)
class Program:
    """Recorded arithmetic, ready to be carried out.

    Attributes:
        steps: One for each operation that something depends on.
        data: What steps have beside their operands: selections, tables, functions, by the steps' index.
        ends: The steps that take in the outputs.
    """

    steps: ctypes.Array[_Step]
    data: dict[int, tuple[str, Any]] = field(default_factory=dict)
    ends: tuple[int, ...] = ()

    def merge(self, place: Place, out: native.Stored, beginning: np.ndarray | None, *, check: bool) -> bool:
        """Write the output at a place; whether all inputs are finite (looked at if `check`), as in all that follow."""
        return self._run(place, {}, out=out, beginning=beginning, check=check)

    def sums(self, place: Place, block: int, *, check: bool) -> tuple[bool, list[list[float]]]:
        """For each output its sums over blocks of so many elements (a multiple of 256, or all)."""
        blocks = -(-place.numel // block)
        found = [np.zeros(_LANES + blocks) for _ in self.ends]
        addresses = {step: each.ctypes.data for step, each in zip(self.ends, found, strict=True)}
        finite = self._run(place, addresses, block=block, check=check)
        return finite, [each[_LANES:].tolist() for each in found]

    def count(
        self, place: Place, brackets: dict[int, native.Bounds], starts: Sequence[int] = (0,), *, check: bool
    ) -> tuple[bool, dict[int, native.Counted]]:
        """Count and collect outputs, as `native.survey` does magnitudes."""
        asked = native.Brackets(list(brackets.values()), place.numel * len(starts), single=False)
        addresses = {self.ends[i]: asked.address(j) for j, i in enumerate(brackets)}
        finite = self._run(place, addresses, starts=starts, check=check)
        return finite, dict(zip(brackets, asked.counted(), strict=True))

    def _run(
        self,
        place: Place,
        addresses: dict[int, int],
        *,
        starts: Sequence[int] = (0,),
        block: int = 0,
        out: native.Stored | None = None,
        beginning: np.ndarray | None = None,
        check: bool,
    ) -> bool:
        steps = (_Step * len(self.steps)).from_buffer_copy(self.steps)
        told: list[tuple[Callable[[int], object], ctypes.c_int64]] = []
        states: dict[int, native.Thinning] = place.carry.setdefault(("program", id(self)), {})
        for index, (operation, data) in self.data.items():
            if operation == "thin":
                if index not in states:
                    states[index] = native.whole(1)[0]
                    states[index].keep, states[index].equal, states[index].left = data.limits(place)
                steps[index].data = ctypes.addressof(states[index])
            elif operation == "count":
                told.append((data, ctypes.c_int64(0)))
                steps[index].data = ctypes.addressof(told[-1][1])
        for index, address in addresses.items():
            steps[index].data, steps[index].x = address, block
        for index in set(self.ends).difference(addresses) if out is None else ():
            steps[index].operation = _CODE["load"]  # nobody asked: something harmless in its place
            steps[index].a, steps[index].to = 0, _REGISTERS - 1
        inputs = place.scan.stored(place.start, place.numel)
        finite = native.program(inputs, place.start, steps, starts, out, beginning, check=check)
        for tell, number in told:
            tell(number.value)
        return finite


def record(inputs: int, compute: Callable[[Tile], Any], end: str) -> Program:
    """The program of a function of a tile.

    Args:
        inputs: The base and the experts.
        compute: Gives elements, or a sequence of them.
        end: What is done with these: ``store``, ``sums`` or ``bracket``.

    Raises:
        AttributeError, TypeError: It does something that cannot be recorded.
    """
    tile = Recorded(inputs)
    found = compute(cast("Tile", tile))
    ends = [tile.note(end, (value._at,), data=end) for value in ([found] if isinstance(found, Value) else found)]
    steps, data, places = _allocated(tile.notes)
    return Program(steps, data, tuple(places[e] for e in ends))


_ENDS = ("store", "sums", "bracket", "count")


def _allocated(notes: Sequence[_Note]) -> tuple[ctypes.Array[_Step], dict[int, tuple[str, Any]], dict[int, int]]:
    """Steps of what is needed, each result in a register that is free again after its last use: steps, data, places."""
    needed: set[int] = set()
    for index in range(len(notes) - 1, -1, -1):
        if index in needed or notes[index].operation in _ENDS:
            needed |= {index, *notes[index].operands}
    order = _fused(notes, sorted(needed))
    last = {operand: index for index in order for operand in notes[index].operands}
    free = list(range(_REGISTERS - 2, -1, -1))  # the last one is for what nobody asked for
    register: dict[int, int] = {}
    steps = (_Step * len(order))()
    data: dict[int, tuple[str, Any]] = {}
    for place, index in enumerate(order):
        note = notes[index]
        if not free:
            raise TypeError(f"more than {_REGISTERS - 1} intermediate results at once cannot be recorded")
        to = register[index] = free.pop()
        a, b, c = (*(register[o] for o in note.operands), to, to, to)[:3]
        if note.operation in ("load", "differ"):
            a, b = int(note.x), a
        steps[place] = _Step(_CODE[note.operation], to, a, b, c, 0, note.x, note.y, None)
        if note.operation == "table":
            steps[place].data = note.data.ctypes.data
        if note.data is not None:
            data[place] = (note.operation, note.data)
        free += [register.pop(o) for o in {index, *note.operands} if last.get(o, index) == index]
    return steps, data, {index: place for place, index in enumerate(order)}


def _fused(notes: Sequence[_Note], order: list[int]) -> list[int]:
    """The same with operations done at once that `_FUSED` knows, and with inputs from which something is subtracted at once."""
    number = Counter(operand for index in order for operand in notes[index].operands)
    gone = set()
    for index in order:
        note = notes[index]
        if note.operation == "subtract" and notes[note.operands[0]].operation == "load":
            loaded, base = note.operands
            if number[loaded] == 1:
                note.operation, note.operands, note.x = "differ", (base,), notes[loaded].x
                gone.add(loaded)
        for place in range(len(note.operands)):
            before = notes[note.operands[place]]
            known = _FUSED.get((before.operation, note.operation, place))
            if known is not None and number[note.operands[place]] == 1:
                gone.add(note.operands[place])
                note.operation, note.x = known, note.x or before.x
                note.operands = (*note.operands[:place], *before.operands, *note.operands[place + 1 :])
    return [index for index in order if index not in gone]


def loop(scan: Scan, compute: Callable[[Tile], Any]) -> Loop:
    """The compiled loop that does what a function does to the tiles of a scan, and stores the result."""
    program = record(len(scan.sources), compute, "store")

    def looped(place: Place, out: native.Stored, beginning: np.ndarray | None) -> bool:
        done = program.merge(place, out, beginning, check=scan.checks)
        if not done:
            scan.look_again(place.start, place.numel)
        return done

    return looped
