"""A walk over all tensors of a merge: how a method looks at the whole model before the first tensor is made.

What it asks of each tensor runs in any order and on any threads; the answers come back in the tensors' order, so what is
concluded from them does not depend on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from geomerge.late import also_alone
from geomerge.methods.tile import Scan, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.base import Method


Item = TypeVar("Item")
Result = TypeVar("Result")


class Walk:
    """Tensors that are merged with the same method and parameters.

    Args:
        scans: Opens each.
        names: Their names.
        numel: Elements of all of them.
        experts: The number of inputs of each after the base.
        run: Maps a function over the scans, such as a thread pool's ``map``.
        threads: How many may work on what belongs to no scan.
        methods: The method of each, with the parameters that it has for that tensor.
    """

    def __init__(
        self,
        scans: Sequence[Callable[[], Scan]],
        names: Sequence[str],
        numel: int,
        experts: int,
        run: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
        threads: int = 1,
        methods: Sequence[Method] = (),
    ) -> None:
        self._scans = scans
        self._run, self._threads = run, threads
        self.names = tuple(names)
        self.methods = tuple(methods)
        self.numel = numel
        self.experts = experts

    def over(self, work: Callable[[Scan], Result]) -> list[Result]:
        """Ask something of every tensor: the answers in the tensors' order.

        What an interrupted run has found is not asked again; in its answers sequences are tuples.
        """
        return list(self._run(lambda opened: work(opened()), self._scans))

    def mapped(self, transform: Callable[[Scan], Scan], numel: int) -> Walk:
        """The same walk over what a function makes of each scan, with `numel` elements in all."""

        def then(opened: Callable[[], Scan]) -> Callable[[], Scan]:
            return lambda: transform(opened())

        scans = [then(opened) for opened in self._scans]
        return Walk(scans, self.names, numel, self.experts, self._run, self._threads, self.methods)

    def over_segments(self, work: Callable[[Iterator[Tile]], Result]) -> list[Result]:
        """Run `work` on the tiles of every segment of every tensor; the results in order."""
        return [result for each in self.over(lambda scan: scan.over(work)) for result in each]

    def side_by_side(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Run `work` on what was gathered from all tensors; the results in order."""
        with ThreadPoolExecutor(self._threads, initializer=also_alone) as pool:
            return list(pool.map(work, items))


def whole(scan: Scan, *, based: bool) -> Tensor:
    """All of a scan's inputs, float64: shape ``(K, elements)``; with `based` the task vectors, and no base.

    Not by `Scan.over`: its threads may be the ones that wait for this very tensor.
    """
    gathered = torch.empty(len(scan.sources) - based, scan.numel, dtype=torch.float64, device=scan.device)
    for tile in (tile for segment in scan.segments for tile in scan.tiles(segment)):
        values = tile.task_vectors() if based else tile.inputs
        for row, each in zip(gathered, values, strict=True):
            row[tile.start : tile.start + tile.numel] = each
    return gathered
