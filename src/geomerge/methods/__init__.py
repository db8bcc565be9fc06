"""The mathematics of merging, callable on plain tensors and state dicts.

Every registered method is a function of this module under its name and aliases:

    from geomerge import methods

    methods.linear([a, b], weight=[0.3, 0.7])                    # no base: a list of models
    methods.ties(base, [a, b, c], density=0.3, weight=1.0)       # base first
    methods.nuslerp([a, b], weight=[1, 1], base=base)            # base optional

Models are tensors of one shape or mappings of such tensors. Parameters are the recipe's; one that belongs to each model may be
one value or a list. See `geomerge.methods.direct.Function` for the common arguments.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from geomerge.errors import UsageError


def __getattr__(name: str) -> Any:
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(name)  # a module of this package that is being imported
    # Not `from geomerge.methods import …`: that would ask this very function for the names of its own modules.
    registry = importlib.import_module("geomerge.methods.registry")
    direct = importlib.import_module("geomerge.methods.direct")
    try:
        return direct.Function(registry.get(name))
    except UsageError as error:
        raise AttributeError(f"{error}") from None


def __dir__() -> list[str]:
    return sorted(importlib.import_module("geomerge.methods.registry").all_methods())
