"""Matrix methods that look at all weights first: DOGE-TA's masks, RESM's ranks, KnOTS's common trimming, OPCM's norm."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import geomerge as gm
import optimised_references as ref
import tiny
from geomerge.engine import execute
from geomerge.engine.live import LiveMerge
from geomerge.engine.run import run_in_memory
from geomerge.engine.shards import finalize, run_shard
from geomerge.errors import NotFiniteError
from geomerge.methods import registry, tile
from geomerge.recipe import loads

Array = np.ndarray
Weights = Mapping[str, Array]
SHAPES = {"h.0.a": (12, 16), "h.0.b": (16, 9), "h.1.a": (12, 16), "h.1.b": (6, 30), "top": (5, 8), "norm": (16,)}
MATRICES = [n for n, s in SHAPES.items() if len(s) == 2]


def changes(
    tasks: int = 3, *, low: bool = False, grid: bool = False, thin: bool = False, seed: int = 0
) -> list[dict[str, Array]]:
    """Task vectors of a small model, of unequal sizes from weight to weight.

    `low`: of rank 2. `grid`: with many equal magnitudes. `thin`: with many small elements, in some layers more than in others.
    """
    random = np.random.default_rng([seed, tasks])
    made = []
    for k in range(tasks):
        each = {}
        for i, (name, shape) in enumerate(SHAPES.items()):
            size = 0.02 * (k + 1) * (1 + i % 3)
            each[name] = random.standard_normal(shape) * size
            if low and len(shape) == 2:
                each[name] = random.standard_normal((shape[0], 2)) @ random.standard_normal((2, shape[1])) * size
            if thin:
                each[name] *= np.where(random.random(shape) < 0.15 * (i // 2), 1e-3, 1)
            if grid:
                each[name] = np.round(each[name] * 64) / 64
        made.append(each)
    return made


def merged(method: str, taus: Sequence[Weights], **parameters: Any) -> dict[str, Array]:
    """The merged task vectors: the base is zero, so nothing is lost in the sum with it."""
    base = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
    experts = [{n: torch.from_numpy(np.asarray(w)) for n, w in t.items()} for t in taus]
    found = getattr(gm.methods, method)(base, experts, **parameters)
    return {n: w.numpy() for n, w in found.items()}


# -- slow references, in NumPy alone --------------------------------------------------------------------------------------


def doge(taus: Sequence[Weights], density: float, steps: int) -> dict[str, Array]:
    """Σ λ_t(τ_t + Δ)⊙mask_t with one threshold for all weights of a task."""
    least = []
    for t in taus:
        everything = np.sort(np.concatenate([np.abs(t[n]).ravel() for n in MATRICES]))
        rank = everything.size - int(density * everything.size + 1e-9)
        least.append(everything[rank - 1] if rank else 0.0)
    made = {}
    for n in MATRICES:
        mine = [t[n] for t in taus]
        shift, _ = ref.doge_shift(mine, steps=steps)
        made[n] = sum(
            0.07 / np.linalg.norm(v) * (v + shift) * (np.abs(v) >= bound) for v, bound in zip(mine, least, strict=True)
        )
    return made


def layer_shares(taus: Sequence[Weights], epsilon: float) -> dict[str, float]:
    """(1 − z)/max(1 − z) of each weight."""

    def zeros(v: Array) -> float:
        return float(np.mean(np.abs(v) < epsilon * np.sqrt(np.mean(v**2)))) if v.any() else 1.0

    density = {n: 1 - np.mean([zeros(t[n]) for t in taus]) for n in MATRICES}
    return {n: float(found / max(density.values())) for n, found in density.items()}


def tsvm(taus: Sequence[Array], k: int) -> Array:
    """TSV-Merge with k triplets of each task."""
    parts = [np.linalg.svd(t, full_matrices=False) for t in taus]
    u, vh = (np.concatenate(x, i) for x, i in (([p[0][:, :k] for p in parts], 1), ([p[2][:k] for p in parts], 0)))
    s = np.concatenate([p[1][:k] for p in parts])

    def polar(a: Array) -> Array:
        left, _, right = np.linalg.svd(a, full_matrices=False)
        return np.asarray(left @ right)

    return np.asarray(polar(u) * s @ polar(vh))


def resm(taus: Sequence[Weights], epsilon: float, gamma: float) -> dict[str, Array]:
    """Without the treatment of outliers."""
    share = layer_shares(taus, epsilon)
    made = {}
    for n in MATRICES:
        k = max(1, math.floor(min(SHAPES[n]) / len(taus) * share[n] ** gamma + 1e-9))
        made[n] = tsvm([t[n] for t in taus], k)
    return made


def knots(taus: Sequence[Weights], density: float, exactly: bool = False) -> dict[str, Array]:
    """TIES over the coordinates of all weights as one vector."""
    bases, coordinates = {}, []
    for n in MATRICES:
        u, s, _ = np.linalg.svd(np.concatenate([t[n] for t in taus], 1), full_matrices=False)
        bases[n] = u[:, s > max(1e-6 * s[0], 1e-5)] if s[0] else u[:, :0]
    for t in taus:
        flat = np.concatenate([(bases[n].T @ t[n]).ravel() for n in MATRICES])
        order = np.lexsort((np.arange(flat.size), -np.abs(flat)))
        kept = np.zeros_like(flat)
        kept[order[: math.floor(density * flat.size + 1e-9) + (not exactly)]] = 1
        coordinates.append(flat * kept)
    sign = np.where(np.sum(coordinates, 0) >= 0, 1.0, -1.0)
    agree = [np.where(c * sign > 0, c, 0) for c in coordinates]
    flat = np.sum(agree, 0) / np.maximum(np.sum([a != 0 for a in agree], 0), 1)
    made, at = {}, 0
    for n in MATRICES:
        shape = bases[n].shape[1], SHAPES[n][1]
        made[n] = bases[n] @ flat[at : at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)
    return made


CASES: list[tuple[str, dict[str, Any], dict[str, Any], Callable[[list[Weights]], dict[str, Array]]]] = [
    ("doge_ta", {"steps": 8}, {}, lambda t: doge(t, 0.3, 8)),
    ("doge_ta", {"steps": 3, "density": 0.05}, {"grid": True}, lambda t: doge(t, 0.05, 3)),
    ("doge_ta", {"steps": 3, "density": 1.0}, {}, lambda t: doge(t, 1.0, 3)),
    ("resm", {"rank_mode": "layer", "outlier_mode": "off", "epsilon": 0.1}, {"thin": True}, lambda t: resm(t, 0.1, 1)),
    (
        "resm",
        {"rank_mode": "layer", "outlier_mode": "off", "epsilon": 0.8, "gamma": 3},
        {"thin": True},
        lambda t: resm(t, 0.8, 3),
    ),
    ("knots", {"scope": "global"}, {}, lambda t: knots(t, 0.2)),
    ("knots", {"scope": "global", "top_k": "exact_k"}, {}, lambda t: knots(t, 0.2, exactly=True)),
    ("knots", {"scope": "global", "density": 0.5}, {"low": True}, lambda t: knots(t, 0.5)),
]


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize(("method", "options", "kind", "reference"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_over_all_weights(
    method: str,
    options: dict[str, Any],
    kind: dict[str, Any],
    reference: Callable[[list[Weights]], dict[str, Array]],
    tasks: int,
) -> None:
    """Each weight is what the slow reference makes of all of them; vectors follow the rest rule and count for nothing."""
    taus = changes(tasks, **kind)
    found, wanted = merged(method, taus, **options), reference(taus)
    for name in MATRICES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-6 * np.abs(wanted[name]).max())
    rest = 0.0 if method == "doge_ta" else sum(t["norm"] for t in taus) / tasks
    np.testing.assert_allclose(found["norm"], rest, atol=1e-15)


@pytest.mark.parametrize("tasks", [2, 3])
def test_the_layers_of_the_cases_differ(tasks: int) -> None:
    """The reference's shares are no ones: the comparison above says something."""
    shares = layer_shares(changes(tasks, thin=True), 0.1)
    assert len(set(shares.values())) == len(MATRICES)
    assert min(shares.values()) < 0.8


