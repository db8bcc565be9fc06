"""Tensors that adapters hold whole (norms, embeddings, heads, biases): what becomes of them when adapters are combined.

What such a tensor changes is its difference from the base's. With the base at hand the differences are merged by the method
that merges ΔW, tile by tile. Without it they are kept only where all adapters hold the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geomerge import anatomy
from geomerge.align.sources import ConstantSource
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.dtypes import to_torch
from geomerge.checkpoint.lora import Adapter
from geomerge.checkpoint.reader import load
from geomerge.engine.adapter_names import base_names
from geomerge.engine.stored import raw_source, stored_source
from geomerge.errors import IncompatibleModels
from geomerge.methods.base import Method
from geomerge.methods.buffers import empty
from geomerge.methods.kernel import prepare
from geomerge.methods.tile import Scan, Source


class _Difference:
    """x − y."""

    dtype = "F64"

    def __init__(self, x: Source, y: Source) -> None:
        self.label = x.label
        self._x, self._y = x, y

    def read(self, start: int, out: Tensor) -> None:
        other = empty(out.numel(), torch.float64, out.device)
        self._x.read(start, out)
        self._y.read(start, other)
        out.sub_(other)


def whole_tensors(
    adapters: Sequence[Adapter], base: Checkpoint | None, method: Method, seed: int, *, based: bool
) -> dict[str, Tensor]:
    """The whole tensors of the combined adapter.

    Args:
        adapters: The adapters.
        base: Their base, if it was given.
        method, seed: What merges differences.
        based: The method takes a base, which is zero here: no difference.

    Raises:
        IncompatibleModels: They differ and there is no base; or they do not fit it.
    """
    names = dict.fromkeys(name for adapter in adapters for name in adapter.whole)
    made: dict[str, Tensor] = {}
    for name in names:
        holders = [a for a in adapters if name in a.whole]
        values = [load(a.weights, a.weights.tensors[a.whole[name]]) for a in holders]
        if len(holders) == len(adapters) and all(torch.equal(values[0], v) for v in values[1:]):
            made[name] = values[0]
        elif base is None:
            raise IncompatibleModels(
                f"the adapters hold {name} whole and differ in it, or some lack it: what it changes is not known without "
                "their base",
                where=holders[0].ref,
                hint="give it with --base",
            )
        else:
            made[name] = _merged(name, adapters, base, method, seed, based=based)
    return made


def _merged(
    name: str, adapters: Sequence[Adapter], base: Checkpoint, method: Method, seed: int, *, based: bool
) -> Tensor:
    """base + merge(adapters' − base)."""
    tied = {a: s for a, s in anatomy.read(base.shapes, base.config).tied.items() if s in base.tensors}
    holder = next(a for a in adapters if name in a.whole)
    found = base_names(holder, {*base.tensors, *tied}, [name], base.ref)[0][name]
    stored = tied.get(found, found)
    shape = base.tensors[stored].shape
    nothing: Source = ConstantSource(0.0, f"no change: {name}")
    own = stored_source(base, stored, f"{base.ref}: {stored}")
    sources: list[Source] = [nothing] * based
    for adapter in adapters:
        if name not in adapter.whole:
            sources.append(nothing)
            continue
        info = adapter.weights.tensors[adapter.whole[name]]
        if info.shape != shape:
            raise IncompatibleModels(
                f"{name} has the shape {list(info.shape)} in {adapter.ref} and {list(shape)} in the base {base.ref}",
                hint="vocabularies of different sizes are merged as whole models: BASE+ADAPTER in a recipe",
            )
        sources.append(_Difference(raw_source(adapter.weights, info, f"{adapter.ref}: {name}"), own))

    def open_scan(**tiling: Any) -> Scan:
        return Scan(sources, shape, name=name, seed=seed, **tiling)

    out = torch.empty(math.prod(shape), dtype=to_torch(base.dtype(stored)))
    if not out.numel():
        return out.view(shape)
    prepared = prepare(method, open_scan, shape)
    for segment in prepared.scan.segments:
        for start, values in prepared.tiles(segment):
            before = torch.empty(values.numel(), dtype=torch.float64)
            own.read(start, before)
            out[start : start + values.numel()] = before + values
    return out.view(shape)
