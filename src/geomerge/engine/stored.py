"""A checkpoint's tensor as a source of elements: as it is stored, decoded from codes, changed by an adapter."""

from __future__ import annotations

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.header import TensorInfo
from geomerge.engine.lora import LoraSource, whole
from geomerge.engine.sources import FileSource, decoded_source
from geomerge.methods.tile import Source, TensorSource


def raw_source(checkpoint: Checkpoint, info: TensorInfo, label: str) -> Source:
    """A tensor as it lies in a file or in memory."""
    if info.file is None:
        return TensorSource(checkpoint.memory[info.name], label)
    return FileSource(checkpoint, info, label)


def stored_source(checkpoint: Checkpoint, name: str, label: str) -> Source:
    """A tensor as the model has it.

    Args:
        checkpoint: The opened model.
        name: The tensor.
        label: Model and tensor, for messages.
    """
    found = decoded_source(checkpoint, name, label)
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
    return LoraSource(found, checkpoint.logical[name].shape, change, made[0], made[1], made[2])
