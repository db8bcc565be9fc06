"""Codes of a few bits in 32-bit words, with a scale for each group of elements of a row.

===================  =============================================  =======================================
format               words                                          W[o, i], with g the group of column i
===================  =============================================  =======================================
compressed-tensors   ``X.weight_packed``: along rows                (q − 2ᵇ⁻¹)·s[o, g] or (q − z[o, g])·s[o, g]
GPTQ                 ``X.qweight`` of Wᵀ: along columns of Wᵀ       (q − z[g, o] − 1)·s[g, o]; v2 without the 1
AWQ (``gemm``)       ``X.qweight`` of Wᵀ: along rows, interleaved   (q − z[g, o])·s[g, o]
===================  =============================================  =======================================

The first element is in the lowest bits. Zero points are packed as well, along the output dimension; AWQ has its eight elements
in the order 0 2 4 6 1 3 5 7. GPTQ and AWQ store the transpose, so a row of W is a column of their words: the words (a quarter
of the 16-bit weight) are read once and kept while the tensor is worked on, and are decoded a few rows at a time.

References: Frantar et al., GPTQ, 2022 (layout: AutoGPTQ); Lin et al., AWQ, 2023 (layout: llm-awq); compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from geomerge.checkpoint.coded.base import Parts, RowCoded, damaged
from geomerge.checkpoint.dtypes import to_torch

if TYPE_CHECKING:
    from torch import Tensor

WORD = 32
AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word AWQ has its j-th element, in units of four bits."""


@dataclass(frozen=True)
class _Grouped(RowCoded):
    """Codes of a few bits with groups.

    Attributes:
        words, scale: The names of the codes and the scales.
        zero: The name of the zero points, if there are some.
        groups: The name of the vector that says to which group each column belongs, if there is one.
        bits: Of a code.
        group: Columns in a group, where no vector says it.
        wide: The scales have more than 16 bits.
    """

    words: str
    scale: str
    zero: str | None
    groups: str | None
    bits: int
    group: int
    wide: bool

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(n for n in (self.words, self.scale, self.zero, self.groups) if n is not None)

    @property
    def exact(self) -> str:
        # A difference of codes has at most 9 bits; with those of a 16-bit scale the product fits into float32.
        return "F64" if self.wide else "F32"

    @property
    def mask(self) -> int:
        return (1 << self.bits) - 1

    def group_of(self, parts: Parts, count: int) -> Tensor:
        """The group of each column.

        Raises:
            DamagedCheckpoint: One belongs to a group that has no scale.
        """
        import torch

        if self.groups is None:
            return torch.arange(self.columns) // self.group
        found = parts.whole(self.groups).long()
        if int(found.min()) < 0 or int(found.max()) >= count:
            raise damaged(self.groups, f"names the group {int(found.max())} of {count}")
        return found


@dataclass(frozen=True)
class RowPacked(_Grouped):
    """compressed-tensors' ``pack-quantized``: words along rows."""

    def rows(self, parts: Parts, first: int, last: int) -> Tensor:
        import torch

        dtype = to_torch(self.exact)
        width = -(-self.columns * self.bits // WORD)
        words = parts.elements(self.words, first * width, last * width).view(last - first, width)
        codes = unpack(words, self.bits)[:, : self.columns].to(dtype)
        scales = parts.whole(self.scale)
        scales = scales.reshape(-1, scales.shape[-1] if scales.dim() > 1 else 1)
        scales = scales[first:last] if len(scales) > 1 else scales
        group = self.group_of(parts, scales.shape[1]) if scales.shape[1] > 1 else torch.zeros(1, dtype=torch.int64)
        if self.zero is None:
            codes -= 1 << (self.bits - 1)
        else:
            codes -= at(parts.whole(self.zero), torch.arange(first, last), self.bits).to(dtype)[:, group]
        return codes.mul_(scales.to(dtype)[:, group])


@dataclass(frozen=True)
class Gptq(_Grouped):
    """GPTQ: the transpose, words along its columns.

    Attributes:
        offset: What is added to a stored zero point: 1 in the first version of the format.
    """

    offset: int = 1

    def rows(self, parts: Parts, first: int, last: int) -> Tensor:
        import torch

        assert self.zero is not None
        dtype = to_torch(self.exact)
        # Shape (words, 1, rows) >> (places, 1): the elements of a word are neighbours in a column of Wᵀ.
        words = parts.whole(self.words)[:, first:last].unsqueeze(1)
        shifts = torch.arange(0, WORD, self.bits, dtype=torch.int32).view(1, -1, 1)
        codes = ((words >> shifts) & self.mask).reshape(-1, last - first)
        scales = parts.whole(self.scale)[:, first:last].to(dtype)
        zeros = at(parts.whole(self.zero).T, torch.arange(first, last), self.bits).T.to(dtype) + self.offset
        group = self.group_of(parts, len(scales))
        return codes.to(dtype).sub_(zeros[group]).mul_(scales[group]).T


@dataclass(frozen=True)
class Awq(_Grouped):
    """AWQ: the transpose, words along its rows, interleaved."""

    def rows(self, parts: Parts, first: int, last: int) -> Tensor:
        assert self.zero is not None
        dtype = to_torch(self.exact)
        scales = parts.whole(self.scale)[:, first:last].to(dtype)
        group = self.group_of(parts, len(scales))
        zeros = self._columns(parts.whole(self.zero), first, last).to(dtype)
        codes = self._columns(parts.whole(self.words), first, last).to(dtype)
        return codes.sub_(zeros[group]).mul_(scales[group]).T

    def _columns(self, words: Tensor, first: int, last: int) -> Tensor:
        import torch

        each = WORD // self.bits
        begin, end = first // each, -(-last // each)
        shifts = torch.tensor(AWQ_PLACE, dtype=torch.int32) * self.bits
        found = ((words[:, begin:end].unsqueeze(2) >> shifts) & self.mask).reshape(len(words), -1)
        return found[:, first - begin * each : last - begin * each]


def unpack(words: Tensor, bits: int) -> Tensor:
    """All codes of some rows of words: ``(rows, n)`` → at least ``(rows, n·32 // bits)``."""
    import torch

    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
        return ((words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)).reshape(len(words), -1)
    return at(words.T, torch.arange(words.shape[1] * WORD // bits), bits).T


def at(words: Tensor, index: Tensor, bits: int) -> Tensor:
    """Single codes of columns of words: ``(n, columns)`` → ``(len(index), columns)``. A code may lie in two words."""
    place = index * bits
    word, shift = place // WORD, (place % WORD).unsqueeze(1)
    unsigned = words.long() & 0xFFFFFFFF
    found = unsigned[word] >> shift
    if WORD % bits:
        found |= unsigned[(word + 1).clamp(max=len(words) - 1)] << (WORD - shift)
    return found & ((1 << bits) - 1)
