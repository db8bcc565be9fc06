"""Tensors that are looked at together: those of one role in one block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from geomerge.anatomy import Part


class Group(NamedTuple):
    """A block's tensors of one role; outside the blocks the tensors of one role before or after them."""

    module: str
    column: str
    role: str

    def __str__(self) -> str:
        place = (
            f"block {self.column}"
            if self.column.isdigit()
            else {"in": "before", "out": "after"}[self.column] + " the blocks"
        )
        return f"{self.role}, {place}" + (f" of {self.module}" if self.module else "")


def group_of(part: Part) -> Group:
    """The group of a tensor."""
    column = {"pre": "in", "post": "out"}.get(part.position, "out") if part.block is None else str(part.block)
    return Group(part.module, column, part.role)
