"""Combining adapters: what comes out is what the same arithmetic on dense ΔW gives, computed here by other code."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_samples import PREFIX, dense, factors, merged, write_adapter
from safetensors.torch import load_file
from torch import Tensor

import geomerge
from geomerge.adapter.combine import combine
from geomerge.adapter.knots import joint
from geomerge.adapter.low_rank import Budget, Factors, combination, inner, truncate
from geomerge.adapter.streamed import Streamed, height, in_rows
from geomerge.adapter.streamed import truncate as truncate_streamed
from geomerge.errors import IncompatibleModels, NotFiniteError, UsageError

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SHAPES = {Q: (16, 16), UP: (24, 16)}


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Three adapters: plain with s = 3, rank-stabilised of rank 3, and one with patterns that leaves UP alone."""
    first = {**factors(Q, 16, 16, 2, 1), **factors(UP, 24, 16, 2, 2)}
    second = {**factors(Q, 16, 16, 3, 3), **factors(UP, 24, 16, 3, 4)}
    third = factors(Q, 16, 16, 1, 5)
    return [
        write_adapter(tmp_path / "a", first, "org/base", lora_alpha=6),
        write_adapter(tmp_path / "b", second, "org/base", r=3, lora_alpha=4, use_rslora=True),
        write_adapter(tmp_path / "c", third, "org/base", rank_pattern={"q_proj": 1}, alpha_pattern={Q: 5}),
    ]


