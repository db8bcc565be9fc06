"""Continual merging: the published algorithms, one step after the other or all at once, and states that are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import geomerge as gm
import references as ref
import tiny
from cli_samples import Program
from geomerge.checkpoint import open_checkpoint
from geomerge.continual import RULES, State, continue_merge
from geomerge.continual.step import weight_matrices
from geomerge.engine.matrices import whole_matrices
from geomerge.errors import (
    DamagedCheckpoint,
    GeomergeError,
    IncompatibleModels,
    ModelError,
    NotFiniteError,
    UsageError,
)
from geomerge.methods.matrix.opcm import cleaned
from geomerge.methods.properties import NAMES

Array = ref.Array
GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_optimised.json").read_text())


def project(total: Array, tau: Array, alpha: float, *, zero_diagonal: bool = True) -> Array:
    """OPCM's projection with complete bases, by clearing entries of UᵀτV."""
    u, sigma, vt = np.linalg.svd(total)
    r = 0
    if alpha < 1 and sigma.any():
        r = next(k for k in range(len(sigma)) if sigma[: k + 1].sum() / sigma.sum() > alpha)
    inner = u.T @ tau @ vt.T
    inner[:r, :r] = 0
    if zero_diagonal and sigma.any():
        np.fill_diagonal(inner, 0)
    return np.asarray(u @ inner @ vt)


def opcm(
    taus: Sequence[dict[str, Array]], matrices: Sequence[str], alpha: float = 0.5, **options: bool
) -> dict[str, Array]:
    """The merged task vectors after all experts."""
    total = {name: np.zeros_like(t) for name, t in taus[0].items()}
    norms = []
    for tau in taus:
        norms.append(np.sqrt(sum(np.sum(t * t) for t in tau.values())))
        for name, t in tau.items():
            total[name] = total[name] + (project(total[name], t, alpha, **options) if name in matrices else t)
    size = np.sqrt(sum(np.sum(t * t) for t in total.values()))
    return {name: t * np.mean(norms) / size for name, t in total.items()}


def ties(taus: Sequence[Array], lambda_: float = 0.5, density: float = 0.2) -> Array:
    """S ← S + λ·TIES(S, τ), the first time S ← λτ."""
    total = lambda_ * taus[0]
    for tau in taus[1:]:
        thinned = [ref.magnitude(t, density) for t in (total, tau)]
        total = total + lambda_ * ref.combine(np.zeros_like(tau), thinned, [1.0, 1.0], elect=True, normalize=False)
    return np.asarray(total)


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A model of a few tensors."""
    return tiny.save(folder, tensors)


def change(folder: Path, base: dict[str, Tensor]) -> dict[str, Array]:
    """The merged task vectors that a model holds."""
    return {name: (t.double() - base[name].double()).numpy() for name, t in tiny.read(folder).items()}


def family(root: Path, count: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """A base and experts with two weights, a bias, a head and an embedding; written as ``0`` (the base), ``1``, …"""
    shapes = {
        "model.embed_tokens.weight": (9, 6),
        "model.layers.0.mlp.up_proj.weight": (8, 6),
        "model.layers.0.mlp.down_proj.weight": (6, 8),
        "model.layers.0.mlp.down_proj.bias": (6,),
        "lm_head.weight": (9, 6),
    }
    base = tiny.random_tensors(shapes, seed, dtype=dtype)
    models = [base, *(tiny.random_tensors(shapes, seed + k, like=base, dtype=dtype) for k in range(1, count + 1))]
    for i, tensors in enumerate(models):
        write(root / str(i), tensors)
    return models


def experts(root: Path, count: int = 3) -> list[Path]:
    """The directories of the experts."""
    return [root / str(i) for i in range(1, count + 1)]


def test_published_algorithm(tmp_path: Path) -> None:
    """The case of an oracle that was checked against the authors' code: a weight and a bias, base zero, three experts."""
    case = GOLDEN["cases"]["opcm_alpha0.5_sequence_of_3"]
    taus = [torch.tensor(t, dtype=torch.float64) for t in GOLDEN["inputs"]["mat_tau"]]
    for i, tau in enumerate([torch.zeros_like(taus[0]), *taus]):
        write(tmp_path / str(i), {"fc1.weight": tau, "fc1.bias": tau[:, 0].clone()})
    step = continue_merge(tmp_path / "state", experts(tmp_path), base=tmp_path / "0")
    found = tiny.read(tmp_path / "state")
    np.testing.assert_allclose(found["fc1.weight"], case["out_w"], rtol=1e-9)
    np.testing.assert_allclose(found["fc1.bias"], case["out_b"], rtol=1e-9)
    assert 1 / step.state.factor == pytest.approx(case["lambda_T"], rel=1e-12)
    base, *all_at_once = ({"w": t, "b": t[:, 0]} for t in (torch.zeros_like(taus[0]), *taus))
    merged = gm.methods.opcm(base, all_at_once)
    np.testing.assert_allclose(merged["w"], case["out_w"], rtol=1e-9)
    np.testing.assert_allclose(merged["b"], case["out_b"], rtol=1e-9)


