"""Orthogonal Procrustes: exact on planted rotations, the same bits on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from planted import rotation
from torch import Tensor

from geomerge.align.procrustes import Block, Blocks, cross_product, solve


def vectors(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks(moving: Tensor, fixed: Tensor, step: int = 7, weight: Tensor | None = None) -> Blocks:
    def walk() -> Iterator[Block]:
        for i in range(0, len(moving), step):
            yield Block(moving[i : i + step], fixed[i : i + step], None if weight is None else weight[i : i + step])

    return walk


def test_planted_rotation() -> None:
    """X₂ = X₁·Qᵀ gives Q, to rounding."""
    x, q = vectors(50, 12), rotation(12)
    found = solve(cross_product(blocks(x @ q.T, x), 12))
    assert found.determined == 12
    torch.testing.assert_close(found.rotation, q, atol=1e-12, rtol=0)


def test_optimal_against_any_other() -> None:
    """No random rotation, nor a small turn of the solution, comes closer."""
    moving, fixed = vectors(40, 8, 1), vectors(40, 8, 2)
    q = solve(cross_product(blocks(moving, fixed), 8)).rotation
    best = float((moving @ q - fixed).norm())
    skew = vectors(8, 8, 3)
    others = [rotation(8, s) for s in range(20)] + [q @ torch.matrix_exp(1e-3 * (skew - skew.T)), torch.eye(8)]
    assert all(float((moving @ other.double() - fixed).norm()) >= best for other in others)


def test_orthogonal_and_partly_determined() -> None:
    """Fewer vectors than dimensions: still orthogonal, and it says how many dimensions they determine."""
    found = solve(cross_product(blocks(vectors(5, 12), vectors(5, 12, 1)), 12))
    assert found.determined == 5
    torch.testing.assert_close(
        found.rotation @ found.rotation.T, torch.eye(12, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_nothing_determined() -> None:
    zero = torch.zeros(6, 4, dtype=torch.float64)
    assert solve(cross_product(blocks(zero, zero), 4)).determined == 0


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_bits(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads does not show."""
    moving, fixed = vectors(64, 24), vectors(64, 24, 1)
    expected = cross_product(blocks(moving, fixed), 24)
    monkeypatch.setattr("geomerge.align.procrustes._threads", lambda: threads)
    assert torch.equal(cross_product(blocks(moving, fixed), 24), expected)


def test_options_against_a_direct_computation() -> None:
    """Centring (weighted), then unit length, then weights."""
    moving, fixed, weight = vectors(30, 6), vectors(30, 6, 1), vectors(30, 1, 2).abs()[:, 0]
    found = cross_product(blocks(moving, fixed, weight=weight), 6, centre=True, normalise=True)
    share = weight / weight.sum()
    m, f = moving - share @ moving, fixed - share @ fixed
    m, f = m / m.norm(dim=1, keepdim=True), f / f.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, (m * weight[:, None]).T @ f, atol=1e-12, rtol=1e-12)
