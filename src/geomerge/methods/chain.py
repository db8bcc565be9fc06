"""Chains: steps that thin every expert's task vector, one after the other, before a method sees it.

The published methods that thin and combine are fixed chains (TIES is `trim` and a disjoint merge, DARE is `dare` and a sum);
here the same steps go before any method that works on task vectors. They act where a tensor is read (`Scan.thinning`), so
methods, surveys and executors know nothing of them, every input is read once for the output, and nothing is rounded between
the steps and the method. What a step measures is measured before, in passes of its own. The steps that there are: see
`geomerge.methods.before`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from geomerge.methods.base import Method
from geomerge.methods.kernel import Open
from geomerge.methods.tile import Scan, Tile

if TYPE_CHECKING:
    from torch import Tensor


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step(Method):
    """One step before a method: parameters as a method has them, a name, and what it does to a tensor's task vectors.

    Its properties are those of task arithmetic (weights 1) with the step.
    """

    family: ClassVar[str] = "step"
    before: ClassVar[bool] = True
    """Whether it comes before the method; see `geomerge.methods.after` for the others."""

    @classmethod
    def usage(cls) -> str:
        return f"steps: [{{{cls.name}: {{{', '.join(f'{name}: …' for name in cls.parameters())}}}}}]"

    @property
    def idle(self) -> bool:
        """Whether the task vectors stay as they are, bit for bit."""
        return False

    @property
    def whole(self) -> bool:
        """Whether whole matrices are decomposed."""
        return False

    @property
    def free(self) -> bool:
        """Whether the inputs need not be read for the step beforehand."""
        return False

    def decided(self, weight: bool) -> Step:
        """The step for a tensor that by default is, or is not, a weight matrix."""
        return self

    def bind(self, open_scan: Open, shape: Shape) -> Piece:
        """Measure what the step needs of one tensor.

        Args:
            open_scan: Opens scans whose task vectors the steps before have thinned.
            shape: The tensor's shape.
        """
        raise NotImplementedError


class Piece:
    """A step bound to one tensor.

    Attributes:
        columns: Elements of the rows that it must see whole, of which tiles are then made; `None`: tiles are flat.
    """

    columns: int | None = None

    def begin(self) -> None:
        """See `Thinning.begin`."""

    def thin_(self, tile: Tile) -> None:
        """Thin the task vectors of a tile that begins and ends with whole rows, in place; here: leave them as they are."""


class Thinning:
    """A chain bound to one tensor: see `geomerge.methods.tile.Thinning`."""

    def __init__(self, pieces: Sequence[Piece], experts: int) -> None:
        self._pieces = tuple(pieces)
        self._experts = experts

    @property
    def rows(self) -> int:
        return max(piece.columns or 1 for piece in self._pieces)

    def begin(self) -> None:
        for piece in self._pieces:
            piece.begin()

    def thin_(self, stack: Tensor, start: int, scan: Scan) -> None:
        models = stack[: self._experts + 1]  # statistics may come after them
        models[1:].sub_(models[0])
        for piece in self._pieces:
            shaped = models if piece.columns is None else models.view(len(models), -1, piece.columns)
            piece.thin_(Tile(shaped, start, -1, scan, thinned=True))


def thinned(open_scan: Open, steps: Sequence[Step], shape: Shape, experts: int) -> Open:
    """Opens the same scans with the task vectors thinned; what that needs is measured when the first is opened.

    Args:
        open_scan: Opens scans of a base and experts.
        steps: The chain; without steps the scans stay as they are.
        shape: The tensor's shape.
        experts: The number of experts.
    """
    if not steps:
        return open_scan
    lock = threading.Lock()
    made: list[Thinning] = []

    def after(pieces: Sequence[Piece]) -> Open:
        if not pieces:
            return open_scan
        thinning = Thinning(pieces, experts)
        return lambda **tiling: open_scan(thinning=thinning, **tiling)

    def opened(**tiling: Any) -> Scan:
        with lock:
            if not made:
                pieces: list[Piece] = []
                for step in steps:
                    pieces.append(step.bind(after(pieces[:]), shape))
                made.append(Thinning(pieces, experts))
        return open_scan(thinning=made[0], **tiling)

    return opened