def change(adapter: Path, module: str) -> Tensor:
    """ΔW of a module, zero where the adapter does not have it."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    if f"{PREFIX}{module}.lora_A.weight" not in tensors:
        return torch.zeros(SHAPES[module], dtype=torch.float64)
    return dense_by_pattern(adapter, module)


def dense_by_pattern(adapter: Path, module: str) -> Tensor:
    config = json.loads((adapter / "adapter_config.json").read_text())
    if f"^{module}" in config.get("alpha_pattern", {}):
        config["alpha_pattern"][module] = config["alpha_pattern"][f"^{module}"]
        tensors = load_file(adapter / "adapter_model.safetensors")
        a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "AB")
        return config["alpha_pattern"][module] / a.shape[0] * (b @ a)
    return dense(adapter, module)


def same(out: Path, wanted: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    for module, value in wanted.items():
        torch.testing.assert_close(change(out, module), value, rtol=tolerance, atol=tolerance, msg=module)


def test_linear_is_the_weighted_sum(adapters: list[Path], tmp_path: Path) -> None:
    """Different ranks, scales and rules of scaling, a missing layer: exactly Σ wₖ·ΔWₖ, of rank Σ rₖ, with no error."""
    weights = [0.2, -0.7, 1.5]
    report = combine(adapters, tmp_path / "out", parameters={"weight": weights, "normalize": False}, dtype="float64")
    same(tmp_path / "out", {m: sum(w * change(a, m) for w, a in zip(weights, adapters)) for m in SHAPES})
    assert {each.module: each.rank for each in report.layers} == {Q: 6, UP: 5}
    assert report.error == 0


def test_arithmetic_on_the_factors_apart_is_something_else(adapters: list[Path]) -> None:
    """What this must never do: (ΣwB)(ΣwA) is another matrix, far from Σw·BA."""
    one, two = (load_file(a / "adapter_model.safetensors") for a in (adapters[0], adapters[0]))
    two = {k: v.flip(0) for k, v in two.items()}
    a, b = (0.5 * (one[f"{PREFIX}{Q}.lora_{s}.weight"] + two[f"{PREFIX}{Q}.lora_{s}.weight"]) for s in "AB")
    right = combination(
        [Factors(t[f"{PREFIX}{Q}.lora_B.weight"], t[f"{PREFIX}{Q}.lora_A.weight"]) for t in (one, two)], [0.5, 0.5]
    )
    assert (b @ a - right.b @ right.a).norm() > 0.3 * (right.b @ right.a).norm()


def test_one_adapter_of_scale_1_keeps_its_bits(tmp_path: Path) -> None:
    """Identity: the very factors come back, and so they do at the second time."""
    source = write_adapter(tmp_path / "a", factors(Q, 16, 16, 2, 1), "org/base")
    for out in ("one", "two"):
        combine([source], tmp_path / out, dtype="float64")
        found, wanted = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / out, source))
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
        source = tmp_path / out


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("task_arithmetic", {}),
        ("ties", {"density": 0.3}),
        ("karcher", {}),
        ("model_stock", {}),
        ("sce", {}),
    ],
)
def test_the_order_does_not_matter(
    adapters: list[Path], tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    """Permutation."""
    found = []
    for i, order in enumerate(itertools.permutations(adapters)):
        combine(order, tmp_path / str(i), method=method, parameters=parameters, dtype="float64", rank=16)
        found.append({m: change(tmp_path / str(i), m) for m in SHAPES})
    for other in found[1:]:
        for module in SHAPES:
            torch.testing.assert_close(other[module], found[0][module], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["slerp", "karcher", "multislerp", "model_stock"])
def test_methods_of_norms_and_angles(adapters: list[Path], tmp_path: Path, method: str) -> None:
    """Coefficients from the factors' inner products are those that the method finds on the dense ΔW."""
    two = adapters[:2]
    parameters: dict[str, Any] = {"t": 0.3} if method == "slerp" else {}
    combine(two, tmp_path / "out", method=method, parameters=parameters, dtype="float64")
    for module, shape in SHAPES.items():
        changes = [change(a, module) for a in two]
        function = getattr(geomerge.methods, method)
        if method == "slerp":
            wanted = function(changes[0], [changes[1]], t=0.3)
        elif method == "model_stock":
            wanted = function(torch.zeros(shape, dtype=torch.float64), changes)
        else:
            wanted = function(changes, **({"weight": 1.0} if method == "multislerp" else {}))
        torch.testing.assert_close(change(tmp_path / "out", module), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.4, "weight": [1.0, 2.0, 0.5]}),
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.5, "lambda": 0.7}),
        ("della", {"density": 0.6, "epsilon": 0.1}),
        ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    ],
)
def test_elementwise(adapters: list[Path], tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    """At full rank the result is the method's on dense ΔW; at rank 3 its error is the one of the best approximation."""
    combine(adapters, tmp_path / "full", method=method, parameters=parameters, rank=16, seed=7, dtype="float64")
    cut = combine(adapters, tmp_path / "cut", method=method, parameters=parameters, rank=3, seed=7, dtype="float64")
    for module, shape in SHAPES.items():
        experts = [{f"{module}.weight": change(a, module)} for a in adapters]
        base = {f"{module}.weight": torch.zeros(shape, dtype=torch.float64)}
        options = {"weight": 1.0, **parameters}
        function = getattr(geomerge.methods, method)
        wanted = function(base, experts, seed=7, **options)[f"{module}.weight"]
        torch.testing.assert_close(change(tmp_path / "full", module), wanted, rtol=1e-9, atol=1e-9)
        values = torch.linalg.svdvals(wanted)
        said = next(each for each in cut.layers if each.module == module)
        assert said.rank == 3
        assert said.error == pytest.approx(values[3:].norm().item(), rel=1e-6)
        assert (change(tmp_path / "cut", module) - wanted).norm().item() == pytest.approx(said.error, rel=1e-6)


def test_a_merge_of_whole_models_is_the_same(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """base + combine(a, b) = the recipe's merge of base+a and base+b, random masks and all."""
    parameters = {"density": 0.5}
    combine(adapters[:2], tmp_path / "out", method="dare_ties", parameters=parameters, rank=16, seed=3, dtype="float64")
    recipe = f"merge_method: dare_ties\nbase_model: {base}\nseed: 3\ndtype: float64\nmodels:\n" + "".join(
        f"- {{model: {base}+{a}, parameters: {{weight: 1, density: 0.5}}}}\n" for a in adapters[:2]
    )
    wanted, found = geomerge.merge_state_dicts(recipe), merged(f"{base}+{tmp_path / 'out'}")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


# -- truncation --------------------------------------------------------------------------------------------------------


def test_truncation_is_the_best_there_is(adapters: list[Path], tmp_path: Path) -> None:
    """Rank 2 of the exact sum: the error is that of the SVD of the dense sum, layer by layer and in all."""
    report = combine(adapters, tmp_path / "out", rank=2, dtype="float64")
    squares = 0.0
    for said in report.layers:
        total = sum(change(a, said.module) for a in adapters) / 3
        values = torch.linalg.svdvals(total)
        assert said.error == pytest.approx(values[2:].norm().item())
        assert said.norm == pytest.approx(total.norm().item())
        assert (change(tmp_path / "out", said.module) - total).norm().item() == pytest.approx(said.error)
        squares += said.error**2
    assert report.error == pytest.approx(squares**0.5)
    assert 0 < report.relative < 1


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 6])
def test_a_rank_that_holds_less_than_half_is_noted(rank: int, adapters: list[Path], tmp_path: Path) -> None:
    """Of all layers' energy together; and what is noted is no part of what is written."""
    report = combine(adapters, tmp_path / "out", rank=rank)
    squares = [
        torch.linalg.svdvals(sum(change(a, each.module) for a in adapters) / 3).square() for each in report.layers
    ]
    left = sum(s[rank:].sum().item() for s in squares) / sum(s.sum().item() for s in squares)
    said = [note for note in report.notes if f"truncation left out {left:.0%} of" in note]
    assert len(said) == len(report.notes) == (left > 0.5)
    assert left > 0.5 if rank == 1 else left < 0.5 or rank < 6


