"""The element types of weights: what safetensors calls them, what a recipe calls them, and how wide they are.

Inside geomerge a dtype is always the safetensors name (``"BF16"``); recipes, ``config.json`` and torch say
``"bfloat16"``. This table is the only place where the two meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from geomerge.errors import ModelError, OutOfRange, RecipeError, did_you_mean

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: The safetensors name.
        recipe: torch's name, which recipes and ``config.json`` use.
        itemsize: Bytes for each element.
        kind: ``float`` (16 bits or more), ``float8`` (codes that usually need a scale), ``int``, ``bool``, ``complex``.
    """

    name: str
    recipe: str
    itemsize: int
    kind: str


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("F64", "float64", 8, "float"),
        DType("F32", "float32", 4, "float"),
        DType("F16", "float16", 2, "float"),
        DType("BF16", "bfloat16", 2, "float"),
        DType("F8_E4M3", "float8_e4m3fn", 1, "float8"),
        DType("F8_E5M2", "float8_e5m2", 1, "float8"),
        DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 1, "float8"),
        DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 1, "float8"),
        DType("F8_E8M0", "float8_e8m0fnu", 1, "float8"),
        DType("I64", "int64", 8, "int"),
        DType("U64", "uint64", 8, "int"),
        DType("I32", "int32", 4, "int"),
        DType("U32", "uint32", 4, "int"),
        DType("I16", "int16", 2, "int"),
        DType("U16", "uint16", 2, "int"),
        DType("I8", "int8", 1, "int"),
        DType("U8", "uint8", 1, "int"),
        DType("BOOL", "bool", 1, "bool"),
        DType("C64", "complex64", 8, "complex"),
    )
}
"""By safetensors name. The format's types of less than a byte (F4, F6) are left out: nothing here can merge them."""

MERGEABLE: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
"""The recipe names that a merge can compute from and be written in."""

_BY_RECIPE = {d.recipe: d.name for d in DTYPES.values()}
_SHORT = {
    "fp16": "F16",
    "f16": "F16",
    "half": "F16",
    "bf16": "BF16",
    "fp32": "F32",
    "f32": "F32",
    "float": "F32",
    "fp64": "F64",
    "f64": "F64",
    "double": "F64",
}


def parse_dtype(text: object, where: object = None) -> str:
    """The safetensors name of a dtype that a person wrote: ``bfloat16``, ``torch.bfloat16``, ``bf16``, ``BF16``.

    Args:
        text: What the recipe or the command line says.
        where: The recipe's ``file:line``, for the error.

    Raises:
        RecipeError: An unknown dtype, or one that a merge cannot be written in (integers, float8).
    """
    place = None if where is None else str(where)
    word = text.strip().lower().removeprefix("torch.") if isinstance(text, str) else text
    name = (_SHORT.get(word) or _BY_RECIPE.get(word)) if isinstance(word, str) else None
    if name is None:
        hint = did_you_mean(word, MERGEABLE) if isinstance(word, str) else None
        raise RecipeError(f"unknown dtype {text!r}", where=place, hint=hint or f"known: {', '.join(MERGEABLE)}")
    if DTYPES[name].kind != "float":
        raise RecipeError(
            f"a merge cannot be written as {text!r}", where=place, hint=f"choose one of {', '.join(MERGEABLE)}"
        )
    return name


def recipe_name(name: str) -> str:
    """``"BF16"`` → ``"bfloat16"``."""
    return DTYPES[name].recipe


def out_of_range(tensor: str, name: str) -> OutOfRange:
    """The error for a tensor of which a dtype does not hold all merged elements."""
    most = {"F16": 65504.0, "F64": 1.8e308}.get(name, 3.4e38)
    return OutOfRange(
        f"the merged weights are beyond what {recipe_name(name)} holds (±{most:g})",
        where=tensor,
        hint="make the weights or lambda smaller" + (", or write `dtype: bfloat16`" if name == "F16" else ""),
    )


def to_torch(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name."""
    import torch

    found = getattr(torch, DTYPES[name].recipe)
    assert isinstance(found, torch.dtype)
    return found


def from_torch(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype.

    Raises:
        ModelError: safetensors cannot hold it.
    """
    recipe = str(dtype).removeprefix("torch.")
    if recipe not in _BY_RECIPE:
        raise ModelError(f"tensors of dtype {recipe} cannot be stored", hint="convert them to a float dtype first")
    return _BY_RECIPE[recipe]
