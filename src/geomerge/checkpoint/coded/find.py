"""Which tensors of a checkpoint are codes, and how they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from geomerge.checkpoint.coded.base import CannotDecode, Coded
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.header import TensorInfo

Read = Callable[[TensorInfo], bytes]

_ACTIVATIONS = (
    *(".input_scale", ".output_scale", ".k_scale", ".v_scale", ".scale_input"),
    *(".input_zero_point", ".output_zero_point", ".input_scale_ub"),
)
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
        _check_method(quantization)
        found, serving = _find(quantization, tensors, config, read)
        parts = {part for each in found.values() for part in each.stored}
        hidden = (parts | serving | {name for name in tensors if name.endswith(_ACTIVATIONS)}) - found.keys()
        _check_left(tensors, found, hidden)
    except CannotDecode as reason:
        return Decoding(refusal=str(reason))
    return Decoding(found, frozenset(hidden))


def _find(
    quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None, read: Read
) -> tuple[dict[str, Coded], set[str]]:
    """The decoded tensors, and stored ones that serve no decoding but are no tensors of the model either.

    What is there is found by the names and dtypes of the tensors: a checkpoint may mix layouts.
    """
    from geomerge.checkpoint.coded.bitsandbytes import find_four_bit
    from geomerge.checkpoint.coded.find_packed import empty_biases, find_row_packed, find_transposed, shapes_stored
    from geomerge.checkpoint.coded.packed import Gptq
    from geomerge.checkpoint.coded.scaled import find_scaled

    found, serving = find_four_bit(tensors, config, read)
    found |= find_row_packed(quantization, tensors, config, read)
    serving |= shapes_stored(tensors)
    transposed = find_transposed(quantization, tensors, config)
    if any(isinstance(each, Gptq) for each in transposed.values()):
        serving |= set(empty_biases(tensors, read))
    found |= transposed
    if quantization.get("format") != "pack-quantized":
        found |= find_scaled(quantization, tensors, config)
    return found, serving


def _check_method(quantization: Mapping[str, Any]) -> None:
    method, layout = quantization.get("quant_method"), quantization.get("format", "")
    if method == "compressed-tensors":
        if layout not in _FORMATS and "evidence" not in quantization:
            raise CannotDecode(f"codes of the format {layout!r} cannot be decoded")
    elif method not in _METHODS:
        raise CannotDecode("codes of this method cannot be decoded")


def _check_left(tensors: Mapping[str, TensorInfo], found: Mapping[str, Coded], hidden: Collection[str]) -> None:
    """Nothing that looks like codes may be taken for numbers."""
    from geomerge.checkpoint.coded.scaled import scale_of

    if not found:
        raise CannotDecode("no codes of a known format are in it")
    for name, info in tensors.items():
        if name in found or name in hidden:
            continue
        byte = info.dtype == "I8" or DTYPES[info.dtype].kind == "float8"
        scaled = info.dtype == "U8" and scale_of(name, tensors) is not None
        if byte or scaled or name.endswith(_PARTS):
            raise CannotDecode(f"{name} holds codes, or belongs to some, and what they stand for is not known")


_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision", "dense")
"""compressed-tensors' names of formats that can be decoded."""
_METHODS = (
    *("int8", "fp8", "fbgemm_fp8", "gptq", "awq", "gptq or awq", "bitsandbytes"),
    *(d.recipe for d in DTYPES.values() if d.kind == "float8"),
)
_PARTS = (".qweight", ".qzeros", ".weight_packed", ".absmax", ".SCB", "_zero_point")
