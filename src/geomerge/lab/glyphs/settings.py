"""Sizes of the glyphs suite: its images, its backbone, its training."""

from __future__ import annotations

from dataclasses import dataclass, field

from geomerge.lab.glyphs.images import Warp


@dataclass(frozen=True)
class Training:
    """One kind of training.

    Attributes:
        steps, batch: How many steps of how many images.
        learning_rate, weight_decay, warmup: See `geomerge.lab.training.train`.
    """

    steps: int
    learning_rate: float
    batch: int = 128
    weight_decay: float = 0.01
    warmup: float = 0.1


@dataclass(frozen=True)
class Settings:
    """Everything that the models depend on beside the seed.

    Attributes:
        generator: The version of what makes the data; raised when it changes.
        side, patch: Pixels of an image's and of a patch's side.
        width, layers, attention_heads: Of the backbone.
        base_warp: How much the base's images differ from the fonts' glyphs.
        warp: How much the tasks' images do: more, so that the experts have to learn what the base has not seen.
        base, expert: Their training.
        base_images: How many different images the base sees.
        train, calibration, validation, test: Samples of each task's splits.
        handwritten: How many of scikit-learn's 1,797 digits each split is made from, in `SPLITS`' order.
        shots: Training samples of each class that its head is the mean of.
        head_scale: The logit of a sample of usual length in a class's direction. Much larger, and the base would be sure of
            its errors, and fine-tuning would first of all be busy with that.
    """

    generator: int = 1
    side: int = 24
    patch: int = 6
    width: int = 96
    layers: int = 4
    attention_heads: int = 4
    base_warp: Warp = field(default_factory=Warp)
    warp: Warp = field(
        default_factory=lambda: Warp(
            rotation=18.0, shear=0.25, scale=(0.7, 1.1), shift=0.06, contrast=0.5, noise=(0.05, 0.22)
        )
    )
    base: Training = field(default_factory=lambda: Training(500, 4e-3))
    expert: Training = field(default_factory=lambda: Training(280, 6e-4))
    base_images: int = 60_000
    train: int = 8000
    calibration: int = 500
    validation: int = 500
    test: int = 1000
    handwritten: tuple[int, int, int, int] = (900, 200, 200, 497)
    shots: int = 10
    head_scale: float = 7.0


SIZES = {
    "tiny": Settings(),
    "small": Settings(
        side=28,
        patch=4,
        width=192,
        layers=8,
        attention_heads=6,
        base=Training(20_000, 1e-3, batch=256),
        expert=Training(2000, 2e-4, batch=256),
        base_images=1_000_000,
        train=40_000,
        calibration=2000,
        validation=2000,
        test=4000,
    ),
}
"""``tiny`` ships with the package; ``small`` is meant for an accelerator."""
