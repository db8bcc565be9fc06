"""Methods that look at the whole model first: TIES with a global share, PCB, EMR, Consensus; and masks that need no look."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import geomerge as gm
import tiny
from geomerge.engine.live import LiveMerge
from geomerge.engine.run import run_in_memory
from geomerge.engine.shards import finalize, run_shard
from geomerge.methods import native, order
from geomerge.methods.order import largest_of_all, nth_smallest_of_all
from geomerge.methods.tile import Scan, TensorSource, Tile
from geomerge.methods.walk import Walk
from geomerge.recipe import loads
from test_methods_golden import GOLDEN, MATRICES, RTOL, VECTORS, expected

Array = np.ndarray
SHAPES = {"a.weight": (17, 23), "b.bias": (31,), "c.weight": (9, 40), "d.empty": (0,), "e.one": (1,)}


def models(count: int, *, grid: bool = False, seed: int = 0) -> list[dict[str, Tensor]]:
    """A base and experts of several tensors, float64; on a coarse grid many magnitudes are equal."""
    random = np.random.default_rng(seed)
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    made = [base]
    for k in range(count):
        change = {
            n: random.integers(-3, 4, s) / 64 if grid else random.standard_normal(s) * 0.1 * (k + 1)
            for n, s in SHAPES.items()
        }
        made.append({n: (np.round(base[n] * 64) / 64 if grid else base[n]) + change[n] for n in SHAPES})
    if grid:
        made[0] = {n: np.round(base[n] * 64) / 64 for n in SHAPES}
    return [{n: torch.from_numpy(np.asarray(w, dtype=np.float64)) for n, w in m.items()} for m in made]


def flat(model: dict[str, Tensor]) -> Array:
    return np.concatenate([w.numpy().reshape(-1) for w in model.values()])


# -- slow references over one flat vector -------------------------------------------------------------------------------


def top(tau: Array, density: float, exactly: bool = False) -> Array:
    """What is at least the (d − ⌊density·d⌋)-th smallest magnitude; or exactly ⌊density·d⌋ elements, of equals the first."""
    if not exactly:
        rank = tau.size - math.floor(density * tau.size + 1e-9)
        return np.where(np.abs(tau) >= (np.sort(np.abs(tau))[rank - 1] if rank else 0), tau, 0)
    order = np.lexsort((np.arange(tau.size), -np.abs(tau)))
    kept = np.zeros_like(tau)
    kept[order[: math.floor(density * tau.size + 1e-9)]] = 1
    return tau * kept


def ties(taus: Sequence[Array], density: float, how: str = "mean", exactly: bool = False) -> Array:
    thin = np.array([top(t, density, exactly) for t in taus])
    sign = np.sign(thin.sum(0))
    sign = np.where(sign == 0, np.sign(sign.sum()), sign)  # the majority's, where votes cancel
    agree = np.where(thin * sign > 0, thin, 0)
    if how == "sum":
        return agree.sum(0)
    if how == "max":
        return np.abs(agree).max(0) * sign
    return agree.sum(0) / np.maximum((agree != 0).sum(0), 1)


def pcb(taus: Sequence[Array], r: float, rho: float, balance: str, lambda_: float = 1.0) -> Array:
    d, n = taus[0].size, len(taus)
    clipped, shares = [], []
    for tau in taus:
        ordered = np.sort(np.abs(tau))
        low, high = ordered[math.floor(d * rho + 1e-9)], ordered[math.floor(d * (1 - rho) + 1e-9) - 1]
        a = np.clip(np.abs(tau), low, high)
        clipped.append(np.sign(tau) * a)
        shares.append((a - a.min()) / (a.max() - a.min()) if a.max() > a.min() else np.zeros(d))
    signed = [np.sign(t) * u for t, u in zip(taus, shares, strict=True)]
    weights = []
    for t in range(n):
        if balance == "raw":
            inter = np.tanh(taus[t] * sum(taus))
        elif balance == "normsum":
            inter = np.tanh(taus[t] * sum(signed))
        else:
            inter = sum(np.tanh(signed[t] * s) for s in signed)
        score = np.exp(n * shares[t] ** 2) * inter
        least = np.sort(score)[min(math.floor(d * (1 - r) + 1e-9), d - 1)]
        score = np.where(np.abs(score - least) < 1e-14 * np.abs(score).max(), least, score)  # equal but for rounding
        flat_ = not score.max() > least or not shares[t].any()
        weights.append(np.zeros(d) if flat_ else (np.clip(score, least, score.max()) - least) / (score.max() - least))
    total = sum(c * w for c, w in zip(clipped, weights, strict=True))
    return lambda_ * total / np.maximum(sum(weights), 1e-12)


def emr(taus: Sequence[Array], task: int) -> Array:
    sign = np.where(sum(taus) > 0, 1.0, -1.0)
    unified = sign * np.max([np.where(t * sign > 0, np.abs(t), 0) for t in taus], axis=0)
    if not task:
        return unified
    taken = unified * (taus[task - 1] * sign > 0)
    norm = np.abs(taken).sum()
    return taken * (np.abs(taus[task - 1]).sum() / norm if norm else 1.0)


def consensus(taus: Sequence[Array], total: Array, threshold: float, k: int) -> Array:
    masks = [np.abs(t) > threshold * np.abs(total - t) for t in taus]
    return np.where(np.sum(masks, axis=0) >= k, total, 0)


CASES: list[tuple[str, dict[str, Any], Callable[[list[Array]], Array]]] = [
    ("ties", {"scope": "global", "density": 0.3, "weight": 1}, lambda t: ties(t, 0.3)),
    (
        "ties",
        {"scope": "global", "density": 0.3, "weight": 1, "top_k": "exact_k"},
        lambda t: ties(t, 0.3, exactly=True),
    ),
    ("ties", {"scope": "global", "density": 0.3, "weight": 1, "merge_func": "sum"}, lambda t: ties(t, 0.3, "sum")),
    ("ties", {"scope": "global", "density": 0.07, "weight": 1, "merge_func": "max"}, lambda t: ties(t, 0.07, "max")),
    ("ties", {"scope": "global", "density": 0.999, "weight": 1}, lambda t: ties(t, 0.999)),
    ("pcb", {}, lambda t: pcb(t, 0.2, 0.01, "raw")),
    ("pcb", {"density": 0.05, "winsor": 0.1, "balance": "normsum"}, lambda t: pcb(t, 0.05, 0.1, "normsum")),
    ("pcb", {"density": 1.0, "winsor": 0.0, "balance": "pair"}, lambda t: pcb(t, 1.0, 0.0, "pair")),
    ("pcb", {"density": 0.4, "lambda": 1.2, "balance": "pair"}, lambda t: pcb(t, 0.4, 0.01, "pair", 1.2)),
    ("emr", {}, lambda t: emr(t, 0)),
    ("emr", {"task": 2}, lambda t: emr(t, 2)),
    ("tall_mask", {"task": 3}, lambda t: np.where(np.abs(t[2]) > 0.4 * np.abs(sum(t) - t[2]), sum(t), 0)),
    (
        "tall_mask",
        {"task": 2, "merged": "ties", "threshold": 0.3},
        lambda t: np.where(np.abs(t[1]) > 0.3 * np.abs(ties(t, 0.2, "sum") - t[1]), ties(t, 0.2, "sum"), 0),
    ),
    ("consensus", {"lambda": 1}, lambda t: consensus(t, sum(t), 0.4, 2)),
    ("consensus", {"k": 3, "threshold": 0.2, "lambda": 0.5}, lambda t: 0.5 * consensus(t, sum(t), 0.2, 3)),
    ("consensus", {"k": 0, "lambda": 1}, sum),
    ("consensus_ties", {"lambda": 1}, lambda t: consensus(t, ties(t, 0.2, "sum"), 0.4, 2)),
    (
        "consensus_ties",
        {"lambda": 1, "top_k": "exact_k"},
        lambda t: consensus(t, ties(t, 0.2, "sum", exactly=True), 0.4, 2),
    ),
]


@pytest.mark.parametrize("grid", [False, True], ids=["dense", "grid"])
@pytest.mark.parametrize(("method", "options", "reference"), CASES, ids=[f"{m}-{o}" for m, o, _ in CASES])
def test_over_the_whole_model(
    method: str, options: dict[str, Any], reference: Callable[[list[Array]], Array], grid: bool
) -> None:
    """State dicts: shares, ranks and sums are those of all tensors together, as one flat vector has them."""
    base, *experts = models(3, grid=grid)
    merged = getattr(gm.methods, method)(
        base, experts, **{k.replace("lambda", "lambda_"): v for k, v in options.items()}
    )
    taus = [flat(e) - flat(base) for e in experts]
    np.testing.assert_allclose(flat(merged), flat(base) + reference(taus), rtol=0, atol=1e-12)


class TestGolden:
    """Cases of the authors' code."""

    @pytest.mark.parametrize("balance", ["raw", "pair"])
    def test_pcb(self, balance: str) -> None:
        found = gm.methods.pcb(torch.zeros(40), VECTORS, density=0.2, winsor=0.05, balance=balance)
        np.testing.assert_allclose(found.numpy(), expected(f"pcb_{balance}_r0.2_rho0.05"), rtol=RTOL, atol=1e-12)

    @pytest.mark.parametrize("task", [1, 2, 3])
    def test_tall_masks(self, task: int) -> None:
        """A mask is where the retrieved model is not the base."""
        found = gm.methods.tall_mask(torch.zeros(40), VECTORS, task=task, threshold=0.4)
        mask = np.array(GOLDEN["cases"]["tall_masks_lambda0.4"][task - 1]).astype(bool)
        total = sum(v.numpy() for v in VECTORS)
        np.testing.assert_allclose(found.numpy(), np.where(mask, total, 0), rtol=1e-12, atol=1e-15)

    def test_ties_of_the_authors(self) -> None:
        """`kth_inclusive` is their rule: density 0.2 keeps 9 of 40."""
        for options in ({"top_k": "kth_inclusive"}, {"scope": "global"}):
            found = gm.methods.ties(torch.zeros(40), VECTORS, weight=1, density=0.2, **options)
            np.testing.assert_allclose(found.numpy(), expected("ties_global_K0.2_mean"), rtol=RTOL, atol=0)

    def test_emr(self) -> None:
        """The unified vector, and both kinds of rescalers over a matrix and a vector."""
        case = GOLDEN["cases"]["emr"]
        experts = [{"w": m, "b": m[0, :5].clone()} for m in MATRICES]
        base = {name: torch.zeros_like(w) for name, w in experts[0].items()}
        unified = gm.methods.emr(base, experts)
        np.testing.assert_allclose(unified["w"].numpy(), np.array(case["unified_w"]), rtol=RTOL)
        for rescale, key in (("l1", "rescaler_paper_l1"), ("tensor_mean", "rescaler_reference_tensor_means")):
            for k, factor in enumerate(case[key]):
                own = gm.methods.emr(base, experts, task=k + 1, rescale=rescale)
                mask = own["w"] != 0
                torch.testing.assert_close(own["w"][mask], factor * unified["w"][mask], rtol=RTOL, atol=0)


