"""Weights stored as 8-bit codes with a scale for each row or for the whole tensor: ``W = codes · scale``.

That is what compressed-tensors (``int-quantized``, ``float-quantized``) and 8-bit checkpoints without a stated format hold
beside each linear layer: ``X.weight`` of int8 or float8, and ``X.weight_scale`` with one number, or one for each row.
Decoded tile by tile, such a model merges like any other; its scales are then no tensors of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.header import TensorInfo

FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
"""compressed-tensors' names of formats with one code in a byte."""

SCALE = "_scale"
"""What a weight's name and its scales' name differ by."""
_IGNORED = (".input_scale", ".output_scale", ".k_scale", ".v_scale")
"""Scales of activations: they belong to the quantised model's arithmetic, not to its weights."""


@dataclass(frozen=True)
class Scaled:
    """One decoded tensor.

    Attributes:
        scale: The name of its scales.
        dtype: What the decoded numbers are said to be: the dtype of the scales.
        rowwise: One scale for each row; else one for all.
    """

    scale: str
    dtype: str
    rowwise: bool


def scaled_tensors(
    quantization: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]
) -> dict[str, Scaled] | None:
    """The tensors that can be decoded, or `None` when the model holds codes that cannot.

    Args:
        quantization: What `geomerge.checkpoint.quantisation` found.
        tensors: The checkpoint's tensors.
    """
    if quantization is None:
        return {}
    known = quantization.get("format", "")
    if quantization.get("quant_method") == "compressed-tensors" and known not in FORMATS:
        return None
    if quantization.get("quant_method") not in ("compressed-tensors", "int8", *_float8()):
        return None
    found: dict[str, Scaled] = {}
    for name, info in tensors.items():
        if info.dtype != "I8" and DTYPES[info.dtype].kind != "float8":
            continue
        scale = tensors.get(name + SCALE)
        if scale is None or DTYPES[scale.dtype].kind != "float" or name + "_zero_point" in tensors:
            return None
        count = prod(scale.shape)
        if count != 1 and (len(info.shape) < 2 or count != info.shape[0]):
            return None
        found[name] = Scaled(scale.name, scale.dtype, count != 1)
    return found or None


def companions(tensors: Mapping[str, TensorInfo], scaled: Mapping[str, Scaled]) -> set[str]:
    """Tensors that only serve the codes: their scales, and those of activations."""
    if not scaled:
        return set()
    return {s.scale for s in scaled.values()} | {name for name in tensors if name.endswith(_IGNORED)}


def _float8() -> tuple[str, ...]:
    return ("fp8", *(d.recipe for d in DTYPES.values() if d.kind == "float8"))
