"""One code in a byte, with scales: ``W = (codes − zero point) · scale``.

A scale may belong to the whole tensor, to a row, to a group of elements in a row, or to a block of rows and columns:

* compressed-tensors (``int-quantized``, ``float-quantized``): ``X.weight`` of int8 or float8 and ``X.weight_scale``, with
  ``X.weight_zero_point`` where the scheme is not symmetric.
* FP8 in blocks of 128×128 (DeepSeek-V3, Qwen, transformers' ``fp8``): ``X.weight`` and ``X.weight_scale_inv``, which, whatever
  its name says, is multiplied by.
* fp8 checkpoints of diffusion models: ``X.weight`` and ``X.scale_weight``.
* bitsandbytes' LLM.int8: ``X.weight`` of int8 and ``X.SCB``, the largest magnitude of each row: ``W = codes · SCB / 127``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from geomerge.checkpoint.coded.base import CannotDecode, Parts, RowCoded, damaged, need, said_dtype
from geomerge.checkpoint.dtypes import DTYPES, to_torch
from geomerge.checkpoint.header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = (128, 128)
"""Rows and columns of the blocks of FP8 checkpoints that do not say otherwise."""


@dataclass(frozen=True)
class Scaled(RowCoded):
    """One tensor of scaled codes.

    Attributes:
        scale: The name of its scales.
        zero: The name of its zero points, if it has some.
        block: How many rows and how many columns share a scale.
        matrix: Rows in each of several matrices that are stored as one tensor (experts), which begin with a new block.
        divisor: What the scales are divided by.
        wide: The scales have more than 16 bits.
    """

    scale: str
    zero: str | None
    block: tuple[int, int]
    matrix: int = 0
    divisor: int = 1
    wide: bool = True

    @property
    def stored(self) -> tuple[str, ...]:
        return (self.name, self.scale) if self.zero is None else (self.name, self.scale, self.zero)

    @property
    def exact(self) -> str:
        # A code has at most 8 significant bits, 9 after a zero point; with those of a 16-bit scale it fits into float32.
        return "F64" if self.wide or self.divisor != 1 else "F32"

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.matrix else super().columns

    @property
    def encodable(self) -> bool:
        """Whether a merge can be written back in this scheme: a scale for each row or one for all, zero as zero."""
        rowwise = self.block == (1, self.columns)
        whole = self.block[0] * self.block[1] == prod(self.shape)
        return self.zero is None and self.divisor == 1 and not self.matrix and (rowwise or whole)

    def rows(self, parts: Parts, first: int, last: int) -> Tensor:
        dtype, columns = to_torch(self.exact), self.columns
        values = parts.elements(self.name, first * columns, last * columns).to(dtype).view(last - first, columns)
        if self.zero is not None:
            values -= self._spread(parts.whole(self.zero), first, last, dtype)
        values *= self._spread(parts.whole(self.scale), first, last, dtype)
        return values.div_(self.divisor) if self.divisor != 1 else values

    def _spread(self, grid: Tensor, first: int, last: int, dtype: Any) -> Tensor:
        """The scales of some rows, broadcastable to them."""
        import torch

        height, width = self.block
        across = -(-self.columns // width)
        row = torch.arange(first, last)
        which = row // height
        if self.matrix:
            which = row // self.matrix * -(-self.matrix // height) + row % self.matrix // height
        found = grid.reshape(-1, across)[which].to(dtype)
        return found if across == 1 else found.repeat_interleave(width, 1)[:, : self.columns]


def scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The name of a tensor's scales."""
    stem = name.removesuffix("weight")
    candidates = (f"{name}_scale", f"{name}_scale_inv", f"{stem}scale_weight", f"{stem}SCB")
    return next((c for c in candidates if c in tensors), None)


def find_scaled(
    quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None
) -> dict[str, Scaled]:
    """The int8 and float8 tensors that have scales.

    Raises:
        CannotDecode: One has none.
        DamagedCheckpoint: One has scales that do not fit.
    """
    found = {}
    for name, info in tensors.items():
        if info.dtype == "I8" or (DTYPES[info.dtype].kind == "float8" and not _is_scale(name)):
            if name.endswith("_zero_point"):
                continue
            scale = scale_of(name, tensors)
            if scale is None:
                raise CannotDecode(f"{name} holds 8-bit codes without a known scale")
            if info.dtype == "I8" and "fp8" in str(quantization.get("quant_method")):
                raise CannotDecode(f"{name} holds bytes in an FP8 model, where a byte is two 4-bit floats")
            found[name] = _scaled(info, tensors[scale], tensors, quantization, config)
    return found


def _is_scale(name: str) -> bool:
    return name.endswith(("_scale", "_scale_inv", ".scale_weight"))


def _scaled(
    info: TensorInfo,
    scale: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    quantization: Mapping[str, Any],
    config: Mapping[str, Any] | None,
) -> Scaled:
    if DTYPES[scale.dtype].kind != "float" and scale.dtype != "F8_E8M0":
        raise CannotDecode(f"{scale.name} holds scales of the dtype {DTYPES[scale.dtype].recipe}")
    zero = tensors.get(f"{info.name}_zero_point")
    if zero is not None:
        need(zero.name, zero.shape, scale.shape)
    rows = info.shape[0] if len(info.shape) > 1 else 1
    columns = max(prod(info.shape) // max(rows, 1), 1)
    grid, matrix = scale.shape, 0
    if len(info.shape) == len(grid) == 3 and grid[0] == rows and prod(grid) > rows:
        # Experts in one tensor, each with the scales of a matrix.
        matrix, (rows, columns), grid = info.shape[1], info.shape[1:], grid[1:]
    return Scaled(
        name=info.name,
        dtype=said_dtype(config, scale.dtype),
        shape=info.shape,
        scale=scale.name,
        zero=None if zero is None else zero.name,
        block=_block(scale.name, grid, rows, columns, _stated_block(quantization)),
        matrix=matrix,
        divisor=127 if scale.name.endswith("SCB") else 1,
        wide=DTYPES[scale.dtype].itemsize > 2,
    )


def _block(
    name: str, grid: tuple[int, ...], rows: int, columns: int, stated: tuple[int, int] | None
) -> tuple[int, int]:
    """How many rows and columns of a matrix share one of its scales."""
    count = prod(grid)
    if count == 1:
        return max(rows, 1), columns
    if count == rows and len(grid) - grid.count(1) <= 1:
        return 1, columns
    if len(grid) == 2:
        high, wide = grid
        for block in (stated, _BLOCK):
            if block is not None and (-(-rows // block[0]), -(-columns // block[1])) == (high, wide):
                return block
        if high == rows and wide and columns % wide == 0:
            return 1, columns // wide
    raise damaged(name, f"has the shape {list(grid)}, which does not fit codes of {rows} rows and {columns} columns")


def _stated_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size that a config gives, in the places where it may stand."""
    places = [quantization.get("weight_block_size")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        places.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    for said in places:
        if isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said):
            return said[0], said[1]
    return None