class TestOrderOverAModel:
    """Exact order statistics over several tensors, by bracket and by counting."""

    def walk(self, arrays: Sequence[Array]) -> Walk:
        scans = [
            lambda a=a, i=i: Scan([TensorSource(torch.from_numpy(a))], a.shape, name=str(i), tile=64)
            for i, a in enumerate(arrays)
        ]
        return Walk(scans, [str(i) for i in range(len(arrays))], sum(a.size for a in arrays), 0)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("counting", [False, True])
    def test_nth_smallest(self, seed: int, counting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Signed values, ranks from the first to the last, against a sort."""
        random = np.random.default_rng(seed)
        arrays = [random.standard_normal(n) if seed % 2 else random.integers(-4, 5, n) / 8 for n in (3000, 1, 777, 20)]
        if counting:
            monkeypatch.setattr("geomerge.methods.order.choose", lambda *a: None)
        ordered = np.sort(np.concatenate(arrays))
        ranks = [0, 1, 100, 1900, ordered.size - 2, ordered.size - 1]
        found = nth_smallest_of_all(self.walk(arrays), lambda tile: [tile.base] * len(ranks), ranks, signed=True)
        assert found == [ordered[r] for r in ranks]

    @pytest.mark.parametrize("k", [0, 1, 57, 1500, 3797, 3798, 5000])
    def test_largest(self, k: int) -> None:
        """Which elements are kept, equals decided by tensor and index; nothing more, nothing less."""
        random = np.random.default_rng(7)
        arrays = [random.integers(-5, 6, n) / 4 for n in (3000, 1, 777, 20)]
        walk = self.walk(arrays)
        selections = largest_of_all(walk, lambda tile: [tile.base.abs()], [k])
        kept = []
        for name, array in zip(walk.names, arrays, strict=True):
            scan = Scan([TensorSource(torch.from_numpy(array))], array.shape, name=name, tile=64)

            def shrink(tile: Tile, name: str = name) -> Tensor:
                return selections[name][0].shrink_(tile.base.clone(), tile, 0)

            kept.append(np.concatenate([shrink(t).numpy() for s in scan.segments for t in scan.tiles(s)]))
        whole = np.concatenate(arrays)
        order = np.lexsort((np.arange(whole.size), -np.abs(whole)))[: min(k, whole.size)]
        expected_ = np.zeros_like(whole)
        expected_[order] = whole[order]
        assert np.array_equal(np.concatenate(kept), expected_)


ENGINE: dict[str, dict[str, Any]] = {
    "ties": {"weight": 1, "density": 0.2, "scope": "global"},
    "pcb": {"density": 0.2},
    "emr": {"task": 2},
    "consensus_ties": {"lambda": 0.5},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.family(tmp_path, dtype=torch.bfloat16)
    return tmp_path


def recipe(root: Path, method: str, more: str = "") -> str:
    experts = ", ".join(f"{{model: {root}/{n}}}" for n in "abc")
    return (
        f"merge_method: {method}\nbase_model: {root}/base\nmodels: [{experts}]\n"
        f"parameters: {json.dumps(ENGINE[method])}\ndtype: bfloat16\n{more}"
    )


@pytest.mark.parametrize("method", ENGINE)
class TestEngine:
    def test_on_disk_as_in_memory(self, method: str, root: Path, tmp_path: Path) -> None:
        """Files, state dicts, any tile, any number of threads, a saved plan: the same bits."""
        text = recipe(root, method)
        report = gm.merge(text, tmp_path / "out", threads=2)
        merged = tiny.read(tmp_path / "out")
        assert report.tensors == len(merged)
        plan = gm.plan(text)
        for tile, threads in ((64, 1), (1 << 13, 3), (1 << 20, 2)):
            assert tiny.same(merged, run_in_memory(plan, tile=tile, threads=threads))
        plan.save(tmp_path / "plan.json")
        gm.merge(type(plan).load(tmp_path / "plan.json"), tmp_path / "again")
        assert tiny.same(merged, tiny.read(tmp_path / "again"))

    def test_against_the_function(self, method: str, root: Path) -> None:
        """gm.methods on the state dicts."""
        tensors = [tiny.read(root / n) for n in ("base", "a", "b", "c")]
        values = {k.replace("lambda", "lambda_"): v for k, v in ENGINE[method].items()}
        found = getattr(gm.methods, method)(tensors[0], tensors[1:], **values)
        assert tiny.same(gm.merge_state_dicts(recipe(root, method)), found)

    def test_progress_reaches_its_end(self, method: str, root: Path, tmp_path: Path) -> None:
        """What the survey reads counts, too."""
        seen: dict[str, int] = {"total": 0, "done": 0}

        class Watch:
            def start(self, total: int, done: int) -> None:
                seen.update(total=total, done=done)

            def advance(self, nbytes: int) -> None:
                seen["done"] += nbytes

            def finish(self) -> None:
                assert seen["done"] == seen["total"]

        plan = gm.plan(recipe(root, method))
        gm.merge(plan, tmp_path / "out", progress=Watch())
        assert seen["total"] == seen["done"] > plan.nbytes

    def test_after_a_kill(self, method: str, root: Path, tmp_path: Path) -> None:
        """A run that stops at its third tensor is continued to the same bytes."""
        text = recipe(root, method)
        gm.merge(text, tmp_path / "whole")

        class Stop(BaseException):
            pass

        class Watch:
            count = 0

            def start(self, total: int, done: int) -> None:
                self.total, self.done = total, done

            def advance(self, nbytes: int) -> None:
                self.done += nbytes
                if self.done > 0.9 * self.total and not Watch.count:
                    Watch.count = 1
                    raise Stop

            def finish(self) -> None: ...

        with pytest.raises(Stop):
            gm.merge(text, tmp_path / "out", progress=Watch(), threads=1)
        gm.merge(text, tmp_path / "out", resume=True)
        assert tiny.same(tiny.read(tmp_path / "out"), tiny.read(tmp_path / "whole"))


def test_shares_by_parameters(root: Path) -> None:
    """Tensors with another density are another crowd: each share is one of its own."""
    text = recipe(root, "ties").replace('"density": 0.2', '"density": [{"role": "mlp", "value": 0.1}, {"value": 0.6}]')
    merged = gm.merge_state_dicts(text)
    base, *experts = [{n: w.double() for n, w in tiny.read(root / n).items()} for n in ("base", "a", "b", "c")]
    for chosen, density in ((lambda n: "mlp" in n, 0.1), (lambda n: "mlp" not in n, 0.6)):
        names = [n for n in merged if chosen(n)]
        whole = [np.concatenate([m[n].numpy().reshape(-1) for n in names]) for m in (base, *experts)]
        taus = [w - whole[0] for w in whole[1:]]
        found = np.concatenate([merged[n].float().numpy().reshape(-1) for n in names])
        wanted = torch.from_numpy(whole[0] + ties(taus, density)).bfloat16().float().numpy()
        assert np.array_equal(found, wanted)


def test_live_merges_survey(root: Path) -> None:
    """A candidate in memory is what the merge on disk is."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(str(root / "a"), dtype=torch.bfloat16)
    live = LiveMerge({str(root / n): root / n for n in ("base", "a", "b", "c")}, module)
    text = recipe(root, "ties")
    live.blend(loads(text))
    merged = gm.merge_state_dicts(text)
    state = module.state_dict()
    assert all(torch.equal(state[n], w) for n, w in merged.items())


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("emr", {"task": 4}, "task is 4"),
        ("tall_mask", {"task": 4}, "task is 4"),
        ("tall_mask", {"task": 0}, "must lie in"),
        ("consensus", {"k": 4}, "nothing would be left"),
        ("pcb", {"density": 0}, r"\(0, 1\]"),
        ("pcb", {"winsor": 0.5}, "must lie in"),
        ("ties", {"weight": 1, "scope": "model"}, "one of tensor, global"),
    ],
)
def test_wrong_parameters(method: str, options: dict[str, Any], says: str) -> None:
    base, *experts = models(3)
    with pytest.raises(gm.UsageError, match=says):
        getattr(gm.methods, method)(base, experts, **options)