def recipe(folder: Path, parameters: dict[str, Any] | None = None, **more: Any) -> str:
    """OPCM of the three experts that `family` writes."""
    models = [{"model": str(path)} for path in experts(folder)]
    said = {"merge_method": "opcm", "base_model": str(folder / "0"), "models": models, "parameters": parameters or {}}
    return json.dumps(said | more, indent=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.8, "zero_diagonal": False}], ids=str)
def test_a_recipe_gives_the_same_model(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    """`merge_method: opcm` of all experts is `geomerge continue` of them, but for the last bit of float64."""
    family(tmp_path, dtype=dtype)
    continue_merge(tmp_path / "state", experts(tmp_path), base=tmp_path / "0", parameters=options)
    gm.merge(recipe(tmp_path, options), tmp_path / "out", threads=2)
    found, wanted = tiny.read(tmp_path / "out"), tiny.read(tmp_path / "state")
    if dtype == torch.float64:
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-15)
    else:
        assert tiny.same(found, wanted)


class TestRecipe:
    def test_one_norm_for_all_tensors(self, tmp_path: Path) -> None:
        """Parameters may differ from tensor to tensor: together the task vectors have the experts' mean norm."""
        base, *others = family(tmp_path)
        some = [{"filter": "down_proj", "value": 0.1}, {"value": 0.9}]
        gm.merge(recipe(tmp_path, {"alpha": some, "rest": "mean"}), tmp_path / "out")
        found = change(tmp_path / "out", base)
        sizes = [np.sqrt(sum(float(((m[n] - base[n]) ** 2).sum()) for n in base)) for m in others]
        assert np.sqrt(sum(np.sum(c * c) for c in found.values())) == pytest.approx(np.mean(sizes), rel=1e-12)
        taus = [{n: (m[n] - base[n]).numpy() for n in base} for m in others]
        wanted: dict[str, Array] = {}
        for name in base:
            total = np.zeros_like(taus[0][name])
            for tau in taus:
                alpha = 0.1 if "down_proj" in name else 0.9
                total = total + (project(total, tau[name], alpha) if "proj.weight" in name else tau[name] / 3)
            wanted[name] = total
        ratio = np.mean(sizes) / np.sqrt(sum(np.sum(t * t) for t in wanted.values()))
        for name, each in found.items():
            np.testing.assert_allclose(each, wanted[name] * ratio, atol=1e-13)

    def test_what_the_base_keeps_counts_for_nothing(self, tmp_path: Path) -> None:
        """With `rest: base` only the weights of linear layers are merged, and measured."""
        base, *others = family(tmp_path)
        gm.merge(recipe(tmp_path, {"rest": "base"}), tmp_path / "out")
        found = change(tmp_path / "out", base)
        weights = [n for n in base if "proj.weight" in n]
        assert {n for n, c in found.items() if c.any()} == set(weights)
        sizes = [np.sqrt(sum(float(((m[n] - base[n]) ** 2).sum()) for n in weights)) for m in others]
        assert np.sqrt(sum(np.sum(found[n] ** 2) for n in weights)) == pytest.approx(np.mean(sizes), rel=1e-12)

    def test_steps_and_lambda(self, tmp_path: Path) -> None:
        """λ and LiNeS come after the division by the norm."""
        base, *_ = family(tmp_path)
        gm.merge(recipe(tmp_path), tmp_path / "plain")
        plain = change(tmp_path / "plain", base)
        gm.merge(recipe(tmp_path, {"lambda": 0.25}), tmp_path / "quarter")
        gm.merge(recipe(tmp_path, steps=[{"lines": {"alpha": 0.5, "beta": 0.25}}]), tmp_path / "lines")
        for name in base:
            np.testing.assert_allclose(change(tmp_path / "quarter", base)[name], plain[name] / 4, atol=1e-14)
            factor = 0.75 if ".layers." in name else 0.5
            np.testing.assert_allclose(change(tmp_path / "lines", base)[name], plain[name] * factor, atol=1e-14)

    def test_memory_of_the_rest(self, tmp_path: Path) -> None:
        """The memory is that of the weights, not of an embedding or a head, however large; both are added up."""
        shapes = {"model.embed_tokens.weight": (4000, 16), "model.layers.0.mlp.up_proj.weight": (24, 16)}
        base = tiny.random_tensors(shapes, 0)
        for i in range(4):
            write(tmp_path / str(i), base if i == 0 else tiny.random_tensors(shapes, i, like=base))
        plan = gm.plan(recipe(tmp_path))
        nodes = {n.name: n for n in plan.output_nodes()}
        assert nodes["model.embed_tokens.weight"].rule == "rest: sum"
        assert whole_matrices(plan, nodes["model.embed_tokens.weight"]) == 0
        assert whole_matrices(plan, nodes["model.layers.0.mlp.up_proj.weight"]) > 0


