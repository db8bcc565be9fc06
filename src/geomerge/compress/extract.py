"""One expert out of compressed ones: θ₀ + factor · mask ⊙ vector, a model directory again."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.layout import DEFAULT_SHARD_SIZE, plan_layout
from geomerge.checkpoint.reader import open_checkpoint
from geomerge.checkpoint.writer import OutputDirectory
from geomerge.compress.container import FILE, Contents, mask, vector
from geomerge.engine.build import Builder
from geomerge.engine.execute import Facts, Interrupted, Threads, Work
from geomerge.engine.plan import Node
from geomerge.engine.planner import make_plan
from geomerge.engine.run import Progress, Report, write_model_files
from geomerge.engine.sinks import FileSink
from geomerge.engine.sources import FileSource, read_into
from geomerge.errors import DamagedCheckpoint, IncompatibleModels
from geomerge.late import without_gradients
from geomerge.methods.tile import BLOCK
from geomerge.recipe import loads
from geomerge.version import __version__

PIECE = 1 << 18
"""Elements at a time: a multiple of 8, so that a piece's bits are whole bytes."""

assert PIECE % BLOCK == 0


def extract(
    packed: str | Path,
    task: str | int,
    out: str | Path,
    *,
    base: str | Path,
    force: bool = False,
    threads: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write one expert as a model directory.

    Config, tokenizer and other files are the base's.

    Args:
        packed: What `geomerge.compress.compress` made.
        task: The expert's name, or its number from 1.
        out: The directory to make.
        base: The base that the experts were compressed against.
        force: Replace an existing model directory.
        threads: By default one for each core that the process may use.
        allow_pickle: Read pickled weights (weights only).
        progress: Told how far it is.

    Raises:
        UsageError: There are no compressed experts, none of that name, or the place is taken.
        IncompatibleModels: The base is another one.
        DamagedCheckpoint: A tensor is missing or has another shape.
    """
    begun = time.perf_counter()
    place = Path(packed)
    contents = Contents.read(place)
    number = contents.number(task)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(base)}]}
    plan, opened = make_plan(loads(json.dumps(recipe), ""), allow_pickle=allow_pickle)
    try:
        if plan.inputs[0].fingerprint != contents.fingerprint:
            raise IncompatibleModels(
                f"the experts were compressed against another base ({contents.base}, fingerprint {contents.fingerprint[:16]})",
                where=str(base),
            )
        with open_checkpoint(str(place)) as held:
            nodes = list(plan.output_nodes())
            _check(held, nodes, number, place)
            if contents.packed not in (None, held.fingerprint()):
                raise DamagedCheckpoint(
                    f"the merged vector and masks are not those that {FILE} describes: of other experts, or changed",
                    where=str(place),
                    hint="compress the experts again",
                )
            layout = plan_layout(
                [(n.name, n.dtype, n.shape) for n in nodes], DEFAULT_SHARD_SIZE, {"geomerge": __version__}
            )
            with OutputDirectory(out, force, inputs=[place, Path(plan.inputs[0].path)]) as output:
                try:
                    output.create(layout)
                    lock = threading.Lock()

                    def advance(nbytes: int) -> None:
                        if progress is not None:
                            with lock:
                                progress.advance(nbytes)

                    if progress is not None:
                        progress.start(plan.nbytes, 0)
                    work = _Give(
                        Builder(plan, opened),
                        FileSink(output, layout),
                        advance,
                        threading.Event(),
                        held,
                        number,
                        list(contents.tasks.values())[number - 1],
                    )
                    Threads(work, threads).run(list(enumerate(nodes)), lambda entries: None)
                    if progress is not None:
                        progress.finish()
                    for checkpoint in (*opened, held):
                        checkpoint.verify_unchanged()
                    write_model_files(plan, output)
                    final = output.finish()
                except BaseException:
                    output.abandon()  # there is nothing that a later run could go on with
                    raise
    finally:
        for checkpoint in opened:
            checkpoint.close()
    return Report(
        out=final,
        seconds=time.perf_counter() - begun,
        nbytes=plan.nbytes,
        tensors=len(nodes),
        resumed=0,
        rounding_loss=None,
        codes=(),
        notes=plan.notes,
    )


def _check(held: Checkpoint, nodes: list[Node], number: int, place: Path) -> None:
    known = {node.name: node for node in nodes}
    for name, info in held.tensors.items():
        if not name.startswith("vector."):
            continue
        node = known.get(name.removeprefix("vector."))
        bits = held.tensors.get(mask(number, name.removeprefix("vector.")))
        size = math.prod(info.shape)
        if (
            node is None
            or node.shape != info.shape
            or bits is None
            or bits.shape != (-(-size // 8),)
            or bits.dtype != "U8"
        ):
            raise DamagedCheckpoint(f"{name} and its masks do not fit the base", where=str(place))


@dataclass
class _Give(Work):
    """Writes θ₀ + factor · mask ⊙ vector, and the base's tensors where the experts changed nothing."""

    held: Checkpoint = field(default=None)  # type: ignore[assignment]
    number: int = 1
    factor: float = 1.0

    @without_gradients()
    def make(self, node: Node, run: Callable[..., Iterable[Any]] = map) -> Facts:
        info = self.held.tensors.get(vector(node.name))
        if info is None:
            return super().make(node, run)
        bits = self.held.tensors[mask(self.number, node.name)]
        assert info.file is not None
        assert bits.file is not None
        base = self.builder.source(node.operands[0], node)
        change = FileSource(self.held, info, vector(node.name))
        descriptor, label = self.held.descriptor(bits.file), mask(self.number, node.name)
        round_ = self.builder.rounding(node)

        def give(start: int) -> None:
            if self.stop.is_set():
                raise Interrupted
            count = min(PIECE, node.numel - start)
            values, added = (torch.empty(count, dtype=torch.float64) for _ in range(2))
            base.read(start, values)
            change.read(start, added)
            packed = torch.empty(-(-count // 8), dtype=torch.uint8)
            read_into(descriptor, packed, bits.offset + start // 8, label)
            chosen = torch.from_numpy(np.unpackbits(packed.numpy(), count=count))
            self.sink.write(node, start, round_(start, values.addcmul_(added, chosen.double(), value=self.factor)))
            self.advance(count * DTYPES[node.dtype].itemsize)

        list(run(give, range(0, node.numel, PIECE)))
        return {}
