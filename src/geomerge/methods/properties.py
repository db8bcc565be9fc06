"""Metamorphic properties by name: what stays true of a method whatever its inputs are.

A method lists those that hold for it; the conformance suite (`geomerge.testing`) checks each of them, and checks that a
method which does not list one really lacks it. They are meant strictly, for every input: an exact tie of signs or a
change below a method's threshold that breaks a property takes it off the list. `SINGLE` and `IDENTICAL` are said of
neutral parameters (weights of 1, the defaults else), the others of all parameters.
"""

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

MEANING = {
    PERMUTATION: "the order of the experts does not matter",
    BASE: "experts equal to the base give the base",
    SINGLE: "a single expert is returned",
    IDENTICAL: "identical experts give that expert",
    SCALE: "scaling all task vectors scales the merged one (or all models, where there is no base or it is interpolated with)",
    SIGN: "negating all task vectors (or models, likewise) negates the merged one",
    ROTATION: "rotating all task vectors (or models, likewise) rotates the merged one",
}
