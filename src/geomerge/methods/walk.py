"""A walk over all tensors of a merge: how a method looks at the whole model before the first tensor is made.

What it asks of each tensor runs in any order and on any threads; the answers come back in the tensors' order, so what is
concluded from them does not depend on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from geomerge.methods.tile import Scan, Tile

Result = TypeVar("Result")


class Walk:
    """Tensors that are merged with the same method and parameters.

    Args:
        scans: Opens each.
        names: Their names.
        numel: Elements of all of them.
        run: Maps a function over the scans, such as a thread pool's ``map``.
    """

    def __init__(
        self,
        scans: Sequence[Callable[[], Scan]],
        names: Sequence[str],
        numel: int,
        run: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
    ) -> None:
        self._scans = scans
        self._run = run
        self.names = tuple(names)
        self.numel = numel

    def over(self, work: Callable[[Scan], Result]) -> list[Result]:
        """Ask something of every tensor: the answers in the tensors' order."""
        return list(self._run(lambda opened: work(opened()), self._scans))

    def over_segments(self, work: Callable[[Iterator[Tile]], Result]) -> list[Result]:
        """Run `work` on the tiles of every segment of every tensor; the results in order."""
        return [result for each in self.over(lambda scan: scan.over(work)) for result in each]
