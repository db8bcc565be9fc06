"""Metamorphic properties by name: what stays true of a method whatever its inputs are.

A method lists those that hold for it at its default parameters; the conformance tests check each of them, and check
that a method which does not list one really lacks it.
"""

PERMUTATION = "permutation"
"""The order of the experts (with their parameters) does not matter."""

BASE = "base"
"""If all experts equal the base, so does the output, bit for bit."""

SINGLE = "single"
"""One expert (at neutral parameters) gives that expert."""

IDENTICAL = "identical"
"""Identical experts give that expert."""

SCALE = "scale"
"""Multiplying all task vectors by c > 0 multiplies the merged task vector by c."""

SIGN = "sign"
"""Negating all task vectors negates the merged one."""

ROTATION = "rotation"
"""Rotating the rows and columns of all task vectors rotates the merged one."""

MEANING = {
    PERMUTATION: "the order of the experts does not matter",
    BASE: "experts equal to the base give the base",
    SINGLE: "a single expert is returned",
    IDENTICAL: "identical experts give that expert",
    SCALE: "scaling all task vectors scales the merged one",
    SIGN: "negating all task vectors negates the merged one",
    ROTATION: "rotating all task vectors rotates the merged one",
}
