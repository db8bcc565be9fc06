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
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from geomerge.methods import native
from geomerge.methods.steps import CODE, SPARE, Step, laid_out

if TYPE_CHECKING:
    from geomerge.methods.selection import Selection
    from geomerge.methods.tile import Loop, Place, Scan, Tile

_LANES = 256
_INFINITY = float("inf")


class _Note(NamedTuple):
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

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        raise TypeError(f"torch.{name} cannot be recorded: use the elements' own operations, those of {__name__}.Value")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name!r} cannot be recorded: {__name__} knows no such operation")

    def _noted(self, operation: str, *operands: Value, x: float = 0.0, y: float = 0.0, data: Any = None) -> Value:
        return Value(self._tile, self._tile.note(operation, (self._at, *(o._at for o in operands)), x, y, data))

    def _either(self, other: Value | float, value: str, number: str) -> Value:
        if not isinstance(other, (Value, int, float)):
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
        return self._noted("plus", other, x=float(alpha))

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


def _in_place(function: Callable[..., Value]) -> Callable[..., Value]:
    @functools.wraps(function)
    def changed(self: Value, *arguments: Any, **options: Any) -> Value:
        self._at = function(self, *arguments, **options)._at
        return self

    return changed


for _name, _function in list(vars(Value).items()):
    if callable(_function) and not _name.startswith("_") and _name not in ("clone", "to", "element_size"):
        setattr(Value, f"{_name}_", _in_place(_function))


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
        number = len(self.notes)
        if data is None:
            sign = x or math.copysign(1.0, x)  # 0.0 and −0.0 are equal, and not the same
            found = self._known.setdefault((operation, operands, x, y, sign), number)
            if found != number:
                return found
        self.notes.append(_Note(operation, operands, x, y, data))
        return number


@dataclass(frozen=True, eq=False)
class Program:
    """Recorded arithmetic, ready to be carried out.

    Attributes:
        steps: One for each operation that something depends on.
        data: What steps have beside their operands: selections, tables, functions, by the steps' index.
        ends: The steps that take in the outputs.
        ranked: What these are, in numbers: outputs of the same are the same.
    """

    steps: ctypes.Array[Step]
    data: dict[int, tuple[str, Any]] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    ranked: tuple[int, ...] = ()

    def merge(self, place: Place, out: native.Stored, beginning: native.Doubles | None, *, check: bool) -> bool:
        """Write the output at a place; whether all inputs are finite (looked at if `check`), as in all that follow."""
        return self._run(place, {}, out=out, beginning=beginning, check=check)

    def sums(self, place: Place, block: int, *, check: bool) -> tuple[bool, list[list[float]]]:
        """For each output its sums over blocks of so many elements (a multiple of 256, or all)."""
        blocks = -(-place.numel // block)
        found = [native.zeros(_LANES + blocks) for _ in self.ends]
        addresses = {step: ctypes.addressof(each) for step, each in zip(self.ends, found, strict=True)}
        finite = self._run(place, addresses, block=block, check=check)
        return finite, [each[_LANES:] for each in found]

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
        beginning: native.Doubles | None = None,
        check: bool,
    ) -> bool:
        steps = (Step * len(self.steps)).from_buffer_copy(self.steps)
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
            steps[index].operation = CODE["load"]  # nobody asked: something harmless in its place
            steps[index].a, steps[index].to = 0, SPARE
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
    ranked = tuple(value._at for value in ([found] if isinstance(found, Value) else found))
    ends = [tile.note(end, (at,), data=end) for at in ranked]
    notes = tile.notes
    layout = laid_out(tuple([(n.operation, n.operands, int(n.x) if n.operation == "load" else 0) for n in notes]))
    steps = layout.steps()
    data = {}
    for step, note in zip(steps, (notes[index] for index in layout.notes), strict=True):
        if note.operation != "load" and (note.x or note.y or math.copysign(1.0, note.x) < 0):
            step.x, step.y = note.x, note.y
    for place, index in enumerate(layout.notes):
        held = notes[index].data
        if notes[index].operation == "table":
            steps[place].data = held.ctypes.data
        if held is not None:
            data[place] = (notes[index].operation, held)
    step_of = {index: place for place, index in enumerate(layout.notes)}
    return Program(steps, data, tuple(step_of[e] for e in ends), ranked)


def loop(scan: Scan, compute: Callable[[Tile], Any]) -> Loop:
    """The compiled loop that does what a function does to the tiles of a scan, and stores the result."""
    program = record(len(scan.sources), compute, "store")

    def looped(place: Place, out: native.Stored, beginning: native.Doubles | None) -> bool:
        done = program.merge(place, out, beginning, check=scan.checks)
        if not done:
            scan.look_again(place.start, place.numel)
        return done

    return looped
