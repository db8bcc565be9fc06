"""Images of characters: prototypes drawn once for every face, then warped, dimmed and covered with noise at random.

A sample is a function of (seed, purpose, its number): generating a split again gives the same images.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge.errors import RunError, UsageError
from geomerge.lab.glyphs.characters import FACES, may_have

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROTOTYPE = 56
"""Pixels of a prototype's side; the glyph's longer side fills `_INK` of them."""

_INK = 46


@dataclass(frozen=True)
class Warp:
    """How much an image may differ from its prototype.

    Attributes:
        rotation: Degrees, at most, to either side.
        shear: At most.
        scale: The least and the largest.
        shift: At most, as a share of the image's side.
        contrast: The least; the most is 1.
        noise: The least and the largest standard deviation of the pixels' noise.
    """

    rotation: float = 10.0
    shear: float = 0.15
    scale: tuple[float, float] = (0.85, 1.1)
    shift: float = 0.04
    contrast: float = 0.6
    noise: tuple[float, float] = (0.02, 0.12)


@functools.cache
def prototypes(characters: str) -> tuple[Tensor, Tensor, Tensor]:
    """Every character in every face that has it.

    Returns:
        Images ``(prototypes, PROTOTYPE, PROTOTYPE)`` in uint8, and for each character its first prototype's index and
        how many it has, ``(characters,)`` each.

    Raises:
        RunError: A character is in none of the faces.
    """
    import torch

    faces = [_face(name) for name in FACES]
    images: list[Tensor] = []
    first: list[int] = []
    count: list[int] = []
    for character in characters:
        drawn = [
            _draw(font, character)
            for font, known, name in faces
            if ord(character) in known and may_have(name, character)
        ]
        found = [image for image in drawn if image is not None]
        if not found:
            raise RunError(f"no bundled font draws {character!r}", hint="matplotlib's fonts are incomplete")
        first.append(len(images))
        count.append(len(found))
        images += found
    return torch.stack(images), torch.tensor(first), torch.tensor(count)


@functools.cache
def _face(name: str) -> tuple[Any, frozenset[int], str]:
    import matplotlib
    from matplotlib.ft2font import FT2Font

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    try:
        font = FT2Font(str(path))
    except (OSError, RuntimeError) as error:
        raise RunError(f"a font bundled with matplotlib cannot be read: {error}", where=str(path)) from None
    font.set_size(64, 72)
    return font, frozenset(font.get_charmap()), name


def _draw(font: Any, character: str) -> Tensor | None:
    """A prototype: the glyph's ink, cut out, scaled and centred. `None` for a blank."""
    import numpy as np
    import torch
    from PIL import Image

    font.set_text(character, 0.0)
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = np.asarray(font.get_image(), dtype=np.uint8)
    rows, columns = np.nonzero(ink.any(1))[0], np.nonzero(ink.any(0))[0]
    if not len(rows):
        return None
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    factor = _INK / max(ink.shape)
    size = (max(round(ink.shape[1] * factor), 1), max(round(ink.shape[0] * factor), 1))
    scaled = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BILINEAR))
    canvas = np.zeros((PROTOTYPE, PROTOTYPE), dtype=np.uint8)
    top, left = (PROTOTYPE - size[1]) // 2, (PROTOTYPE - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = scaled
    return torch.from_numpy(canvas)


@functools.cache
def handwritten() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, made as large as a prototype's ink.

    Returns:
        Images ``(1797, PROTOTYPE, PROTOTYPE)`` in uint8 and labels ``(1797,)``, in scikit-learn's order.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    import torch
    from torch.nn import functional

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "the handwritten digits are scikit-learn's, which is not installed", hint="pip install 'geomerge[eval]'"
        ) from None
    found = load_digits()
    small = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    large = functional.interpolate(small, size=(_INK, _INK), mode="bilinear", align_corners=False)
    margin = (PROTOTYPE - _INK) // 2
    padded = functional.pad(large, (margin,) * 4)[:, 0]
    return (padded * 255).round().to(torch.uint8), torch.tensor(found.target, dtype=torch.int64)


def warped(prototypes: Tensor, side: int, warp: Warp, generator: torch.Generator, chunk: int = 4096) -> Tensor:
    """An image of each prototype.

    Args:
        prototypes: ``(samples, PROTOTYPE, PROTOTYPE)`` in uint8.
        side: Pixels of an image's side.
        warp: How much it may differ.
        generator: For all that is random.
        chunk: Samples at a time; the numbers do not depend on it only if it stays the same.

    Returns:
        ``(samples, 1, side, side)`` in float32, the paper near -1 and the ink near 3: zero mean and unit variance, roughly.
    """
    import torch
    from torch.nn import functional

    parts = []
    for batch in torch.split(prototypes, chunk):
        n = len(batch)

        def uniform(low: float, high: float, n: int = n) -> Tensor:
            return low + (high - low) * torch.rand(n, generator=generator)

        turn = uniform(-warp.rotation, warp.rotation) * (torch.pi / 180)
        scale = 1 / uniform(*warp.scale)
        shear = uniform(-warp.shear, warp.shear)
        cos, sin = turn.cos() * scale, turn.sin() * scale
        matrix = torch.stack(
            [
                torch.stack([cos, shear * cos - sin, 2 * uniform(-warp.shift, warp.shift)], -1),
                torch.stack([sin, shear * sin + cos, 2 * uniform(-warp.shift, warp.shift)], -1),
            ],
            1,
        )
        grid = functional.affine_grid(matrix, [n, 1, side, side], align_corners=False)
        source = functional.avg_pool2d(batch[:, None].float() / 255, 3, stride=1, padding=1)
        ink = functional.grid_sample(source, grid, mode="bilinear", align_corners=False)
        ink = ink * uniform(warp.contrast, 1.0)[:, None, None, None]
        noise = torch.randn(ink.shape, generator=generator) * uniform(*warp.noise)[:, None, None, None]
        parts.append(4 * (ink + noise) - 1)
    return torch.cat(parts)


def printed(characters: str, count: int, side: int, warp: Warp, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random images of random characters in random faces.

    Returns:
        Images ``(count, 1, side, side)`` and labels ``(count,)``.
    """
    import torch

    images, first, faces = prototypes(characters)
    labels = torch.randint(len(characters), (count,), generator=generator)
    face = (torch.rand(count, generator=generator) * faces[labels]).long().clamp_max(faces[labels] - 1)
    return warped(images[first[labels] + face], side, warp, generator), labels
