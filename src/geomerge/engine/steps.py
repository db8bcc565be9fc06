"""The steps after a method that scale the merged task vector of each tensor by a number (column factors: see `activations`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from geomerge.anatomy import Part
from geomerge.errors import RecipeError
from geomerge.recipe.resolve import Lookup
from geomerge.recipe.values import Step, Where


class Steps:
    """A recipe's steps, looked up for one tensor after the other.

    Args:
        steps: As the recipe has them.
        used: Takes the filters that have matched a tensor.
    """

    def __init__(self, steps: Sequence[Step], used: set[int]) -> None:
        mine = [s for s in steps if s.name in ("scale", "lines")]
        self._steps = [(s.name, {k: Lookup(k, (s.parameters,), used) for k in s.parameters}, s.where) for s in mine]

    def at(self, part: Part, t: float, blocks: int) -> tuple[float, float | None]:
        """The product of all steps; and β·depth of LiNeS whose α is found from the model (see `Node.lift`).

        Args:
            part: The output's tensor, which filters test.
            t: The depth in the slice.
            blocks: How many the output's stack has that the tensor is in.

        Raises:
            RecipeError: A value that is no number, or is missing.
        """
        scale, lift = 1.0, None
        for name, lookups, where in self._steps:
            values = {k: found.value for k, lookup in lookups.items() if (found := lookup.at(part, t)) is not None}
            auto = name == "lines" and values.get("alpha", "auto") == "auto"
            last = "post_block_scale" in values and _behind(values.pop("post_block_scale"), where) == "last"
            try:
                numbers = {k: float(v) for k, v in values.items() if not (auto and k == "alpha")}
            except ValueError:
                raise RecipeError(
                    f"the step {name!r} takes numbers, not {_written(values)}", where=str(where)
                ) from None
            if name == "scale":
                scale *= numbers.get("value", 1.0)
                continue
            lifted = _lifted(numbers, part, blocks, where, last=last)
            if not auto:
                scale *= numbers["alpha"] + lifted
            elif lift is not None:
                raise RecipeError("two steps with `alpha: auto` cannot follow each other", where=str(where))
            else:
                lift = lifted
        return scale, lift


def _behind(value: Any, where: Where) -> str:
    """What LiNeS scales tensors behind the blocks by."""
    from geomerge.methods.after import Lines  # few recipes ask

    try:
        return str(Lines.parameters()["post_block_scale"].check(value))
    except ValueError as error:
        raise RecipeError(f"the step 'lines': {error}", where=str(where)) from None


def _written(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def _lifted(numbers: dict[str, float], part: Part, blocks: int, where: Where, *, last: bool) -> float:
    """β·depth of LiNeS; tensors outside of the blocks have depth 0 (those behind them 1, if they count as the `last`), and a
    single block, which is the last one, 1.
    """
    if "beta" not in numbers:
        raise RecipeError(
            f"the step 'lines' needs beta (for {part.name})",
            where=str(where),
            hint="add an entry without a filter: it is for all other tensors",
        )
    if part.position != "block":
        depth = 1.0 if last and part.position == "post" else 0.0
    else:
        depth = 1.0 if blocks == 1 else part.depth or 0.0
    return numbers["beta"] * depth
