"""The splits of the glyphs tasks, and what the base is trained on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from geomerge.lab.glyphs.characters import CLASSES, base_characters
from geomerge.lab.glyphs.images import handwritten, printed, warped
from geomerge.lab.glyphs.settings import Settings
from geomerge.lab.kinds import SPLITS, Split
from geomerge.lab.training import generator_for

if TYPE_CHECKING:
    from torch import Tensor


@functools.lru_cache(maxsize=40)
def split_data(settings: Settings, seed: int, task: str, split: Split) -> tuple[Tensor, Tensor]:
    """Images ``(samples, 1, side, side)`` and labels of one split of one task.

    Splits do not overlap: each is drawn under a name of its own, and the handwritten digits of one split are other
    digits than those of another.
    """
    import torch

    count = int(getattr(settings, split))
    generator = generator_for(seed, f"glyphs/{task}/{split}")
    if task != "handwritten":
        return printed(CLASSES[task], count, settings.side, settings.warp, generator)
    images, labels = handwritten()
    mine = digits_of(settings, seed, split)
    rounds = -(-count // len(mine))
    # Every digit of the split in turn, each time under another warp.
    order = torch.cat([mine[torch.randperm(len(mine), generator=generator)] for _ in range(rounds)])[:count]
    return warped(images[order], settings.side, settings.warp, generator), labels[order]


def digits_of(settings: Settings, seed: int, split: Split) -> Tensor:
    """Which of scikit-learn's digits belong to a split: their indices."""
    import torch

    order = torch.randperm(sum(settings.handwritten), generator=generator_for(seed, "glyphs/handwritten"))
    return torch.split(order, list(settings.handwritten))[SPLITS.index(split)]


def base_data(settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels of the characters that belong to no task."""
    generator = generator_for(seed, "glyphs/base")
    return printed(base_characters(), settings.base_images, settings.side, settings.base_warp, generator)
