"""What methods and steps that thin task vectors have in common: how they make up for the elements that are gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geomerge.errors import UsageError
from geomerge.methods.base import Method
from geomerge.methods.sparsify import Rescale


class Rescaling(Method):
    """A method or step with the parameters `rescale` and `rescale_norm`; ``rescale: l1`` is short for both."""

    rescale: bool
    rescale_norm: str

    @classmethod
    def make(
        cls, values: Mapping[str, Any], *, count: int, compat: str | None = None, extrapolate: bool = False
    ) -> Method:
        if values.get("rescale") == "l1":
            if values.get("rescale_norm", "l1") != "l1":
                raise UsageError(f"{cls.name}: rescale is l1, but rescale_norm is {values['rescale_norm']}")
            values = {**values, "rescale": True, "rescale_norm": "l1"}
        return super().make(values, count=count, compat=compat, extrapolate=extrapolate)

    @property
    def rescaling(self) -> Rescale:
        """The rescaling as the parameters ask for it."""
        return ("l1" if self.rescale_norm == "l1" else "inverse") if self.rescale else "none"