def test_energy_chooses_the_fewest_directions(adapters: list[Path], tmp_path: Path) -> None:
    """The chosen rank holds the share, one less does not."""
    report = combine(adapters, tmp_path / "out", energy=0.9, dtype="float64")
    for said in report.layers:
        share = torch.linalg.svdvals(sum(change(a, said.module) for a in adapters) / 3).square()
        share = share.cumsum(0) / share.sum()
        assert share[said.rank - 1] >= 0.9
        assert said.rank == 1 or share[said.rank - 2] < 0.9


def test_literal_truncation() -> None:
    """diag(3, 2) in a clumsy factorisation: rank 1 keeps the 3 and reports the 2."""
    b, a = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.5, 1.0], [1.5, -1.0]]).double()
    found = truncate(Factors(b, a), Budget(1))
    torch.testing.assert_close(found.factors.b @ found.factors.a, torch.diag(torch.tensor([3.0, 0.0]).double()))
    assert (found.norm, found.error) == (pytest.approx(13**0.5), pytest.approx(2.0))
    assert inner(Factors(b, a), Factors(b, a)) == pytest.approx(13)


def blocks(matrix: Tensor) -> Streamed:
    rows, columns = matrix.shape
    step = height(columns)
    return Streamed(rows, columns, lambda: (matrix[i : i + step] for i in range(0, rows, step)))


def test_streamed_truncation() -> None:
    """A flat spectrum, the hardest: within half a percent of the best; a matrix of rank 3 is found exactly; zero is zero."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 400, generator=generator, dtype=torch.float64)
    found = truncate_streamed(blocks(noise), Budget(8), "x")
    best = torch.linalg.svdvals(noise)[8:].norm().item()
    assert best <= found.error <= 1.005 * best
    assert (noise - found.factors.b @ found.factors.a).norm().item() == pytest.approx(found.error)
    low = noise[:, :3] @ noise[:3]
    assert truncate_streamed(blocks(low), Budget(8), "x").error < 1e-12 * low.norm().item()
    chosen = truncate_streamed(blocks(low), Budget(energy=1 - 1e-12), "x")
    assert (chosen.factors.rank, chosen.error < 1e-9) == (3, True)
    zero = truncate_streamed(blocks(torch.zeros(300, 400, dtype=torch.float64)), Budget(4), "x")
    assert (zero.norm, zero.error) == (0, 0)
    assert not bool(zero.factors.b.any())


def test_energy_goes_beyond_the_first_guess() -> None:
    """When 32 directions do not hold the share, more are tried."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(120, 100, generator=generator, dtype=torch.float64)
    share = torch.linalg.svdvals(noise).square()
    wanted = int((share.cumsum(0) / share.sum() < 0.8).sum()) + 1
    assert wanted > 32
    assert truncate_streamed(blocks(noise), Budget(energy=0.8), "x").factors.rank == wanted
    assert truncate_streamed(blocks(noise), Budget(40, 0.99), "x").factors.rank == 40


def test_rows_from_pieces() -> None:
    """Pieces of any size become blocks of whole rows."""
    values = torch.arange(35.0, dtype=torch.float64)
    found = [b.clone() for b in in_rows([values[:3], values[3:20], values[20:]], 7, 5)]
    assert torch.equal(torch.cat(found), values.view(7, 5))


def test_threads_do_not_change_a_bit(adapters: list[Path], tmp_path: Path) -> None:
    """One thread or three."""
    for method in ("linear", "ties"):
        for threads in (1, 3):
            combine(adapters, tmp_path / f"{method}{threads}", method=method, rank=2, threads=threads)
        one, three = ((tmp_path / f"{method}{t}" / "adapter_model.safetensors").read_bytes() for t in (1, 3))
        assert one == three


# -- KnOTS -------------------------------------------------------------------------------------------------------------