@pytest.mark.parametrize("method", ["pcb", "emr", "consensus", "consensus_ties"])
def test_experts_equal_to_the_base(method: str) -> None:
    """No NaN, and the base bit for bit."""
    base, *_ = models(1)
    merged = getattr(gm.methods, method)(base, [base, base, base])
    assert all(torch.equal(merged[n], base[n]) for n in base)


@pytest.mark.parametrize("grid", [False, True], ids=["dense", "grid"])
def test_a_model_larger_than_the_sample(grid: bool) -> None:
    """Where thresholds are predicted from a sample, small tensors beside large ones have their share in it."""
    shapes = {"a": (400, 500), "b": (96,), "c": (3,), "d": (5000,), "e": (300, 300)}
    random = np.random.default_rng(5)
    base = {n: random.integers(-64, 65, s) / 64 for n, s in shapes.items()}
    experts = [
        {
            n: base[n] + (random.integers(-3, 4, s) / 64 if grid else 0.1 * random.standard_normal(s))
            for n, s in shapes.items()
        }
        for _ in range(2)
    ]
    tensors = [{n: torch.from_numpy(w) for n, w in m.items()} for m in (base, *experts)]
    taus = [flat(t) - flat(tensors[0]) for t in tensors[1:]]
    merged = gm.methods.ties(tensors[0], tensors[1:], weight=1, density=0.1, scope="global")
    np.testing.assert_allclose(flat(merged), flat(tensors[0]) + ties(taus, 0.1), rtol=0, atol=1e-12)
    merged = gm.methods.pcb(tensors[0], tensors[1:])
    np.testing.assert_allclose(flat(merged), flat(tensors[0]) + pcb(taus, 0.2, 0.01, "raw"), rtol=0, atol=1e-12)


