"""Eigenvectors of symmetric matrices and products AAᵀ: SciPy's library against torch's, and what it must not disturb."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info
from torch import Tensor

import geomerge as gm
from geomerge.methods import eigen, linalg

N, K = 320, 32
Q = torch.linalg.qr(torch.from_numpy(np.random.default_rng(1).standard_normal((N, N)))).Q
INDEX = torch.arange(1, N + 1, dtype=torch.float64)
SPECTRA = {
    "power": INDEX**-5.0,
    "exponential": torch.exp(-24 * INDEX / N),
    "often": torch.where(INDEX <= 20, 2.0, torch.where(INDEX <= 50, 1.0, 0.0)).double(),
    "clusters": (2.0 + 1e-14 * INDEX.flip(0) - (INDEX > 7).double() - (INDEX > 200).double() / 2),
    "rank": torch.where(INDEX > 5, 0.0, 1 / INDEX),
    "noise": torch.rand(N, generator=torch.Generator().manual_seed(2)).double().sort(descending=True).values,
    "zero": torch.zeros(N, dtype=torch.float64),
}


def matrix(values: Tensor) -> Tensor:
    """A matrix with these eigenvalues."""
    made = (Q * values) @ Q.T
    return (made + made.T) / 2


@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [1, 5, K, N // 3, N // 2, N])
def test_are_eigenvectors(spectrum: str, k: int, scale: float) -> None:
    """The values are right, the vectors orthonormal, and their residuals rounding; task vectors of norm 10⁻³⁰ and 10³⁰."""
    values = SPECTRA[spectrum] * scale
    made = matrix(values)
    found, vectors = eigen.eigh(made, k)
    largest = max(float(values[0]), 1e-300)
    assert (found.shape, vectors.shape) == ((k,), (N, k))
    assert float((found - values[:k]).abs().max()) <= 3e-14 * largest
    assert float(torch.linalg.vector_norm(made @ vectors - vectors * found, dim=0).max()) <= 3e-13 * largest
    assert torch.allclose(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_values_above_a_number_are_counted(spectrum: str, scale: float) -> None:
    """Without being found; also where a pivot is zero."""
    values = SPECTRA[spectrum] * scale
    form = eigen.tridiagonal(matrix(values))
    assert form is not None
    gaps = values[:-1] - values[1:] > 1e-10 * values[0]
    for bound in [*((values[:-1] + values[1:]) / 2)[gaps][:40].tolist(), 2 * scale + 1e-9 * scale]:
        assert form.above(bound) == int((values > bound).sum())
    ones = eigen.Tridiagonal(torch.ones(3), torch.zeros(2), torch.zeros(0), torch.zeros(0))
    assert [ones.above(bound) for bound in (0.5, 1.0, 1.5)] == [3, 0, 0]


def test_thresholding_finds_what_is_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """No vector of a singular value that it takes away; nothing of a matrix that it takes away whole."""
    asked: list[int] = []
    eigh = linalg.eigh
    monkeypatch.setattr(linalg, "eigh", lambda product, k, form: asked.append(k) or eigh(product, k, form))
    made = (Q * INDEX**-1.0) @ Q.T
    for threshold, kept in ((0.09, 11), (0.3, 3), (0.9999, 1)):
        expected = (Q * (INDEX**-1.0 - threshold).clamp(min=0.0)) @ Q.T
        assert torch.allclose(linalg.shrink(made, threshold), expected, rtol=0, atol=1e-12)
        assert asked.pop() == kept
    assert not linalg.shrink(made, 1.01).any()


def test_only_the_upper_triangle_is_looked_at() -> None:
    """Whoever finds it, torch's library or SciPy's."""
    for n in (N, 20):
        made = matrix(SPECTRA["noise"])[:n, :n].clone()
        garbage = made.triu() + torch.full_like(made, 7.0).tril(-1)
        for k in (3, n):
            assert torch.allclose(eigen.eigh(garbage, k)[0], eigen.eigh(made, k)[0], rtol=1e-12)


def test_what_is_not_finite() -> None:
    """It has no eigenvalues, in neither library, and nothing waits for an iteration to converge."""
    for bad in (float("nan"), float("inf")):
        for n in (N, 20):
            made = matrix(SPECTRA["noise"])[:n, :n].clone()
            made[3, 3] = bad
            values, vectors = eigen.eigh(made, 5)
            assert (values.shape, vectors.shape) == ((5,), (n, 5))
            assert bool(values.isnan().all() and vectors.isnan().all())


def test_without_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LAPACK says that it did not converge, torch does it."""
    real, refused = eigen._lapack, []

    def fails(name: str, *arguments: object, integers: bool = False) -> bool:
        refused.append(name)
        return name != broken and real(name, *arguments, integers=integers)

    monkeypatch.setattr(eigen, "_lapack", fails)
    for broken, k in (("dsytrd", 5), ("dstemr", 5), ("dstedc", N)):
        values, vectors = eigen.eigh(matrix(SPECTRA["noise"]), k)
        assert refused[-1] == broken
        assert vectors.shape == (N, k)
        assert torch.allclose(values, SPECTRA["noise"][:k], rtol=1e-12)