def knots_reference(changes: list[list[Tensor]], density: float) -> list[Tensor]:
    """KnOTS-TIES by the paper's formulas on dense matrices: a full SVD of [ΔW₁ … ΔW_T], one threshold over all layers."""
    bases, parts = [], []
    for layer in changes:
        u, s, vh = np.linalg.svd(np.concatenate([c.numpy() for c in layer], 1), full_matrices=False)
        k = int((s > 1e-6 * s[0]).sum())
        bases.append(u[:, :k])
        parts.append(np.split(s[:k, None] * vh[:k], len(layer), 1))
    vectors = [np.concatenate([parts[i][t].ravel() for i in range(len(parts))]) for t in range(len(changes[0]))]
    trimmed = []
    for vector in vectors:
        kept = np.zeros_like(vector)
        largest = np.argsort(-np.abs(vector), kind="stable")[: int(density * len(vector))]
        kept[largest] = vector[largest]
        trimmed.append(kept)
    stack = np.array(trimmed)
    sign = np.where(stack.sum(0) >= 0, 1, -1)
    agree = stack * sign > 0
    mean = (stack * agree).sum(0) / np.maximum(agree.sum(0), 1)
    out, at = [], 0
    for basis, layer in zip(bases, parts, strict=True):
        size = layer[0].size
        out.append(torch.from_numpy(basis @ mean[at : at + size].reshape(layer[0].shape)))
        at += size
    return out


def test_knots_ties(adapters: list[Path], tmp_path: Path) -> None:
    """The factored route gives what the dense SVD gives (up to directions' signs, which the product does not see)."""
    combine(adapters, tmp_path / "out", method="ties", parameters={"density": 0.3}, knots=True, dtype="float64")
    wanted = knots_reference([[change(a, m) for a in adapters] for m in SHAPES], 0.3)
    # The sign of a singular direction decides no vote: it turns all of an element's votes around, so only exact ties differ.
    for module, value in zip(SHAPES, wanted, strict=True):
        torch.testing.assert_close(change(tmp_path / "out", module), value, rtol=1e-9, atol=1e-9)


def test_knots_of_a_linear_method_is_that_method(adapters: list[Path], tmp_path: Path) -> None:
    """A change of basis alone changes nothing."""
    parameters = {"weight": [0.5, 1.0, -0.3]}
    for knots in (False, True):
        combine(
            adapters,
            tmp_path / str(knots),
            method="task_arithmetic",
            parameters=parameters,
            knots=knots,
            dtype="float64",
        )
    same(tmp_path / "True", {m: change(tmp_path / "False", m) for m in SHAPES})


def test_knots_of_identical_adapters(adapters: list[Path], tmp_path: Path) -> None:
    """Their representations are the same, and TIES that keeps everything gives the adapter back."""
    a = factors(Q, 16, 16, 2, 1)
    term = Factors(a[f"{Q}.lora_B.weight"], a[f"{Q}.lora_A.weight"])
    found = joint([term, term])
    torch.testing.assert_close(found.parts[0], found.parts[1])
    assert found.parts.shape == (2, 2, 16)
    combine([adapters[0]] * 2, tmp_path / "out", method="ties", knots=True, dtype="float64")
    same(tmp_path / "out", {m: change(adapters[0], m) for m in SHAPES})


def test_knots_keeps_a_tiny_adapter() -> None:
    """The cutoff follows the scale: a factor of 10⁻⁹ loses no direction."""
    a = factors(Q, 16, 16, 2, 1)
    term = Factors(1e-9 * a[f"{Q}.lora_B.weight"], a[f"{Q}.lora_A.weight"])
    assert joint([term]).basis.shape[1] == 2


# -- what is written, what is refused ----------------------------------------------------------------------------------


def test_embeddings_convolutions_and_whole_tensors(tmp_path: Path) -> None:
    """Other kinds of layers come back in their own layout; a whole tensor that all share is kept."""
    torch.manual_seed(0)
    parts = [
        {
            "emb.lora_embedding_A": torch.randn(2, 9).double(),
            "emb.lora_embedding_B": torch.randn(4, 2).double(),
            "conv.lora_A.weight": torch.randn(2, 3, 3, 3).double(),
            "conv.lora_B.weight": torch.randn(5, 2, 1, 1).double(),
            "norm.weight": torch.ones(4),
        }
        for _ in range(2)
    ]
    adapters = [write_adapter(tmp_path / str(i), p) for i, p in enumerate(parts)]
    combine(adapters, tmp_path / "out", dtype="float64")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {k.removeprefix(PREFIX) for k in found} == set(parts[0])
    assert config["modules_to_save"] == ["norm"]
    assert set(config["target_modules"]) == {"emb", "conv"}
    b, a = found[f"{PREFIX}conv.lora_B.weight"], found[f"{PREFIX}conv.lora_A.weight"]
    assert a.shape == (4, 3, 3, 3)
    wanted = sum(
        torch.einsum("or,rikl->oikl", p["conv.lora_B.weight"].flatten(1), p["conv.lora_A.weight"]) for p in parts
    )
    torch.testing.assert_close(torch.einsum("or,rikl->oikl", b.flatten(1), a), wanted / 2)
    b, a = found[f"{PREFIX}emb.lora_embedding_B"], found[f"{PREFIX}emb.lora_embedding_A"]
    torch.testing.assert_close(b @ a, sum(p["emb.lora_embedding_B"] @ p["emb.lora_embedding_A"] for p in parts) / 2)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "karcher"])
