"""Metamorphic properties by name: what stays true of a method whatever its inputs are.

A method lists those that hold for it; the conformance suite (`geomerge.testing`) checks each of them, and checks that a
method which does not list one really lacks it. They are meant strictly, for every input: an exact tie of signs or a
change below a method's threshold that breaks a property takes it off the list. `SINGLE` and `IDENTICAL` are said of
neutral parameters (weights of 1, the defaults else), the others of all parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geomerge.methods.base import Method

PERMUTATION = "permutation"
"""The order of the experts (with their parameters) does not matter. An only expert changes places with the base."""

BASE = "base"
"""If all experts equal the base, so does the output, bit for bit."""

SINGLE = "single"
"""One expert (at neutral parameters) gives that expert."""

IDENTICAL = "identical"
"""Identical experts give that expert (all models identical, where there is one expert beside a base)."""

SCALE = "scale"
"""Multiplying all task vectors by c > 0, while the base stays, multiplies the merged one by c. Where there is no base, or
models are interpolated with it, all models are multiplied; so for the next two."""

SIGN = "sign"
"""Negating all task vectors negates the merged one."""

ROTATION = "rotation"
"""Rotating the rows and columns of all task vectors rotates the merged one."""

NAMES = (PERMUTATION, BASE, SINGLE, IDENTICAL, SCALE, SIGN, ROTATION)


def meaning(name: str, method: type[Method]) -> str:
    """A property in words, of that method."""
    what = {
        "required": "all task vectors",
        "optional": "all task vectors, or all models without a base,",
        "ignored": "",
    }
    moved = what[method.base_use] if method.adds_to_base() else "all models"
    result = "the merged one" if moved == "all task vectors" else "the result"
    return {
        PERMUTATION: "the order of the experts does not matter",
        BASE: "experts equal to the base give the base",
        SINGLE: "a single expert is returned",
        IDENTICAL: "identical experts give that expert",
        SCALE: f"scaling {moved} scales {result}",
        SIGN: f"negating {moved} negates {result}",
        ROTATION: f"rotating {moved} rotates {result}",
    }[name]