GLOBAL: dict[str, dict[str, Any]] = {
    "doge_ta": {"steps": 3, "density": 0.3},
    "resm": {"rank_mode": "layer", "epsilon": 1.0, "gamma": 4.0},
    "knots": {"scope": "global", "density": 0.2, "full_weights": True},
}


class TestProperties:
    @pytest.mark.parametrize("method", GLOBAL)
    def test_the_order_of_experts(self, method: str) -> None:
        """Does not matter."""
        taus = changes()
        first, second = (merged(method, t, **GLOBAL[method]) for t in (taus, taus[::-1]))
        for name in SHAPES:
            np.testing.assert_allclose(first[name], second[name], rtol=0, atol=1e-9)

    @pytest.mark.parametrize("method", GLOBAL)
    def test_experts_equal_to_the_base(self, method: str) -> None:
        """Zeros, never NaN; and one that is no expert at all disturbs nobody."""
        taus = changes()
        nothing = [{n: np.zeros(s) for n, s in SHAPES.items()}] * 3
        assert not any(w.any() for w in merged(method, nothing, **GLOBAL[method]).values())
        assert all(np.isfinite(w).all() for w in merged(method, [*taus, nothing[0]], **GLOBAL[method]).values())

    @pytest.mark.parametrize("method", ["resm", "knots"])
    def test_scale(self, method: str) -> None:
        """Shares and ranks depend on no unit."""
        taus = changes()
        scaled = merged(method, [{n: w * 4 for n, w in t.items()} for t in taus], **GLOBAL[method])
        for name, w in merged(method, taus, **GLOBAL[method]).items():
            np.testing.assert_allclose(scaled[name], 4 * w, rtol=1e-9, atol=1e-12)

    def test_alone_the_scopes_are_one(self) -> None:
        """A tensor that is merged on its own is all there is."""
        taus = [torch.from_numpy(t["h.0.a"]) for t in changes()]
        zero = torch.zeros_like(taus[0])
        for method, one, other in (
            ("doge_ta", {"scope": "global", "steps": 3}, {"scope": "tensor", "steps": 3}),
            ("knots", {"scope": "global"}, {"scope": "tensor"}),
            ("resm", {"rank_mode": "layer"}, {"rank_mode": "off"}),
        ):
            function = getattr(gm.methods, method)
            assert torch.equal(function(zero, taus, **one), function(zero, taus, **other)), method

    def test_everything_kept(self) -> None:
        """With density 1 there is nothing to rank."""
        taus = changes()
        for method, more in (("doge_ta", {"steps": 3}), ("knots", {})):
            one, other = (merged(method, taus, density=1.0, scope=s, **more) for s in ("global", "tensor"))
            assert all(np.array_equal(one[n], other[n]) for n in SHAPES), method

    def test_the_mask_keeps_its_share_of_the_model(self) -> None:
        """Weights of large changes keep more than their share, the others less; together it is the share exactly."""
        taus = changes(1)
        for scope, spread in (("global", 0.3), ("tensor", 0.02)):
            found = merged("doge_ta", taus, steps=0, density=0.25, scope=scope)
            kept = {n: np.count_nonzero(found[n]) for n in MATRICES}
            shares = [kept[n] / found[n].size for n in MATRICES]
            assert bool(max(shares) - min(shares) > spread) is (scope == "global")
            if scope == "global":
                numel = sum(found[n].size for n in MATRICES)
                assert sum(kept.values()) == math.floor(0.25 * numel) + 1  # the threshold itself is kept, too

    def test_sparse_layers_get_fewer_directions(self) -> None:
        """A weight of which a quarter of the elements changed gets that share of its rank; the densest ones all."""
        taus = changes(1)
        taus[0]["h.1.a"][:9] = taus[0]["h.1.b"][:, 8:] = 0
        found = merged("resm", taus, rank_mode="layer", outlier_mode="off", epsilon=1e-9)
        assert np.linalg.matrix_rank(found["h.0.a"]) == 12
        assert np.linalg.matrix_rank(found["h.1.a"]) == 3
        assert np.linalg.matrix_rank(found["h.1.b"]) == math.floor(6 * 8 / 30)