def test_whole_tensors_with_a_base(base: Path, adapters: list[Path], tmp_path: Path, method: str) -> None:
    """Differences from the base are merged as ΔW is; an adapter that lacks the tensor changes nothing."""
    own = load_file(base / "model.safetensors")["model.norm.weight"]
    changes = [torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    made = [
        write_adapter(tmp_path / f"w{i}", {**factors(Q, 16, 16, 2, i), "model.norm.weight": own + c}, "org/base")
        for i, c in enumerate(changes)
    ]
    inputs = [*made, adapters[2]]
    parameters = {"density": 0.5} if method == "ties" else {}
    combine(inputs, tmp_path / "out", method=method, parameters=parameters, base=base, dtype="float64", rank=16)
    changes.append(torch.zeros(16, dtype=torch.float64))
    function = getattr(geomerge.methods, method)
    if method in ("linear", "karcher"):
        merge = function(changes)
    else:
        merge = function(torch.zeros(16, dtype=torch.float64), changes, weight=1.0, **parameters)
    found = merged(f"{base}+{tmp_path / 'out'}")
    torch.testing.assert_close(found["model.norm.weight"], own + merge, rtol=1e-12, atol=1e-12)


def test_peft_reads_it(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """PEFT loads the result, ranks that differ from layer to layer and all, and its forward pass has the summed ΔW."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    combine(adapters, tmp_path / "out", dtype="float64")
    ranks = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"]
    assert ranks  # or this would not test them
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    found = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    wanted = merged(f"{base}+{tmp_path / 'out'}")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "nearswap"}, "does not work on task vectors alone"),
        ({"method": "passthrough"}, "exactly 1"),
        ({"method": "ties", "parameters": {"densty": 1}}, "no parameter 'densty'"),
        ({"method": "ties", "parameters": {"density": [0.5]}}, "1 values for 2"),
        ({"method": "karcher", "knots": True}, "gains nothing from KnOTS"),
        ({"method": "della", "parameters": {"density": 0.5}, "knots": True}, "needs whole rows"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 1.5}, "share of"),
    ],
)
def test_refused_settings(adapters: list[Path], tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    """What makes no sense is said before anything is read."""
    with pytest.raises(UsageError, match=says):
        combine(adapters[:2], tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("second", "config", "says"),
    [
        (factors(Q, 16, 12, 2, 1), {}, r"\[16, 16\] in .* and linear \[16, 12\]"),
        ({**factors(Q, 16, 16, 2, 1), f"{Q}.lora_magnitude_vector": torch.ones(16)}, {"use_dora": True}, "DoRA"),
        ({**factors(Q, 16, 16, 2, 1), f"{Q}.lora_B.bias": torch.ones(16)}, {}, "has a bias"),
        ({**factors(Q, 16, 16, 2, 1), "model.norm.weight": torch.ones(16)}, {}, "hold model.norm.weight whole"),
    ],
)
def test_refused_adapters(
    adapters: list[Path], tmp_path: Path, second: dict[str, Tensor], config: dict[str, Any], says: str
) -> None:
    """Adapters that do not go together, or whose change is no s·B·A."""
    other = write_adapter(tmp_path / "other", second, **config)
    with pytest.raises(IncompatibleModels, match=says):
        combine([adapters[0], other], tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_not_finite(adapters: list[Path], tmp_path: Path, method: str) -> None:
    """NaN in a factor is refused, naming it."""
    bad = factors(Q, 16, 16, 2, 1)
    bad[f"{Q}.lora_B.weight"][3, 1] = torch.nan
    other = write_adapter(tmp_path / "other", bad)
    with pytest.raises(NotFiniteError, match=r"other: .*q_proj\.lora_B"):
        combine([adapters[0], other], tmp_path / "out", method=method)


def test_the_same_adapter_twice_is_noted(adapters: list[Path], tmp_path: Path) -> None:
    report = combine([adapters[0], adapters[1], adapters[0]], tmp_path / "out")
    assert report.notes == (f"{adapters[0]} and {adapters[0]} hold the same weights: they count twice",)