@pytest.mark.parametrize("method", RULES)
def test_step_by_step_is_all_at_once(tmp_path: Path, method: str) -> None:
    """One expert a call or all in one, on one thread or three: the same bits of the model, the sum and the counters."""
    family(tmp_path)
    for expert in experts(tmp_path):
        first = not (tmp_path / "steps").exists()
        start = {"base": tmp_path / "0", "method": method} if first else {}
        continue_merge(tmp_path / "steps", [expert], threads=1, **start)  # type: ignore[arg-type]
    continue_merge(tmp_path / "batch", experts(tmp_path), base=tmp_path / "0", method=method, threads=3)
    steps, batch = (tiny.digests(tmp_path / name) for name in ("steps", "batch"))
    assert {n: d for n, d in steps.items() if n != "README.md"} == {n: d for n, d in batch.items() if n != "README.md"}
    assert "continual/model.safetensors" in steps


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.8}, {"alpha": 0.0, "zero_diagonal": False}, {"alpha": 1.0}], ids=str
)
def test_opcm_reference(tmp_path: Path, options: dict[str, Any]) -> None:
    """Against complete bases in NumPy; embeddings, heads and biases are added as they are."""
    base, *others = family(tmp_path)
    continue_merge(tmp_path / "state", experts(tmp_path), base=tmp_path / "0", parameters=options)
    taus = [{n: (m[n] - base[n]).numpy() for n in base} for m in others]
    expected = opcm(taus, [n for n in base if "proj.weight" in n], **options)
    for name, found in change(tmp_path / "state", base).items():
        np.testing.assert_allclose(found, expected[name], atol=1e-13)


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        ("average", lambda taus: sum(taus) / len(taus)),
        ("task_arithmetic", lambda taus: 0.3 * sum(taus)),
        ("ties", ties),
    ],
)
def test_baselines(tmp_path: Path, method: str, reference: Callable[[list[Array]], Array]) -> None:
    """Average, task arithmetic and TIES against a line of NumPy each."""
    base, *others = family(tmp_path)
    continue_merge(tmp_path / "state", experts(tmp_path), base=tmp_path / "0", method=method)
    for name, found in change(tmp_path / "state", base).items():
        expected = reference([(m[name] - base[name]).numpy() for m in others])
        np.testing.assert_allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize("method", ["opcm", "average"])
def test_one_expert_is_returned(tmp_path: Path, method: str) -> None:
    """The first step gives the first expert, bit for bit in its own dtype."""
    _, one = family(tmp_path, 1, dtype=torch.bfloat16)
    gm.continue_merge(tmp_path / "state", experts(tmp_path, 1), base=tmp_path / "0", method=method)
    assert tiny.same(tiny.read(tmp_path / "state"), one)


