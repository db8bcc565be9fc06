"""WIDEN: ranks of columns, the rules for embeddings and vectors, and what the weights of a column add up to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import geomerge as gm
import optimised_references as ref
from geomerge.methods import tile
from geomerge.testing import models

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_optimised.json").read_text())


def test_published_algorithm() -> None:
    """The case of an oracle that was checked against the authors' code."""
    case = GOLDEN["cases"]["widen_2d_t1_s1"]
    base = torch.tensor(case["base"], dtype=torch.float64)
    experts = [base + torch.tensor(t, dtype=torch.float64) for t in GOLDEN["inputs"]["mat_tau"]]
    found = gm.methods.widen(base, experts)
    np.testing.assert_allclose(found.numpy(), case["out"], rtol=1e-9)


def test_two_columns_by_hand() -> None:
    """Base [3, 1; 4, 0]. Expert a doubles the first column: its norm changes by 5, its direction not at all; the second is
    untouched. Expert b turns the second column by 90°.

    Ranks of a: M (1, 0); D, both 0: by index (0, 1). Of b: M both 0: (0, 1); D (0, 1). Above the mean ½ is rank 1 (R = ½ > ¼).
    First column: a's S^M = 1, S^D = e⁰/(e⁰ + e⁰) = ½, weight ¾; b has not moved it: θ = [3, 4] + ¾·[3, 4].
    Second column: a has not moved it; b's S^M = S^D = 1, weight 1: [0, 1].
    """
    base = torch.tensor([[3.0, 1.0], [4.0, 0.0]])
    a = torch.tensor([[6.0, 1.0], [8.0, 0.0]])
    b = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    assert torch.equal(gm.methods.widen(base, [a, b]), torch.tensor([[5.25, 0.0], [7.0, 1.0]]))


def test_directions_of_one_row() -> None:
    """Slices of one element all turn by nothing: their order by angle is that of their places, not of rounding."""
    base = 0.7 * torch.arange(1, 7, dtype=torch.float64)[None]
    change = torch.tensor([[0.11, 0.07, 0.19, 0.05, 0.13, 0.17]], dtype=torch.float64)
    found = gm.methods.widen(base, [base + change], above_average_ratio=1.5, score_calibration=0.3)
    np.testing.assert_allclose(((found - base) / change)[0], [1, 1, 0.65, 1, 0.65, 0.3], rtol=1e-9)


def test_embeddings_are_weighed_by_token() -> None:
    """Token embeddings row by row, in tiles of any size; the same numbers under another name column by column."""
    base, *experts = models(4, (70, 9))
    state = [{"model.embed_tokens.weight": m, "lm_head.weight": m} for m in (base, *experts)]
    arrays = [m.numpy() for m in experts]
    found = gm.methods.widen(state[0], state[1:])
    np.testing.assert_allclose(found["lm_head.weight"], ref.widen(base.numpy(), arrays), rtol=1e-13, atol=1e-15)
    rows = ref.widen(base.numpy(), arrays, rows=True)
    np.testing.assert_allclose(found["model.embed_tokens.weight"], rows, rtol=1e-13, atol=1e-15)
    assert np.abs(rows - found["lm_head.weight"].numpy()).max() > 0.01
    np.testing.assert_allclose(gm.methods.widen(base, experts, slices="rows"), rows, rtol=1e-13, atol=1e-15)


def test_rows_over_several_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights by token, cut anywhere."""
    monkeypatch.setattr(tile, "SEGMENT", 1 << 9)
    base, *experts = models(3, (211, 7))
    rows = ref.widen(base.numpy(), [m.numpy() for m in experts], rows=True)
    for size in (64, 1000, 1 << 20):
        np.testing.assert_allclose(
            gm.methods.widen(base, experts, slices="rows", tile=size), rows, rtol=1e-13, atol=1e-15
        )


@pytest.mark.parametrize("columns", [3, 4, 5, 49, 50])
def test_the_middle_column_is_not_above_the_mean(columns: int) -> None:
    """Two copies of an expert: columns above the median count twice (weight 1 each), the others once, halves in between."""
    base, expert = models(2, (8, columns))
    found = gm.methods.widen(base, [expert, expert])
    factors = ((found - base) / (expert - base)).mean(0)
    rounded = (2 * factors).round() / 2
    assert torch.allclose(factors, rounded, atol=1e-9)
    assert set(rounded.tolist()) <= {1.0, 1.5, 2.0}
    # ⌊n/2⌋ columns rank above the mean by either change, and add a half each.
    assert float((2 * (rounded - 1)).sum()) == 2 * (columns // 2)


def test_out_of_reach_the_weights_are_shares() -> None:
    """With nothing above the mean the weights of a column add up to 1: identical experts come back, others are blended."""
    base, *experts = models(4, (12, 10))
    assert torch.allclose(gm.methods.widen(base, experts[:1] * 3, above_average_ratio=1e9), experts[0], atol=1e-12)
    found = gm.methods.widen(base, experts, above_average_ratio=1e9)
    stacked = torch.stack(experts)
    assert bool((found <= stacked.amax(0) + 1e-12).all())
    assert bool((found >= stacked.amin(0) - 1e-12).all())


def test_columns_of_zeros_and_vectors() -> None:
    """Padding columns have no direction and give no NaN; vectors are scored by |τ|: e^½/(e^½ + e^¼) where neither is above."""
    base, *experts = models(3, (6, 8))
    for m in (base, *experts):
        m[:, 2] = 0.0
    found = gm.methods.widen(base, experts)
    assert bool(torch.isfinite(found).all())
    assert not found[:, 2].any()
    np.testing.assert_allclose(found, ref.widen(base.numpy(), [m.numpy() for m in experts]), rtol=1e-13, atol=1e-15)
    zero, a, b = (torch.tensor(v, dtype=torch.float64) for v in ([0.0, 0.0], [0.5, 1.0], [0.25, -2.0]))
    # Means of |τ|: 0.75 and 1.125; in the second place both are above.
    share = np.exp(0.5) / (np.exp(0.5) + np.exp(0.25))
    expected = [share * 0.5 + (1 - share) * 0.25, 1.0 - 2.0]
    np.testing.assert_allclose(gm.methods.widen(zero, [a, b]), expected, rtol=1e-14)


def test_small_changes_are_ranked_right() -> None:
    """Columns turned by 10⁻⁹ to 5·10⁻⁹ radians, whose 1 − cos is zero in float64: the ranks are those of the angles."""
    base = torch.zeros(2, 5, dtype=torch.float64)
    base[0] = 1.0
    turned = base.clone()
    turned[1] = 1e-9 * torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])
    found = gm.methods.widen(base, [turned, turned])[1] / turned[1]
    # Norms grow by φ²/2 in the same order: above the median are the third and the fifth.
    assert torch.allclose(found, torch.tensor([1.0, 1, 2, 1, 2], dtype=torch.float64))
