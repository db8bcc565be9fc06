"""Read the peer's stored outputs (README.md): ``for case in cases(): ... outputs(case)``."""

from __future__ import annotations

import json
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).resolve().parent.parent / "data" / "mergekit"


def cases(*, deterministic: bool | None = None) -> list[dict[str, Any]]:
    """The rows of ``cases.json``: all, or only those with (or without) stored outputs."""
    rows: list[dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())
    return [row for row in rows if deterministic is None or row["deterministic"] == deterministic]


def failures() -> list[dict[str, Any]]:
    """Recipes that the peer refuses or gets wrong."""
    rows: list[dict[str, Any]] = json.loads((FOLDER / "peer_failures.json").read_text())
    return rows


@cache
def _layouts() -> dict[str, list[tuple[str, list[int]]]]:
    layouts: dict[str, list[tuple[str, list[int]]]] = json.loads((FOLDER / "layouts.json").read_text())
    return layouts


@cache
def _vectors() -> dict[str, np.ndarray]:
    return load_file(FOLDER / "outputs.safetensors")


def outputs(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """The peer's output of a deterministic case: float32 arrays by tensor name."""
    vector, tensors, start = _vectors()[case["name"]], {}, 0
    for name, shape in _layouts()[case["layout"]]:
        tensors[name] = vector[start : start + prod(shape)].reshape(shape)
        start += prod(shape)
    if start != vector.size:
        raise ValueError(f"{case['name']}: {vector.size} stored values for a layout of {start}")
    return tensors


def recipe(case: dict[str, Any]) -> str:
    """The case's YAML with absolute model paths."""
    text: str = case["yaml"]
    return text.replace("models/", f"{FOLDER}/models/")


def model(name: str) -> dict[str, np.ndarray]:
    """A stored float32 model's tensors, by a name such as ``s_base``."""
    return load_file(FOLDER / "models" / name / "model.safetensors")
