"""Spectral methods against slow references with full decompositions, their identities, and the linear algebra they share.

The tolerance: one ulp of the output's dtype, and 10⁻⁸ of the largest element of the merged task vector. A matrix method has no
last bit of its own: two exact algorithms for the same singular vectors differ by the rounding of float64 times the condition
of the problem. `geomerge.methods.linalg` keeps that product below 10⁻⁹ (`test_polar_at_any_condition`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import geomerge as gm
import references as ref
from geomerge.errors import UsageError
from geomerge.methods import linalg, registry
from geomerge.methods.matrix.lore import low_rank_base
from geomerge.testing import models
from test_methods_golden import LOW_RANK

Array = NDArray[np.float64]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(7, 150), (150, 7), (40, 40), (33, 24), (1, 5), (1, 1)]


# -- references --------------------------------------------------------------------------------------------------------


def triplets(matrix: Array, k: int) -> tuple[Array, Array, Array]:
    """The k largest that count."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    k = min(k, int(np.sum(s > 1e-6 * s[0]))) if s[0] > 0 else 0
    return u[:, :k], s[:k], vh[:k]


def unit(matrix: Array) -> Array:
    """The polar factor."""
    u, _, vh = triplets(matrix, min(matrix.shape))
    return u @ vh


def tsvm(taus: list[Array], ranks: list[int] | None = None) -> Array:
    """U⊥ Σ V⊥ᵀ."""
    ranks = ranks or [max(1, min(taus[0].shape) // len(taus))] * len(taus)
    parts = [triplets(t, k) for t, k in zip(taus, ranks, strict=True)]
    return (
        unit(np.hstack([p[0] for p in parts]))
        * np.concatenate([p[1] for p in parts])
        @ unit(np.vstack([p[2] for p in parts]))
    )


def iso_c(taus: list[Array]) -> Array:
    """σ̄·UVᵀ."""
    u, s, vh = triplets(sum(taus, np.zeros_like(taus[0])), min(taus[0].shape))
    return s.mean() * u @ vh


def iso_cts(taus: list[Array]) -> Array:
    """Common and task directions, all equally strong."""
    r, total = min(taus[0].shape), sum(taus, np.zeros_like(taus[0]))
    each = min(round((r - math.floor(0.8 * r)) / len(taus)), r // len(taus))
    if not each:
        return iso_c(taus)
    common = triplets(total, r - each * len(taus)) if each * len(taus) < r else (total[:, :0], total[0, :0], total[:0])
    parts = [triplets(t - common[0] @ common[0].T @ t, each) for t in taus] + [common]
    u, s, vh = np.hstack([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), np.vstack([p[2] for p in parts])
    return s.mean() * unit(u) @ unit(vh)


def low(matrix: Array, k: int) -> Array:
    """The nearest matrix of rank k."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def twin(taus: list[Array]) -> Array:
    """λ Σ τ and the exclusive parts: density 0.3, λ = 0.4, weights 1/T."""
    shared = 0.4 * sum(taus, np.zeros_like(taus[0]))
    k = math.floor(0.3 * min(taus[0].shape))
    return shared + sum(low(t - shared, k) for t in taus) / len(taus)


def compress(taus: list[Array]) -> Array:
    """A quarter of the rank each."""
    return np.asarray(sum(low(t, math.floor(0.25 * min(t.shape))) for t in taus))


def resm(taus: list[Array]) -> Array:
    """Outliers' mass and density."""
    shares = [np.mean(np.abs(t) >= 0.1 * np.sqrt(np.mean(t**2))) for t in taus]
    ranks = [max(1, math.floor(min(taus[0].shape) * share / sum(shares) + 1e-9)) for share in shares]
    masses = []
    for t in taus:
        size = np.abs(t)
        masses.append(size[size > size.mean() + 1.5 * size.std()].sum())
    weights = np.array(masses) * len(taus) / sum(masses) if sum(masses) > 0 else np.ones(len(taus))
    return tsvm([w * t for w, t in zip(weights, taus, strict=True)], ranks)


def above_the_kth(r: Array, density: float) -> Array:
    """What is at least the (d − ⌊density·d⌋)-th smallest magnitude."""
    return np.where(np.abs(r) >= np.sort(np.abs(r).ravel())[r.size - math.floor(density * r.size) - 1], r, 0)


def knots(taus: list[Array]) -> Array:
    """TIES of the coordinates in the joint basis."""
    u, _, _ = triplets(np.hstack(taus), taus[0].shape[0])
    coordinates = [above_the_kth(u.T @ t, 0.5) for t in taus]
    zero = np.zeros_like(coordinates[0])
    return u @ ref.combine(zero, coordinates, [1.0] * len(taus), elect=True, normalize=True)


def lore(thetas: list[Array], rounds: int = 5, price: float = 0.05) -> Array:
    """Rounds of coordinate descent, literally: the base, then the changes."""
    changes = [np.zeros_like(t) for t in thetas]
    for _ in range(rounds):
        centre = np.mean([t - c for t, c in zip(thetas, changes, strict=True)], axis=0)
        for i, t in enumerate(thetas):
            u, s, vh = np.linalg.svd(t - centre, full_matrices=False)
            changes[i] = (u * np.maximum(s - price, 0)) @ vh
    return np.asarray(centre + sum(changes))


ROWS: list[tuple[str, Callable[[list[Array]], Array], dict[str, Any]]] = [
    ("tsvm", tsvm, {}),
    ("iso_c", iso_c, {}),
    ("iso_cts", iso_cts, {}),
    ("twin", twin, {"lambda": 0.4, "density": 0.3}),
    ("svd_compress", compress, {"ratio": 0.25}),
    ("resm", resm, {"kappa": 1.5, "rank_mode": "task"}),
    ("knots", knots, {"density": 0.5}),
    ("lore", lore, {"mu": 0.1, "sweeps": 5, "tolerance": 0}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("method", "reference", "parameters"), ROWS, ids=[row[0] for row in ROWS])
def test_agrees_with_the_reference(
    method: str, reference: Callable[[list[Array]], Array], parameters: dict[str, Any], count: int, dtype: str
) -> None:
    """Wide, tall and square matrices, rows and single elements."""
    based = registry.get(method).base_use == "required"
    for shape in SHAPES:
        tensors = [m.to(DTYPES[dtype]) for m in models(count + based, shape)]
        arrays = [m.double().numpy() for m in tensors]
        function = getattr(gm.methods, method)
        found = function(tensors[0], tensors[1:], **parameters) if based else function(tensors, **parameters)
        origin = arrays[0] if based else np.zeros(shape)
        change = reference([x - origin for x in arrays[based:]])
        allowed = ref.ulp(origin + change, dtype) + 1e-8 * np.abs(change).max()
        error = np.abs(found.double().numpy() - (origin + change))
        assert np.all(error <= allowed), (shape, np.max(error / allowed))


# -- identities --------------------------------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor, error: float = 1e-10) -> bool:
    """Equal up to a share of the norm."""
    return float((a - b).norm()) <= error * float(b.norm())


def orthogonal(n: int, seed: int) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).standard_normal((n, n))))[0]


U, V = orthogonal(24, 1), orthogonal(36, 2)
ZERO = torch.zeros(24, 36, dtype=torch.float64)
TAUS = [torch.from_numpy(np.random.default_rng(s).standard_normal((24, 36))) for s in (3, 4, 5)]


def spectrum(values: list[float], first: int = 0) -> Tensor:
    """A matrix with these singular values, in directions of its own from `first` on."""
    k = len(values)
    return (U[:, first : first + k] * torch.tensor(values, dtype=torch.float64)) @ V[:, first : first + k].T


def test_orthogonal_tasks_are_summed() -> None:
    """TSV-Merge of task vectors that share no direction is their sum, also of lower rank than they might have."""
    taus = [spectrum([3.0, 2.0, 1.0], 4 * i) for i in range(4)]
    assert close(gm.methods.tsvm(ZERO, taus), sum(taus, ZERO))
    assert close(gm.methods.iso_c(ZERO, taus), sum((spectrum([2.0] * 3, 4 * i) for i in range(4)), ZERO))


def test_identical_experts() -> None:
    """TSV-Merge: the strongest ⌊r/T⌋ directions once, not T times. Iso-C: T times the flat expert."""
    tau = spectrum([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    found = gm.methods.tsvm(ZERO, [tau] * 6)
    assert close(found, spectrum([8.0, 7.0, 6.0, 5.0]))
    assert close(gm.methods.iso_c(ZERO, [tau] * 6), spectrum([6 * 4.5] * 8))


def test_nuclear_norms() -> None:
    """TSV-Merge keeps the sum of all kept singular values, Iso-C that of the summed task vector, spread evenly."""
    kept = sum(torch.linalg.svdvals(t)[:8].sum() for t in TAUS)
    assert float(torch.linalg.matrix_norm(gm.methods.tsvm(ZERO, TAUS), "nuc")) == pytest.approx(float(kept))
    strengths = torch.linalg.svdvals(gm.methods.iso_c(ZERO, TAUS))
    assert torch.allclose(strengths, torch.linalg.svdvals(sum(TAUS, ZERO)).mean().expand(24))


def test_iso_c_of_lower_rank() -> None:
    """Directions that the sum lacks stay empty; as published they get σ̄, too."""
    tau = spectrum([4.0, 2.0])
    assert close(gm.methods.iso_c(ZERO, [tau]), spectrum([3.0, 3.0]))
    full = torch.linalg.svdvals(gm.methods.iso_c(ZERO, [tau], support_only=False))
    assert torch.allclose(full, torch.full((24,), 6 / 24, dtype=torch.float64))


def test_iso_cts_without_room_for_tasks_is_iso_c() -> None:
    """Bit for bit."""
    found = gm.methods.iso_cts(ZERO, TAUS, common_space_fraction=1.0)
    assert torch.equal(found, gm.methods.iso_c(ZERO, TAUS))


def test_resm_switched_off_is_tsvm() -> None:
    """Bit for bit; and for identical experts all weights are 1."""
    off = gm.methods.resm(ZERO, TAUS, outlier_mode="off", rank_mode="off")
    assert torch.equal(off, gm.methods.tsvm(ZERO, TAUS))
    mass = gm.methods.resm(ZERO, TAUS[:1] * 3, outlier_mode="mass", rank_mode="off")
    assert close(mass, gm.methods.tsvm(ZERO, TAUS[:1] * 3))


def test_resm_winsor() -> None:
    """One element far out is clipped to mean + κ standard deviations."""
    tau = torch.ones(4, 4, dtype=torch.float64)
    tau[1, 2] = -33.0
    # |τ|: mean 3, standard deviation √(15·4 + 900)/4 = √60.
    found = gm.methods.resm(torch.zeros_like(tau), [tau], outlier_mode="winsor", rank_mode="off", kappa=2)
    assert float(found[1, 2]) == pytest.approx(-(3 + 2 * 60**0.5))
    assert float(found[0, 0]) == 1.0


def test_resm_ranks_follow_density() -> None:
    """Three quarters of the directions for a task vector with three times as many elements."""
    ranks = registry.get("resm").make({}, count=2)._ranks  # type: ignore[attr-defined]
    sparse, dense = torch.zeros(8, 12, dtype=torch.float64), torch.zeros(8, 12, dtype=torch.float64)
    sparse.view(-1)[::4], dense.view(-1)[:72] = 1.0, 1.0
    assert ranks(torch.stack([sparse, dense])) == [2, 6]
    assert ranks(torch.stack([sparse, torch.zeros_like(sparse)])) == [8, 1]


@pytest.mark.parametrize("t", [0, 1, 2])
def test_twin_with_everything_kept(t: int) -> None:
    """Density 1 and one weight: that expert. No weight: the shared expert. Equal weights at λ = 1/T: the mean."""
    one = [float(i == t) for i in range(3)]
    assert close(gm.methods.twin(ZERO, TAUS, weight=one, density=1.0), TAUS[t])
    shared = 0.3 * sum(TAUS, ZERO)
    assert close(gm.methods.twin(ZERO, TAUS, weight=0.0), shared)
    assert close(gm.methods.twin(ZERO, TAUS, density=1.0, lambda_=1 / 3), sum(TAUS, ZERO) / 3)
    bias, biases = ZERO[0], [tau[0] for tau in TAUS]
    assert close(gm.methods.twin(bias, biases, weight=one), biases[t])


def test_compression_error_is_the_tail() -> None:
    """‖τ − τ_k‖² is the sum of the squares left out; energy keeps as few as it takes."""
    strengths = torch.linalg.svdvals(TAUS[0])
    for k in (0, 1, 7, 23, 24):
        found = gm.methods.svd_compress(ZERO, TAUS[:1], rank=k)
        assert float((found - TAUS[0]).norm()) == pytest.approx(float(strengths[k:].norm()), abs=1e-12)
    tau = spectrum([4.0, 2.0, 2.0, 1.0])  # squares 16, 4, 4, 1 of 25
    for energy, kept in ((0.5, [4.0]), (0.64, [4.0]), (0.65, [4.0, 2.0, 2.0]), (0.96, [4.0, 2.0, 2.0])):
        found = gm.methods.svd_compress(ZERO, [tau], energy=energy)
        assert float(found.norm()) ** 2 >= energy * 25 - 1e-9
        assert int(torch.linalg.matrix_rank(found)) <= len(kept)
    assert torch.equal(gm.methods.svd_compress(ZERO, [tau], energy=1.0), tau)
    with pytest.raises(UsageError, match="one of rank, ratio and energy"):
        gm.methods.svd_compress(ZERO, [tau], rank=1, ratio=0.5)


def test_lore_descends() -> None:
    """No sweep raises the objective; a high price gives the mean; one model and identical ones are returned."""

    def objective(sweeps: int) -> float:
        base, changes = low_rank_base(torch.stack(TAUS), 0.8, sweeps, 0.0)
        nuclear = sum(float(torch.linalg.matrix_norm(c, "nuc")) for c in changes)
        return float(sum(((base + c - t) ** 2).sum() for c, t in zip(changes, TAUS, strict=True))) + 0.8 * nuclear

    course = [objective(n) for n in (1, 2, 3, 5, 10, 30)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(course))
    assert course[-1] < course[0]
    assert close(gm.methods.lore(TAUS, mu=1e3), sum(TAUS, ZERO) / 3)
    assert torch.equal(gm.methods.lore(TAUS[:1]), TAUS[0])
    assert torch.equal(gm.methods.lore([TAUS[1]] * 3), TAUS[1])


@pytest.mark.parametrize("shape", [(5, 30), (30, 5), (4, 17), (40, 1)])
def test_lore_of_long_weights(shape: tuple[int, int]) -> None:
    """Rounds that are made in the few directions that the experts have are those of the whole weights."""
    random = np.random.default_rng(3)
    base = random.standard_normal(shape)
    thetas = [base + 0.05 * random.standard_normal(shape) for _ in range(3)]
    found = gm.methods.lore([torch.from_numpy(t) for t in thetas], mu=0.4, sweeps=25, tolerance=0)
    assert found.numpy() == pytest.approx(lore(thetas, 25, 0.2), abs=1e-12)


def test_knots_with_all_coordinates_of_one_sign() -> None:
    """Where nothing is thinned and nobody disagrees it is the mean, as of any linear merge in the joint basis."""
    taus = [spectrum([3.0, 2.0, 1.0]), spectrum([1.5, 2.0, 3.0])]
    assert close(gm.methods.knots(ZERO, taus, density=1.0), (taus[0] + taus[1]) / 2)


@pytest.mark.parametrize("method", [row[0] for row in ROWS if row[0] != "lore"])
def test_zero_task_vectors(method: str) -> None:
    """All of them zero: the base, to the bit. One of them zero: finite."""
    base = TAUS[0].float()
    function = getattr(gm.methods, method)
    assert torch.equal(function(base, [base, base]), base)
    assert bool(torch.isfinite(function(base, [base, TAUS[1].float(), base])).all())


# -- linear algebra ----------------------------------------------------------------------------------------------------


def graded(low: float, rows: int = 60, columns: int = 90) -> Tensor:
    """A matrix whose singular values fall from 1 to `low`."""
    u, v = orthogonal(rows, 6), orthogonal(columns, 7)
    return (u * torch.logspace(0, math.log10(low), rows, dtype=torch.float64)) @ v[:, :rows].T


CONDITIONS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-7, 1e-12]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("low", CONDITIONS)
def test_polar_at_any_condition(low: float, transposed: bool) -> None:
    """Within 10⁻⁹ of the full decomposition, by whichever way it was found."""
    matrix = graded(low).T if transposed else graded(low)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    expected = (u * (s > 1e-6 * s[0])) @ vh
    assert close(linalg.polar(matrix), expected, 1e-9)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, 1e200])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40), (1, 9), (9, 1), (1, 1)])
