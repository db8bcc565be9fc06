"""Experts into one merged task vector and masks, tensor by tensor in tiles."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomerge.checkpoint.dtypes import DTYPES, parse_dtype, to_torch
from geomerge.checkpoint.layout import plan_layout
from geomerge.checkpoint.output_place import COMPRESSED
from geomerge.checkpoint.reader import open_checkpoint
from geomerge.checkpoint.writer import OutputDirectory
from geomerge.compress.container import FILE, Contents, mask, vector
from geomerge.engine.build import Builder
from geomerge.engine.execute import Facts, Interrupted, Threads, Work
from geomerge.engine.experts import plan_experts
from geomerge.engine.plan import Node
from geomerge.engine.run import Progress
from geomerge.engine.sinks import FileSink
from geomerge.errors import IncompatibleModels, UsageError, did_you_mean
from geomerge.late import without_gradients
from geomerge.methods.combine import added
from geomerge.methods.elementwise.emr import unified
from geomerge.methods.elementwise.tall_mask import TallMask, tall_mask
from geomerge.methods.tile import Scan, Segment, block_sums
from geomerge.version import __version__

METHODS = ("tall", "emr")


@dataclass(frozen=True)
class Packed:
    """What was made.

    Attributes:
        out: The directory.
        contents: Its description.
        nbytes: Bytes of its tensors.
        experts: Bytes of the experts' own.
        density: For each expert the share of elements in its mask.
        seconds: How long it took.
    """

    out: Path
    contents: Contents
    nbytes: int
    experts: int
    density: Mapping[str, float]
    seconds: float


def compress(
    base: str | Path,
    experts: Mapping[str, str | Path],
    out: str | Path,
    *,
    method: str = "tall",
    threshold: float | None = None,
    dtype: str | None = None,
    force: bool = False,
    threads: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Write experts of one base as one merged task vector and packed masks.

    Args:
        base: What all were trained from.
        experts: Name → model.
        out: The directory to make.
        method: ``tall``: the sum of the task vectors, and where an expert outweighs the others. ``emr``: the largest agreeing
            magnitudes, where an expert agrees in sign, and a factor for each.
        threshold: λ of TALL's masks, by default 0.4.
        dtype: Of the merged vector; by default that of the models.
        force: Replace an existing directory.
        threads: By default one for each core that the process may use.
        allow_pickle: Read pickled weights (weights only).
        progress: Told how far it is.

    Raises:
        UsageError: The place is taken; an unknown method; no expert, or one that is the base.
        ModelError: A model cannot be used, or they do not fit.
    """
    begun = time.perf_counter()
    if method not in METHODS:
        raise UsageError(f"there is no way {method!r} to compress", hint=did_you_mean(method, METHODS))
    if not experts:
        raise UsageError("there is no expert to compress")
    if threshold is not None and method != "tall":
        raise UsageError(f"{method} has no threshold", hint="leave it out, or take the method tall")
    threshold = 0.4 if threshold is None else threshold
    least, most = TallMask.parameters()["threshold"].within or (0, math.inf)
    if not least <= threshold <= most:
        raise UsageError(f"the threshold is {threshold}: give a number from {least} to {most}")
    kind = None if dtype is None else parse_dtype(dtype)
    plan, opened = plan_experts(base, experts.values(), allow_pickle=allow_pickle)
    try:
        merged = [node for node in plan.output_nodes() if node.method is not None]
        if not merged:
            raise IncompatibleModels("the models share no tensor that could be compressed", where=str(base))
        entries: list[tuple[str, str, tuple[int, ...]]] = []
        for node in merged:
            entries.append((vector(node.name), kind or node.dtype, node.shape))
            entries += [(mask(k + 1, node.name), "U8", (-(-node.numel // 8),)) for k in range(len(experts))]
        layout = plan_layout(entries, metadata={"geomerge": __version__})
        places = [Path(i.path) for i in plan.inputs if i.path]
        with OutputDirectory(out, force, inputs=places, kind=COMPRESSED) as output:
            try:
                output.create(layout)
                lock, found = threading.Lock(), dict[int, Facts]()

                def advance(nbytes: int) -> None:
                    if progress is not None:
                        with lock:
                            progress.advance(nbytes)

                def done(some: list[tuple[int, Facts]]) -> None:
                    with lock:
                        found.update(some)

                if progress is not None:
                    progress.start(sum(node.nbytes for node in merged), 0)
                builder = Builder(plan, opened)
                work = _Pack(builder, FileSink(output, layout), advance, threading.Event(), method, threshold, kind)
                Threads(work, threads).run(list(enumerate(merged)), done)
                if progress is not None:
                    progress.finish()
                for checkpoint in opened:
                    checkpoint.verify_unchanged()
                contents, density = _concluded(
                    plan.inputs[merged[0].operands[0].input], experts, method, threshold, merged, found
                )
                with open_checkpoint(str(output.partial)) as packed:
                    contents = replace(contents, packed=packed.fingerprint())
                output.write_json(FILE, contents.to_json())
                final = output.finish()
            except BaseException:
                output.abandon()  # there is nothing that a later run could go on with
                raise
    finally:
        for checkpoint in opened:
            checkpoint.close()
    own = sum(node.nbytes for node in merged) * len(experts)
    return Packed(final, contents, layout.nbytes, own, density, time.perf_counter() - begun)


def _concluded(
    base: Any, experts: Mapping[str, Any], method: str, threshold: float, nodes: list[Node], found: Mapping[int, Facts]
) -> tuple[Contents, dict[str, float]]:
    """The description, and the masks' densities."""
    total = max(sum(node.numel for node in nodes), 1)
    factors, density = {}, {}
    for k, name in enumerate(experts):
        kept, own, taken = (math.fsum(facts["sums"][k][i] for facts in found.values()) for i in range(3))
        factors[name] = own / taken if method == "emr" and taken > 0 else 1.0
        density[name] = kept / total
    contents = Contents(
        method,
        factors,
        base.hub_id or Path(base.path or base.ref).name,
        base.fingerprint,
        threshold if method == "tall" else None,
    )
    return contents, density


@dataclass
class _Pack(Work):
    """Writes one tensor's merged vector and masks; its facts are, for each expert, kept elements, ‖τ‖₁ and ‖m ⊙ τ_merged‖₁."""

    method: str = "tall"
    threshold: float = 0.4
    dtype: str | None = field(default=None)

    @without_gradients()
    def make(self, node: Node, run: Callable[..., Iterable[Any]] = map) -> Facts:
        scan: Scan = self.builder.opener(node, node.operands, run)()
        target = replace(node, name=vector(node.name), dtype=self.dtype or node.dtype)
        masks = [replace(node, name=mask(k + 1, node.name), dtype="U8") for k in range(scan.experts)]
        kind = to_torch(target.dtype)

        def pack(segment: Segment) -> list[list[list[float]]]:
            sums: list[list[list[float]]] = [[[], [], []] for _ in masks]
            for tile in scan.tiles(segment):
                if self.stop.is_set():
                    raise Interrupted
                deltas = tile.task_vectors()
                whole, bits = self._masks(deltas)
                self.sink.write(target, tile.start, whole.to(kind))
                for k, (place, each) in enumerate(zip(masks, bits, strict=True)):
                    packed = np.packbits(each.reshape(-1).cpu().numpy() > 0)
                    self.sink.write(place, tile.start // 8, torch.from_numpy(packed))
                    parts = (each, deltas[k].abs(), whole.abs() * each)
                    for total, part in zip(sums[k], parts, strict=True):
                        total.extend(block_sums(part))
                self.advance(tile.numel * DTYPES[node.dtype].itemsize)
            return sums

        found = list(run(pack, scan.segments))
        return {
            "sums": [
                [math.fsum(v for each in found for v in each[k][i]) for i in range(3)] for k in range(scan.experts)
            ]
        }

    def _masks(self, deltas: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """The merged task vector, and 1.0 where an expert takes it."""
        if self.method == "emr":
            sign, most = unified(deltas)
            return most * sign, [(delta * sign).gt(0.0).to(delta.dtype) for delta in deltas]
        total = added(deltas)
        return total, [tall_mask(delta, total, self.threshold) for delta in deltas]
