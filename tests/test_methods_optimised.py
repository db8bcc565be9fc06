"""WUDI and its closed forms, OptMerge, DOGE-TA: against the published algorithms, slow references, and what must be true."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import geomerge as gm
import optimised_references as ref
import tiny
from geomerge.methods.matrix.doge_ta import DogeTa, threshold
from geomerge.methods.matrix.quadratic import Quadratic, interference

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "golden_optimised.json").read_text())
FULL, LOW = (torch.tensor(GOLDEN["inputs"][key], dtype=torch.float64) for key in ("mat_tau", "lowrank_tau"))

SHAPES = [(12, 16), (16, 12), (4, 30), (30, 4), (1, 6), (6, 1), (3, 3)]
"""Of every kind: the stacked task vectors have fewer rows than columns, twice as many, more."""


def merged(method: str, taus: Tensor, **parameters: Any) -> Tensor:
    """The merged task vector: the base is zero, so nothing is lost in the sum with it."""
    return getattr(gm.methods, method)(torch.zeros_like(taus[0]), list(taus), **parameters)


def drawn(shape: tuple[int, int], tasks: int = 3, seed: int = 0) -> Tensor:
    """Random task vectors of unequal norms."""
    random = np.random.default_rng([seed, tasks, *shape])
    return torch.from_numpy(random.standard_normal((tasks, *shape)) * 0.02 * np.arange(1, tasks + 1)[:, None, None])


def close(found: Tensor, expected: Any, error: float = 1e-9) -> bool:
    """Equal up to a share of the largest element."""
    expected = np.asarray(expected)
    return bool(np.abs(found.numpy() - expected).max() <= error * np.abs(expected).max())


@pytest.mark.parametrize(
    ("case", "method", "taus", "parameters"),
    [
        ("wudi_closed_form", "iwudi", FULL, {"filter": "none"}),
        ("wudi_adam_lr1e-5_300", "wudi", FULL, {}),
        ("iwudi_exp_t300", "iwudi", FULL, {}),
        ("optmerge_fullft_adam_lr1e-5_300", "optmerge", FULL, {}),
        ("optmerge_lora_sgd_lr1e-4_m0.9_300", "wudi2", LOW, {"mode": "lora"}),
        ("doge_ta_lam0.07_sub6_K0.30_adam1e-4_400", "doge", FULL, {}),
    ],
)
def test_published_algorithms(case: str, method: str, taus: Tensor, parameters: dict[str, Any]) -> None:
    """The cases of an oracle that was checked against the authors' code."""
    assert close(merged(method, taus, **parameters), GOLDEN["cases"][case]["out"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_slow_references(shape: tuple[int, int], tasks: int) -> None:
    """Every method in every shape, whichever way its objective is kept."""
    taus = drawn(shape, tasks)
    arrays = list(taus.numpy())
    n = shape[1]
    cases = [
        ("wudi", {"steps": 60}, ref.wudi(arrays, steps=60)),
        ("iwudi", {"t": 40}, ref.spectral(arrays, lambda x: 1 - np.exp(-40 * x))),
        ("iwudi", {"filter": "tikhonov"}, ref.spectral(arrays, lambda x: x / (x + 0.01))),
        ("iwudi", {"filter": "landweber"}, ref.spectral(arrays, lambda x: 1 - (1 - 0.9 * x / x[0]) ** 150)),
        ("iwudi", {"start": "zero"}, ref.spectral(arrays, lambda x: 1 - np.exp(-300 * x), np.zeros(shape))),
        (
            "swudi",
            {},
            ref.spectral(arrays, lambda x: (1 - np.exp(-1300 * x)) * (np.arange(n) < math.ceil(0.65 * n - 1e-9))),
        ),
        ("aswudi", {"reference_floor": True}, ref.spectral(arrays, lambda x: (np.arange(n) < participation(x)) * 1.0)),
        ("optmerge", {"steps": 60}, ref.optmerge(arrays, "full", 60)),
        ("optmerge", {"steps": 60, "mode": "lora"}, ref.optmerge(arrays, "lora", 60)),
        ("optmerge", {"steps": 60, "mode": "modality"}, ref.optmerge(arrays, "modality", 60)),
        (
            "swudi",
            {"ratio": 1, "rho": 0.5, "lambda_ref": 2, "gamma": 3, "start": "zero"},
            ref.spectral(arrays, lambda x: (1 - np.exp(-1300 * (2 / x[0]) ** 0.5 * x)) ** 3, np.zeros(shape)),
        ),
    ]
    for method, parameters, expected in cases:
        assert close(merged(method, taus, **parameters), expected, 1e-7), (method, parameters)


@pytest.mark.parametrize(
    ("method", "parameters", "response"),
    [
        ("iwudi", {}, lambda x: 1 - np.exp(-300 * x)),
        ("iwudi", {"filter": "tikhonov"}, lambda x: x / (x + 0.01)),
        ("iwudi", {"filter": "none"}, np.ones_like),
        ("swudi", {"ratio": 1}, lambda x: 1 - np.exp(-1300 * x)),
    ],
)
def test_weak_directions(method: str, parameters: dict[str, Any], response: Callable[[np.ndarray], np.ndarray]) -> None:
    """Task vectors of low rank, rounded to seven decimals: what the noise's directions do is written down, too."""
    # With f = 1 they are divided by 10⁻⁸, and so is rounding, here and in the reference.
    error = 1e-6 if response is np.ones_like else 1e-9
    assert close(merged(method, LOW, **parameters), ref.spectral(list(LOW.numpy()), response), error)


def participation(values: np.ndarray) -> int:
    """⌈(Σ√λ)²/Σλ⌉."""
    return math.ceil(np.sqrt(values).sum() ** 2 / values.sum() - 1e-9)


@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (4, 30), (3, 3)], ids=str)
@pytest.mark.parametrize("tasks", [2, 3])
def test_doge_reference(shape: tuple[int, int], tasks: int) -> None:
    """DOGE-TA row by row, and its Δ stays out of the shared subspace but for what Adam's own scaling puts there."""
    taus = drawn(shape, tasks)
    arrays = list(taus.numpy())
    assert close(merged("doge_ta", taus, steps=30), ref.doge(arrays, steps=30), 1e-6)
    delta, projector = ref.doge_shift(arrays, steps=30)
    assert np.linalg.norm(projector @ delta) <= 0.5 * np.linalg.norm(delta)


