"""GGML's types: elements in blocks of 32 or 256, each with its own scale.

``q8_0``  w = d·q, q a signed byte                                       32 elements in 34 bytes
``q4_0``  w = d·(q − 8), q four bits                                     32 in 18
``q4_1``  w = d·q + m                                                    32 in 20
``q5_0``  w = d·(q − 16), q five bits                                    32 in 22
``q5_1``  w = d·q + m                                                    32 in 24
``q4_K``  w = (d·sᵢ)·q − (dₘ·mᵢ), sᵢ and mᵢ of six bits for 32 elements   256 in 144
``q5_K``  the same with q of five bits                                   256 in 176
``q6_K``  w = (d·sᵢ)·(q − 32), sᵢ a signed byte for 16 elements           256 in 210

d, m and dₘ are float16. The products are exact in float32 and the sums in float64, so the decoded numbers are what the codes
stand for; GGML's own float32 arithmetic rounds the sums once.

References: the layouts in ``ggml-common.h`` of ggml (Gerganov et al.), 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geomerge.checkpoint.coded.base import Parts, RowCoded
from geomerge.checkpoint.dtypes import to_torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One of GGML's types.

    Attributes:
        name: GGML's name.
        elements, nbytes: Of a block.
        dtype: The safetensors name of a type that has no blocks.
        decode: Blocks of bytes ``(n, nbytes)`` → ``(n, elements)``; `None` where nothing is to be decoded, or cannot be.
        exact: A dtype that holds the decoded numbers.
    """

    name: str
    elements: int
    nbytes: int
    dtype: str | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    exact: str = "F64"

    @property
    def known(self) -> bool:
        """Whether it can be read."""
        return self.dtype is not None or self.decode is not None


