"""The profile ``compat: mergekit`` against the stored outputs of mergekit 0.1.5 (tests/peer)."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import yaml

import geomerge as gm
from peer import stored

CASES = {case["name"]: case for case in stored.cases(deterministic=True)}

TOLERANCES = {
    "": 1e-6,
    # The peer computes or writes in 16 bits; a sum that cancels to another sign moves a whole element.
    "half": 0.1,
    # The peer's float32 softmax picks other outliers than exact arithmetic does.
    "float32_noise": 0.03,
}

ALSO_EQUAL = ("ties/dtype_float32_of_bfloat16", "gradient/density_to_zero")
"""Two cases more in which equal magnitudes stand at a threshold (0.00459862 twice in the second's first block)."""


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest error of any tensor, relative to the tensor's norm."""
    size = float(np.linalg.norm(theirs))
    return float(np.linalg.norm(ours.astype(np.float64) - theirs)) / (size or 1.0)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    """Every deterministic case: the same tensors, float32 within 10⁻⁶ of each tensor's norm."""
    case = CASES[name]
    theirs = stored.outputs(case)
    ours = {k: v.float().numpy() for k, v in gm.merge_state_dicts(stored.recipe(case), compat="mergekit").items()}
    assert set(ours) == set(theirs)
    marks = ["equal_magnitudes"] if name in ALSO_EQUAL else case.get("marks") or []
    agreeing = total = 0
    for tensor, expected in theirs.items():
        assert ours[tensor].shape == expected.shape, tensor
        if "equal_magnitudes" in marks:
            # Which of several equal magnitudes the peer keeps is arbitrary: only those at a threshold may differ.
            agreeing += np.count_nonzero(np.abs(ours[tensor] - expected) <= 1e-6 * np.abs(expected).max())
            total += expected.size
            continue
        assert relative_error(ours[tensor], expected) < TOLERANCES[marks[0] if marks else ""], tensor
    assert agreeing >= 0.88 * total


RANDOM = {case["name"]: case for case in stored.cases(deterministic=False)}
SEEDS = 16


@pytest.mark.parametrize("name", RANDOM)
def test_random_case(name: str) -> None:
    """Random methods agree in distribution: kept share, mean, second moment and projection, over seeds of our own.

    Per tensor the two means over seeds may differ by 5 of their joint standard errors (there are some 1400 comparisons).
    """
    case = RANDOM[name]
    recipe = yaml.safe_load(case["yaml"])
    base = stored.model(recipe["base_model"].removeprefix("models/"))
    full = {tensor: np.zeros(value.shape) for tensor, value in base.items()}
    for entry in recipe["models"]:
        expert = stored.model(entry["model"].removeprefix("models/"))
        for tensor, value in base.items():
            full[tensor] += entry["parameters"]["weight"] * (expert[tensor].astype(float) - value)
    draws = defaultdict(list)
    for seed in range(SEEDS):
        text = stored.recipe(case) + f"seed: {seed}\n"
        for tensor, merged in gm.merge_state_dicts(text, compat="mergekit").items():
            delta, reference = merged.double().numpy() - base[tensor], full[tensor]
            power = float((reference**2).sum())
            along = float((delta * reference).sum()) / power if power else 0.0
            draws[tensor].append([(delta != 0).mean(), delta.mean(), (delta**2).mean(), along])
    theirs = case["statistics"]
    for tensor, rows in draws.items():
        values = np.array(rows)
        for column, what in enumerate(("kept", "mean", "square", "along")):
            mean, deviation = theirs["tensors"][tensor][what]
            ours = values[:, column]
            error = np.sqrt(deviation**2 / theirs["seeds"] + max(ours.std(ddof=1), deviation) ** 2 / SEEDS)
            assert abs(ours.mean() - mean) <= 5 * error + 1e-9 * abs(mean), (tensor, what, ours.mean(), mean, error)
