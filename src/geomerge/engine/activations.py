"""Activation-informed merging (AIM): which column factors a tensor gets, from a file of activations.

τ_m ← τ_m ⊙ (1 − (1 − ω)·aⱼ / max a) with aⱼ the mean |xⱼ| of a weight's input feature j on the base model (Nobari et al. 2025,
Activation-Informed Merging, arXiv:2502.02421): what the base uses most is changed least. The file holds one vector for each
weight that has activations, in the base's tensor names; `geomerge.observe.activations` makes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from geomerge import anatomy
from geomerge.anatomy.components import inner_name
from geomerge.engine.adapted import stored_transposed
from geomerge.engine.plan import Columns
from geomerge.errors import IncompatibleModels, RecipeError
from geomerge.recipe.resolve import Lookup

if TYPE_CHECKING:
    from geomerge.anatomy import Part
    from geomerge.engine.models import Model, Models
    from geomerge.recipe.values import Step

_OMEGA = 0.4
"""The value of the authors' experiments."""


class Activations:
    """The activations of one step, fitted to one tensor after the other.

    Args:
        step: The step of the recipe.
        models: Opens the file.
        base: The model whose activations they are.
        used: Takes the filters that have matched a tensor.

    Raises:
        RecipeError: The file has activations of what is no tensor of the base.
    """

    def __init__(self, step: Step, models: Models, base: Model, used: set[int]) -> None:
        assert step.statistics is not None
        self.step, self.base = step, base
        self.file = models.get(step.statistics, step.where)
        self._omega = Lookup("omega", (step.parameters,), used)
        self._found = self._asked = 0
        self._stored = self._named()

    def at(self, part: Part, name: str, shape: tuple[int, ...], t: float) -> Columns | None:
        """The factors of one tensor; `None` where there are none.

        Args:
            part: The output's tensor, which filters test.
            name: Its name in the base (of a base under another model's names: there, see `geomerge.engine.components`).
            shape: Its shape.
            t: The depth in the slice.

        Raises:
            RecipeError: ω is out of range.
            IncompatibleModels: The activations do not fit the tensor.
        """
        self._asked += 1
        found = self._omega.at(part, t)
        place = self.step.where if found is None else found.where
        try:
            omega = _OMEGA if found is None else float(found.value)
        except ValueError:
            raise RecipeError(f"omega must be a number, not {found and found.value!r}", where=str(place)) from None
        if not 0 <= omega <= 1:
            raise RecipeError(f"omega must lie in [0, 1], not {omega:g}", where=str(place))
        if name not in self._stored or part.role == "embedding":
            return None
        axis = self._axis(name, shape)
        self._found += 1
        return Columns(self.file.operand(self._stored[name]), omega, axis) if omega < 1 else None

    def _named(self) -> dict[str, str]:
        """The base's tensors that have activations → their names in the file: as they are stored, or as a version of
        transformers calls them in memory, which may be with other prefixes (see `geomerge.anatomy.components`)."""
        base, file = self.base, self.file.tensors
        own = {base.own.get(name, name): name for name in (*base.tensors, *base.anatomy.tied)}
        found = {own[name]: name for name in file if name in own}
        others = {name: kind.shape for name, kind in file.items() if name not in own}
        known = (
            {(part.component, inner_name(name)): name for name, part in base.anatomy.parts.items()} if others else {}
        )
        for name, part in anatomy.read(others, base.config).parts.items() if others else ():
            meant = known.get((part.component, inner_name(name)))
            if meant is None:
                raise RecipeError(
                    f"{self.file} has activations of {name!r}, which is no tensor of {base}",
                    where=str(self.step.where),
                    hint=f"observe {base} itself: `geomerge.observe.activations` makes such a file",
                )
            found.setdefault(meant, name)
        return found

    @property
    def note(self) -> str:
        """How many tensors have activations."""
        return (
            f"aim: {self._found} of {self._asked} merged tensors have activations in {self.file}, "
            "the others are left as they are"
        )

    def _axis(self, name: str, shape: tuple[int, ...]) -> int:
        """The dimension of the input features: the last, but the first of weights that are stored as (in, out)."""
        length = self.file.tensors[self._stored[name]].shape
        fits = [axis for axis in range(len(shape)) if length == (shape[axis],)] if len(shape) in (1, 2) else []
        known = self._known(name, shape)
        if known is not None:
            fits = [axis for axis in fits if axis == known]
        if len(fits) == 2:
            others = {axis for each in self._stored if (axis := self._evident(each)) is not None}
            if len(others) != 1:
                raise IncompatibleModels(
                    f"{name} is square {list(shape)}: which of its dimensions are the input features cannot be told",
                    where=str(self.step.where),
                    hint="add the model's config.json, from which its architecture is known",
                )
            fits = list(others)
        if not fits:
            raise IncompatibleModels(
                f"{self.file} has activations of the shape {list(length)} for {name} {list(shape)}",
                where=str(self.step.where),
                hint="a weight needs one number for each input feature, a norm one for each of its own elements; "
                "`geomerge.observe.activations` makes such a file",
            )
        return fits[0]

    def _known(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The dimension of the input features that the architecture says."""
        if len(shape) != 2:
            return None
        if stored_transposed(name, self.base.config):
            return 0
        return None if self.base.anatomy.guessed else 1

    def _evident(self, name: str) -> int | None:
        """The dimension that the activations of a weight that is not square fit."""
        kind = self.base.tensors.get(name)
        if kind is None or len(kind.shape) != 2 or kind.shape[0] == kind.shape[1]:
            return None
        length = self.file.tensors[self._stored[name]].shape
        return next((axis for axis in (1, 0) if length == (kind.shape[axis],)), None)
