"""bitsandbytes' four-bit codes (NF4, FP4): a table of 16 numbers and a scale for each block of elements.

``X.weight`` holds two codes in a byte, the first in its upper half, over the row-major elements; ``X.weight.quant_map`` is the
table, ``X.weight.absmax`` each block's largest magnitude, and ``X.weight.quant_state.bitsandbytes__nf4`` JSON with the shape
and the size of a block: ``W[i] = table[q[i]] · absmax[i // blocksize]``.

With double quantisation the magnitudes are codes of a byte themselves,
``absmax[j] = nested_map[c[j]] · nested_absmax[j // nested_blocksize] + offset``, in float32 as bitsandbytes computes it: a
magnitude is a float32 there, and its rounding is part of what the codes stand for.

Reference: Dettmers et al., QLoRA, 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from geomerge.checkpoint.coded.base import CannotDecode, Coded, Parts, damaged, need, said_dtype
from geomerge.checkpoint.header import TensorInfo
from geomerge.checkpoint.strict_json import parse_json

if TYPE_CHECKING:
    from torch import Tensor

_STATE = ".quant_state.bitsandbytes__"
_FORMAT = ".weight_format"


@dataclass(frozen=True)
class FourBit(Coded):
    """A tensor of four-bit codes.

    Attributes:
        block: Elements that share a scale.
        nested: Scales that share a scale of their own; 0 where they are plain numbers.
        offset: What is added to decoded scales.
    """

    block: int
    nested: int = 0
    offset: float = 0.0

    @property
    def stored(self) -> tuple[str, ...]:
        parts = ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if self.nested else ()))
        return (self.name, *(f"{self.name}.{part}" for part in parts))

    def decode(self, parts: Parts, start: int, stop: int) -> Tensor:
        import torch

        first, last = start // 2, -(-stop // 2)
        raw = parts.elements(self.name, first, last)
        codes = torch.stack((raw >> 4, raw & 15), 1).reshape(-1)[start - 2 * first : stop - 2 * first]
        begin, end = start // self.block, -(-stop // self.block)
        scales = self._scales(parts, begin, end).double().repeat_interleave(self.block)
        table = parts.whole(f"{self.name}.quant_map").reshape(-1).double()
        return table[codes.int()].mul_(scales[start - begin * self.block : stop - begin * self.block])

    def _scales(self, parts: Parts, begin: int, end: int) -> Tensor:
        import torch

        scales = parts.elements(f"{self.name}.absmax", begin, end)
        if not self.nested:
            return scales
        outer = parts.whole(f"{self.name}.nested_absmax").reshape(-1)[torch.arange(begin, end) // self.nested]
        return parts.whole(f"{self.name}.nested_quant_map").reshape(-1)[scales.int()] * outer + self.offset


def find_four_bit(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None, read: Callable[[TensorInfo], bytes]
) -> tuple[dict[str, Coded], set[str]]:
    """The tensors of four-bit codes, and those that only describe them.

    Raises:
        DamagedCheckpoint: The parts of a tensor do not fit each other.
    """
    found: dict[str, Coded] = {}
    serving = set()
    for key, state in tensors.items():
        if _STATE not in key:
            continue
        name = key.partition(_STATE)[0]
        serving.add(key)
        if name not in tensors or tensors[name].dtype != "U8":
            raise damaged(key, "describes four-bit codes that are not there")
        said = parse_json(read(state), key, what="the state of its codes")
        found[name] = _four_bit(name, said, tensors, config)
    for name, info in tensors.items():
        if name.endswith(_FORMAT):
            serving.add(name)
            if any(read(info)):
                raise CannotDecode(f"{name} says that the int8 codes are laid out for a kernel")
    return found, serving


def _four_bit(
    name: str, said: Mapping[str, Any], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None
) -> FourBit:
    def part(suffix: str, count: int, dtype: str = "F32") -> None:
        info = tensors.get(f"{name}.{suffix}")
        if info is None:
            raise damaged(name, f"has no {suffix} beside it")
        if info.dtype != dtype:
            raise damaged(info.name, f"holds {info.dtype} instead of {dtype}")
        need(info.name, (prod(info.shape),), (count,))

    shape, block, nested = said.get("shape"), said.get("blocksize"), said.get("nested_blocksize", 0)
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise damaged(name, f"is said to have the shape {shape!r:.100}")
    if type(block) is not int or type(nested) is not int or block < 1 or nested < 0:
        raise damaged(name, f"is said to have blocks of {block!r:.20} and {nested!r:.20}")
    offset = said.get("nested_offset", 0.0)
    if not isinstance(offset, int | float):
        raise damaged(name, f"is said to have the offset {offset!r:.20}")
    need(name, (prod(tensors[name].shape),), (-(-prod(shape) // 2),))
    blocks = -(-prod(shape) // block)
    part("quant_map", 16)
    part("absmax", blocks, "U8" if nested else "F32")
    if nested:
        part("nested_absmax", -(-blocks // nested))
        part("nested_quant_map", 256)
    dtype = said_dtype({"dtype": said.get("dtype")} if config is None else config)
    return FourBit(name, dtype, tuple(shape), block, nested, float(offset))