def test_opcm_keeps_the_mean_norm(tmp_path: Path) -> None:
    """‖θ − θ₀‖ is the mean of the experts' after every step, though their sizes differ."""
    base, *others = family(tmp_path)
    sizes = []
    for i, m in enumerate(others, 1):
        scaled = {n: base[n] + i * (m[n] - base[n]) for n in base}
        sizes.append(np.sqrt(sum(float(((scaled[n] - base[n]) ** 2).sum()) for n in base)))
        write(tmp_path / f"scaled{i}", scaled)
        start = {"base": tmp_path / "0"} if i == 1 else {}
        step = continue_merge(tmp_path / "state", [tmp_path / f"scaled{i}"], **start)  # type: ignore[arg-type]
        found = np.sqrt(sum(np.sum(c * c) for c in change(tmp_path / "state", base).values()))
        assert found == pytest.approx(np.mean(sizes), rel=1e-12)
        assert step.change == pytest.approx(np.mean(sizes), rel=1e-12)


def test_opcm_of_a_copy_and_of_strangers(tmp_path: Path) -> None:
    """The same expert again adds nothing to a weight; experts with no common rows and columns add up, λ = √2."""
    w = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 6)))
    upper, lower = torch.zeros(8, 12, dtype=torch.float64), torch.zeros(8, 12, dtype=torch.float64)
    upper[:4, :6], lower[4:, 6:] = w, w.flip(1)
    copy = upper * (1 + 2**-52)  # not to the last bit: a state takes each expert once
    for name, tensor in (("0", torch.zeros_like(upper)), ("1", upper), ("2", copy), ("3", lower)):
        write(tmp_path / name, {"fc.weight": tensor})
    continue_merge(tmp_path / "copy", [tmp_path / "1", tmp_path / "2"], base=tmp_path / "0")
    assert torch.allclose(tiny.read(tmp_path / "copy")["fc.weight"], upper, atol=1e-14)
    step = continue_merge(tmp_path / "two", [tmp_path / "1", tmp_path / "3"], base=tmp_path / "0")
    assert torch.allclose(tiny.read(tmp_path / "two")["fc.weight"], (upper + lower) / np.sqrt(2), atol=1e-14)
    assert 1 / step.state.factor == pytest.approx(np.sqrt(2))


@pytest.mark.parametrize("method", RULES)
def test_experts_equal_to_the_base(tmp_path: Path, method: str) -> None:
    """A zero task vector: the base, bit for bit, without NaN; and a real expert after it is taken in."""
    base, _ = family(tmp_path, 1, dtype=torch.float32)
    shutil.copytree(tmp_path / "0", tmp_path / "same")
    continue_merge(tmp_path / "state", [tmp_path / "same"], base=tmp_path / "0", method=method)
    assert tiny.same(tiny.read(tmp_path / "state"), base)
    continue_merge(tmp_path / "state", experts(tmp_path, 1))
    found = tiny.read(tmp_path / "state")
    assert all(bool(torch.isfinite(t).all()) for t in found.values())
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


def merged(method: str, taus: Sequence[Sequence[Array]]) -> list[Array]:
    """What a rule makes of task vectors (each a matrix and a vector), at its neutral parameters."""
    rule = RULES[method].make({}, count=1)
    sums = [torch.zeros(np.shape(t), dtype=torch.float64) for t in taus[0]]
    norms = 0.0
    for count, tau in enumerate(taus, 1):
        norms += float(np.sqrt(sum(np.sum(t * t) for t in tau)))
        deltas = [torch.tensor(t) for t in tau]
        sums = [rule.step(s, d, count, d.dim() == 2) for s, d in zip(sums, deltas, strict=True)]
    size = float(np.sqrt(sum(float(s.square().sum()) for s in sums)))
    factor = rule.factor(size, norms, len(taus))
    return [s.numpy() * factor for s in sums]


