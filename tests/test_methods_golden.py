"""Cases of the published algorithms, computed by an oracle that was itself checked against the authors' code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import geomerge as gm
import references as ref
from geomerge.methods.sparsify import MagPrune

RTOL = 1e-9
"""The cases' own tolerance in float64."""

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())
VECTORS = [torch.tensor(v, dtype=torch.float64) for v in GOLDEN["inputs"]["vec_tau"]]
LOW_RANK = [torch.tensor(m, dtype=torch.float64) for m in GOLDEN["inputs"]["lowrank_tau"]]
MATRICES = [torch.tensor(m, dtype=torch.float64) for m in GOLDEN["inputs"]["mat_tau"]]


def expected(case: str) -> np.ndarray:
    """What the case says comes out."""
    return np.array(GOLDEN["cases"][case])


@pytest.mark.parametrize(("case", "normalize"), [("ties_global_K0.2_mean", True), ("ties_global_K0.2_sum", False)])
def test_ties(case: str, normalize: bool) -> None:
    """TIES of one flat vector. The paper's code keeps ⌊0.2·40⌋ + 1 = 9 of 40 elements, so the density is 9/40."""
    found = gm.methods.ties(torch.zeros(40), VECTORS, weight=1, density=9 / 40, normalize=normalize)
    np.testing.assert_allclose(found.numpy(), expected(case), rtol=RTOL, atol=0)


def test_breadcrumbs_of_rows() -> None:
    """The paper's rows: ⌊0.13·16⌋ = 2 outliers away, ⌊0.5·16⌋ = 8 of the rest kept, of each row; or row after row."""
    settings = {"weight": 1, "density": 0.5, "gamma": 0.13}
    matrix = MATRICES[0]
    found = gm.methods.breadcrumbs(torch.zeros_like(matrix), [matrix], scope="row", **settings)
    rows = [gm.methods.breadcrumbs(torch.zeros(16), [row], **settings) for row in matrix]
    assert torch.equal(found, torch.stack(rows))
    np.testing.assert_allclose(found, expected("breadcrumbs_rowwise_keep0.5_remove0.13"), rtol=RTOL, atol=0)


def test_della_keep_probabilities() -> None:
    """MagPrune's probabilities, here and in the references."""
    found = MagPrune((0.7,), (0.07,)).probabilities(MATRICES[0], 0).numpy()
    np.testing.assert_allclose(found, expected("della_keep_prob_density0.7_eps0.07"), rtol=RTOL)
    reference = ref.keep_probability(MATRICES[0].numpy(), 0.7, 0.07)
    np.testing.assert_allclose(reference, expected("della_keep_prob_density0.7_eps0.07"), rtol=RTOL)


def test_sce() -> None:
    """SCE as in the paper: only what was selected is merged."""
    found = gm.methods.sce(torch.zeros_like(MATRICES[0]), MATRICES, select_topk=0.3)
    np.testing.assert_allclose(found.numpy(), expected("sce_topk0.3_paper"), rtol=RTOL, atol=0)


@pytest.mark.parametrize(
    ("case", "method", "taus"),
    [
        ("tsvm_reference", "tsvm", MATRICES),
        ("tsvm_ranksafe_lowrank", "tsvm", LOW_RANK),
        ("iso_c", "iso_c", MATRICES),
    ],
)
def test_spectral(case: str, method: str, taus: list[torch.Tensor]) -> None:
    """Spectral methods of one weight; with task vectors of low rank no arbitrary direction comes in."""
    found = getattr(gm.methods, method)(torch.zeros_like(taus[0]), taus).numpy()
    np.testing.assert_allclose(found, expected(case), rtol=RTOL, atol=1e-9 * np.abs(expected(case)).max())