# -- in the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tiny.Tensors]:
    """Models base, a, b, c in the working directory, whose matrices have several segments and tiles."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tile, "SEGMENT", 1 << 13)
    return tiny.family(tmp_path, hidden_size=96, intermediate_size=176, num_hidden_layers=2)


def recipe(method: str, **parameters: Any) -> str:
    experts = ", ".join(f"{{model: {n}}}" for n in "abc")
    values = json.dumps(ENGINE[method] | parameters)
    return f"merge_method: {method}\nbase_model: base\nmodels: [{experts}]\nparameters: {values}\n"


ENGINE = GLOBAL | {"opcm": {"alpha": 0.4}}


@pytest.mark.parametrize("method", ENGINE)
class TestEngine:
    def test_the_same_bits_whoever_computes(
        self, method: str, family: dict[str, tiny.Tensors], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On disk, in memory, by any tile and number of threads, with room for one matrix, in shards; and of a saved plan."""
        text = recipe(method)
        gm.merge(text, "out", threads=2)
        found = tiny.read(Path("out"))
        plan = gm.plan(text)
        for size, threads in ((1 << 13, 1), (1 << 20, 3)):
            assert tiny.same(found, run_in_memory(plan, tile=size, threads=threads))
        monkeypatch.setattr(execute, "ROOM", 1)
        assert tiny.same(found, run_in_memory(plan, threads=3))
        plan.save(Path("plan.json"))
        for i in (2, 1):
            run_shard(type(plan).load(Path("plan.json")), "shards", i, 2, threads=1)
        finalize("shards")
        assert tiny.same(found, tiny.read(Path("shards")))

    def test_resume(self, method: str, family: dict[str, tiny.Tensors]) -> None:
        """Killed in the middle and continued: the bytes are the same."""
        text = recipe(method)
        gm.merge(text, "whole")
        with pytest.raises(KeyboardInterrupt):
            gm.merge(text, "out", threads=1, progress=tiny.Interrupt(0.9))
        assert gm.merge(text, "out", resume=True).resumed > 0
        assert tiny.same(tiny.read(Path("out")), tiny.read(Path("whole")))

    def test_nan(self, method: str, family: dict[str, tiny.Tensors]) -> None:
        """The survey names the model and the tensor; nothing is left."""
        name = "model.layers.1.mlp.up_proj.weight"
        family["b"][name].view(-1)[7] = math.nan
        tiny.save(Path("b"), family["b"], tiny.config(Path("b")))
        with pytest.raises(NotFiniteError) as caught:
            gm.merge(recipe(method), "out")
        assert caught.value.where == f"b: {name}"
        assert not list(Path().glob("out*"))


