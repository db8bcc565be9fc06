"""Equalities between methods, and what each preserves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import geomerge as gm
import references as ref
from geomerge.testing import models


def close(a: torch.Tensor, b: torch.Tensor, error: float = 1e-12) -> bool:
    """Equal up to a share of the norm."""
    return float((a - b).norm()) <= error * float(b.norm())


A, B, C = models(3, (40, 30))
UNIT_B = B * (A.norm() / B.norm())
OTHER = torch.from_numpy(np.random.default_rng(7).standard_normal((40, 30)))


@settings(max_examples=30, deadline=None)
@given(t=st.floats(0, 1), angle=st.floats(1e-6, 3.1), ratio=st.floats(0.01, 100))
def test_slerp_in_the_plane(t: float, angle: float, ratio: float) -> None:
    """At any angle and any ratio of norms: the two unit vectors' point at angle tω, its parts scaled by the norms."""
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64) * ratio
    found = gm.methods.slerp(a, [b], t=t)
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    assert torch.allclose(found, first * a + second * b, rtol=1e-9, atol=1e-9)
    if ratio == 1:
        assert float(found.norm()) == pytest.approx(1)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("other", [B, OTHER], ids=["close", "far"])
def test_slerp_is_symmetric(t: float, other: torch.Tensor) -> None:
    """slerp(t; a, b) = slerp(1 − t; b, a)."""
    assert close(gm.methods.slerp(A, [other], t=t), gm.methods.slerp(other, [A], t=1 - t))


@pytest.mark.parametrize("other", [UNIT_B, OTHER * (A.norm() / OTHER.norm())], ids=["close", "far"])
def test_equal_norms_are_preserved(other: torch.Tensor) -> None:
    """Models of one norm: slerp, nuslerp, multislerp and karcher keep it, the average does not."""
    norm = pytest.approx(float(A.norm()), rel=1e-10)
    assert float(gm.methods.slerp(A, [other], t=0.3).norm()) == norm
    assert float(gm.methods.nuslerp([A, other], weight=[0.7, 0.3]).norm()) == norm
    assert float(gm.methods.multislerp([A, other], weight=[0.7, 0.3], eps=0).norm()) == norm
    assert float(gm.methods.karcher([A, other]).norm()) == norm
    assert float(gm.methods.linear([A, other]).norm()) < float(A.norm())


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_nuslerp_is_slerp(t: float) -> None:
    """With weights 1 − t and t; with a base it is slerp of the task vectors."""
    assert close(gm.methods.nuslerp([A, B], weight=[1 - t, t]), gm.methods.slerp(A, [B], t=t))
    based = gm.methods.nuslerp([B, C], weight=[1 - t, t], base=A)
    assert close(based - A, gm.methods.slerp(B - A, [C - A], t=t), 1e-10)


def test_three_ways_to_the_middle() -> None:
    """Of two models of one norm: slerp at ½, karcher, multislerp with equal weights."""
    for other in (UNIT_B, OTHER * (A.norm() / OTHER.norm())):
        middle = gm.methods.slerp(A, [other], t=0.5)
        assert close(gm.methods.karcher([A, other]), middle, 1e-9)
        assert close(gm.methods.multislerp([A, other], weight=1, eps=0), middle, 1e-9)


