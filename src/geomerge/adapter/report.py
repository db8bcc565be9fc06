"""What an operation on adapters did to each layer, and in all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geomerge.adapter.layers import Layer
from geomerge.adapter.low_rank import Truncated


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        module: Its path.
        shape: Of ΔW.
        rank: Of what was written.
        norm: ‖ΔW‖ before truncation.
        error: What truncation left out, ‖ΔW − B·A‖ (rounding to the output's dtype comes on top).
    """

    module: str
    shape: tuple[int, int]
    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """The error as a share of the norm."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Report:
    """An adapter that was made.

    Attributes:
        out: Its directory.
        how: What was done, in a few words.
        layers: Its low-rank layers.
        whole: Tensors that it holds whole.
        left_out: Tensors that changed and are in neither, with the reason.
        nbytes: Bytes of its tensors.
        notes: What the user should know.
    """

    out: Path
    how: str
    layers: tuple[LayerReport, ...]
    whole: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    nbytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def norm(self) -> float:
        """‖ΔW‖ over all layers."""
        return math.sqrt(math.fsum(each.norm**2 for each in self.layers))

    @property
    def error(self) -> float:
        """The error over all layers."""
        return math.sqrt(math.fsum(each.error**2 for each in self.layers))

    @property
    def relative(self) -> float:
        """The error over all layers as a share of the norm."""
        return self.error / self.norm if self.norm else 0.0

    def noted(self) -> Report:
        """With a note where truncation left out more of ‖ΔW‖² than is in the adapter."""
        share = self.relative**2
        if share <= 0.5:
            return self
        note = (
            f"truncation left out {share:.0%} of ‖ΔW‖²: this adapter is far from what it stands for; "
            "a higher rank holds more, or give the share that it is to hold (--energy 0.9)"
        )
        return replace(self, notes=(*self.notes, note))

    def to_json(self) -> dict[str, Any]:
        """Plain data without paths: the same for the same inputs, wherever they lie."""
        return {
            "how": self.how,
            "norm": self.norm,
            "error": self.error,
            "relative_error": self.relative,
            "bytes": self.nbytes,
            "layers": [
                {
                    "module": each.module,
                    "shape": list(each.shape),
                    "rank": each.rank,
                    "norm": each.norm,
                    "error": each.error,
                    "relative_error": each.relative,
                }
                for each in self.layers
            ],
            "whole": list(self.whole),
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
        }


def layer_reports(layers: Sequence[Layer], made: Sequence[Truncated]) -> tuple[LayerReport, ...]:
    """The reports of layers that were truncated."""
    return tuple(
        LayerReport(layer.module, layer.shape, each.factors.rank, each.norm, each.error)
        for layer, each in zip(layers, made, strict=True)
    )
