"""From noted operations to the steps of a compiled loop: which are needed, in what order, where their results are kept."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Collection
from dataclasses import dataclass

from geomerge.methods.native.build import GROUPS

_ALONE = ("load", "table", "tanh", "thin", "count", "sums", "bracket", "store")
_TOGETHER = (
    *(
        "subtract",
        "multiply",
        "divide",
        "larger",
        "shift",
        "scale",
        "share",
        "over",
        "plus",
        "plus_product",
        "plus_quotient",
    ),
    *("size", "sign", "exp", "floor", "clamp", "shrink", "replace", "less", "least", "equal", "different"),
    *("below", "up_to", "same", "other", "above", "from"),
)
OPERATIONS = (*_ALONE, *_TOGETHER)
"""As in `native/program.h`, which says what each does: first those that work on a chunk as a whole."""

CODE = {name: code for code, name in enumerate(OPERATIONS)}
SPARE = 159
"""The last of the registers, for what nobody asked for."""

_ENDS = ("store", "sums", "bracket", "count")
_SUMMED = "summed"
"""How a group ends whose results are summed up, and nothing else."""

Structure = tuple[tuple[str, tuple[int, ...], int], ...]
"""Of noted operations without their numbers and data: name, operands (numbers of earlier notes), and of a load the input."""


class Step(ctypes.Structure):
    """One operation on registers: see `native/program.h`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("operation", "to", "a", "b", "c", "group", "within")),
        ("x", ctypes.c_double),
        ("y", ctypes.c_double),
        ("data", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Layout:
    """Steps without numbers and data.

    Attributes:
        template: Their bytes.
        notes: The note that each comes from.
    """

    template: bytes
    notes: tuple[int, ...]

    def steps(self) -> ctypes.Array[Step]:
        """The steps, to be filled in."""
        return (Step * len(self.notes)).from_buffer_copy(self.template)


@functools.lru_cache(maxsize=512)
def laid_out(structure: Structure) -> Layout:
    """The layout of noted operations: tensors that are made alike have it in common.

    Raises:
        TypeError: There are more intermediate results at once than registers.
    """
    order = ordered(structure)
    last = {operand: place for place, index in enumerate(order) for operand in structure[index][1]}
    free = list(range(SPARE - 1, -1, -1))
    register: dict[int, int] = {}
    steps = (Step * len(order))()
    for place, index in enumerate(order):
        name, operands, given = structure[index]
        if not free:
            raise TypeError(f"more than {SPARE} intermediate results at once cannot be recorded")
        # Never the register of an operand: each is free only after its last use.
        to = register[index] = free.pop()
        a, b, c = (given, 0, 0) if name == "load" else (*(register[o] for o in operands), to, to, to)[:3]
        steps[place] = Step(CODE[name], to, a, b, c)
        free += [register.pop(o) for o in {index, *operands} if last.get(o, place) == place]
    known = _known()
    together: set[int] = set()
    for place, text in groups(structure, order):
        steps[place].group = known.get(text, 0)
        if not steps[place].group:
            continue
        stop = place + text.count("(")
        together.update(range(place, stop))
        if text.endswith(_SUMMED):
            for sums in range(stop, stop + len(text.split(" > ")[1].split()) - 1):
                steps[sums].within = 1
    users = _users(structure, order)
    for place, index in enumerate(order):
        if structure[index][0] == "load" and together.issuperset(users.get(index, (-1,))):
            steps[place].within = 1
    return Layout(bytes(steps), tuple(order))


def ordered(structure: Structure) -> list[int]:
    """The notes that something depends on: as many as can follow each other of those that can be done together."""
    needed: set[int] = set()
    for index in range(len(structure) - 1, -1, -1):
        if index in needed or structure[index][0] in _ENDS:
            needed |= {index, *structure[index][1]}
    waiting, order, done = sorted(needed), [], set[int]()
    together = False
    while waiting:
        left = []
        for index in waiting:
            name, operands, _ = structure[index]
            if (name in _TOGETHER) is together and done.issuperset(operands):
                order.append(index)
                done.add(index)
            else:
                left.append(index)
        waiting, together = left, not together
    return order


def _users(structure: Structure, order: list[int]) -> dict[int, list[int]]:
    """For each note the places of the steps that take it."""
    found: dict[int, list[int]] = {}
    for place, index in enumerate(order):
        for operand in set(structure[index][1]):
            found.setdefault(operand, []).append(place)
    return found


def groups(structure: Structure, order: list[int]) -> list[tuple[int, str]]:
    """The groups of steps that can be done together: the place of the first, and what they do.

    A group reads ``subtract(i0,r1) scale(0) > 1``: operands are inputs (i0), other registers (r1; numbered together, in the
    order in which it reads them) or earlier results of the group (from 0), and what is needed after it comes last, with
    ``summed`` behind it if the steps that follow sum it up in this order, and nothing else needs it.
    """
    users = _users(structure, order)
    found, start = [], 0
    while start < len(order):
        stop = start
        while stop < len(order) and structure[order[stop]][0] in _TOGETHER:
            stop += 1
        if stop > start + 1:
            later = {index: [p for p in users.get(index, ()) if p >= stop] for index in order[start:stop]}
            kept = [index for index, places in later.items() if places]
            after = [structure[index] for index in order[stop : stop + len(kept)]]
            summed = [operands[0] for name, operands, _ in after if name == "sums"]
            only = sorted(summed) == sorted(kept) and all(len(later[index]) == 1 for index in kept)
            text = _written(structure, order[start:stop], summed if only else kept)
            found.append((start, f"{text} {_SUMMED}" if only else text))
        start = max(stop, start + 1)
    return found


def _written(structure: Structure, group: list[int], kept: Collection[int]) -> str:
    names = {index: str(number) for number, index in enumerate(group)}
    words = []
    for index in group:
        name, operands, _ = structure[index]
        read = [names.setdefault(o, f"{'ri'[structure[o][0] == 'load']}{len(names) - len(group)}") for o in operands]
        words.append(f"{name}({','.join(read)})")
    return f"{' '.join(words)} > {' '.join(names[index] for index in kept)}"


@functools.cache
def _known() -> dict[str, int]:
    """The groups that are compiled: their numbers."""
    return {text: number for number, text in enumerate(GROUPS.read_text().splitlines(), 1)}