def test_polar_of_any_size_and_rank(shape: tuple[int, int], size: float) -> None:
    """A partial isometry of exactly the matrix's rank: no direction that it lacks is filled up; of zero, zero."""
    drawn = np.random.default_rng(8)
    for rank in sorted({0, 1, min(shape) // 3, min(shape)}):
        left, right = (torch.from_numpy(drawn.standard_normal((n, rank))) for n in shape)
        matrix = left @ right.T * size
        found = linalg.polar(matrix)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        assert close(found, u[:, :rank] @ vh[:rank], 1e-10)
        assert float(found.square().sum()) == pytest.approx(rank, abs=1e-10)
        assert float((found * matrix).sum()) == pytest.approx(float(s.sum()))


def test_what_is_decomposed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what is well conditioned, a few rows where a few values are weak, all where most are."""
    decomposed: list[int] = []
    svd = linalg.svd
    monkeypatch.setattr(linalg, "svd", lambda matrix: decomposed.append(len(matrix)) or svd(matrix))
    linalg.polar(graded(1e-2))
    linalg.largest(graded(1e-5), 20)
    linalg.polar(spectrum([1.0] * 9))
    assert not decomposed
    linalg.polar(graded(1e-4))
    # 60 values from 1 to 10⁻⁴: those below 3·10⁻³ are weak.
    assert decomposed == [22]
    linalg.shrink(graded(1e-7), 1e-3)
    assert decomposed == [22, 60]
    exact = linalg.polar(graded(1e-5))
    monkeypatch.setattr(linalg, "_WEAK", 0.0)
    assert not close(linalg.polar(graded(1e-5)), exact, 1e-9)


@pytest.mark.parametrize("low", CONDITIONS)
@pytest.mark.parametrize("k", [1, 20, 60])
def test_largest_at_any_condition(low: float, k: int) -> None:
    """Orthonormal vectors, the right values, and their product."""
    for matrix in (graded(low), graded(low).T):
        found = linalg.largest(matrix, k)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        kept = min(k, int((s > 1e-6 * s[0]).sum()))
        assert len(found.s) == kept
        assert torch.allclose(found.s, s[:kept], rtol=1e-8, atol=0)
        one = torch.eye(kept, dtype=torch.float64)
        assert torch.allclose(found.u.T @ found.u, one, atol=1e-8)
        assert torch.allclose(found.vh @ found.vh.T, one, atol=1e-8)
        assert close(found.matrix(), (u[:, :kept] * s[:kept]) @ vh[:kept], 1e-9)


def test_largest_knows_a_rank() -> None:
    """Of a matrix of rank 5 there are 5, of zero none."""
    matrix = spectrum([1.0, 0.9, 0.5, 0.3, 0.2])
    assert len(linalg.largest(matrix, 12).s) == 5
    assert len(linalg.largest(matrix, 12, floor=0.4).s) == 3
    assert len(linalg.largest(ZERO, 12).s) == 0
    assert torch.equal(linalg.polar(ZERO), ZERO)


def test_shrink() -> None:
    """Each singular value by the threshold, none below zero."""
    matrix = spectrum([3.0, 2.0, 1.0, 0.5])
    assert close(linalg.shrink(matrix, 0.75), spectrum([2.25, 1.25, 0.25]))
    assert torch.equal(linalg.shrink(matrix, 10.0), ZERO)


@pytest.mark.parametrize("threshold", [1e-5, 5e-4, 1e-2, 0.5])
def test_shrink_at_any_threshold(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weak values are looked at only where the threshold leaves some."""
    matrix = graded(1e-4)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    decomposed: list[int] = []
    svd = linalg.svd
    monkeypatch.setattr(linalg, "svd", lambda matrix: decomposed.append(len(matrix)) or svd(matrix))
    expected = (u * (s - threshold).clamp(min=0.0)) @ vh
    assert close(linalg.shrink(matrix, threshold), expected, 1e-9)
    assert close(linalg.shrink(matrix.T, threshold), expected.T, 1e-9)
    assert bool(decomposed) == (threshold < 3e-3)


def test_complement() -> None:
    """Orthonormal, and orthogonal to what is given; of nothing, everything."""
    rest = linalg.complement(U[:, :7])
    assert torch.allclose(
        torch.cat([U[:, :7], rest], 1).T @ rest, torch.eye(24, dtype=torch.float64)[:, 7:], atol=1e-14
    )
    assert linalg.complement(U[:, :0]).shape == (24, 24)


def test_one_thread_restores_the_setting() -> None:
    """Also when those inside leave in another order than they came."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first, second = linalg.one_thread(), linalg.one_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_each_thread_has_one() -> None:
    """Whatever it had before, while others are inside, and whether these leave before it or after."""
    before, found = torch.get_num_threads(), list[int]()
    try:
        torch.set_num_threads(3)
        pool = ThreadPoolExecutor(1)
        pool.submit(torch.get_num_threads).result()  # is its own from now on

        def enter() -> None:
            linalg.one_thread().__enter__()
            found.append(torch.get_num_threads())

        def leave() -> None:
            found.append(torch.get_num_threads())
            linalg.one_thread().__exit__(None, None, None)
            found.append(torch.get_num_threads())

        for first in (True, False):
            with linalg.one_thread():
                pool.submit(enter).result()
                if first:
                    pool.submit(leave).result()
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
            if not first:
                pool.submit(leave).result()
            assert found == [1, 1, 3]
            found.clear()
    finally:
        torch.set_num_threads(before)


def test_twin_by_magnitude() -> None:
    """Of each exclusive vector the largest elements in place of directions."""
    shared = 0.4 * sum(TAUS, ZERO)
    wanted = shared.clone()
    for tau in TAUS:
        v = tau - shared
        least = v.abs().flatten().sort().values[-math.floor(0.25 * v.numel())]
        wanted += torch.where(v.abs() >= least, v, 0.0) / len(TAUS)
    assert close(gm.methods.twin(ZERO, TAUS, lambda_=0.4, density=0.25, compress="magnitude"), wanted)


def test_knots_leaves_noise_out() -> None:
    """Updates of low rank, rounded to seven decimals: directions up to the cutoff; 0 takes all above 10⁻⁶ of the largest."""
    zero, arrays = torch.zeros_like(LOW_RANK[0]), [t.numpy() for t in LOW_RANK]
    for cutoff, number in ((1e-5, 6), (0, 12)):
        found = gm.methods.knots(zero, LOW_RANK, full_weights=True, density=0.2, cutoff=cutoff)
        basis = np.linalg.svd(np.hstack(arrays), full_matrices=False)[0][:, :number]
        coordinates = [above_the_kth(basis.T @ t, 0.2) for t in arrays]
        origin = np.zeros_like(coordinates[0])
        merged = ref.combine(origin, coordinates, [1.0] * len(arrays), elect=True, normalize=True)
        assert close(found, torch.from_numpy(basis @ merged), 1e-9)
    assert not gm.methods.knots(zero, [r * 1e-6 for r in LOW_RANK], full_weights=True).any()


def test_resm_switched_off_as_yaml_has_it() -> None:
    """`off` without quotes is false there."""
    quoted, bare = (gm.methods.resm(ZERO, TAUS, outlier_mode=off, rank_mode=off) for off in ("off", False))
    assert torch.equal(quoted, bare)
    with pytest.raises(UsageError, match="one of off, mass, winsor, not True"):
        gm.methods.resm(ZERO, TAUS, outlier_mode=True)
