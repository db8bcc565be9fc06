"""Where a merge's output goes: into its place in a file, or into tensors in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from geomerge.checkpoint.dtypes import DTYPES, to_torch
from geomerge.checkpoint.writer import Layout, disk_error
from geomerge.engine.plan import Node, Plan


class Sink(Protocol):
    """Takes the output's elements, in any order and from any thread."""

    def write(self, node: Node, start: int, values: Tensor) -> None:
        """`values` (in the node's dtype) are its elements from `start` on."""


class Files(Protocol):
    """The output's files, open for writing."""

    partial: Path
    descriptors: list[int]


class FileSink:
    """Writes every tile to its final place in the output's files."""

    def __init__(self, files: Files, layout: Layout) -> None:
        self.files, self.layout = files, layout

    def write(self, node: Node, start: int, values: Tensor) -> None:
        place = self.layout.place[node.name]
        offset = place.offset + start * DTYPES[node.dtype].itemsize
        view = memoryview(values.detach().contiguous().cpu().view(torch.uint8).numpy().data)
        descriptor = self.files.descriptors[place.file]
        try:
            while view:
                done = os.pwrite(descriptor, view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            path = self.files.partial / self.layout.files[place.file].name
            raise disk_error(error, path, self.layout.size) from None


class MemorySink:
    """Collects the output as a state dict."""

    def __init__(self, plan: Plan) -> None:
        self.tensors: dict[str, Tensor] = {
            n.name: torch.empty(n.shape, dtype=to_torch(n.dtype)) for n in plan.output_nodes()
        }
        self._flat: Mapping[str, Tensor] = {name: t.view(-1) for name, t in self.tensors.items()}

    def write(self, node: Node, start: int, values: Tensor) -> None:
        self._flat[node.name][start : start + values.numel()] = values.detach().reshape(-1).cpu()
