"""Steps before a method: what they make of task vectors, the same bits however the work is cut, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import geomerge as gm
import tiny
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.engine.live import LiveMerge
from geomerge.engine.plan import Plan
from geomerge.engine.planner import make_plan
from geomerge.engine.run import run_in_memory
from geomerge.engine.shards import finalize, run_shard
from geomerge.methods import after, before, native, registry
from geomerge.methods.chain import Step, thinned
from geomerge.methods.kernel import prepare
from geomerge.methods.tile import Scan, TensorSource
from geomerge.recipe import grammar, loads

Array = np.ndarray

HEAD = "base_model: base\nmodels:\n  - {model: a}\n  - {model: b}\n  - {model: c}\ndtype: float64\nseed: 3\n"


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts of two blocks, on a grid coarse enough for many equal magnitudes."""
    root = tmp_path_factory.mktemp("parents")
    base = tiny.llama(root / "base", 0, num_hidden_layers=2)
    for seed, name in enumerate("abc", 1):
        tiny.llama(root / name, seed, like=base, num_hidden_layers=2, dtype=torch.bfloat16)
    tiny.llama(root / "base", 0, num_hidden_layers=2, dtype=torch.bfloat16)
    return root


@pytest.fixture(autouse=True)
def _there(parents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parents)


def recipe(method: str, more: str = "", head: str = HEAD) -> Any:
    return loads(f"merge_method: {method}\n{head}{more}")


def merged(method: str, more: str = "", **options: Any) -> dict[str, Tensor]:
    plan, inputs = make_plan(recipe(method, more))
    return run_in_memory(plan, inputs, **options)


def by_hand(method: str, parameters: dict[str, Any], thin: Callable[[str, int, Tensor], Tensor]) -> dict[str, Tensor]:
    """The method on models that have the thinned task vectors, all of it in float64 and in two steps."""
    base, *experts = ({n: t.double() for n, t in tiny.read(Path(m)).items()} for m in ("base", "a", "b", "c"))
    made = [{n: base[n] + thin(n, k, e[n] - base[n]) for n in base} for k, e in enumerate(experts)]
    return getattr(gm.methods, method)(base, made, seed=3, **parameters)  # type: ignore[no-any-return]


def kept(delta: Tensor, lower: int, upper: int) -> Tensor:
    """The elements of the ranks [lower, upper) of |δ|, descending; of equals the first comes first."""
    flat = delta.reshape(-1).numpy()
    order = np.lexsort((np.arange(flat.size), -np.abs(flat)))[lower:upper]
    found = np.zeros_like(flat)
    found[order] = flat[order]
    return torch.from_numpy(found).view(delta.shape)


def trim(density: float) -> Callable[[str, int, Tensor], Tensor]:
    return lambda name, k, delta: kept(delta, 0, int(density * delta.numel() + 1e-9))


def dare(density: float) -> Callable[[str, int, Tensor], Tensor]:
    """As the method DARE drops: told by merging one expert in each position with the weights of the others zero."""
    made: dict[int, dict[str, Tensor]] = {}

    def thin(name: str, k: int, delta: Tensor) -> Tensor:
        if k not in made:
            base, *experts = ({n: t.double() for n, t in tiny.read(Path(m)).items()} for m in ("base", "a", "b", "c"))
            zeros = {n: torch.zeros_like(t) for n, t in base.items()}
            taus = [{n: e[n] - base[n] for n in base} for e in experts]
            weight = [float(i == k) for i in range(3)]
            made[k] = gm.methods.dare_linear(zeros, taus, density=density, weight=weight, seed=3)
        return made[k][name]

    return thin


def breadcrumbs(density: float, gamma: float) -> Callable[[str, int, Tensor], Tensor]:
    def thin(name: str, k: int, delta: Tensor) -> Tensor:
        top = int(gamma * delta.numel() + 1e-9)
        return kept(delta, top, top + int(density * delta.numel() + 1e-9))

    return thin


