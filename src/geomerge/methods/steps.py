"""From noted operations to the steps of a compiled loop: which are needed, which done at once, where results are kept."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from dataclasses import dataclass

OPERATIONS = (
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
"""As in `native/program.h`, which says what each does."""

_FUSED = {
    ("shift", "sign", 0): ("elect", True),
    ("multiply", "floor", 0): ("agree", False),
    ("subtract", "size", 0): ("distance", False),
    ("size", "scale", 0): ("weight", False),
    ("weight", "less", 0): ("lighter", True),
    ("size", "lighter", 1): ("outweighed", False),
    ("sign", "plus", 1): ("plus_sign", False),
}
"""What does an operation and the one that alone takes its result, as which operand; whether the number is the first one's."""

CODE = {name: code for code, name in enumerate(OPERATIONS)}
SPARE = 159
"""The last of the registers, for what nobody asked for."""

_ENDS = ("store", "sums", "bracket", "count")

Structure = tuple[tuple[str, tuple[int, ...], float], ...]
"""Of noted operations without their numbers and data: name, operands (numbers of earlier notes), and of a load the input."""


class Step(ctypes.Structure):
    """One operation on registers: see `native/program.h`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("operation", "to", "a", "b", "c", "unused")),
        ("x", ctypes.c_double),
        ("y", ctypes.c_double),
        ("data", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Layout:
    """Steps without numbers and data.

    Attributes:
        template: Their bytes.
        places: The steps' notes, by place.
        numbers: Of the steps that may have numbers the place, and the note that has them.
    """

    template: bytes
    places: dict[int, int]
    numbers: tuple[tuple[int, int], ...]

    def steps(self) -> ctypes.Array[Step]:
        """The steps, to be filled in."""
        return (Step * len(self.places)).from_buffer_copy(self.template)


@dataclass
class _Operation:
    name: str
    operands: tuple[int, ...]
    x: float
    numbers: int


@functools.lru_cache(maxsize=512)
def laid_out(structure: Structure) -> Layout:
    """The layout of noted operations: tensors that are made alike have it in common.

    Raises:
        TypeError: There are more intermediate results at once than registers.
    """
    needed: set[int] = set()
    for index in range(len(structure) - 1, -1, -1):
        if index in needed or structure[index][0] in _ENDS:
            needed |= {index, *structure[index][1]}
    notes = {index: _Operation(*structure[index], index) for index in sorted(needed)}
    _fuse(notes)
    last = {operand: index for index, note in notes.items() for operand in note.operands}
    free = list(range(SPARE - 1, -1, -1))
    register: dict[int, int] = {}
    steps = (Step * len(notes))()
    for place, (index, note) in enumerate(notes.items()):
        if not free:
            raise TypeError(f"more than {SPARE} intermediate results at once cannot be recorded")
        # Never the register of an operand: each is free only after its last use.
        to = register[index] = free.pop()
        a, b, c = (*(register[o] for o in note.operands), to, to, to)[:3]
        if note.name in ("load", "differ"):
            a, b = int(note.x), a
        steps[place] = Step(CODE[note.name], to, a, b, c)
        free += [register.pop(o) for o in {index, *note.operands} if last.get(o, index) == index]
    places = dict(enumerate(notes))
    numbers = tuple((p, notes[i].numbers) for p, i in places.items() if notes[i].name not in ("load", "differ"))
    return Layout(bytes(steps), places, numbers)


def _fuse(notes: dict[int, _Operation]) -> None:
    """Do at once what `_FUSED` knows, and load inputs from which something is subtracted together with that."""
    uses = Counter(operand for note in notes.values() for operand in note.operands)
    for index in list(notes):
        note = notes[index]
        if note.name == "subtract" and notes[note.operands[0]].name == "load" and uses[note.operands[0]] == 1:
            loaded, base = note.operands
            note.name, note.operands, note.x = "differ", (base,), notes.pop(loaded).x
        for place, operand in enumerate(note.operands):
            known = _FUSED.get((notes[operand].name, note.name, place))
            if known is not None and uses[operand] == 1:
                before = notes.pop(operand)
                note.name, first = known
                note.numbers = before.numbers if first else note.numbers
                note.operands = (*note.operands[:place], *before.operands, *note.operands[place + 1 :])
                break