def test_doge_shift_of_the_published_algorithm() -> None:
    """With masks of everything and of nothing the shift can be read off: Σ λ_t(τ_t + Δ)."""
    method = DogeTa(density=1.0)
    scales = 0.07 / torch.linalg.vector_norm(FULL.flatten(1), dim=1)
    whole = method.merge_above(FULL.clone(), [0.0] * 3)
    delta = (whole - torch.einsum("t,tij->ij", scales, FULL)) / scales.sum()
    expected = np.array(GOLDEN["cases"]["doge_ta_lam0.07_sub6_K0.30_adam1e-4_400"]["delta"])
    assert np.abs(delta.numpy() - expected).max() < 1e-9 * np.abs(expected).max()
    assert not method.merge_above(FULL.clone(), [math.inf] * 3).any()


def test_doge_without_steps_balances_norms() -> None:
    """steps = 0 and whole masks: Σ η τ_t/‖τ_t‖, whatever the norms; a task vector of zeros adds nothing."""
    taus = torch.stack([torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])]).double()
    expected = 0.1 * np.array([[0.6, 1.0], [0.0, 0.8]])
    assert close(merged("doge_ta", taus, steps=0, density=1, eta=0.1), expected, 1e-12)
    assert close(
        merged("doge_ta", taus * torch.tensor([5.0, 9.0]).view(2, 1, 1), steps=0, density=1, eta=0.1), expected
    )
    more = torch.cat([taus, torch.zeros_like(taus[:1])])
    assert close(merged("doge_ta", more, steps=0, density=1, eta=0.1), expected, 1e-12)


def test_doge_threshold_includes_equals() -> None:
    """Of [1, 2, 2, 3] a quarter: the 3rd smallest, 2, so that three are kept; nothing to drop keeps all."""
    values = torch.tensor([[1.0, -2.0], [2.0, 3.0]])
    assert threshold(values, 0.25) == 2.0
    assert threshold(values, 0.0) == 3.0
    assert threshold(values, 1.0) == 0.0


@pytest.mark.parametrize("shape", [(12, 16), (4, 60)], ids=str)
def test_wudi_lowers_its_loss_step_by_step(shape: tuple[int, int]) -> None:
    """The published loss falls with every ten steps, and ends nowhere below the exact minimiser's."""
    taus = drawn(shape)
    losses = [
        ref.wudi_loss(merged("wudi", taus, steps=s, lr=1e-6).numpy(), list(taus.numpy())) for s in range(0, 60, 10)
    ]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    least = ref.wudi_loss(merged("iwudi", taus, filter="none").numpy(), list(taus.numpy()))
    assert least <= losses[-1]


