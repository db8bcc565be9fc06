"""Inner products, norms and angles: as precise as float64 allows, however close the models are."""

from __future__ import annotations

from collections.abc import Sequence

import mpmath
import numpy as np
import pytest
import torch

import geomerge as gm
from geomerge.methods import gram, native, tile
from geomerge.methods.tile import Scan, TensorSource
from geomerge.testing import models


def scan_of(tensors: Sequence[torch.Tensor], columns: int | None = None, size: int = 1 << 13) -> Scan:
    """A scan of tensors in memory."""
    return Scan([TensorSource(t) for t in tensors], tensors[0].shape, columns=columns, tile=size)


def exact_angle(x: np.ndarray, y: np.ndarray) -> float:
    """The angle of two vectors in 60 digits."""
    with mpmath.workdps(60):
        a, b = [mpmath.mpf(float(v)) for v in x.ravel()], [mpmath.mpf(float(v)) for v in y.ravel()]
        dot = mpmath.fdot(a, b)
        return float(mpmath.acos(dot / mpmath.sqrt(mpmath.fdot(a, a) * mpmath.fdot(b, b))))


def test_centred_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix is that of (x₀, x₁ − x₀, x₂ − x₀), and gives back the products of the models; over several segments."""
    monkeypatch.setattr(tile, "SEGMENT", 1 << 14)
    tensors = models(3, (3, 15_001))
    found = gram.measure(scan_of(tensors), "tensor")
    flat = [t.numpy().ravel() for t in tensors]
    centred = np.stack([flat[0], flat[1] - flat[0], flat[2] - flat[0]])
    np.testing.assert_allclose(found.centred, centred @ centred.T, rtol=1e-12)
    np.testing.assert_allclose(found.raw(), np.stack(flat) @ np.stack(flat).T, rtol=1e-12)
    np.testing.assert_allclose(found.norm(2), np.linalg.norm(flat[2]), rtol=1e-12)
    tasks = found.task_vectors()
    assert tasks.count == 2
    np.testing.assert_allclose(tasks.raw(), centred[1:] @ centred[1:].T, rtol=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_small_angles(size: float) -> None:
    """Models that differ by 10⁻³ … 10⁻⁷ of their size: the angle to nine digits, where arccos has none left at 10⁻⁸."""
    random = np.random.default_rng(1)
    x = random.standard_normal(400)
    y = x + size * random.standard_normal(400)
    g = gram.measure(scan_of([torch.from_numpy(x), torch.from_numpy(y)]), "tensor")
    assert float(g.angle(0, 1)) == pytest.approx(exact_angle(x, y), rel=1e-9)


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
def test_angles_between_task_vectors(size: float) -> None:
    """Task vectors far smaller than the models: their angles are as precise as those of the models would be."""
    random = np.random.default_rng(2)
    base = random.standard_normal(300)
    x, y = (base + size * random.standard_normal(300) for _ in range(2))
    g = gram.measure(scan_of([torch.from_numpy(v) for v in (base, x, y)]), "tensor")
    assert float(g.task_vectors().angle(0, 1)) == pytest.approx(exact_angle(x - base, y - base), rel=1e-12)


def test_special_angles() -> None:
    """0 for equal models, π for opposite ones, π/2 for orthogonal ones, 0 where one is zero."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    cases = [(x, 0.0), (-x, np.pi), (torch.tensor([-2.0, 1.0, 0.0]).double(), np.pi / 2), (0 * x, 0.0)]
    for y, angle in cases:
        assert float(gram.measure(scan_of([x, y]), "tensor").angle(0, 1)) == pytest.approx(angle, abs=1e-12)
    assert float(gram.measure(scan_of([0 * x, x]), "tensor").angle(0, 1)) == 0.0


def test_angles_of_later_inputs() -> None:
    """The angle of x₁ and x₂ when x₀ is neither."""
    tensors = models(3, (500,))
    g = gram.measure(scan_of(tensors), "tensor")
    assert float(g.angle(1, 2)) == pytest.approx(exact_angle(tensors[1].numpy(), tensors[2].numpy()), rel=1e-9)


