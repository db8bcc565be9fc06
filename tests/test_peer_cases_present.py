"""The stored outputs of the peer tool are complete and sound (the comparison itself is another file's)."""

from __future__ import annotations

import collections
import re
from math import isfinite

import numpy as np
import pytest

from peer import stored

METHODS = (
    "linear slerp nuslerp multislerp karcher task_arithmetic ties dare_linear dare_ties della della_linear breadcrumbs "
    "breadcrumbs_ties model_stock nearswap sce arcee_fusion ram ramplus_tl passthrough"
)


def test_every_method_has_cases() -> None:
    """Each of the 20 methods is covered by at least six deterministic cases of its own grid."""
    counts = collections.Counter(row["name"].split("/")[0] for row in stored.cases(deterministic=True))
    assert {method: counts[method] for method in METHODS.split() if counts[method] < 6} == {}


def test_names_are_unique_and_match_the_vectors() -> None:
    """One stored vector for each deterministic case, none left over."""
    names = [row["name"] for row in stored.cases(deterministic=True)]
    assert len(set(names)) == len(names)
    assert set(names) == set(stored._vectors())


def test_outputs_are_finite_and_fill_their_layout() -> None:
    """Every output has tensors, all finite float32, of the layout's shapes."""
    for row in stored.cases(deterministic=True):
        tensors = stored.outputs(row)
        assert tensors, row["name"]
        for name, value in tensors.items():
            assert value.dtype == np.float32, (row["name"], name)
            assert np.isfinite(value).all(), (row["name"], name)


@pytest.mark.parametrize("family", ["s", "m", "q", "t5"])
def test_outputs_cover_their_inputs(family: str) -> None:
    """Merges of whole models (no slices, no vocabulary policy) give exactly the input's tensors and shapes."""
    shapes = {name: value.shape for name, value in stored.model(f"{family}_a").items()}
    rows = [
        row
        for row in stored.cases(deterministic=True)
        if f"models/{family}_" in row["yaml"] and "slices" not in row["yaml"] and "modules" not in row["yaml"]
    ]
    assert rows
    for row in rows:
        assert {name: value.shape for name, value in stored.outputs(row).items()} == shapes, row["name"]


def test_models_named_by_the_recipes_exist() -> None:
    """Every stored recipe, failures included, names stored models only."""
    present = {path.name for path in (stored.FOLDER / "models").iterdir() if (path / "model.safetensors").is_file()}
    for row in [*stored.cases(), *stored.failures()]:
        named = set(re.findall(r"models/(\w+)", row["yaml"]))
        assert named, row["name"]
        assert named <= present, row["name"]


def test_statistics_of_random_cases_are_sound() -> None:
    """Random cases of four methods carry finite statistics, with a kept share between 0 and 1."""
    rows = stored.cases(deterministic=False)
    assert {row["methods"][0] for row in rows} == {"dare_linear", "dare_ties", "della", "della_linear"}
    for row in rows:
        assert row["statistics"]["seeds"] >= 40
        for name, entry in row["statistics"]["tensors"].items():
            numbers = [value for what in ("kept", "mean", "square", "along") for value in entry[what]]
            assert all(isfinite(value) for value in numbers), (row["name"], name)
            assert 0.0 <= entry["kept"][0] <= entry["moving"] / entry["elements"], (row["name"], name)


def test_data_stay_small() -> None:
    """The stored data stay under 3 MB."""
    size = sum(path.stat().st_size for path in stored.FOLDER.rglob("*") if path.is_file())
    assert size < 3_000_000
