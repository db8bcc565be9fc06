"""A checkpoint's tensor as a source of elements: as it is stored, decoded from codes, changed by an adapter."""

from __future__ import annotations

import math

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.header import TensorInfo
from geomerge.checkpoint.scaled import SCALE
from geomerge.engine.lora import LoraSource, whole
from geomerge.engine.sources import FileSource, ScaledSource
from geomerge.methods.tile import Source, TensorSource


def raw_source(checkpoint: Checkpoint, info: TensorInfo, label: str) -> Source:
    """A tensor as it lies in a file or in memory."""
    if info.file is None:
        return TensorSource(checkpoint.memory[info.name], label)
    return FileSource(checkpoint.descriptor(info.file), info, label)


def stored_source(checkpoint: Checkpoint, name: str, label: str) -> Source:
    """A tensor as the model has it.

    Args:
        checkpoint: The opened model.
        name: The tensor.
        label: Model and tensor, for messages.
    """
    info = checkpoint.tensors[name]
    found = raw_source(checkpoint, info, label)
    scaled = (checkpoint.scaled or {}).get(name)
    if scaled is not None:
        height = info.shape[0] if scaled.rowwise else 1
        scales = raw_source(checkpoint, checkpoint.tensors[scaled.scale], f"{label}{SCALE}")
        found = ScaledSource(found, scales, height, math.prod(info.shape) // max(height, 1))
    change = checkpoint.changes.get(name)
    if change is None or not change.b:
        return found
    made = [
        whole(raw_source(checkpoint, checkpoint.factors[n], f"{label}: {n}"), checkpoint.factors[n].shape)
        if n
        else None
        for n in (change.b, change.a, change.magnitude)
    ]
    assert made[0] is not None
    return LoraSource(found, info.shape, change, made[0], made[1], made[2])