def with_loud_norms(shape: tuple[int, int], norms: int) -> list[dict[str, torch.Tensor]]:
    """A base and two experts, whose many small tensors change a thousand times as much as the large one."""
    random = torch.Generator().manual_seed(6)

    def noise(scale: float, *shape: int) -> torch.Tensor:
        return scale * torch.randn(shape, generator=random)

    base = {"w": noise(0.02, *shape)} | {f"norm{i}": 1 + noise(0.1, 300) for i in range(norms)}
    return [base] + [{n: v + noise(1e-4 if n == "w" else 0.1, *v.shape) for n, v in base.items()} for _ in range(2)]


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("method", ["ties", "pcb"])
def test_small_tensors_do_not_spoil_the_sample(method: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are a fiftieth of the model and no more of the sample, so its brackets hold the thresholds at the first look."""
    looks: list[float] = []
    bounds = order._bounds
    monkeypatch.setattr(order, "_bounds", lambda *given: looks.append(given[4]) or bounds(*given))
    monkeypatch.setattr(order, "by_counting", lambda *_, **__: pytest.fail("counted bit by bit"))
    models = with_loud_norms((1000, 1500), 100)
    with contextlib.nullcontext() if loops else native.turned_off():
        if method == "ties":
            merged = gm.methods.ties(models[0], models[1:], weight=1, density=0.2, scope="global")
            taus = [flat(m) - flat(models[0]) for m in models[1:]]
            np.testing.assert_allclose(flat(merged), flat(models[0]) + ties(taus, 0.2), rtol=0, atol=1e-6)
        else:
            gm.methods.pcb(models[0], models[1:])
    assert set(looks) == {order._OF_ALL[0]}


@pytest.mark.parametrize(("spreads", "again"), [((-5.0, 32.0), 0), ((-6.0, -5.0), 2)])
def test_what_a_models_brackets_missed_is_looked_at_once_more(
    spreads: tuple[float, float], again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By wider ones; only what these miss, too, is counted bit by bit."""
    counted: list[int] = []
    by_counting = order.by_counting
    monkeypatch.setattr(order, "by_counting", lambda *a, **o: counted.append(1) or by_counting(*a, **o))
    monkeypatch.setattr(order, "_OF_ALL", spreads)
    models = with_loud_norms((300, 400), 10)
    merged = gm.methods.ties(models[0], models[1:], weight=1, density=0.1, scope="global")
    assert len(counted) == again
    taus = [flat(m) - flat(models[0]) for m in models[1:]]
    np.testing.assert_allclose(flat(merged), flat(models[0]) + ties(taus, 0.1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tie", [1.0, -1.0, 0.0])
def test_the_majority_breaks_ties(tie: float, compiled: bool, kind: torch.dtype) -> None:
    """Where votes cancel exactly, the sign that most elements of the whole model elect; nothing where there is no majority."""
    others = torch.tensor([3.0, 2.0, 4.0, 5.0]) * (tie or torch.tensor([1.0, -1.0, 1.0, -1.0]))
    names = {"x": slice(0, 3), "y": slice(3, 5)}
    whole = [torch.cat([torch.tensor([sign]), others]) for sign in (1.0, -1.0)]
    base, *experts = [{n: w[s].to(kind).repeat(300) for n, s in names.items()} for w in (torch.zeros(5), *whole)]
    with contextlib.nullcontext() if compiled else native.turned_off():
        ties = gm.methods.ties(base, experts, weight=1.0, scope="global")
        consensus = gm.methods.consensus_ties(base, experts, density=1.0, k=1, **{"lambda": 0.5})
    for found, share in ((ties, 1.0), (consensus, 0.5)):  # of two that agree the mean, and half of the sum
        assert torch.equal(found["x"], torch.cat([torch.tensor([tie * share]), others[:2]]).to(kind).repeat(300))
        assert torch.equal(found["y"], others[2:].to(kind).repeat(300))


class TestLines:
    """LiNeS whose alpha is found from the model."""

    def depths(self, names: list[str]) -> dict[str, float]:
        return {n: int(n.split(".")[2]) / 2 if ".layers." in n else 0.0 for n in names}

    @pytest.mark.parametrize("weight", [1.0, 0.4])
    def test_of_task_arithmetic_it_is_one_in_t(self, root: Path, weight: float) -> None:
        """α is 1/T of the sum, whatever the weights."""
        experts = ", ".join(f"{{model: {root}/{n}, parameters: {{weight: {weight}}}}}" for n in "abc")
        text = f"merge_method: task_arithmetic\nbase_model: {root}/base\nmodels: [{experts}]\ndtype: float32\n"
        auto = gm.merge_state_dicts(text + "steps: [{lines: {alpha: auto, beta: 0.5}}]\n")
        said = gm.merge_state_dicts(text + f"steps: [{{lines: {{alpha: {1 / 3 / weight}, beta: 0.5}}}}]\n")
        for name, w in said.items():
            torch.testing.assert_close(auto[name], w, rtol=0, atol=1e-6)

    def test_of_ties(self, root: Path, tmp_path: Path) -> None:
        """Against the norms of the whole model, computed directly; the manifest says what was used."""
        plain = recipe(root, "ties").replace("bfloat16", "float32")
        gm.merge(plain + "steps: [{lines: {beta: 0.7}}, {scale: 0.9}]\n", tmp_path / "out")
        out, merged = tiny.read(tmp_path / "out"), gm.merge_state_dicts(plain)
        base, *experts = [{n: w.double() for n, w in tiny.read(root / n).items()} for n in ("base", "a", "b", "c")]
        summed = sum(float(sum(e[n] - base[n] for e in experts).abs().sum()) for n in base)
        size = sum(float((merged[n].double() - base[n]).abs().sum()) for n in base)
        alpha = summed / size / 3
        manifest = tiny.manifest(tmp_path / "out")["tensors"]
        for name, depth in self.depths(list(out)).items():
            scale = 0.9 * (alpha + 0.7 * depth)
            assert manifest[name]["scale"] == pytest.approx(scale, rel=1e-5)
            wanted = base[name] + scale * (merged[name].double() - base[name])
            torch.testing.assert_close(out[name].double(), wanted, rtol=0, atol=1e-5)

    def test_nothing_learned(self, root: Path) -> None:
        """Experts equal to the base: the base, no division by zero."""
        text = (
            f"merge_method: task_arithmetic\nbase_model: {root}/base\n"
            f"models: [{{model: {root}/copy, parameters: {{weight: 1}}}}]\nsteps: [{{lines: {{beta: 1}}}}]\n"
        )
        tiny.save(root / "copy", tiny.read(root / "base"), tiny.config(root / "base"))
        assert tiny.same(gm.merge_state_dicts(text), tiny.read(root / "base"))

    @pytest.mark.parametrize(
        ("steps", "says"),
        [
            ("[{lines: {alpha: auto}}]", "needs beta"),
            ("[{lines: {alpha: later, beta: 1}}]", "takes numbers"),
            ("[{lines: {beta: 1}}, {lines: {beta: 1}}]", "cannot follow each other"),
        ],
    )
    def test_wrong_steps(self, root: Path, steps: str, says: str) -> None:
        with pytest.raises(gm.RecipeError, match=says):
            gm.plan(recipe(root, "ties") + f"steps: {steps}\n")


class TestConsensusThatKeepsNothing:
    """Experts of disjoint changes, of which two never need the same element: the output is the base, and the user is told."""

    @pytest.fixture
    def disjoint(self, tmp_path: Path) -> Path:
        models = tiny.family(tmp_path, dtype=torch.bfloat16)
        for k, name in enumerate("abc"):
            own = {}
            for n, w in models[name].items():
                mine = torch.arange(w.numel()).view(w.shape) % 3 == k
                own[n] = torch.where(mine, w, models["base"][n])
            tiny.save(tmp_path / name, own, tiny.config(tmp_path / name))
        return tmp_path

    def text(self, root: Path, method: str, parameters: dict[str, Any]) -> str:
        experts = ", ".join(f"{{model: {root}/{n}}}" for n in "abc")
        values = json.dumps(parameters)
        return f"merge_method: {method}\nbase_model: {root}/base\nmodels: [{experts}]\nparameters: {values}\n"

    @pytest.mark.parametrize(("method", "parameters"), [("consensus", {}), ("consensus_ties", {"density": 0.5})])
    def test_told(
        self, method: str, parameters: dict[str, Any], disjoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """In the report, the manifest, the card and the log, with what to change; each tensor's count is in the manifest."""
        text = self.text(disjoint, method, parameters)
        report = gm.merge(text, disjoint / "out", threads=2)
        (note,) = report.notes
        assert note.startswith(f"{method} keeps 0 % ")
        assert "lower k (is 2) or threshold (is 0.4)" in note
        manifest = tiny.manifest(disjoint / "out")
        assert manifest["notes"] == [note]
        assert all(t["kept"] == 0 for t in manifest["tensors"].values())
        assert note.partition(" ")[2] in (disjoint / "out" / "README.md").read_text()
        assert note in caplog.text
        assert not gm.plan(text).notes

    def test_the_count(self, root: Path) -> None:
        """What the manifest says is what a mask of NumPy has, and 5 % and more is no news."""
        text = self.text(root, "consensus", {"threshold": 0.6})
        assert not gm.merge(text, root / "out", threads=1).notes
        base, *experts = [{n: w.double() for n, w in tiny.read(root / n).items()} for n in ("base", "a", "b", "c")]
        for name, entry in tiny.manifest(root / "out")["tensors"].items():
            taus = [(e[name] - base[name]).numpy() for e in experts]
            votes = sum((np.abs(t) > 0.6 * np.abs(sum(taus) - t)).astype(int) for t in taus)
            assert entry["kept"] == np.count_nonzero(votes >= 2)

    def test_resumed_and_in_shards(self, disjoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counts of an earlier run and of other machines are counted, too."""
        monkeypatch.setattr("geomerge.engine.execute._BUNDLE_TENSORS", 1)  # each is recorded by itself
        text = self.text(disjoint, "consensus", {})
        gm.merge(text, disjoint / "whole")
        with pytest.raises(KeyboardInterrupt):
            gm.merge(text, disjoint / "out", threads=1, progress=tiny.Interrupt(0.5))
        assert gm.merge(text, disjoint / "out", resume=True).resumed > 0
        for i in (1, 2):
            run_shard(gm.plan(text), disjoint / "sharded", i, 2, threads=1)
        assert len(finalize(disjoint / "sharded").notes) == 1
        for name in ("out", "sharded"):
            assert tiny.manifest(disjoint / name) == tiny.manifest(disjoint / "whole")


class TestTaskByName:
    """`task` takes an expert's name: its last part, or all that the recipe writes."""

    @pytest.mark.parametrize("method", ["emr", "tall_mask"])
    def test_as_its_number(self, method: str, root: Path) -> None:
        experts = ", ".join(f"{{model: {root}/{n}}}" for n in "abc")
        head = f"merge_method: {method}\nbase_model: {root}/base\nmodels: [{experts}]\n"
        wanted = gm.merge_state_dicts(head + "parameters: {task: 2}\n")
        for name in ("b", f"{root}/b"):
            assert tiny.same(gm.merge_state_dicts(head + f"parameters: {{task: {name}}}\n"), wanted)

    def test_wrong_names(self, root: Path) -> None:
        """The line, and what was meant; a name that two experts have says so."""
        tiny.save(root / "chat", tiny.read(root / "a"), tiny.config(root / "a"))
        head = f"merge_method: emr\nbase_model: {root}/base\nmodels: [{{model: {root}/chat}}, {{model: {root}/b}}"
        with pytest.raises(gm.RecipeError, match="names no expert: 'chta'") as caught:
            gm.plan(head + "]\nparameters: {task: chta}\n")
        assert "<recipe>:4" in str(caught.value)
        assert "did you mean 'chat'" in str(caught.value)
        (root / "more").mkdir()
        tiny.save(root / "more" / "b", tiny.read(root / "b"), tiny.config(root / "b"))
        with pytest.raises(gm.RecipeError, match="2 experts are called 'b'") as caught:
            gm.plan(head + f", {{model: {root}/more/b}}]\nparameters: {{task: b}}\n")
        assert "write `task: 2`" in str(caught.value)


@pytest.mark.skipif(not native.available(), reason="there are no compiled loops")
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_masks_over_ties_have_the_same_bits_without_loops(scope: str) -> None:
    """As the methods' defaults do in the conformance suite."""
    base, *experts = [{n: t.bfloat16() for n, t in m.items()} for m in models(3, grid=True)]
    options = {"merged": "ties", "task": 2, "scope": scope}
    found = gm.methods.tall_mask(base, experts, **options)
    with native.turned_off():
        assert tiny.same(gm.methods.tall_mask(base, experts, **options), found)
