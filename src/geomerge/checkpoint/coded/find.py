"""Which tensors of a checkpoint are codes, and how they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from geomerge.checkpoint.coded.base import CannotDecode, Coded
from geomerge.checkpoint.coded.scaled import FORMATS, find_scaled
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.header import TensorInfo

Read = Callable[[TensorInfo], bytes]

_ACTIVATIONS = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".scale_input")
"""Scales of activations: they belong to the quantised model's arithmetic, not to its weights."""


@dataclass(frozen=True)
class Decoding:
    """How a checkpoint's codes are decoded.

    Attributes:
        coded: The decoded tensors by name.
        hidden: Stored tensors that are no tensors of the decoded model: parts of codes, scales of activations.
        refusal: Why the codes cannot be decoded; then there are no `coded`.
    """

    coded: Mapping[str, Coded] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    refusal: str | None = None


def find_coded(
    quantization: Mapping[str, Any] | None,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    read: Read,
) -> Decoding:
    """Find the codes of a checkpoint.

    Args:
        quantization: What `geomerge.checkpoint.coded.quantisation` found.
        tensors: The stored tensors.
        config: The model's config.
        read: Reads a whole stored tensor: for the small ones that say how others are stored.

    Raises:
        DamagedCheckpoint: The parts of a tensor do not fit each other.
    """
    if quantization is None:
        return Decoding()
    try:
        found = _find(quantization, tensors, config, read)
    except CannotDecode as reason:
        return Decoding(refusal=str(reason))
    if not found:
        return Decoding(refusal="it says that it is quantised, but no tensor of a known format was found")
    serving = {part for each in found.values() for part in each.stored}
    hidden = (serving | {name for name in tensors if name.endswith(_ACTIVATIONS)}) - found.keys()
    return Decoding(found, frozenset(hidden))


def _find(
    quantization: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    read: Read,  # noqa: ARG001
) -> Mapping[str, Coded]:
    method, layout = quantization.get("quant_method"), quantization.get("format", "")
    if (method == "compressed-tensors" and layout in FORMATS) or method in _eight_bit():
        return find_scaled(quantization, tensors, config)
    raise CannotDecode("codes of this format cannot be decoded")


def _eight_bit() -> tuple[str, ...]:
    return ("int8", "fp8", "fbgemm_fp8", *(d.recipe for d in DTYPES.values() if d.kind == "float8"))
