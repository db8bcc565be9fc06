"""Compiled loops of a method's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geomerge.methods import native
    from geomerge.methods.tile import Loop, Place, Scan

Merge = Callable[["native.Inputs", "Place", "native.Stored", "native.Doubles | None"], bool]
"""Writes a place of the output, from the inputs there; whether these are finite."""


def watched(scan: Scan, merge: Merge) -> Loop:
    """The loop that looks for the model to blame where inputs are not finite."""

    def looped(place: Place, out: native.Stored, beginning: native.Doubles | None) -> bool:
        done = merge(scan.stored(place.start, place.numel), place, out, beginning)
        if not done:
            scan.look_again(place.start, place.numel)
        return done

    return looped
