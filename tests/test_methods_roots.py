"""Inverse square roots of Gram matrices by rational functions of their tridiagonal form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from geomerge.methods import eigen, linalg, native, roots
from geomerge.methods.matrix.iso_c import isotropic

N = 293  # not of whole strips, panels or registers


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).standard_normal((n, n)))).Q


U, V = orthogonal(N, 1), orthogonal(N + 40, 2)[:, :N]
SPECTRA: dict[str, Callable[[], Tensor]] = {
    "ones": lambda: torch.ones(N, dtype=torch.float64),
    "1e-2": lambda: torch.logspace(0, -2, N, dtype=torch.float64),
    "1e-4": lambda: torch.logspace(0, -4, N, dtype=torch.float64),
    "1/i": lambda: 1 / torch.arange(1, N + 1, dtype=torch.float64),
    "one strong": lambda: torch.tensor([1.0, *[1e-3] * (N - 1)], dtype=torch.float64),
    "one weak": lambda: torch.tensor([*[1.0] * (N - 1), 1e-4], dtype=torch.float64),
}
HOPELESS: dict[str, Callable[[], Tensor]] = {
    "half weak": lambda: torch.tensor([*[1.0] * (N // 2), *[1e-5] * (N - N // 2)], dtype=torch.float64),
    "1e-6": lambda: torch.logspace(0, -6, N, dtype=torch.float64),
    "a rank": lambda: torch.where(torch.arange(N) < 17, 1.0, 0.0).double(),
    "zero": lambda: torch.zeros(N, dtype=torch.float64),
}


def form_of(matrix: Tensor) -> eigen.Tridiagonal:
    made = eigen.tridiagonal(eigen.gram(matrix, upper=True))
    assert made is not None
    return made


def far(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize("size", [1e-120, 1e-30, 1.0, 1e30, 1e70])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_is_the_inverse_root(spectrum: str, size: float) -> None:
    """Together with A it is an isometry, to what rounding of A costs."""
    s = SPECTRA[spectrum]() * size
    matrix = (U * s) @ V.T
    root = roots.inverse_root(form_of(matrix))
    assert root is not None
    eigen.mirrored(root)
    bound = 2e-16 * float((s[0] / s).square().sum()) / math.sqrt(2 * N)
    assert far(root @ matrix, U @ V.T) < 4 * bound + 1e-12
    assert bound < 1e-7


@pytest.mark.parametrize("spectrum", HOPELESS)
def test_none_where_rounding_decides(spectrum: str) -> None:
    """And the form is as it was, so that its eigenvectors can be looked for."""
    form = form_of((U * HOPELESS[spectrum]()) @ V.T)
    before = [part.clone() for part in form]
    assert roots.inverse_root(form) is None
    assert all(torch.equal(part, old) for part, old in zip(form, before, strict=True))


@pytest.mark.parametrize("spectrum", ["1/i", "a rank"])
def test_a_matrix_is_made_tridiagonal_once(spectrum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a root and without."""
    real, called = eigen._lapack, []
    monkeypatch.setattr(eigen, "_lapack", lambda *a, **b: called.append(a[0]) or real(*a, **b))
    linalg.polar((U * (SPECTRA | HOPELESS)[spectrum]()) @ V.T)
    assert called == ["dsytrd", *(["dstedc"] if spectrum == "a rank" else [])]


