"""The record of a merge, ``geomerge.json``: versions, inputs, seed, and what was done to every tensor.

It holds no date and no path, so the same command writes the same bytes, and a resumed run the same as one that was not.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from geomerge.engine.loss import RoundingLoss
from geomerge.engine.plan import InputModel, Plan
from geomerge.methods.base import Elementwise, Method
from geomerge.methods.chain import Step
from geomerge.version import __version__


def as_text(content: Mapping[str, Any]) -> str:
    """A manifest as JSON, with one line for each entry of its lists and tables."""
    dense = json.JSONEncoder(ensure_ascii=False).encode

    def laid_out(value: Any) -> str:
        if isinstance(value, Mapping) and value:
            return "{\n    " + ",\n    ".join(f"{dense(str(k))}: {dense(v)}" for k, v in value.items()) + "\n  }"
        if isinstance(value, list) and value:
            return "[\n    " + ",\n    ".join(map(dense, value)) + "\n  ]"
        return dense(value)

    return "{\n  " + ",\n  ".join(f"{dense(key)}: {laid_out(value)}" for key, value in content.items()) + "\n}\n"


def manifest(plan: Plan, facts: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest's content.

    Args:
        plan: What was carried out.
        facts: For each output tensor (by its position in `Plan.outputs`) what the run found: coefficients, loss.
    """
    methods: list[dict[str, Any]] = []
    known: dict[Method, int] = {}
    steps: dict[Step, int] = {}
    tensors: dict[str, Any] = {}
    for position, node in enumerate(plan.output_nodes()):
        entry: dict[str, Any] = {"rule": node.rule}
        if node.method is not None:
            index = known.setdefault(node.method, len(methods))
            if index == len(methods):
                methods.append({"name": node.method.name, "parameters": node.method.values()})
            entry["method"] = index
        found = facts.get(position, {})
        scale = found.get("scale", node.scale)
        if node.chain:
            entry["before"] = [steps.setdefault(step, len(steps)) for step in node.chain]
        if scale != 1.0:
            entry["scale"] = scale
        if node.columns:
            entry["aim"] = [
                {"statistics": _named(plan.inputs[c.statistics.input]), "omega": c.omega, "axis": c.axis}
                for c in node.columns
            ]
        if "coefficients" in found:
            entry["coefficients"] = found["coefficients"]
        if "kept" in found:
            entry["kept"] = found["kept"]
        if "codes" in found:
            error, parents, shrink = found["codes"]
            entry["codes"] = {"error": error, "parents": parents, "scale": shrink}
        share = None if "loss" not in found else RoundingLoss(*found["loss"]).share
        if share is not None:
            entry["rounding_loss"] = round(share, 6)
        tensors[node.name] = entry
    total = total_loss(facts)
    asked: dict[str, Any] = {}
    if plan.alignment:
        asked["alignment"] = [dict(a) for a in plan.alignment]
    if plan.guardrails:
        asked["guardrails"] = dict(plan.guardrails)
    if steps:
        asked["steps"] = [{"name": s.name, "parameters": s.values()} for s in steps]
    return {
        "geomerge": __version__,
        "versions": versions(),
        "plan": plan.hash,
        "inputs": [
            {
                "model": _named(i),
                **({"adapter": PurePath(i.adapter).name} if i.adapter else {}),
                "revision": i.revision,
                "fingerprint": i.fingerprint,
                "files": {name: {"size": size, "header_sha256": header} for name, size, header in i.files},
            }
            for i in plan.inputs
        ],
        "stages": [
            {"name": s.name, "method": s.method, "seed": s.seed, "rounding": s.rounding, "compat": s.compat}
            for s in plan.stages
        ],
        "rounding_loss": None if total.share is None else round(total.share, 6),
        "notes": list(notes(plan, facts)),
        **asked,
        "methods": methods,
        "tensors": tensors,
        "left_out": dict(plan.left_out),
    }


def notes(plan: Plan, facts: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    """What the user should know: what the plan said, and what showed only when the model was made."""
    made: dict[type[Elementwise], list[tuple[Elementwise, int, Mapping[str, Any]]]] = {}
    for position, node in enumerate(plan.output_nodes()):
        if isinstance(node.method, Elementwise) and position in facts:
            made.setdefault(type(node.method), []).append((node.method, node.numel, facts[position]))
    found = (each[0][0].warning([(numel, told) for _, numel, told in each]) for each in made.values())
    return (*plan.notes, *(warning for warning in found if warning is not None))


def _named(model: InputModel) -> str:
    """An input's name without its path."""
    return model.hub_id or (PurePath(model.path).name if model.path else model.ref)


def total_loss(facts: Mapping[int, Mapping[str, Any]]) -> RoundingLoss:
    """The loss over all sampled tensors."""
    losses = (RoundingLoss(*found["loss"]) for _, found in sorted(facts.items()) if "loss" in found)
    return sum(losses, RoundingLoss())


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    return {"python": platform.python_version(), "torch": _version("torch"), "numpy": _version("numpy")}


def _version(package: str) -> str:
    """That of the package that would be imported, from where it lies: importlib.metadata takes longer to import than this."""
    spec = importlib.util.find_spec(package)
    beside = Path(spec.origin).parents[1].glob(f"{package}-*.dist-info") if spec is not None and spec.origin else ()
    found = [folder.name.removeprefix(f"{package}-").removesuffix(".dist-info") for folder in beside]
    if len(found) == 1:
        return found[0]
    from importlib import metadata

    return metadata.version(package)
