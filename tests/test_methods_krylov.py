"""The leading eigenvectors from a Krylov space: what LAPACK finds, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import geomerge as gm
from geomerge.methods import krylov, linalg
from geomerge.methods.krylov import Leading, leading

N, K = 256, 32
Q = torch.linalg.qr(torch.from_numpy(np.random.default_rng(1).standard_normal((N, N)))).Q
INDEX = torch.arange(1, N + 1, dtype=torch.float64)
HEAVY = torch.cat([3.0 - INDEX[:K] / K, 1e-3 * torch.rand(N - K, generator=torch.Generator().manual_seed(2)).double()])
SPECTRA = {
    "power": INDEX**-5.0,
    "exponential": torch.exp(-24 * INDEX / N),
    "gap": HEAVY.sort(descending=True).values,
    "rank": torch.where(INDEX > 2 * K, 0.0, 1 / INDEX),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take matrices that `eigh` would be as fast for."""
    monkeypatch.setattr(krylov, "_SMALL", 1)


def matrix(values: Tensor) -> Tensor:
    """A matrix with these eigenvalues."""
    return linalg.symmetric_product(Q * values, Q.T)


def found(made: Leading | None) -> Leading:
    """There is a result."""
    assert made is not None
    return made


@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [1, 5, K])
def test_agrees_with_all_eigenvectors(spectrum: str, k: int, scale: float) -> None:
    """Values to a relative 10⁻¹⁰, the subspace of the first k to 10⁻⁹; task vectors of norm 10⁻³⁰ and 10³⁰."""
    values = SPECTRA[spectrum]
    made = found(leading(matrix(values) * scale, k))
    # What is not 10⁻⁵ of the largest has digits in no Gram matrix; `floor` is there to keep such away.
    sound = int((values[:k] > 1e-5 * values[0]).sum())
    assert torch.allclose(made.values[:sound], values[:sound] * scale, rtol=1e-10, atol=0)
    outside = made.vectors[:, :sound] - Q[:, :k] @ (Q[:, :k].T @ made.vectors[:, :sound])
    assert float(outside.norm()) < 1e-9
    assert torch.allclose(made.vectors.T @ made.vectors, torch.eye(k, dtype=torch.float64), atol=1e-13)


def test_of_a_lower_rank() -> None:
    """There are as many as there are eigenvalues, none of zero, and the space is no larger than it need be."""
    values = torch.where(INDEX <= 5, 1 / INDEX, 0.0)
    made = found(leading(matrix(values), K))
    assert torch.allclose(made.values, values[:5], rtol=1e-13)
    assert len(found(leading(torch.zeros(N, N, dtype=torch.float64), K)).values) == 0


def test_the_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 16 sees an eigenvalue 16 times at most: the 17th is missed, and that is noticed."""
    often = matrix(torch.where(INDEX <= 20, 2.0, torch.where(INDEX <= 50, 1.0, 0.0)))
    assert leading(often, 20) is None
    assert leading(matrix(torch.ones(N, dtype=torch.float64)), K) is None
    assert len(found(leading(often, 10)).values) == 10  # any ten of the twenty
    monkeypatch.setattr(krylov, "_certified", lambda *_: True)
    assert float(found(leading(often, 20)).values[-1]) == pytest.approx(1.0)


def test_what_is_left_to_eigh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many vectors, too dense a spectrum, values below the floor, a small matrix."""
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((N, N)))
    assert leading(linalg.gram(noise), K) is None
    assert leading(matrix(INDEX**-0.5), K) is None
    power = matrix(SPECTRA["power"])
    assert leading(power, K + 1) is None
    assert leading(power, K, floor=1e-5) is None
    assert leading(power, 3, floor=1e-3) is not None
    monkeypatch.setattr(krylov, "_SMALL", N + 1)
    assert leading(power, 5) is None


def test_same_bits_each_time() -> None:
    """The start is not drawn anew, and the global generator is left alone."""
    power, state = matrix(SPECTRA["power"]), torch.get_rng_state()
    first, second = found(leading(power, 5)), found(leading(power, 5))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(N, N), (N, 300), (300, N)])
def test_singular_triplets(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the full decomposition, without an `eigh` of the whole."""
    wide = torch.linalg.qr(torch.from_numpy(np.random.default_rng(4).standard_normal((max(shape), N)))).Q
    a = (Q * SPECTRA["exponential"].sqrt()) @ wide.T
    a = a if shape[0] <= shape[1] else a.T
    sizes: list[int] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: sizes.append(len(m)) or eigh(m))
    made = linalg.largest(a, K)
    assert max(sizes) < N
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    assert torch.allclose(made.s, s[:K], rtol=1e-12)
    assert float((made.matrix() - (u[:, :K] * s[:K]) @ vh[:K]).norm() / s.norm()) < 1e-12
    assert float((made.u @ made.vh - u[:, :K] @ vh[:K]).norm()) < 1e-9


@pytest.mark.parametrize(
    ("method", "shape"), [("tsvm", (N, 300)), ("tsvm", (N, N)), ("svd_compress", (N, N)), ("iso_cts", (300, N))]
)
def test_methods_either_way(method: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge of eight has the same result from Krylov spaces as from all eigenvectors."""
    short = min(shape)
    strength = torch.exp(-40 * torch.arange(short, dtype=torch.float64) / short)
    taus = []
    for seed in range(8):
        drawn = np.random.default_rng(seed)
        left, right = (torch.from_numpy(drawn.standard_normal((n, short))) for n in shape)
        taus.append((left * strength) @ right.T)
    base = torch.zeros(shape, dtype=torch.float64)
    function, used = getattr(gm.methods, method), []
    monkeypatch.setattr(linalg, "leading", lambda *a, **b: used.append(leading(*a, **b)) or used[-1])
    krylov_ = function(base, taus)
    assert sum(made is not None for made in used) >= 8
    monkeypatch.setattr(linalg, "leading", lambda *_, **__: None)
    exact = function(base, taus)
    assert float((krylov_ - exact).norm() / exact.norm()) < 1e-9