@pytest.mark.parametrize("method", RULES)
def test_declared_properties(method: str) -> None:
    """What a rule's page says stays true does, and what it leaves out does not, on at least one of two sets of inputs."""
    rng = np.random.default_rng(5)
    free = [[rng.normal(size=(6, 5)), rng.normal(size=4)] for _ in range(3)]
    # The second is the first's opposite where TIES compares them: votes that balance.
    tied = [free[0], [-0.5 * x for x in free[0]], free[1]]
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (6, 5))

    def alike(found: Sequence[Array], wanted: Sequence[Array]) -> bool:
        return all(np.allclose(f, w, atol=1e-12) for f, w in zip(found, wanted, strict=True))

    def holds(name: str, taus: list[list[Array]]) -> bool:
        plain = merged(method, taus)
        return {
            "permutation": lambda: alike(merged(method, taus[::-1]), plain),
            "base": lambda: alike(merged(method, [[0 * x for x in t] for t in taus]), [0 * x for x in plain]),
            "single": lambda: alike(merged(method, taus[:1]), taus[0]),
            "identical": lambda: alike(merged(method, [taus[0]] * 3), taus[0]),
            "scale": lambda: alike(merged(method, [[3 * x for x in t] for t in taus]), [3 * x for x in plain]),
            "sign": lambda: alike(merged(method, [[-x for x in t] for t in taus]), [-x for x in plain]),
            "rotation": lambda: alike(
                merged(method, [[left @ w @ right, v] for w, v in taus]), [left @ plain[0] @ right, plain[1]]
            ),
        }[name]()

    for name in NAMES:
        assert all(holds(name, taus) for taus in (free, tied)) == (name in RULES[method].properties), name


def test_projection_is_orthogonal_and_turns_with_its_inputs() -> None:
    """⟨cleaned, S⟩ = 0 (not without the diagonal); rotations go through; a sum of low rank takes out no more than its rank."""
    random = np.random.default_rng(3)
    s, tau = (torch.from_numpy(random.standard_normal((7, 10))) for _ in range(2))
    assert abs(float((cleaned(s, tau, 0.5) * s).sum())) < 1e-12
    assert abs(float((cleaned(s, tau, 0.5, zero_diagonal=False) * s).sum())) > 0.1
    left, right = (torch.from_numpy(np.linalg.qr(random.standard_normal((n, n)))[0]) for n in (7, 10))
    turned = cleaned(left @ s @ right, left @ tau @ right, 0.5)
    assert torch.allclose(turned, left @ cleaned(s, tau, 0.5) @ right, atol=1e-12)
    # Rank 1: σ₁ alone exceeds any α, so no block; what goes is ⟨u, τv⟩uvᵀ.
    u, v = left[:, :1], right[:, :1]
    assert torch.allclose(cleaned(3 * u @ v.T, tau, 0.5), tau - u @ (u.T @ tau @ v) @ v.T, atol=1e-12)
    assert torch.equal(cleaned(torch.zeros_like(tau), tau, 0.5), tau)


def test_only_weights_of_layers_are_projected(tmp_path: Path) -> None:
    """The projections and MLP matrices of a Llama: neither embedding nor head nor norms."""
    tiny.llama(tmp_path / "m", 1)
    with open_checkpoint(str(tmp_path / "m")) as checkpoint:
        found = weight_matrices(checkpoint)
        others = set(checkpoint.tensors) - found
    assert all(name.endswith("_proj.weight") for name in found)
    assert len(found) == 3 * 7
    assert not any("_proj" in name for name in others)


def sizes(state: Path) -> dict[str, int]:
    """Bytes of every file, 0 for the two that list the experts."""
    listing = ("README.md", "state.json")
    return {
        p.relative_to(state).as_posix(): 0 if p.name in listing else p.stat().st_size
        for p in state.rglob("*")
        if p.is_file()
    }


def test_the_state_does_not_grow(tmp_path: Path) -> None:
    """Five more experts: the same files, and all but the list of experts of the same size."""
    family(tmp_path, 6)
    continue_merge(tmp_path / "state", experts(tmp_path, 1), base=tmp_path / "0")
    before = sizes(tmp_path / "state")
    for k in range(2, 7):
        continue_merge(tmp_path / "state", [tmp_path / str(k)])
    assert sizes(tmp_path / "state") == before
    state = State.read(tmp_path / "state")
    assert state is not None
    assert state.count == 6


