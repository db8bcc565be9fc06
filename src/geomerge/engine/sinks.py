"""Where a merge's output goes: into its place in a file, or into tensors in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch

from geomerge.checkpoint.dtypes import DTYPES, to_torch
from geomerge.checkpoint.writer import Layout, disk_error
from geomerge.engine.plan import Node, Plan
from geomerge.methods.native import CODES, Stored, in_memory

if TYPE_CHECKING:
    from torch import Tensor


_WRITE = 1 << 18
"""Bytes of one write. Where the host of a virtual machine takes back free pages, larger ones may take several times as long."""


class Sink(Protocol):
    """Takes the output's elements, in any order and from any thread.

    Attributes:
        readable: What was stored can be looked at.
    """

    @property
    def readable(self) -> bool: ...

    def write(self, node: Node, start: int, values: Tensor) -> None:
        """`values` (in the node's dtype) are its elements from `start` on."""

    def stored(self, node: Node) -> Stored | None:
        """Where compiled loops may write a node's elements themselves; `None`: nowhere."""


class Files(Protocol):
    """The output's files, open for writing; `readable` if for reading, too."""

    readable: bool
    partial: Path
    descriptors: list[int]


class FileSink:
    """Writes every tile to its final place in the output's files."""

    def __init__(self, files: Files, layout: Layout) -> None:
        self.files, self.layout = files, layout
        self.readable = files.readable

    def write(self, node: Node, start: int, values: Tensor) -> None:
        place = self.layout.place[node.name]
        offset = place.offset + start * DTYPES[node.dtype].itemsize
        view = memoryview(values.detach().contiguous().cpu().view(torch.uint8).numpy().data)
        descriptor = self.files.descriptors[place.file]
        try:
            while view:
                done = os.pwrite(descriptor, view[:_WRITE], offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise self._refused(error, place.file) from None

    def stored(self, node: Node) -> Stored | None:
        place = self.layout.place[node.name]
        code = CODES.get(node.dtype)
        if code is None:
            return None

        def failed(error: int) -> NoReturn:
            raise self._refused(OSError(error, os.strerror(error)), place.file) from None

        return Stored(code, file=self.files.descriptors[place.file], offset=place.offset, failed=failed)

    def _refused(self, error: OSError, file: int) -> Exception:
        return disk_error(error, self.files.partial / self.layout.files[file].name, self.layout.size)


class MemorySink:
    """Collects the output as a state dict."""

    readable = True

    def __init__(self, plan: Plan) -> None:
        self.tensors: dict[str, Tensor] = {
            n.name: torch.empty(n.shape, dtype=to_torch(n.dtype)) for n in plan.output_nodes()
        }
        self._flat: Mapping[str, Tensor] = {name: t.view(-1) for name, t in self.tensors.items()}

    def write(self, node: Node, start: int, values: Tensor) -> None:
        self._flat[node.name][start : start + values.numel()] = values.detach().reshape(-1).cpu()

    def stored(self, node: Node) -> Stored | None:
        return in_memory(self._flat[node.name])