def test_a_refusal_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused would be wrong by more than is promised."""
    monkeypatch.setattr(roots, "_ERROR", 1.0)
    matrix = (U * HOPELESS["half weak"]()) @ V.T
    root = roots.inverse_root(form_of(matrix))
    assert root is not None
    assert far(eigen.mirrored(root) @ matrix, U @ V.T) > 1e-7


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_products_with_a_symmetric_matrix(first: bool, transposed: bool) -> None:
    """From either side, of a matrix in any order in memory; what is below the diagonal is not looked at."""
    random = np.random.default_rng(8)
    upper = torch.from_numpy(random.standard_normal((N, N))).triu()
    whole = upper + upper.triu(1).T
    upper += torch.full_like(upper, 1e9).tril(-1)
    matrix = torch.from_numpy(random.standard_normal((N, 300) if first != transposed else (300, N)))
    matrix = matrix.T if transposed else matrix
    found = eigen.symmetric_product(upper, matrix, first=first)
    assert far(found, whole @ matrix if first else matrix @ whole) < 1e-14


@pytest.mark.parametrize("size", [1e-120, 1.0, 1e120])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spectrum", [*SPECTRA, *HOPELESS])
def test_polar_factors_of_large_matrices(spectrum: str, transposed: bool, size: float) -> None:
    """With or without eigenvectors; and Iso-C's with the mean of the values that count."""
    s = (SPECTRA | HOPELESS)[spectrum]() * size
    counts = s > 1e-6 * s[0]
    matrix, expected = (U * s) @ V.T, (U * counts) @ V.T
    if transposed:
        matrix, expected = matrix.T.contiguous(), expected.T
    if spectrum == "1e-6":  # the last value is 10⁻⁶ of the first or is not
        assert far(linalg.polar(matrix), expected) < 0.1
        return
    mean = float(s[counts].mean()) if bool(counts.any()) else 0.0
    for found, scale in ((linalg.polar(matrix), 1.0), (isotropic(matrix.clone()), mean)):
        assert torch.linalg.matrix_norm(found - expected * scale) <= 2e-7 * torch.linalg.matrix_norm(expected * scale)


@pytest.mark.parametrize(("least", "most"), [(1.0, 1.0), (1e-3, 2.0), (1e-9, 1.0), (1e-65, 1e-56), (3e50, 1e61)])
def test_partial_fractions(least: float, most: float) -> None:
    """x^(−1/2) on the whole interval."""
    shifts, weights = (np.array(part) for part in roots._partial_fractions(least, most))
    x = np.geomspace(least, most, 1001)
    found = (weights / (x[:, None] + shifts)).sum(1)
    assert np.abs(found * np.sqrt(x) - 1).max() < 1e-10
    assert (shifts >= 0).all()
    assert (weights > 0).all()


def test_trace_of_the_inverse() -> None:
    """From the pivots; infinite of what has no inverse."""
    rng = np.random.default_rng(3)
    for n in (1, 2, 40):
        diagonal, beside = 2 + rng.random(n), rng.standard_normal(n)[: n - 1] / 2
        whole = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        expected = np.trace(np.linalg.inv(whole))
        assert roots._trace_of_inverse(diagonal.tolist(), beside.tolist()) == pytest.approx(expected, rel=1e-12)
        for bad in (-1.0, 0.0, math.nan):
            diagonal[n // 2] = bad
            assert roots._trace_of_inverse(diagonal.tolist(), beside.tolist()) == math.inf


@pytest.mark.skipif(not native.available(), reason="there are no compiled loops")
@pytest.mark.parametrize("count", [1, 2, 7, 30])
@pytest.mark.parametrize("edges", [(0, 1), (0, 2), (0, 1, 5), (0, 1, 17, 33), (0, 1, 65, 129, 150), (0, 150)])
def test_sums_of_resolvents(edges: tuple[int, ...], count: int) -> None:
    """All of the sum is in what is returned; the same bits without compiled loops."""
    rng = np.random.default_rng(4)
    n, draw = edges[-1], lambda *size: torch.from_numpy(rng.standard_normal(size))
    diagonal, beside, shifts, weights = 1e-3 + draw(n).abs(), draw(n - 1), draw(count).abs(), draw(count)
    diagonal[1:] += beside.abs()
    diagonal[:-1] += beside.abs()
    given = (diagonal, beside, shifts, weights, edges)

    def found() -> list[Tensor]:
        out = diagonal.new_zeros(n, n)
        return [*roots._resolvents(*given, out), out]

    starts, ends, out = made = found()
    with native.turned_off():
        assert all(map(torch.equal, made, found()))
    whole = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
    eye = torch.eye(n, dtype=torch.float64)
    inverses = torch.stack([w * torch.linalg.inv(whole + t * eye) for w, t in zip(weights, shifts, strict=True)])
    expected = inverses.sum(0)
    for first, end in itertools.pairwise(edges):
        beyond = torch.ones(count, dtype=torch.float64)
        for low, high in itertools.pairwise(edges[edges.index(end) :]):
            out[first:end, low:high] = (ends[:, first:end] * beyond[:, None]).T @ starts[:, low:high]
            beyond *= starts[:, high - 1]
    assert torch.equal(out, out.triu())
    size = inverses.abs().sum(0)  # they may cancel, as half of the weights are negative
    assert bool(((out - expected.triu()).abs() <= 1e-11 * size).all())