def test_orthogonal_row_spaces_do_not_interfere() -> None:
    """[[2, 0], …] and [[0, 3], …] never meet: all of the family return the sum."""
    taus = torch.zeros(2, 3, 4, dtype=torch.float64)
    taus[0, :, 0] = torch.tensor([2.0, 1.0, -1.0])
    taus[1, :, 2] = torch.tensor([0.5, 3.0, 1.0])
    for method in ("wudi", "iwudi", "swudi", "aswudi"):
        assert close(merged(method, taus), taus.sum(0), 1e-12), method


@pytest.mark.parametrize("method", ["wudi", "iwudi", "swudi", "aswudi", "optmerge", "doge_ta"])
def test_unchanged_experts(method: str) -> None:
    """Zero task vectors are left out (not divided by), alone and among others."""
    taus = drawn((6, 8), 2)
    zero = torch.zeros_like(taus[:1])
    parameters = {} if method.startswith(("i", "s", "a")) else {"steps": 20}
    assert not merged(method, zero.expand(3, -1, -1), **parameters).any()
    with_zero = merged(method, torch.cat([taus, zero]), **parameters)
    assert bool(torch.isfinite(with_zero).all())
    if method not in ("optmerge", "doge_ta"):  # where T itself sets ranks, one more task is one more task
        assert close(with_zero, merged(method, taus, **parameters), 1e-12)


def test_limits_of_the_filters() -> None:
    """f = 0 is the sum, f = 1 the minimiser: t = 0 and ratio = 0 on one side, t → ∞ with ratio = 1 on the other."""
    taus = drawn((20, 16))
    least = merged("iwudi", taus, filter="none")
    gradient = sum(2 * (least - v) @ v.T @ v / (v * v).sum() for v in taus)
    assert float(gradient.abs().max()) < 1e-12  # type: ignore[union-attr]
    for parameters in ({"t": 0}, {"ratio": 0}):
        assert torch.equal(merged("swudi", taus, **parameters), taus.sum(0))
    assert torch.equal(merged("iwudi", taus, t=0), taus.sum(0))
    assert close(merged("swudi", taus, t=1e9, ratio=1), least)
    assert close(merged("iwudi", taus, t=1e9, start="zero"), least)
    assert close(merged("swudi", taus, t=77, ratio=1), merged("iwudi", taus, t=77), 1e-12)


def test_identical_experts_in_filtered_directions() -> None:
    """Two copies of v: f = 1 gives v, f = 0 gives 2v, and everything else lies between: 2v − vVfVᵀ."""
    v = drawn((20, 12), 1)
    both = v.expand(2, -1, -1)
    assert close(merged("iwudi", both, filter="none"), v[0])
    values, vectors = np.linalg.eigh(2 * (v[0].T @ v[0] / (v * v).sum()).numpy())
    f = np.diag(1 - np.exp(-3 * values))
    assert close(merged("iwudi", both, t=3), v[0].numpy() @ (2 * np.eye(12) - vectors @ f @ vectors.T))


def test_aswudi_counts_real_directions() -> None:
    """Two tasks of rank 1 in 500 dimensions at 60° have λ = 1 ± ½: K = ⌈(√1.5 + √0.5)²/2⌉ = ⌈1.87⌉ = 2, the minimiser.

    With the reference's floor the 498 zeros add 498·10⁻⁴ to Σ√λ: (1.932 + 0.050)²/2 = 1.96, still 2; at 5000 it is 3.
    """
    for columns in (500, 5000):
        taus = torch.zeros(2, 1, columns, dtype=torch.float64)
        taus[0, 0, 0] = 1.0
        taus[1, 0, :2] = torch.tensor([0.5, math.sqrt(0.75)])
        assert close(merged("aswudi", taus), merged("iwudi", taus, filter="none"))
    objective = interference(taus, spectral=True)
    assert objective is not None
    assert objective.factored
    values = torch.tensor([1.5, 0.5], dtype=torch.float64)
    aswudi, floored = (gm.methods.aswudi.method.make({"reference_floor": b}, count=2) for b in (False, True))
    assert aswudi._number(values, 5000) == aswudi._number(values, 2) == 2
    assert floored._number(values, 500) == 2
    assert floored._number(values, 5000) == 3
    assert aswudi._number(torch.ones(7, dtype=torch.float64), 7) == 7


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_optmerge_of_one(mode: str) -> None:
    """k is the full rank, the start is the minimiser: the expert, in both modes."""
    v = drawn((9, 14), 1)
    assert close(merged("optmerge", v, mode=mode), v[0], 1e-9)