@dataclass(frozen=True)
class BlockCoded(RowCoded):
    """A tensor in GGML's blocks, or one whose rows a GGUF file has in another order.

    Attributes:
        block: How its elements are stored.
        heads: llama.cpp turns pairs of neighbouring elements where Hugging Face's models turn the two halves of a head, so it
            stores the rows of some projections in another order: row (h, s, j) of h heads and 2 halves as (h, j, s). The
            number of heads where that is so, else 0.
    """

    block: Block
    heads: int = 0

    @property
    def stored(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def exact(self) -> str:
        return self.block.exact

    @property
    def columns(self) -> int:
        # A vector whose elements are reordered has rows of one element.
        return 1 if self.heads and len(self.shape) == 1 else super().columns

    def rows(self, parts: Parts, first: int, last: int) -> Tensor:
        if not self.heads:
            return self._stored_rows(parts, first, last)
        import torch

        half = self.shape[0] // self.heads // 2
        found = []
        row = first
        while row < last:
            # A run of one half of one head lies at every other row of the head.
            head, within = divmod(row, 2 * half)
            part, j = divmod(within, half)
            count = min(half - j, last - row)
            start = head * 2 * half + 2 * j + part
            found.append(self._stored_rows(parts, start, start + 2 * count - 1)[::2])
            row += count
        return torch.cat(found)

    def _stored_rows(self, parts: Parts, first: int, last: int) -> Tensor:
        width = self.columns // self.block.elements * self.block.nbytes
        if self.block.decode is None:
            values = parts.elements(self.name, first * self.columns, last * self.columns)
            return values.to(to_torch(self.exact)).view(last - first, self.columns)
        raw = parts.elements(self.name, first * width, last * width)
        return self.block.decode(raw.view(-1, self.block.nbytes)).view(last - first, self.columns)


def _half(raw: Tensor) -> Tensor:
    """Two bytes of each block as a number: shape ``(n, 1)``, float32."""
    import torch

    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor, group: int) -> Tensor:
    """Codes of four bits: the low halves of `group` bytes, then their high halves, and so on. Shape ``(n, 2·bytes)``."""
    import torch

    grouped = raw.view(len(raw), -1, 1, group)
    return torch.cat((grouped & 15, grouped >> 4), 2).view(len(raw), -1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """The bits of four bytes, lowest first, as 0 or 16: shape ``(n, 32)``."""
    import torch

    return (((raw.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1) << 4).reshape(len(raw), 32)


def _q8_0(raw: Tensor) -> Tensor:
    import torch

    return raw[:, 2:].contiguous().view(torch.int8).float().mul_(_half(raw[:, :2]))


def _q4_0(raw: Tensor) -> Tensor:
    return _nibbles(raw[:, 2:].contiguous(), 16).float().sub_(8).mul_(_half(raw[:, :2]))


def _q4_1(raw: Tensor) -> Tensor:
    d, m = _half(raw[:, :2]).double(), _half(raw[:, 2:4]).double()
    return _nibbles(raw[:, 4:].contiguous(), 16).double().mul_(d).add_(m)


def _q5_0(raw: Tensor) -> Tensor:
    codes = _nibbles(raw[:, 6:].contiguous(), 16) | _fifth_bits(raw[:, 2:6])
    return codes.float().sub_(16).mul_(_half(raw[:, :2]))


def _q5_1(raw: Tensor) -> Tensor:
    codes = _nibbles(raw[:, 8:].contiguous(), 16) | _fifth_bits(raw[:, 4:8])
    return codes.double().mul_(_half(raw[:, :2]).double()).add_(_half(raw[:, 2:4]).double())


def _six_bit_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits in twelve bytes: ``(n, 8)`` each.

    The first four of each have their bits together; the last four have four bits in the third group of bytes, and two at the
    top of the bytes of the first four.
    """
    import torch

    low, middle, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), 1)
    minima = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), 1)
    return scales, minima


def _with_minima(raw: Tensor, codes: Tensor) -> Tensor:
    scales, minima = _six_bit_scales(raw[:, 4:16])
    step = (_half(raw[:, :2]) * scales).double().unsqueeze(2)
    least = (_half(raw[:, 2:4]) * minima).double().unsqueeze(2)
    return codes.view(-1, 8, 32).double().mul_(step).sub_(least).view(-1, 256)


def _q4_k(raw: Tensor) -> Tensor:
    return _with_minima(raw, _nibbles(raw[:, 16:].contiguous(), 32))


def _q5_k(raw: Tensor) -> Tensor:
    import torch

    # Byte i of 32 has the fifth bits of the i-th elements of the eight groups.
    bits = ((raw[:, 16:48].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8).view(1, 8, 1)) & 1) << 4
    return _with_minima(raw, _nibbles(raw[:, 48:].contiguous(), 32) | bits.reshape(len(raw), 256))


def _q6_k(raw: Tensor) -> Tensor:
    import torch

    low = _nibbles(raw[:, :128].contiguous(), 64).view(-1, 256)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    high = ((raw[:, 128:192].reshape(len(raw), 2, 1, 32) >> shifts) & 3) << 4
    codes = (low | high.view(-1, 256)).float().sub_(32).view(-1, 16, 16)
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    return codes.mul_((scales * _half(raw[:, 208:])).unsqueeze(2)).view(-1, 256)


TYPES: dict[int, Block] = {
    0: Block("f32", 1, 4, "F32", exact="F32"),
    1: Block("f16", 1, 2, "F16", exact="F32"),
    2: Block("q4_0", 32, 18, decode=_q4_0, exact="F32"),
    3: Block("q4_1", 32, 20, decode=_q4_1),
    6: Block("q5_0", 32, 22, decode=_q5_0, exact="F32"),
    7: Block("q5_1", 32, 24, decode=_q5_1),
    8: Block("q8_0", 32, 34, decode=_q8_0, exact="F32"),
    9: Block("q8_1", 32, 40),
    10: Block("q2_K", 256, 84),
    11: Block("q3_K", 256, 110),
    12: Block("q4_K", 256, 144, decode=_q4_k),
    13: Block("q5_K", 256, 176, decode=_q5_k),
    14: Block("q6_K", 256, 210, decode=_q6_k, exact="F32"),
    15: Block("q8_K", 256, 292),
    16: Block("iq2_xxs", 256, 66),
    17: Block("iq2_xs", 256, 74),
    18: Block("iq3_xxs", 256, 98),
    19: Block("iq1_s", 256, 50),
    20: Block("iq4_nl", 32, 18),
    21: Block("iq3_s", 256, 110),
    22: Block("iq2_s", 256, 82),
    23: Block("iq4_xs", 256, 136),
    28: Block("f64", 1, 8, "F64", exact="F64"),
    29: Block("iq1_m", 256, 56),
    30: Block("bf16", 1, 2, "BF16", exact="F32"),
    34: Block("tq1_0", 256, 54),
    35: Block("tq2_0", 256, 66),
    39: Block("mxfp4", 32, 17),
}
"""By GGML's number. Those without a decoder are known so that an error can name them."""