def compress(ratio: float) -> Callable[[str, int, Tensor], Tensor]:
    def thin(name: str, k: int, delta: Tensor) -> Tensor:
        if delta.dim() != 2 or "embed" in name or "lm_head" in name:
            return delta
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        rank = int(ratio * min(delta.shape) + 1e-9)
        return (u[:, :rank] * s[:rank]) @ v[:rank]

    return thin


CASES: dict[str, tuple[str, str, dict[str, Any], str, Callable[[str, int, Tensor], Tensor]]] = {
    "dare before sce": ("sce", "select_topk: 0.5", {"select_topk": 0.5}, "dare: 0.4", dare(0.4)),
    "breadcrumbs before ties": (
        "ties",
        "density: 0.6, weight: 1",
        {"density": 0.6, "weight": 1.0},
        "breadcrumbs: {density: 0.5, gamma: 0.1}",
        breadcrumbs(0.5, 0.1),
    ),
    "trim before model stock": ("model_stock", "", {}, "trim: {density: 0.3}", trim(0.3)),
    "trim before nuslerp": ("nuslerp", "weight: 1", {"weight": 1.0}, "trim: 0.5", trim(0.5)),
    "svd before task arithmetic": (
        "task_arithmetic",
        "weight: 0.7",
        {"weight": 0.7},
        "svd_compress: {ratio: 0.3}",
        compress(0.3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_chain_is_its_two_steps_by_hand(case: str) -> None:
    """To float64's rounding the same as making the thinned experts first and merging those."""
    method, written, parameters, step, thin = CASES[case]
    if method == "nuslerp":  # two models beside the base
        head = "base_model: base\nmodels:\n  - {model: a}\n  - {model: b}\ndtype: float64\nseed: 3\n"
        plan, inputs = make_plan(recipe(method, f"parameters: {{{written}}}\nsteps: [{{{step}}}]\n", head))
        got = run_in_memory(plan, inputs)
        base, *experts = ({n: t.double() for n, t in tiny.read(Path(m)).items()} for m in ("base", "a", "b"))
        made = [{n: base[n] + thin(n, k, e[n] - base[n]) for n in base} for k, e in enumerate(experts)]
        want = gm.methods.nuslerp(made, base=base, **parameters)
    else:
        got = merged(method, f"parameters: {{{written}}}\nsteps: [{{{step}}}]\n")
        want = by_hand(method, parameters, thin)
    for name, tensor in got.items():
        assert torch.allclose(tensor, want[name], rtol=1e-9, atol=1e-12), name
    plain = merged(method, f"parameters: {{{written}}}\n") if method != "nuslerp" else {}
    assert not plain or any(not torch.equal(tensor, got[name]) for name, tensor in plain.items())


def test_a_matrix_method_sees_the_thinned_task_vectors() -> None:
    """dare → tsvm: TSV-Merge of matrices that DARE has thinned."""
    got = merged("tsvm", "steps: [{dare: 0.5}]\n")
    want = by_hand("tsvm", {}, dare(0.5))
    mine = [n for n in got if "proj" in n]
    assert mine
    for name in mine:
        assert torch.allclose(got[name], want[name], rtol=1e-7, atol=1e-9), name


def test_a_survey_sees_the_thinned_task_vectors() -> None:
    """breadcrumbs → TIES over the whole model: its threshold is that of what is left."""
    options = {"density": 0.2, "weight": 1.0, "scope": "global"}
    got = merged(
        "ties",
        "parameters: {density: 0.2, weight: 1, scope: global}\nsteps: [{breadcrumbs: {density: 0.5, gamma: 0.1}}]\n",
    )
    want = by_hand("ties", options, breadcrumbs(0.5, 0.1))
    for name, tensor in got.items():
        assert torch.allclose(tensor, want[name], rtol=1e-9, atol=1e-12), name


PRESETS = {
    "dare_linear": ("task_arithmetic", "", "rescale: true", "dare: {density: 0.4}"),
    "ties": ("ties", "", "", "trim: {density: 0.4}"),
    "breadcrumbs": ("task_arithmetic", "", "gamma: 0.02", "breadcrumbs: {density: 0.4, gamma: 0.02}"),
    "breadcrumbs ": (
        "task_arithmetic",
        "",
        "gamma: 0.1, scope: row",
        "breadcrumbs: {density: 0.4, gamma: 0.1, scope: row}",
    ),
    "della_linear": ("task_arithmetic", "", "epsilon: 0.2", "della: {density: 0.4, epsilon: 0.2}"),
    "breadcrumbs_ties": ("ties", "normalize: false", "gamma: 0.02", "breadcrumbs: {density: 0.4, gamma: 0.02}"),
    "dare_ties": ("ties", "normalize: false", "", "dare: {density: 0.4}"),
    "della": ("ties", "", "epsilon: 0.2", "magprune: {density: 0.4, epsilon: 0.2}"),
}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_published_variants_are_presets_of_a_chain(preset: str, dtype: str) -> None:
    """Bit for bit, also where the preset computes in float32."""
    method, beside, own, step = PRESETS[preset]
    said = registry.get(preset.strip()).chain.split()  # type: ignore[attr-defined]
    assert [before.get(said[0]), said[2]] == [before.get(step.split(":")[0]), method]
    head = HEAD.replace("float64", dtype)
    both = []
    for name, more in (
        (preset.strip(), f"parameters: {{weight: 1, density: 0.4, {own}}}\n"),
        (method, f"parameters: {{weight: 1, {beside}}}\nsteps: [{{{step}}}]\n"),
    ):
        plan, inputs = make_plan(recipe(name, more.replace(", }", "}"), head))
        both.append(run_in_memory(plan, inputs))
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())


@pytest.mark.parametrize("shape", [(3000, 1), (40, 40, 1, 1), (1,), (), (0, 1), (20_000, 1)], ids=str)
@pytest.mark.parametrize("name", ["della", "breadcrumbs "])
def test_rows_of_one_element(name: str, shape: tuple[int, ...]) -> None:
    """1×1 kernels, heads of one column, single numbers: each element is a row, and q its density."""
    method, beside, own, step = PRESETS[name]
    w = torch.from_numpy(np.random.default_rng(4).standard_normal(shape))
    models = {"base": {"w": torch.zeros_like(w)}, "a": {"w": w}}
    head = "base_model: base\nmodels: [{model: a}]\nseed: 3\n"
    one = gm.merge_state_dicts(f"merge_method: {name}\n{head}parameters: {{weight: 1, density: 0.4, {own}}}\n", models)
    more = f"parameters: {{weight: 1, {beside}}}\n".replace(", }", "}")
    assert torch.equal(
        one["w"], gm.merge_state_dicts(f"merge_method: {method}\n{head}{more}steps: [{{{step}}}]\n", models)["w"]
    )
    if name == "della":
        factors = one["w"] / w
        assert torch.allclose(factors, torch.where(factors == 0, 0.0, 1 / 0.4).double())


def test_svd_compress_before_a_sum_is_the_method() -> None:
    """svd_compress → task_arithmetic equals the method svd_compress, rest rule and all."""
    for rest in ("sum", "base"):
        step = merged(
            "task_arithmetic", f"parameters: {{weight: 1}}\nsteps: [{{svd_compress: {{ratio: 0.3, rest: {rest}}}}}]\n"
        )
        method = merged("svd_compress", f"parameters: {{weight: 1, ratio: 0.3, rest: {rest}}}\n")
        for name, tensor in step.items():
            assert torch.allclose(tensor, method[name], rtol=1e-13, atol=1e-15), name


def test_steps_follow_each_other_and_scales_come_last() -> None:
    """trim → dare → task arithmetic → lines → scale, against the same by hand."""
    more = (
        "parameters: {weight: 0.5}\nsteps: [{trim: 0.5}, {dare: 0.8}, {lines: {alpha: 0.2, beta: 0.8}}, {scale: 0.5}]\n"
    )
    got = merged("task_arithmetic", more)
    first, second = trim(0.5), dare(0.8)
    base = {n: t.double() for n, t in tiny.read(Path("base")).items()}
    whole = by_hand(
        "task_arithmetic", {"weight": 1.0}, lambda n, k, d: torch.where(second(n, k, d) != 0, first(n, k, d) / 0.8, 0.0)
    )
    for name, tensor in got.items():
        block = int(name.split(".")[2]) if ".layers." in name else 0
        scale = 0.5 * 0.5 * (0.2 + 0.8 * block)
        assert torch.allclose(tensor, base[name] + scale * (whole[name] - base[name]), rtol=1e-9, atol=1e-12), name


def test_lines_behind_the_blocks() -> None:
    """The final norm and the head are as what is before the blocks, or as the last block."""
    base, whole = ({n: t.double() for n, t in m.items()} for m in (tiny.read(Path("base")), merged("sce")))
    for said, behind in (("alpha", 0.25), ("last", 1.0)):
        got = merged("sce", f"steps: [{{lines: {{alpha: 0.25, beta: 0.75, post_block_scale: {said}}}}}]\n")
        for name, scale in (("model.norm.weight", behind), ("model.embed_tokens.weight", 0.25)):
            assert torch.allclose(got[name], base[name] + scale * (whole[name] - base[name]), rtol=1e-9, atol=1e-12), (
                name
            )


def test_density_one_changes_no_bit() -> None:
    """The endpoint of every sparsifier; such a step is not even planned."""
    plain = merged("sce")
    for step in ("trim: 1.0", "dare: 1", "della: 1.0", "breadcrumbs: {density: 1, gamma: 0}"):
        plan, inputs = make_plan(recipe("sce", f"steps: [{{{step}}}]\n"))
        assert not any(node.chain for node in plan.nodes)
        assert all(torch.equal(t, plain[n]) for n, t in run_in_memory(plan, inputs).items())
    full = merged("sce", "steps: [{svd_compress: {ratio: 1.0}}]\n")
    assert all(torch.equal(t, plain[n]) for n, t in full.items())


def test_values_vary_over_models_depth_and_names() -> None:
    """Filters and gradients as in any parameter; beside a model under the step's name."""
    head = HEAD.replace("{model: b}", "{model: b, parameters: {trim.density: [{filter: mlp, value: 0.25}]}}")
    more = "steps:\n  - trim:\n      density: [{role: norm, value: 1.0}, {value: [0.5, 0.75]}]\n"
    plan, inputs = make_plan(recipe("sce", more, head))
    for checkpoint in inputs:
        checkpoint.close()
    found = {n.name: [getattr(s, "density", None) for s in n.chain] for n in plan.nodes}
    assert found["model.layers.0.self_attn.q_proj.weight"] == [(0.5, 0.5, 0.5)]
    assert found["model.layers.1.self_attn.q_proj.weight"] == [(0.75, 0.75, 0.75)]
    assert found["model.layers.1.mlp.up_proj.weight"] == [(0.75, 0.25, 0.75)]
    assert found["model.norm.weight"] == []


@pytest.mark.parametrize("step", ["trim", "dare", "della", "breadcrumbs", "svd_compress"])
@pytest.mark.parametrize("method", ["task_arithmetic", "sce", "ties", "slerp", "tsvm", "arcee_fusion"])
def test_the_bits_do_not_depend_on_how_the_work_is_cut(method: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, segments, threads, reading ahead: on a coarse grid, where equal magnitudes straddle every border."""
    for module in ("tile", "gram"):
        monkeypatch.setattr(f"geomerge.methods.{module}.BLOCK", 64)
    monkeypatch.setattr("geomerge.methods.tile.SEGMENT", 512)
    random = np.random.default_rng(5)
    shape = (48, 40)
    base = torch.from_numpy(random.integers(-64, 64, shape) / 64.0)
    count = 1 if method in ("arcee_fusion", "slerp") else 3
    experts = [base + torch.from_numpy(random.integers(-4, 5, shape) / 256.0) for _ in range(count)]
    values: dict[str, Any] = {"density": 0.37} if step != "svd_compress" else {"ratio": 0.2}
    steps = [before.get(step).make(values, count=count)]
    if step != "trim":
        steps.append(before.get("trim").make({"density": 0.81, "rescale": True, "rescale_norm": "l1"}, count=count))
    known = registry.get(method).parameters()
    given: dict[str, Any] = {n: 0.3 for n in ("weight", "t") if n in known and known[n].required}
    merge = registry.get(method).make(given | ({"density": 0.5} if method == "ties" else {}), count=count)

    def once(tile: int, threads: int, ahead: bool) -> Tensor:
        sources = [TensorSource(t) for t in (base, *experts)]
        with ThreadPoolExecutor(threads) as pool:

            def open_scan(**tiling: Any) -> Scan:
                return Scan(sources, shape, name="w", seed=1, tile=tile, run=pool.map, read_ahead=ahead, **tiling)

            made: list[Step] = [s for s in steps if isinstance(s, Step)]
            prepared = prepare(merge, thinned(open_scan, made, shape, count), shape)
            out = torch.empty(base.numel(), dtype=torch.float64)
            for segment in prepared.scan.segments:
                for start, piece in prepared.tiles(segment):
                    out[start : start + piece.numel()] = piece
            return out

    first = once(1 << 17, 1, False)
    assert not torch.equal(first, base.reshape(-1))
    for tile, threads, ahead in ((64, 1, False), (192, 3, False), (512, 1, True)):
        assert torch.equal(once(tile, threads, ahead), first)


def test_plans_shards_and_runs_agree(tmp_path: Path) -> None:
    """Written whole, by two shards, from a saved plan: the same bits; the manifest names the chain."""
    text = recipe("ties", "parameters: {density: 0.5, weight: 1}\nsteps: [{dare: 0.5}, {scale: 0.5}]\n")
    gm.merge(text, tmp_path / "whole")
    whole = tiny.read(tmp_path / "whole")
    plan, inputs = make_plan(text)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.hash == plan.hash
    assert all(torch.equal(t, whole[n]) for n, t in run_in_memory(again, inputs, threads=1, tile=4096).items())
    for shard in (1, 2):
        run_shard(plan, tmp_path / "shared", shard, 2)
    finalize(tmp_path / "shared")
    assert all(torch.equal(t, whole[n]) for n, t in tiny.read(tmp_path / "shared").items())
    manifest = json.loads((tmp_path / "whole" / "geomerge.json").read_text())
    entry = manifest["tensors"]["model.norm.weight"]
    assert [manifest["steps"][i] for i in entry["before"]] == [
        {"name": "dare", "parameters": {"density": [0.5] * 3, "rescale": True, "rescale_norm": "inverse"}}
    ]
    assert entry["scale"] == 0.5


def test_live_candidates_do_not_mix_up_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured for one chain is not taken for another's, and files of activations are closed again."""
    up = "model.layers.0.mlp.up_proj.weight"
    save_file({up: torch.rand(tiny.read(Path("base"))[up].shape[1])}, "act.safetensors")
    closed: list[str] = []
    close = Checkpoint.close
    monkeypatch.setattr(Checkpoint, "close", lambda self: (closed.append(self.ref), close(self))[1])
    module = torch.nn.Module()
    base = tiny.read(Path("base"))
    names = {n.replace(".", "_"): n for n in base}
    for flat, name in names.items():
        module.register_parameter(flat, torch.nn.Parameter(torch.zeros(base[name].shape, dtype=torch.float64)))
    state = module.state_dict

    def dotted(*args: Any, **options: Any) -> Any:
        return {names.get(n, n): t for n, t in state(*args, **options).items()}

    module.state_dict = dotted  # type: ignore[method-assign]
    live = LiveMerge({m: m for m in ("base", "a", "b", "c")}, module)
    for method, steps in (
        ("model_stock", ""),
        ("model_stock", "trim: 0.3"),
        ("tsvm", "dare: 0.5"),
        ("tsvm", "dare: 0.6"),
        ("tsvm", "aim: {statistics: act.safetensors}"),
    ):
        more = f"steps: [{{{steps}}}]\n" if steps else ""
        closed.clear()
        live.blend(recipe(method, more))
        assert closed == ["act.safetensors"] * ("aim" in more)
        want = merged(method, more)
        assert all(torch.equal(getattr(module, flat), want[name]) for flat, name in names.items())


def test_damage_is_found_in_what_a_step_would_drop() -> None:
    """A NaN is refused although nothing of that element would be left."""
    base, bad = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    bad[7] = float("nan")
    steps = [before.Dare(density=(0.01,))]
    method = registry.get("task_arithmetic").make({"weight": 1.0}, count=1)

    def open_scan(**tiling: Any) -> Scan:
        return Scan([TensorSource(base), TensorSource(bad, "bad: w")], (64,), name="w", **tiling)

    prepared = prepare(method, thinned(open_scan, steps, (64,), 1), (64,))
    with pytest.raises(gm.NotFiniteError, match="NaN"):
        list(prepared.tiles(prepared.scan.segments[0]))


REFUSED = {
    "unknown step": ("sce", "steps: [{dar: 0.5}]\n", "'dar'", "'dare'", 9),
    "unknown parameter": ("sce", "steps: [{dare: {densty: 0.5}}]\n", "'densty'", "'density'", 9),
    "density of zero": ("sce", "steps:\n  - dare: 0\n", r"density must lie in \(0, 1\], not 0", None, 10),
    "density above one": ("sce", "steps:\n  - trim: {density: 1.5}\n", r"density must lie in \(0, 1\]", None, 10),
    "no density": ("sce", "steps:\n  - trim\n", "needs the parameter 'density'", None, 10),
    "a step of the method's own": (
        "dare_ties",
        "parameters: {weight: 1, density: 0.5}\nsteps: [{dare: 0.5}]\n",
        "'dare' comes before dare_ties, which is the same step",
        "product of the densities",
        10,
    ),
    "beside a model without the step": (
        "ties",
        "parameters: {weight: 1, dare.density: 0.5}\n",
        "ties has no parameter 'dare.density'",
        "no step 'dare' before the method: add `steps: ",
        9,
    ),
    "no list": ("sce", "steps:\n  dare: 0.5\n", "'steps' must be a list", "as in 'steps: ", 10),
    "a scale by nothing": ("sce", "steps:\n  - scale\n", "'scale' needs a value", "scale: 0.7", 10),
    "lines behind the blocks": (
        "sce",
        "steps:\n  - lines: {alpha: 0.5, beta: 0.5, post_block_scale: first}\n",
        "the step 'lines': post_block_scale must be one of alpha, last, not 'first'",
        None,
        10,
    ),
    "lines without beta": ("sce", "steps:\n  - lines: {alpha: 0.5}\n", "'lines' needs beta", "beta: 0.7", 10),
    "lines as a number": ("sce", "steps:\n  - lines: 0.5\n", "takes alpha, beta and post_block_scale", "beta: 0.7", 10),
    "lines without beta somewhere": (
        "sce",
        "steps:\n  - lines: {alpha: 0.5, beta: {role: mlp, value: 1}}\n",
        "needs beta .for ",
        "without a filter",
        10,
    ),
    "after a scale": (
        "sce",
        "steps:\n  - scale: 0.5\n  - dare: 0.5\n",
        "'dare' comes after 'scale'",
        "write 'dare' first",
        11,
    ),
    "twice": ("sce", "steps:\n  - trim: 0.5\n  - magnitude: 0.5\n", "'trim' is given twice", None, 11),
    "beside without its name": (
        "sce",
        "steps: [{dare: 0.5}]\nparameters: {density: 0.5}\n",
        "'density'",
        "dare.density",
        10,
    ),
    "no task vectors": (
        "linear",
        "parameters: {weight: 1}\nsteps:\n  - dare: 0.5\n",
        "linear works on none",
        "base model",
        11,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_its_line(case: str) -> None:
    method, more, what, hint, line = REFUSED[case]
    with pytest.raises(gm.RecipeError, match=what) as caught:
        make_plan(recipe(method, more))
    assert caught.value.where == f"<recipe>:{line}"
    assert hint is None or hint in str(caught.value.hint)


def test_documents_that_draw_alike_are_told() -> None:
    """The masks of two documents with one seed are the same; with another seed, or where only one draws, nothing is said."""
    first = f"name: mid\nmerge_method: dare_linear\n{HEAD}parameters: {{weight: 1, density: 0.5}}\n---\n"
    second = "base_model: base\nmodels: [{model: mid}]\nparameters: {weight: 1}\n"

    def told(text: str) -> bool:
        plan, inputs = make_plan(loads(first + text))
        for checkpoint in inputs:
            checkpoint.close()
        return any("'mid' and the merge of it draw the same masks" in note for note in plan.notes)

    assert told(f"merge_method: ties\n{second}seed: 3\nsteps: [{{dare: 0.5}}]\n")
    assert not told(f"merge_method: ties\n{second}seed: 4\nsteps: [{{dare: 0.5}}]\n")
    assert not told(f"merge_method: ties\n{second}seed: 3\nsteps: [{{trim: 0.5}}]\n")


def test_a_step_needs_the_base() -> None:
    """Where the base is optional, a chain says what it is for; where it is required, the method says so itself."""
    for method, what in (("nuslerp", "without a base has none"), ("ties", "needs a base model")):
        with pytest.raises(gm.RecipeError, match=what):
            make_plan(
                recipe(method, "steps: [{dare: 0.5}]\n", "models: [{model: a}, {model: b}]\nparameters: {weight: 1}\n")
            )


def test_the_grammar_knows_the_steps() -> None:
    """Names and parameters of the tables are those of the classes."""
    for name, step in before.STEPS.items():
        assert grammar.BEFORE[name] == tuple(step.parameters()) or set(grammar.BEFORE[name]) == set(step.parameters())
        assert grammar.STEP_ALIASES.get(name, name) == step.name
        assert {p for p in grammar.BEFORE[name] if p in grammar.BESIDE} == {
            n for n, p in step.parameters().items() if p.per_model
        }
    assert set(before.STEPS) == set(grammar.BEFORE)
    assert {name: tuple(step.parameters()) for name, step in after.AFTER.items()} == grammar.AFTER


class Counting(TensorSource):
    """A source that knows how many elements were read of it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.elements = 0

    def read(self, start: int, out: Tensor) -> None:
        self.elements += out.numel()
        super().read(start, out)


@pytest.mark.parametrize("steps", [["dare"], ["dare", "della"], ["dare", "trim"], ["trim", "dare"]])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_chain_is_one_pass(method: str, steps: list[str]) -> None:
    """Every input is read once for the output, however many steps there are; only what measures is a pass more."""
    count, shape = 2, (30, 50)
    sources = [Counting(t.view(shape)) for t in torch.randn(count + 1, 1500, dtype=torch.float64)]

    def open_scan(**tiling: Any) -> Scan:
        return Scan(sources, shape, name="w", seed=1, tile=256, **tiling)

    made: list[Step] = [before.get(s).make({"density": 0.5}, count=count) for s in steps]
    merge = registry.get(method).make({"weight": 1.0}, count=count)
    with native.turned_off():  # which go to the elements past `read`
        prepared = prepare(merge, thinned(open_scan, made, shape, count), shape)
        assert any(source.elements for source in sources) == ("trim" in steps)
        before_it = [source.elements for source in sources]
        for segment in prepared.scan.segments:
            list(prepared.tiles(segment))
    assert [s.elements - n for s, n in zip(sources, before_it, strict=True)] == [1500] * (count + 1)
