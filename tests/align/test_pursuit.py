"""Orthogonal matching pursuit against a slow reference, planted sums, and what must not change the bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geomerge.align import pursuit
from geomerge.align.pursuit import Sums, pursue


def slow(targets: np.ndarray, atoms: np.ndarray, k: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Straight from the definition: greedy choice, then `lstsq` over everything chosen, for one target at a time."""
    norms = np.linalg.norm(atoms, axis=1)
    chosen, found = [], []
    for target in targets:
        support: list[int] = []
        residual, coefficients = target.copy(), np.zeros(0)
        while len(support) < k and np.linalg.norm(residual) > 1e-12 * np.linalg.norm(target):
            scores = np.abs(atoms @ residual) / np.where(norms > 0, norms, np.inf)
            scores[support] = -1
            support.append(int(scores.argmax()))
            coefficients = np.linalg.lstsq(atoms[support].T, target, rcond=None)[0]
            residual = target - coefficients @ atoms[support]
        chosen.append(support)
        found.append(coefficients)
    return chosen, found


def run(targets: np.ndarray, atoms: np.ndarray, k: int, dtype: torch.dtype = torch.float64) -> Sums:
    """`pursue` on arrays."""
    given = torch.from_numpy(targets)
    return pursue(lambda first, last: given[first:last].clone(), len(targets), torch.from_numpy(atoms).to(dtype), k)


@pytest.mark.parametrize(("count", "m", "d", "k"), [(7, 40, 12, 5), (5, 9, 20, 9), (3, 30, 6, 64), (1, 1, 4, 3)])
def test_equals_the_slow_reference(count: int, m: int, d: int, k: int) -> None:
    """The same rows in the same order, the same coefficients; more rows than dimensions or atoms are never taken."""
    generator = np.random.default_rng(m)
    targets, atoms = generator.standard_normal((count, d)), generator.standard_normal((m, d))
    atoms *= generator.uniform(0.1, 10, (m, 1))
    sums = run(targets, atoms, k)
    chosen, coefficients = slow(targets, atoms, min(k, m, d))
    assert sums.rows.shape == (count, min(k, m, d))
    for i, support in enumerate(chosen):
        assert sums.rows[i, : len(support)].tolist() == support
        np.testing.assert_allclose(sums.coefficients[i, : len(support)], coefficients[i], rtol=1e-9, atol=1e-12)


def test_planted_sums_are_recovered() -> None:
    """Sums of three rows are found with their coefficients, and nothing more is taken."""
    generator = np.random.default_rng(0)
    atoms = generator.standard_normal((120, 96))
    support = np.array([generator.choice(120, 3, replace=False) for _ in range(20)])
    given = generator.uniform(1, 2, (20, 3)) * generator.choice([-1, 1], (20, 3))
    sums = run(np.einsum("nk,nkd->nd", given, atoms[support]), atoms, 10)
    for i in range(20):
        used = {int(r): float(c) for r, c in zip(sums.rows[i], sums.coefficients[i], strict=True) if c != 0}
        assert used.keys() == set(support[i].tolist())
        assert [used[r] for r in support[i].tolist()] == pytest.approx(given[i].tolist(), rel=1e-10)


def test_zeros_equals_and_near_equals() -> None:
    """Zero vectors have empty sums, zero rows are never chosen, of equal rows the first; nearly dependent rows do no harm."""
    generator = np.random.default_rng(1)
    base = generator.standard_normal((4, 8))
    atoms = np.concatenate([np.zeros((1, 8)), base, base, base + 1e-5 * generator.standard_normal((4, 8))])
    targets = np.stack([np.zeros(8), 2 * base[1], base.sum(axis=0)])
    sums = run(targets, atoms, 8)
    assert not sums.coefficients[0].any()
    assert sums.rows[1, 0] == 2
    assert sums.coefficients[1].tolist() == pytest.approx([2, *[0] * 7])
    made = (sums.coefficients.unsqueeze(2) * torch.from_numpy(atoms)[sums.rows]).sum(1)
    np.testing.assert_allclose(made, targets, atol=1e-9)
    assert 0 not in sums.rows[2][sums.coefficients[2] != 0]