@pytest.mark.parametrize("method", GLOBAL)
class TestEngineOfWeights:
    def test_as_the_function(self, method: str, family: dict[str, tiny.Tensors]) -> None:
        """`gm.methods` on the weight matrices' state dict."""
        names = [n for n in family["base"] if "proj" in n]
        base, *experts = ({n: m[n] for n in names} for m in family.values())
        found = gm.merge_state_dicts(recipe(method))
        assert tiny.same({n: found[n] for n in names}, getattr(gm.methods, method)(base, experts, **GLOBAL[method]))

    def test_it_differs_from_a_look_at_each_weight(self, method: str, family: dict[str, tiny.Tensors]) -> None:
        """The option does something: of one layer the changes are larger than of the other, and sparser."""
        grown = family["a"] | {
            n: w + 3 * (w - family["base"][n]) * (torch.arange(w.numel()).view(w.shape) % 3 == 0)
            for n, w in family["a"].items()
            if ".layers.1." in n
        }
        tiny.save(Path("a"), grown, tiny.config(Path("a")))
        alone = {"rank_mode": "off"} if method == "resm" else {"scope": "tensor"}
        one, other = gm.merge_state_dicts(recipe(method)), gm.merge_state_dicts(recipe(method, **alone))
        assert any(not torch.equal(one[n], other[n]) for n in one if "proj" in n)


def test_shares_by_parameters(family: dict[str, tiny.Tensors]) -> None:
    """Weights with another density are another crowd."""
    text = recipe("doge_ta").replace('"density": 0.3', '"density": [{"role": "mlp", "value": 0.1}, {"value": 0.6}]')
    found = gm.merge_state_dicts(text)
    for chosen, density in ((True, 0.1), (False, 0.6)):
        names = [n for n in found if "proj" in n and ("mlp" in n) is chosen]
        base, *experts = ({n: m[n] for n in names} for m in family.values())
        assert tiny.same({n: found[n] for n in names}, gm.methods.doge_ta(base, experts, density=density, steps=3))


def test_live_merges_know_another_survey(family: dict[str, tiny.Tensors]) -> None:
    """What was computed of a weight for one crowd is not taken for another's, though its own parameters are the same."""
    state = {n: torch.nn.Parameter(w.clone()) for n, w in family["a"].items()}

    class Module(torch.nn.Module):
        def state_dict(self, **_: Any) -> dict[str, Tensor]:
            return dict(state)

        def named_parameters(self, **_: Any) -> Any:
            return state.items()

    live = LiveMerge({n: n for n in ("base", "a", "b", "c")}, Module())
    whole = recipe("doge_ta")
    split = whole.replace('"density": 0.3', '"density": [{"role": "mlp", "value": 0.1}, {"value": 0.3}]')
    for text in (whole, split, whole):
        live.blend(loads(text))
        wanted = gm.merge_state_dicts(text)
        assert all(torch.equal(state[n], w) for n, w in wanted.items())


def test_memory_holds_no_model(family: dict[str, tiny.Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    """While KnOTS surveys, no more weights than threads are in memory."""
    from geomerge.methods.matrix import knots as module

    alive: set[int] = set()
    most = 0
    made = module._scan_of_coordinates

    class Watched(tile.Scan):
        def __del__(self) -> None:
            alive.discard(id(self))

    def watch(scan: tile.Scan, **options: Any) -> tile.Scan:
        nonlocal most
        found = made(scan, **options)
        found.__class__ = Watched
        alive.add(id(found))
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(module, "_scan_of_coordinates", watch)
    run_in_memory(gm.plan(recipe("knots")), threads=1)
    assert 1 <= most <= 2


def test_the_methods_say_how_often_they_look() -> None:
    """Passes over the models, which the progress and the estimate count."""
    for method, passes in (("doge_ta", 1), ("resm", 2), ("knots", 3)):
        assert registry.get(method).make(GLOBAL[method], count=3).surveys == passes
    assert registry.get("knots").make({"scope": "global", "density": 1.0}, count=3).surveys == 0
