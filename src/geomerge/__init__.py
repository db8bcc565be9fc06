"""geomerge merges trained neural networks: two or more checkpoints that share an architecture in, one checkpoint out.

    import geomerge as gm

    gm.merge("recipe.yml", "merged/")                      # geomerge's or mergekit's YAML
    gm.plan("recipe.yml").notes                            # what would happen
    gm.methods.ties(base, [a, b], density=0.3, weight=1.0) # on plain tensors or state dicts

Importing it is cheap: torch and the rest are imported by the first call that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from geomerge.errors import (
    DamagedCheckpoint,
    DataError,
    GateFailed,
    GeomergeError,
    IncompatibleModels,
    ModelError,
    NotFiniteError,
    OutOfRange,
    RecipeError,
    RunError,
    UsageError,
)
from geomerge.version import __version__

if TYPE_CHECKING:
    from geomerge import methods, observe
    from geomerge.api import continue_merge, inspect, load_recipe, merge, merge_state_dicts, plan, transplant
    from geomerge.diagnose.run import diagnose
    from geomerge.evaluate.run import evaluate
    from geomerge.export import export_gguf
    from geomerge.moe.build import moe
    from geomerge.search.run import search

__all__ = [
    "DamagedCheckpoint",
    "DataError",
    "GateFailed",
    "GeomergeError",
    "IncompatibleModels",
    "ModelError",
    "NotFiniteError",
    "OutOfRange",
    "RecipeError",
    "RunError",
    "UsageError",
    "__version__",
    "continue_merge",
    "diagnose",
    "evaluate",
    "export_gguf",
    "inspect",
    "load_recipe",
    "merge",
    "merge_state_dicts",
    "methods",
    "moe",
    "observe",
    "plan",
    "search",
    "transplant",
]

_PACKAGES = ("diagnose", "evaluate", "methods", "moe", "observe", "search")
_FROM_API = ("continue_merge", "inspect", "load_recipe", "merge", "merge_state_dicts", "plan", "transplant")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"geomerge.{name}")
    if name in _FROM_API:
        return getattr(importlib.import_module("geomerge.api"), name)
    if name == "export_gguf":
        return importlib.import_module("geomerge.export").export_gguf
    raise AttributeError(f"module 'geomerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