def test_the_model_is_complete(tmp_path: Path) -> None:
    """Config and side files of the base, a card that names the experts in order; copies of copies do not pile up."""
    models = tiny.family(tmp_path, dtype=torch.bfloat16)
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    continue_merge(tmp_path / "state", [tmp_path / "b", tmp_path / "a"], base=tmp_path / "base")
    continue_merge(tmp_path / "state", [tmp_path / "c"])
    found = tiny.read(tmp_path / "state")
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in models["base"].items()
    }
    assert tiny.config(tmp_path / "state")["model_type"] == "llama"
    assert (tmp_path / "state" / "tokenizer_config.json").is_file()
    card = (tmp_path / "state" / "README.md").read_text()
    assert card.index("1. `b`") < card.index("2. `a`") < card.index("3. `c`")
    assert str(tmp_path) not in card
    assert not list(tmp_path.glob(".*replaced*"))
    assert not list(tmp_path.glob("*.partial"))


def test_a_base_that_has_moved(tmp_path: Path) -> None:
    """It is asked for by name, and from then on known at its new place."""
    family(tmp_path)
    continue_merge(tmp_path / "state", experts(tmp_path, 1), base=tmp_path / "0")
    (tmp_path / "0").rename(tmp_path / "moved")
    with pytest.raises(GeomergeError):
        continue_merge(tmp_path / "state", [tmp_path / "2"])
    continue_merge(tmp_path / "state", [tmp_path / "2"], base=tmp_path / "moved")
    continue_merge(tmp_path / "state", [tmp_path / "3"])
    shutil.copytree(tmp_path / "moved", tmp_path / "0")
    continue_merge(tmp_path / "batch", experts(tmp_path), base=tmp_path / "0")
    assert tiny.same(tiny.read(tmp_path / "state"), tiny.read(tmp_path / "batch"))


def _foreign(state: Path) -> None:
    shutil.rmtree(state / "continual")


def _no_json(state: Path) -> None:
    (state / "continual" / "state.json").write_text("{")


def _other_version(state: Path) -> None:
    _edit(state, geomerge_continual=99)


def _no_rule(state: Path) -> None:
    _edit(state, method="magic")


def _bad_parameter(state: Path) -> None:
    _edit(state, parameters={"alpha": 7})


def _other_base(state: Path) -> None:
    data = json.loads((state / "continual" / "state.json").read_text())
    _edit(state, base=data["base"] | {"path": str(state.parent / "3")})


def _other_sum(state: Path) -> None:
    shutil.copy(state / "model.safetensors", state / "continual" / "model.safetensors")


def _no_sum(state: Path) -> None:
    (state / "continual" / "model.safetensors").unlink()


def _edit(state: Path, **changes: Any) -> None:
    path = state / "continual" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_foreign, UsageError, "not the state"),
        (_no_json, DamagedCheckpoint, "state.json"),
        (_other_version, UsageError, "format 1"),
        (_no_rule, DamagedCheckpoint, "magic"),
        (_bad_parameter, DamagedCheckpoint, "alpha"),
        (_other_base, IncompatibleModels, "not the base"),
        (_other_sum, DamagedCheckpoint, "running sum"),
        (_no_sum, ModelError, "continual"),
    ],
)
def test_bad_states_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    """What is no state, or not a sound one, is refused with its name, and left as it is."""
    family(tmp_path)
    state = tmp_path / "state"
    continue_merge(state, experts(tmp_path, 1), base=tmp_path / "0")
    damage(state)
    before = tiny.digests(state)
    with pytest.raises(error, match=message) as caught:
        continue_merge(state, [tmp_path / "2"])
    assert "state" in str(caught.value)
    assert tiny.digests(state) == before


def test_methods_by_the_names_of_the_list(tmp_path: Path) -> None:
    """`geomerge methods` calls them continual_…, since recipes have other methods of these names."""
    family(tmp_path)
    for name in ("ties", "continual_ties"):
        continue_merge(tmp_path / name, experts(tmp_path, 2), base=tmp_path / "0", method=name)
    assert tiny.same(tiny.read(tmp_path / "ties"), tiny.read(tmp_path / "continual_ties"))