@pytest.mark.parametrize("broken", ["dsterf", "dstein", "orthogonal"])
def test_without_the_result_of_an_iteration(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where inverse iteration does not converge, or its vectors are not orthogonal, torch does it."""
    real, called = eigen._call, []

    def fails(library: str, name: str, *arguments: Any) -> None:
        called.append(name)
        real(library, name, *arguments)
        if name == broken:
            ctypes.cast(arguments[-1], ctypes.POINTER(ctypes.c_int)).contents.value = 1

    monkeypatch.setattr(eigen, "_call", fails)
    if broken == "orthogonal":
        monkeypatch.setattr(eigen, "_ORTHOGONAL", 0.0)
    expected = torch.linalg.eigh(matrix(SPECTRA["noise"]), UPLO="U")
    values, vectors = eigen.eigh(matrix(SPECTRA["noise"]), K)
    assert called[-1] == ("dstein" if broken == "orthogonal" else broken)
    assert torch.equal(values, expected.eigenvalues.flip(0)[:K])
    assert torch.equal(vectors, expected.eigenvectors.flip(1)[:, :K])


@pytest.mark.parametrize("shape", [(N, N), (N, 7), (N, 1), (N, 0), (N, 900), (300, N), (5, 900)])
@pytest.mark.parametrize("kind", ["rows", "columns", "piece", "apart"])
def test_gram(shape: tuple[int, int], kind: str) -> None:
    """AAᵀ of whatever lies in memory in whatever way."""
    rows, columns = shape
    whole = torch.from_numpy(np.random.default_rng(5).standard_normal((rows + 3, 2 * columns + 3)))
    made = {
        "rows": whole[:rows, :columns].contiguous(),
        "columns": whole[:rows, :columns].T.contiguous().T,
        "piece": whole[1 : rows + 1, 2 : columns + 2],
        "apart": whole[:rows, : 2 * columns : 2],
    }[kind]
    expected = made @ made.T
    assert torch.allclose(eigen.gram(made), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(eigen.gram(made, upper=True).triu(), expected.triu(), rtol=1e-12, atol=1e-12)


def test_same_bits_beside_each_other() -> None:
    """Several threads, and a library that has more threads: the same bits, and afterwards it has as many as before."""
    made = matrix(SPECTRA["noise"])
    alone = eigen.eigh(made, K), eigen.eigh(made), (eigen.gram(made),)
    before = [each["num_threads"] for each in threadpool_info()]
    results: list[tuple[tuple[Tensor, ...], ...]] = []
    work = [
        threading.Thread(target=lambda: results.append((eigen.eigh(made, K), eigen.eigh(made), (eigen.gram(made),))))
        for _ in range(4)
    ]
    for each in work:
        each.start()
    for each in work:
        each.join()
    assert len(results) == len(work)
    for found in results:
        for one, other in zip(found, alone, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    assert [each["num_threads"] for each in threadpool_info()] == before


BITS = """
import hashlib
from concurrent.futures import ThreadPoolExecutor
import torch
from geomerge.adapter.combine import each_of
from geomerge.late import torch_alone
from geomerge.methods import registry
from geomerge.methods.linalg import one_thread
matrices = torch.randn(2, 512, 520, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
def digest(made):
    return hashlib.sha256(made.contiguous().numpy().tobytes()).hexdigest()
def merged(method):
    with one_thread():
        return digest(registry.get(method).make({}, count=2).merge(matrices.clone()))
def singular_vectors(matrix):
    return digest(torch.linalg.svd(matrix).U)
print(merged("iso_c"), flush=True)
with torch_alone():
    print(singular_vectors(matrices[0]))
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:
            print(*sorted(set(pool.map(merged, ["iso_c"] * 4))))
print(*sorted(set(each_of([matrices[0]] * 2, singular_vectors, 2, None))))
"""


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    """That libraries may use: whichever thread comes first, after others or beside them, each works with one."""

    def printed(number: int) -> str:
        there = os.environ | {"OMP_NUM_THREADS": str(number), "MKL_DYNAMIC": "FALSE"}
        done = subprocess.run([sys.executable, "-c", BITS], env=there, capture_output=True, text=True, check=True)
        return done.stdout

    expected = printed(1)
    merged, vectors = expected.split()[:2]
    assert expected.split() == [merged, vectors, merged, merged, vectors]
    assert printed(3) == expected


def test_small_matrices_load_no_library() -> None:
    """SciPy takes a fifth of a second to load."""
    code = (
        "import sys, torch\n"
        "from geomerge.methods import eigen\n"
        "eye = torch.eye(64, dtype=torch.float64)\n"
        "eigen.eigh(eigen.gram(eye), 3)\n"
        "assert 'scipy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", [(N, N), (N, 400), (400, N)])
def test_singular_triplets(shape: tuple[int, int]) -> None:
    """Those of the full decomposition."""
    wide = torch.linalg.qr(torch.from_numpy(np.random.default_rng(4).standard_normal((max(shape), N)))).Q
    a = (Q * SPECTRA["exponential"].sqrt()) @ wide.T
    a = a if shape[0] <= shape[1] else a.T
    made = linalg.largest(a, K)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    assert torch.allclose(made.s, s[:K], rtol=1e-12)
    assert float((made.matrix() - (u[:, :K] * s[:K]) @ vh[:K]).norm() / s.norm()) < 1e-12
    assert float((made.u @ made.vh - u[:, :K] @ vh[:K]).norm()) < 1e-9


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4, 1e-9, 0.0])
@pytest.mark.parametrize("rows", [N, 400])
def test_largest_outside(rows: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a subspace leaves out of a matrix, much of it or next to nothing, as if it had been made."""
    drawn = np.random.default_rng(6)
    basis = torch.linalg.qr(torch.from_numpy(drawn.standard_normal((rows, N // 2)))).Q
    inside, outside = (torch.from_numpy(drawn.standard_normal((n, N))) for n in (N // 2, rows))
    outside *= torch.exp(-torch.arange(N) / 40)
    outside -= basis @ (basis.T @ outside)
    made = basis @ inside + share * outside
    explicit: list[int] = []
    largest = linalg.largest
    monkeypatch.setattr(linalg, "largest", lambda *a: explicit.append(1) or largest(*a))
    floor = 1e-6 * float(made.norm())
    found = linalg.largest_outside(made, basis, 20, floor)
    assert bool(explicit) == (share <= 1e-2)
    expected = largest(made - basis @ (basis.T @ made), 20, floor)
    assert found.u.shape == expected.u.shape == (rows, 20 if share > 1e-9 else 0)
    assert torch.allclose(found.s, expected.s, rtol=1e-9)
    assert float((found.matrix() - expected.matrix()).norm()) <= 1e-9 * float(expected.s.norm())
    assert float((basis.T @ found.u).abs().max() if len(found.s) else 0.0) < 1e-9


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("tsvm", (N, 400)), ("tsvm", (N, N)), ("svd_compress", (N, N)), ("iso_c", (N, N)), ("iso_c", (400, N)),
        ("iso_cts", (400, N)), ("iso_cts", (N, 400)), ("twin", (N, N)), ("knots", (N, N)), ("optmerge", (N, 400)),
        ("iwudi", (N, 300)),
    ],
)  # fmt: skip
def test_methods_either_way(method: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge of eight has the same result from one library as from the other."""
    short = min(shape)
    strength = torch.exp(-6 * torch.arange(short, dtype=torch.float64) / short)
    taus = []
    for seed in range(8):
        drawn = np.random.default_rng(seed)
        left, right = (torch.from_numpy(drawn.standard_normal((n, short))) for n in shape)
        taus.append((left * strength) @ right.T)
    base = torch.zeros(shape, dtype=torch.float64)
    function, used, real = getattr(gm.methods, method), [], eigen._lapack
    monkeypatch.setattr(eigen, "_lapack", lambda *a, **b: used.append(a[0]) or real(*a, **b))
    ours = function(base, taus)
    assert used
    monkeypatch.setattr(eigen, "_SMALL", 1 << 40)
    exact = function(base, taus)
    assert float((ours - exact).norm() / exact.norm()) < (1e-7 if method == "iso_c" else 1e-9)