def test_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix for each slice along the last dimension, or for each position of the dimensions after the first."""
    monkeypatch.setattr(tile, "SEGMENT", 1 << 8)
    tensors = models(3, (41, 7, 5))
    arrays = np.stack([t.numpy() for t in tensors])
    arrays[1:] -= arrays[0]
    scan = scan_of(tensors, 5, 100)
    rows = [gram.of_rows(t).centred for segment in scan.segments for t in scan.tiles(segment)]
    wide = arrays.reshape(3, -1, 5)
    np.testing.assert_allclose(np.concatenate(rows), np.einsum("irn,jrn->rij", wide, wide), rtol=1e-12)
    columns = gram.measure(scan_of(tensors, 35, 100), "column").centred
    tall = arrays.reshape(3, 41, 35)
    np.testing.assert_allclose(columns, np.einsum("imc,jmc->cij", tall, tall), rtol=1e-12)


def test_empty_tensors() -> None:
    """No elements, no products."""
    assert not gram.measure(scan_of([torch.zeros(0)] * 2), "tensor").centred.any()


def test_sums_do_not_depend_on_order_or_size() -> None:
    """Sums over blocks are added exactly: 10¹⁶ + 1 − 10¹⁶ in different blocks is 1."""
    x = torch.zeros(3 * tile.BLOCK, dtype=torch.float64)
    x[0], x[tile.BLOCK], x[2 * tile.BLOCK] = 1e16, 1.0, -1e16
    for size in (tile.BLOCK, 2 * tile.BLOCK, 1 << 20):
        assert scan_of([x], size=size).sums(lambda t: [t.inputs[0]]) == [1.0]


def test_tiny_halves_do_not_underflow() -> None:
    """bfloat16 models of size 10⁻²⁵: their squares fit float64, and the arc is that of models of ordinary size."""
    a, b = torch.tensor([1.0, 0.0]).bfloat16(), torch.tensor([0.0, 1.0]).bfloat16()
    tiny = 2.0**-83
    large, small = gm.methods.slerp(a, [b], t=0.25), gm.methods.slerp(a * tiny, [b * tiny], t=0.25)
    assert torch.equal(small, large * tiny)


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4])
def test_a_model_much_smaller_than_the_first(ratio: float) -> None:
    """Norms are not what is left of two large numbers in float32."""
    x, y = (torch.from_numpy(np.random.default_rng(k).standard_normal(1 << 16)).bfloat16() for k in range(2))
    y = y * ratio
    for merge in (
        lambda x, y: gm.methods.karcher([x, y]),
        lambda x, y: gm.methods.slerp(x, [y], t=0.4),
        lambda x, y: gm.methods.slerp(x, [y], t=0.4, norm="geo"),
        lambda x, y: gm.methods.multislerp([x, y], weight=1.0),
    ):
        exact = merge(x.double(), y.double())
        assert (merge(x, y).double() - exact).norm() < 0.002 * exact.norm()  # bfloat16's own


@pytest.mark.skipif(not native.available(), reason="the compiled loops were not built (no C compiler?)")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shape", [(40, 896), (7, 1030), (300, 3)])
def test_compiled_products_have_the_bits_of_torch(count: int, shape: tuple[int, int]) -> None:
    """Of bfloat16 models, with sums in registers for two to five of them where whole registers fill."""
    tensors = [t.to(torch.bfloat16) for t in models(count, shape)]

    def measured() -> list[np.ndarray]:
        found = [
            gram.measure(scan_of(tensors, columns), axis) for columns, axis in ((None, "tensor"), (shape[1], "column"))
        ]
        single = Scan([TensorSource(t) for t in tensors], shape, tile=1 << 13, single=True)
        return [g.centred for g in (*found, gram.by_rows(scan_of(tensors, shape[1])), gram.measure(single, "tensor"))]

    fast = measured()
    with native.turned_off():
        for one, other in zip(fast, measured(), strict=True):
            np.testing.assert_array_equal(one, other)