def test_bad_calls_are_refused(tmp_path: Path) -> None:
    """Another method or parameter, no base, no expert, a typing error: and the state stays as it was."""
    family(tmp_path)
    state = tmp_path / "state"
    with pytest.raises(UsageError, match="no base"):
        continue_merge(state, experts(tmp_path, 1))
    with pytest.raises(ModelError, match="one: there is no such file"):
        continue_merge(state, "one", base=tmp_path / "0")  # a word is one expert
    with pytest.raises(UsageError, match="no expert"):
        continue_merge(state, [], base=tmp_path / "0")
    with pytest.raises(UsageError, match="opcmm"):
        continue_merge(state, experts(tmp_path, 1), base=tmp_path / "0", method="opcmm")
    with pytest.raises(UsageError, match="no parameter 'density'"):
        continue_merge(state, experts(tmp_path, 1), base=tmp_path / "0", parameters={"density": 0.3})
    with pytest.raises(UsageError, match="inside the input"):
        continue_merge(tmp_path / "1" / "state", experts(tmp_path, 1), base=tmp_path / "0")
    with pytest.raises(UsageError, match="is given twice"):
        continue_merge(state, [*experts(tmp_path, 2), tmp_path / "1"], base=tmp_path / "0")
    assert not state.exists()
    continue_merge(state, experts(tmp_path, 1), base=tmp_path / "0", parameters={"alpha": 0.4})
    before = tiny.digests(state)
    for wrong in ({"method": "average"}, {"parameters": {"alpha": 0.5}}):
        with pytest.raises(UsageError, match="made with opcm"):
            continue_merge(state, [tmp_path / "2"], **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is the input"):
        continue_merge(state, [state])
    with pytest.raises(UsageError, match="is in this state already, as 1"):
        continue_merge(state, experts(tmp_path, 2))
    with pytest.raises(UsageError, match="is the base and one of the experts") as caught:
        continue_merge(state, [tmp_path / "2", tmp_path / "1" / ".." / "0"])
    assert caught.value.where is None
    assert tiny.digests(state) == before
    continue_merge(state, [tmp_path / "2"], method="opcm", parameters={"alpha": 0.4})


def test_bad_experts_are_refused(tmp_path: Path) -> None:
    """Not finite, or of other shapes or tensors: nothing changes, nothing is left behind."""
    base, *others = family(tmp_path)
    state = tmp_path / "state"
    continue_merge(state, experts(tmp_path, 1), base=tmp_path / "0")
    before = tiny.digests(state)
    bad = {n: t.clone() for n, t in others[1].items()}
    bad["model.layers.0.mlp.up_proj.weight"][3, 2] = float("inf")
    write(tmp_path / "inf", bad)
    write(tmp_path / "narrow", {n: t[:, :5].clone() if t.dim() == 2 else t for n, t in base.items()})
    write(tmp_path / "other", {"something.else.weight": torch.zeros(3, 3)})
    for name, error in (
        ("inf", NotFiniteError),
        ("narrow", ModelError),
        ("other", ModelError),
        ("nowhere", ModelError),
    ):
        with pytest.raises(error) as caught:
            continue_merge(state, [tmp_path / name])
        assert ":1: " not in str(caught.value)  # there is no recipe that has lines
        assert tiny.digests(state) == before
        assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_interrupted_steps_leave_the_state(tmp_path: Path, share: float) -> None:
    """In the first pass or in the second: the state is what it was, and the step can be made again."""
    tiny.family(tmp_path)
    state = tmp_path / "state"
    continue_merge(state, [tmp_path / "a"], base=tmp_path / "base")
    before = tiny.digests(state)
    with pytest.raises(KeyboardInterrupt):
        continue_merge(state, [tmp_path / "b"], threads=1, progress=tiny.Interrupt(share))
    assert tiny.digests(state) == before
    (tmp_path / "state.partial" / "continual").mkdir(parents=True)  # what a killed process leaves
    for name in (".lock", "model.safetensors", "continual/model.safetensors"):
        (tmp_path / "state.partial" / name).write_text("1")
    continue_merge(state, [tmp_path / "b"])
    continue_merge(tmp_path / "batch", [tmp_path / "a", tmp_path / "b"], base=tmp_path / "base")
    assert tiny.same(tiny.read(state), tiny.read(tmp_path / "batch"))


_KILLED = """\
import os, signal, sys
from geomerge.continual import continue_merge

class Kill:
    left = int(sys.argv[3])
    def start(self, total, done): pass
    def finish(self): pass
    def advance(self, nbytes):
        Kill.left -= 1
        if not Kill.left:
            os.kill(os.getpid(), signal.SIGKILL)

continue_merge(sys.argv[1], [sys.argv[2]], progress=Kill())
"""


def test_killed_steps_leave_the_state(tmp_path: Path) -> None:
    """SIGKILL at the fourth tensor of the first pass: the state is what it was, and the step can be made again."""
    family(tmp_path)
    state = tmp_path / "state"
    continue_merge(state, experts(tmp_path, 1), base=tmp_path / "0")
    before = tiny.digests(state)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.run(
        [sys.executable, "-c", _KILLED, str(state), str(tmp_path / "2"), "4"], env=environment, check=False
    )
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "state.partial" / "continual").is_dir()
    assert tiny.digests(state) == before
    continue_merge(state, experts(tmp_path)[1:])
    continue_merge(tmp_path / "batch", experts(tmp_path), base=tmp_path / "0")
    assert tiny.same(tiny.read(state), tiny.read(tmp_path / "batch"))


