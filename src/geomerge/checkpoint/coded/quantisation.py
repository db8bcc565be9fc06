"""Is this model quantised? Then its stored numbers are codes, and a merge of codes is garbage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.header import TensorInfo

_SCALE_SUFFIXES = ("_scale", "_scale_inv", "_scales", ".scale", ".scales")
_PACKED = {".qweight": "gptq or awq", ".weight_packed": "compressed-tensors", ".weight.absmax": "bitsandbytes"}
_PACKED |= {".SCB": "bitsandbytes"}


def quantisation(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    """What says that a model is quantised, or ``None``.

    The config's own statement is returned as it is. Without one, tensors give it away: float8 codes with a scale beside
    them, or the packed layouts of GPTQ, AWQ, compressed-tensors and bitsandbytes. Float8 tensors without any scale are
    plain numbers and no quantisation.

    Returns:
        A dict with at least ``quant_method``; when found by the tensors, also ``evidence``, a tensor's name.
    """
    for place in (config or {}, *(v for v in (config or {}).values() if isinstance(v, dict))):
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if isinstance(found, dict) and found:
                return {"quant_method": "unknown", **found}
    packed = tuple(_PACKED)
    codes = {"I8", "U8", *(name for name, dtype in DTYPES.items() if dtype.kind == "float8")}
    for name, info in tensors.items():
        if name.endswith(packed):
            return {"quant_method": next(m for s, m in _PACKED.items() if name.endswith(s)), "evidence": name}
        if info.dtype in codes:
            stem = name.removesuffix(".weight")
            candidates = [name + s for s in _SCALE_SUFFIXES] + [stem + s for s in (".scale_weight", *_SCALE_SUFFIXES)]
            scale = next((c for c in candidates if c in tensors), None)
            if scale is not None:
                return {"quant_method": DTYPES[info.dtype].recipe, "evidence": scale}
    return None