@pytest.mark.parametrize("shift", [1e-10, 1e-7, 1e-5])
def test_rows_that_float32_cannot_tell_apart(shift: float) -> None:
    """Float32 only says where to look: among rows that differ beyond its digits the best in float64 is taken."""
    generator = np.random.default_rng(4)
    base = generator.standard_normal((6, 24))
    near = [base + shift * generator.standard_normal((6, 24)) for _ in range(30)]
    atoms, targets = np.concatenate(near), generator.standard_normal((20, 6)) @ base
    norms = np.linalg.norm(atoms, axis=1)
    sums = run(targets, atoms, 3)
    for i, target in enumerate(targets):
        residual = target
        for s in range(3):
            scores = np.abs(atoms @ residual) / norms
            scores[sums.rows[i, :s].numpy()] = -1
            assert sums.rows[i, s] == scores.argmax()
            chosen = atoms[sums.rows[i, : s + 1].numpy()]
            residual = target - np.linalg.lstsq(chosen.T, target, rcond=None)[0] @ chosen


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_lengths_beyond_float32(size: float) -> None:
    """Rows so short or long that their products would vanish or overflow are found all the same."""
    generator = np.random.default_rng(5)
    atoms, targets = generator.standard_normal((40, 12)), generator.standard_normal((6, 12))
    plain = run(targets, atoms, 4)
    atoms[::2] *= size
    sums = run(targets, atoms, 4)
    assert torch.equal(sums.rows, plain.rows)
    scale = np.where(plain.rows.numpy() % 2 == 0, size, 1.0)
    np.testing.assert_allclose(sums.coefficients.numpy() * scale, plain.coefficients, rtol=1e-9)


def test_what_is_along_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is equally far from what the dictionary cannot express; targets are then taken apart, with the same result."""
    monkeypatch.setattr(pursuit, "_PAIRS", 3)
    generator = np.random.default_rng(6)
    atoms = np.concatenate([generator.standard_normal((50, 4)), np.zeros((50, 4))], axis=1)
    targets = np.concatenate([1e-9 * generator.standard_normal((7, 4)), np.ones((7, 4))], axis=1)
    sums = run(targets, atoms, 3)
    chosen, coefficients = slow(targets, atoms, 3)
    assert sums.rows.tolist() == chosen
    np.testing.assert_allclose(sums.coefficients, coefficients, rtol=1e-6)


def test_progress_counts_every_row() -> None:
    """k for each vector, whether it needs them or not."""
    generator = np.random.default_rng(7)
    atoms = torch.from_numpy(generator.standard_normal((20, 8)))
    told: list[int] = []
    pursue(lambda first, last: atoms[first:last].clone(), 5, atoms, 4, told.append)
    assert sum(told) == 5 * 4
    assert len(told) == 4


def test_the_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread or four; 16-bit rows are widened exactly."""
    monkeypatch.setattr(pursuit, "_AT_ONCE", 64)
    generator = np.random.default_rng(2)
    targets, atoms = generator.standard_normal((9, 16)), generator.standard_normal((50, 16))
    made = []
    for threads in (1, 4):
        monkeypatch.setattr(pursuit, "_threads", lambda threads=threads: threads)
        made.append(run(targets, atoms, 6, torch.bfloat16))
    assert torch.equal(made[0].rows, made[1].rows)
    assert torch.equal(made[0].coefficients, made[1].coefficients)
    wide = torch.from_numpy(atoms).bfloat16().double().numpy()
    np.testing.assert_array_equal(made[0].coefficients, run(targets, wide, 6).coefficients)


def test_blocks_of_targets_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, as for wide models."""
    generator = np.random.default_rng(3)
    targets, atoms = generator.standard_normal((11, 10)), generator.standard_normal((30, 10))
    whole = run(targets, atoms, 4)
    monkeypatch.setattr(pursuit, "_HELD", 100)
    cut = run(targets, atoms, 4)
    assert torch.equal(whole.rows, cut.rows)
    np.testing.assert_allclose(whole.coefficients, cut.coefficients, rtol=1e-12)