def test_two_steps_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever read the state before another step replaced it is told so, and does not undo that step."""
    from geomerge.continual import step

    family(tmp_path)
    state = tmp_path / "state"
    continue_merge(state, experts(tmp_path, 1), base=tmp_path / "0")
    original = step.OutputDirectory

    def meanwhile(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(step, "OutputDirectory", original)
        continue_merge(state, [tmp_path / "2"])
        return original(*args, **options)

    monkeypatch.setattr(step, "OutputDirectory", meanwhile)
    with pytest.raises(UsageError, match="meanwhile"):
        continue_merge(state, [tmp_path / "3"])
    continue_merge(state, [tmp_path / "3"])
    continue_merge(tmp_path / "batch", experts(tmp_path), base=tmp_path / "0")
    assert tiny.same(tiny.read(state), tiny.read(tmp_path / "batch"))


def test_killed_between_two_renames(tmp_path: Path) -> None:
    """The old state stands aside under a name that the next call says."""
    family(tmp_path)
    state = tmp_path / "state"
    continue_merge(state, experts(tmp_path, 1), base=tmp_path / "0")
    state.rename(tmp_path / ".state.replaced-123")
    with pytest.raises(UsageError, match=r"mv .*\.state\.replaced-123"):
        continue_merge(state, [tmp_path / "2"], base=tmp_path / "0")


def test_large_tensors_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of several pieces, on several threads, whatever the size of a piece."""
    from geomerge.continual import work
    from geomerge.engine import execute

    monkeypatch.setattr(execute, "LARGE", 1 << 15)
    base = {"fc.bias": torch.from_numpy(np.random.default_rng(0).standard_normal(70_000))}
    write(tmp_path / "0", base)
    for k in (1, 2):
        write(
            tmp_path / str(k),
            {"fc.bias": base["fc.bias"] + torch.from_numpy(np.random.default_rng(k).standard_normal(70_000))},
        )
    found = []
    for size, threads in ((1 << 14, 1), (1 << 14, 3), (1 << 20, 2)):
        monkeypatch.setattr(work, "PIECE", size)
        place = tmp_path / f"{size}-{threads}"
        step = continue_merge(place, experts(tmp_path, 2), base=tmp_path / "0", threads=threads)
        found.append((step.norm, step.state.norms, tiny.bits(tiny.read(place)["fc.bias"])))
    assert found[0] == found[1] == found[2]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Program:
    """The program in this process."""
    return Program(capsys)


def test_command_line(tmp_path: Path, run: Program) -> None:
    """Start, go on, and be told: in words and as JSON."""
    family(tmp_path)
    state = tmp_path / "state"
    code, out, err = run(
        "continue", state, tmp_path / "1", "--base", tmp_path / "0", "--method", "ties", "--density", "0.3"
    )
    assert (code, err) == (0, "")
    assert "ties: Continual TIES" in out
    assert "1, the last is 1" in out
    code, out, _ = run("continue", state, tmp_path / "2", tmp_path / "3", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["experts"] == 3
    assert told["parameters"] == {"lambda": 0.5, "density": 0.3}
    code, out, err = run("continue", state, tmp_path / "2", "--alpha", "0.2")
    assert (code, out) == (2, "")
    assert "ties has no parameter 'alpha'" in err
    code, _, err = run("continue", tmp_path / "1", tmp_path / "2", "--base", tmp_path / "0")
    assert code == 2
    assert "is not the state of a continual merge" in err