@settings(max_examples=20, deadline=None)
@given(weight=st.lists(st.floats(0.1, 3), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_the_tangent_step_of_multislerp_vanishes(weight: list[float], seed: int) -> None:
    """The closed form equals mergekit's step on the tangent space (which `references` takes), far apart as close by."""
    random = np.random.default_rng(seed)
    far = [random.standard_normal((6, 7)) for _ in weight]
    close_by = [far[0] + 0.01 * x for x in far]
    for arrays in (far, close_by):
        tensors = [torch.from_numpy(x) for x in arrays]
        found = gm.methods.multislerp(tensors, weight=weight)
        np.testing.assert_allclose(found.numpy(), ref.multislerp(arrays, weight), rtol=1e-9, atol=1e-10)


def test_model_stock_of_identical_and_orthogonal_experts() -> None:
    """Identical experts (c = 1) are returned, orthogonal ones (c = 0) leave the base; two at 60° give ⅔ of their mean."""
    assert close(gm.methods.model_stock(A, [B, B, B]), B)
    axes = [A.clone() for _ in range(3)]
    for i, x in enumerate(axes):
        x.view(-1)[i] += 1
    assert torch.equal(gm.methods.model_stock(A.float(), [x.float() for x in axes]), A.float())
    base, first, second = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    assert close(gm.methods.model_stock(base, [first, second]), (first + second) / 2 * (2 / 3))


def test_task_arithmetic_is_linear() -> None:
    """In the task vectors and in λ; with weights 1/K it is the average, and a negative weight takes back a positive one."""
    merged = gm.methods.task_arithmetic(A, [B, C], weight=[0.3, -0.8])
    assert close(merged - A, 0.3 * (B - A) - 0.8 * (C - A))
    doubled = gm.methods.task_arithmetic(A, [A + 2 * (B - A), A + 2 * (C - A)], weight=[0.3, -0.8])
    assert close(doubled - A, 2 * (merged - A))
    assert close(gm.methods.task_arithmetic(A, [B, C], weight=0.5), gm.methods.linear([B, C]))
    back = gm.methods.task_arithmetic(merged, [merged + (B - A), merged + (C - A)], weight=[-0.3, 0.8])
    assert close(back, A)


def test_averaging_is_affine() -> None:
    """average(aθ + b) = a·average(θ) + b."""
    assert close(
        gm.methods.linear([3 * A + 2, 3 * B + 2], weight=[1, 4]), 3 * gm.methods.linear([A, B], weight=[1, 4]) + 2
    )


def test_ties_without_trimming_or_conflict_is_the_mean() -> None:
    """All signs agree and nothing is trimmed."""
    up = [A + 0.1 * (B - A).abs(), A + 0.2 * (C - A).abs()]
    assert close(gm.methods.ties(A, up, weight=1), gm.methods.linear(up))


@pytest.mark.parametrize(
    ("thinned", "plain"), [("breadcrumbs", {"gamma": 0.0}), ("dare_linear", {}), ("della_linear", {})]
)
def test_nothing_thinned_is_task_arithmetic(thinned: str, plain: dict[str, float]) -> None:
    """At full density the thinning methods are task arithmetic."""
    normalize = {"normalize": False} if thinned == "della_linear" else {}
    found = getattr(gm.methods, thinned)(A, [B, C], weight=[0.4, 0.9], density=1, **plain, **normalize)
    assert close(found, gm.methods.task_arithmetic(A, [B, C], weight=[0.4, 0.9]))


def test_della_without_a_window_keeps_as_dare_does() -> None:
    """ε = 0: every element survives with the density, whatever its rank, and is divided by it."""
    change = gm.methods.della_linear(A, [B], weight=1, density=0.5, epsilon=0) - A
    kept = change.abs() > 1e-9
    assert torch.allclose(change[kept], 2 * (B - A)[kept], rtol=1e-9, atol=1e-12)
    assert abs(int(kept.sum()) - 600) < 4 * math.sqrt(1200 / 4)


def test_nearswap_is_a_clip() -> None:
    """For t of at least 10⁻⁶: a + clip(b − a, −t, t)."""
    for t in (1e-6, 1e-3, 0.05, 10.0):
        assert close(gm.methods.nearswap(A, [B], t=t), A + (B - A).clamp(-t, t))


def test_disjoint_experts_keep_what_is_theirs() -> None:
    """Task vectors on disjoint supports: TIES, SCE and RAM return each unchanged, task arithmetic too."""
    left, right = torch.zeros_like(A), torch.zeros_like(A)
    left[:, :15], right[:, 15:] = (B - A)[:, :15], (C - A)[:, 15:]
    together = A + left + right
    for name, parameters in (
        ("ties", {"weight": 1}),
        ("task_arithmetic", {"weight": 1}),
        ("sce", {}),
        ("ram", {"epsilon": 0}),
    ):
        assert close(getattr(gm.methods, name)(A, [A + left, A + right], **parameters), together, 1e-10), name
