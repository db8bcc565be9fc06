"""What a stored case is, and how the grids write their recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(frozen=True)
class Case:
    """One recipe for the peer.

    Attributes:
        name: Unique; ``method/what`` for the grids, ``structure/what`` otherwise.
        yaml: The recipe, its model paths relative to the stored data (``models/s_base``).
        notes: What the case is about, when its name does not say it.
        exact: The peer's result does not depend on a seed, so its output is stored; otherwise statistics are.
        copy_tokenizer: Let the peer write a tokenizer beside the weights.
        marks: Why a correct result may differ from the peer's: ``equal_magnitudes`` (its choice among equal values is
            its sorting routine's) or ``float32_noise`` (its selection depends on the last bits of float32).
    """

    name: str
    yaml: str
    notes: str = ""
    exact: bool = True
    copy_tokenizer: bool = False
    marks: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        """The merge methods of the recipe's documents, in order."""
        return [document["merge_method"] for document in yaml.safe_load_all(self.yaml)]

    @property
    def all_marks(self) -> list[str]:
        """The marks, with ``half`` added when some document works or writes in 16 bits."""
        half = any(
            "float16" in f"{document.get('dtype')} {document.get('out_dtype')}"
            or ("models/h_" in str(document) and document.get("dtype") != "float32")
            for document in yaml.safe_load_all(self.yaml)
        )
        return sorted([*self.marks, "half"] if half else self.marks)


@dataclass
class Grid:
    """Collects the cases of one method."""

    method: str
    cases: list[Case] = field(default_factory=list)

    def add(
        self,
        what: str,
        models: Mapping[str, Mapping[str, Any]] | Sequence[str],
        *,
        base: str | None = None,
        dtype: str | None = None,
        out_dtype: str | None = None,
        notes: str = "",
        exact: bool = True,
        marks: tuple[str, ...] = (),
        **parameters: Any,
    ) -> None:
        """Add a `models:` recipe; ``models`` maps a stored model's name to its parameters, in order."""
        listed: Mapping[str, Mapping[str, Any]] = (
            models if isinstance(models, Mapping) else {name: {} for name in models}
        )
        recipe: dict[str, Any] = {"merge_method": self.method, "models": []}
        for name, own in listed.items():
            entry: dict[str, Any] = {"model": f"models/{name}"}
            if own:
                entry["parameters"] = dict(own)
            recipe["models"].append(entry)
        if base:
            recipe["base_model"] = f"models/{base}"
        if parameters:
            recipe["parameters"] = {name.rstrip("_"): value for name, value in parameters.items()}
        if dtype:
            recipe["dtype"] = dtype
        if out_dtype:
            recipe["out_dtype"] = out_dtype
        text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=110)
        self.cases.append(Case(f"{self.method}/{what}", text, notes, exact, marks=marks))
