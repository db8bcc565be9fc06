"""Block numbers for diffusers' U-shaped networks, whose names nest stage and unit.

Blocks follow the forward pass, as the community counts them when it merges Stable Diffusion block by block
(IN01…IN11, M00, OUT00…OUT11 are blocks 0…10, 11 and 12…23 of an SD 1.x UNet):

    down_blocks.i.{resnets,attentions,…}.j    one block for each (i, j)
    down_blocks.i.downsamplers                a block of its own, after the stage's units
    mid_block                                 one block, whatever it holds
    up_blocks.i.{resnets,attentions,…}.j      one block for each (i, j)
    up_blocks.i.upsamplers                    part of the stage's last unit

A block's number is not in its tensors' names, so these blocks order the depth and answer filters, but cannot be
renumbered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_PLACE = re.compile(r"(?:^|\.)(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?([a-z_]+)(?:\.(\d+))?")
# A key packs side, stage and unit, 20 bits each of the last two; the last unit number is kept for resamplers.
_BITS = 20
_LAST = (1 << _BITS) - 1
_UP = 2


def place(name: str) -> int | None:
    """Where a tensor stands in the forward pass, as a key that sorts; None when it is in no block."""
    found = _PLACE.search(name)
    if found is None:
        return None
    side, stage, kind, unit = found.groups()
    if side == "mid_block":
        return 1 << 2 * _BITS
    # ControlNet's `controlnet_down_blocks` and friends never reach here: a component must match whole.
    index = _LAST if kind in ("downsamplers", "upsamplers") else int(unit or 0)
    return ((_UP if side == "up_blocks" else 0) << 2 * _BITS) + (int(stage or 0) << _BITS) + index


def number(keys: Iterable[int]) -> dict[int, int]:
    """Block numbers for the keys of one network, from 0 in the order of the forward pass."""
    numbers: dict[int, int] = {}
    following = 0
    for key in sorted(set(keys)):
        if key >> 2 * _BITS == _UP and key & _LAST == _LAST and numbers:
            numbers[key] = following - 1
        else:
            numbers[key] = following
            following += 1
    return numbers
