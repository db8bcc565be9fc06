"""The anatomy of a model as plain data, for `geomerge inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from geomerge.anatomy.anatomy import Anatomy


def summary(anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Counts by module, role and dtype; everything in it is JSON.

    Args:
        anatomy: What `read` gave for `shapes`.
        shapes: Tensor name → shape.
        dtypes: Tensor name → dtype name; tensors that are missing here are left out of the counts by dtype.

    Returns:
        ``family``, ``guessed``, ``tensors``, ``parameters`` (buffers left out, tied tensors once), ``modules`` (name →
        ``blocks``, ``layer_keys``, ``roles``: role → ``tensors`` and ``parameters``), ``components`` (name → ``modules``,
        ``tensors`` and ``parameters``; empty for a model that has but one), ``dtypes``, ``tied``,
        ``stored_twice`` (aliases that the checkpoint stores beside their twin), ``vocabulary`` (``rows``: None when
        there is no vocabulary, or the tensors disagree; ``tensors``: name → axis), ``buffers``.
    """
    twice = sorted(alias for alias, stored in anatomy.tied.items() if alias in shapes and stored in shapes)
    uncounted = anatomy.buffers | set(twice)
    modules: dict[str, dict[str, Any]] = {
        name: {"blocks": blocks, "layer_keys": list(anatomy.layer_keys.get(name, ())), "roles": {}}
        for name, blocks in anatomy.depth.items()
    }
    components: dict[str, dict[str, Any]] = {}
    by_dtype: dict[str, dict[str, int]] = {}
    total = 0
    for name, part in anatomy.parts.items():
        size = prod(shapes[name])
        roles = modules.setdefault(part.module, {"blocks": 0, "layer_keys": [], "roles": {}})["roles"]
        counts = [roles.setdefault(part.role, {"tensors": 0, "parameters": 0})]
        if name in dtypes:
            counts.append(by_dtype.setdefault(dtypes[name], {"tensors": 0, "parameters": 0}))
        component = components.setdefault(part.component, {"modules": [], "tensors": 0, "parameters": 0})
        if part.module not in component["modules"]:
            component["modules"].append(part.module)
        counts.append(component)
        for count in counts:
            count["tensors"] += 1
            count["parameters"] += 0 if name in uncounted else size
        total += 0 if name in uncounted else size
    rows = {shapes[name][axis] for name, axis in anatomy.vocabulary.items()}
    return {
        "family": anatomy.family,
        "guessed": anatomy.guessed,
        "tensors": len(anatomy.parts),
        "parameters": total,
        "modules": modules,
        "components": components if set(components) != {""} else {},
        "dtypes": by_dtype,
        "tied": dict(anatomy.tied),
        "stored_twice": twice,
        "vocabulary": {"rows": rows.pop() if len(rows) == 1 else None, "tensors": dict(anatomy.vocabulary)},
        "buffers": sorted(anatomy.buffers),
    }