def test_optmerge_lora_properties() -> None:
    """Copies come back, c·τ gives c·θ, rotations go through; with full steps none of it."""
    taus, copies = drawn((10, 16), 3), drawn((10, 16), 1).expand(3, -1, -1)
    assert close(merged("optmerge", copies, mode="lora"), copies[0], 1e-9)
    assert not close(merged("optmerge", copies, mode="full"), copies[0], 1e-3)
    for mode, holds in (("lora", True), ("full", False)):
        plain = merged("optmerge", taus, mode=mode)
        scaled = merged("optmerge", 3 * taus, mode=mode) / 3
        assert close(scaled, plain.numpy(), 1e-9) is holds, mode
        left, right = (
            torch.from_numpy(np.linalg.qr(np.random.default_rng(i).standard_normal((i, i)))[0]) for i in (10, 16)
        )
        assert (
            close(merged("optmerge", left @ taus @ right, mode=mode), (left @ plain @ right).numpy(), 1e-9) is holds
        ), mode


def test_optmerge_closed_form_is_the_limit_of_its_steps() -> None:
    """Many large steps of descent end where the closed form is; of several minimisers it is the one next to the start."""
    taus = drawn((6, 20), 3)
    exact = merged("optmerge", taus, mode="lora", closed_form=True)
    assert close(merged("optmerge", taus, mode="lora", lr=0.3, steps=3000), exact.numpy(), 1e-6)
    assert not close(exact, taus.mean(0).numpy(), 1e-2)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (8, 8)], ids=str)
def test_both_forms_of_the_objective_agree(shape: tuple[int, int]) -> None:
    """Factored or not: the same descent and the same filtered solution."""
    taus = drawn(shape)
    thin, dense = (Quadratic(taus, taus, factored=f) for f in (True, False))
    theta = taus.sum(0)
    assert close(thin.descent(theta), dense.descent(theta).numpy(), 1e-12)
    assert close(thin.filtered(theta, torch.ones_like), dense.filtered(theta, torch.ones_like).numpy(), 1e-6)
    assert not thin.settled(theta)
    assert thin.settled(dense.filtered(theta, torch.ones_like))


def test_wudi_damps_rounding() -> None:
    """T = 1 and copies of it in bfloat16's coarse numbers: nothing to optimise, so not a bit moves."""
    v = (drawn((9, 14), 1) * 64).round() / 64
    assert torch.equal(merged("wudi", v), v[0])
    assert torch.equal(merged("wudi", torch.cat([v, torch.zeros_like(v)])), v[0])


@pytest.mark.parametrize("method", ["swudi", "optmerge", "doge_ta"])
def test_recipes(method: str, tmp_path: Path) -> None:
    """A recipe merges a model's weights as the function does, rounded once; what the rule leaves alone is the base's."""
    models = tiny.family(tmp_path, "base a b")
    text = f"""
merge_method: {method}
base_model: {tmp_path}/base
models: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]
parameters: {"{scope: tensor}" if method == "doge_ta" else "{}"}
"""
    gm.merge(text, tmp_path / "out", threads=2)
    found = tiny.read(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    base, *experts = (m[name] for m in models.values())
    alone = {"scope": "tensor"} if method == "doge_ta" else {}
    assert torch.allclose(found[name], getattr(gm.methods, method)(base, experts, **alone), rtol=1e-6)
    assert not torch.equal(found[name], base)
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(found[norm], models["base"][norm]) is (method != "swudi")


@pytest.mark.parametrize("method", ["wudi", "iwudi", "optmerge", "doge_ta"])
def test_inference_mode_and_gradients(method: str) -> None:
    """In inference mode, and on tensors that ask for gradients, the same bits."""
    taus = drawn((5, 7), 2)
    expected = merged(method, taus)
    with torch.inference_mode():
        assert torch.equal(merged(method, taus), expected)
    assert torch.equal(merged(method, taus.clone().requires_grad_()).detach(), expected)
