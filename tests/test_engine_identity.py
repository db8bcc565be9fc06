"""One merge, one result: streamed, in memory, in any tiles, on any number of threads, interrupted and resumed, read ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import geomerge as gm
import tiny
from geomerge.checkpoint import from_state_dict
from geomerge.engine import execute
from geomerge.engine.build import Builder
from geomerge.engine.planner import make_plan
from geomerge.engine.run import run_in_memory
from geomerge.engine.sinks import MemorySink
from geomerge.methods import tile

SHAPES = {
    "model.embed_tokens.weight": (301, 130),
    "model.layers.0.mlp.up_proj.weight": (97, 411),
    "model.layers.0.mlp.up_proj.bias": (97,),
    "model.layers.1.self_attn.q_proj.weight": (5, 7001),
    "model.layers.1.conv.weight": (40, 13, 3, 3),
    "model.norm.weight": (9001,),
    "model.scalar": (),
    "model.empty": (0, 4),
}
BASED = {
    "ties": "parameters: {density: 0.3, weight: 0.7}",
    "dare_ties": "parameters: {density: 0.4, weight: 0.7}",
    "della": "parameters: {density: 0.5, epsilon: 0.1, weight: 0.7}",
    "breadcrumbs": "parameters: {density: 0.8, gamma: 0.03, weight: 0.7}",
    "model_stock": "parameters: {filter_wise: true}",
    "sce": "parameters: {select_topk: 0.4}",
}


def recipe(method: str, folder: str = "", extra: str = "") -> str:
    """A recipe for the models base, a and b, on disk below `folder` or in memory."""
    if method == "linear":
        return (
            f"merge_method: linear\nmodels:\n- {{model: {folder}a, parameters: {{weight: 0.3}}}}\n"
            f"- {{model: {folder}b, parameters: {{weight: 0.9}}}}\n{extra}"
        )
    if method == "slerp":
        return f"merge_method: slerp\nbase_model: {folder}a\nmodels: [{{model: {folder}b}}]\nparameters: {{t: 0.37}}\n{extra}"
    if method == "nuslerp":
        return (
            f"merge_method: nuslerp\nmodels:\n- {{model: {folder}a, parameters: {{weight: 1}}}}\n"
            f"- {{model: {folder}b, parameters: {{weight: 2}}}}\n"
            f"parameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}\n{extra}"
        )
    return (
        f"merge_method: {method}\nbase_model: {folder}base\nmodels: [{{model: {folder}a}}, {{model: {folder}b}}]\n"
        f"{BASED[method]}\n{extra}"
    )


METHODS = ["linear", "slerp", "nuslerp", *BASED]


@pytest.fixture(scope="module")
def models() -> dict[str, tiny.Tensors]:
    """Three bfloat16 models whose tensors are cut unevenly by any tile."""
    base = tiny.random_tensors(SHAPES, 1, dtype=torch.bfloat16)
    return {
        "base": base,
        "a": tiny.random_tensors(SHAPES, 2, like=base, step=0.1, dtype=torch.bfloat16),
        "b": tiny.random_tensors(SHAPES, 3, like=base, step=0.2, dtype=torch.bfloat16),
    }


@pytest.fixture(scope="module")
def folder(models: dict[str, tiny.Tensors], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models on disk."""
    root = tmp_path_factory.mktemp("models")
    for name, tensors in models.items():
        tiny.save(root / name, tensors, shards=2 if name == "a" else 1)
    return root


@pytest.fixture
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "SEGMENT", 1 << 14)
    monkeypatch.setattr(execute, "LARGE", 1 << 14)


def in_memory(text: str, models: dict[str, tiny.Tensors], **options: Any) -> tiny.Tensors:
    """Merge state dicts with the options of `run_in_memory`."""
    given = {name: from_state_dict(tensors, name=name) for name, tensors in models.items()}
    plan, inputs = make_plan(gm.load_recipe(text), models=given)
    return run_in_memory(plan, inputs, **options)


@pytest.mark.usefixtures("_small_segments")
@pytest.mark.parametrize("method", METHODS)
def test_bits_do_not_depend_on_how_it_is_run(
    method: str, models: dict[str, tiny.Tensors], folder: Path, tmp_path: Path
) -> None:
    """Files = state dicts = any tile = any number of threads, over tensors of several segments."""
    expected = gm.merge_state_dicts(recipe(method), models, threads=1)
    assert not tiny.same(expected, models["a"])
    for threads in (2, 3):
        assert tiny.same(gm.merge_state_dicts(recipe(method), models, threads=threads), expected), threads
    for size, threads in ((1, 2), (8192, 1), (24_576, 3), (1 << 20, 2)):
        assert tiny.same(in_memory(recipe(method), models, tile=size, threads=threads), expected), size
    gm.merge(recipe(method, f"{folder}/"), tmp_path / "out", threads=3, tile=8192)
    assert tiny.same(tiny.read(tmp_path / "out"), expected)


@pytest.mark.parametrize("method", METHODS)
def test_bits_do_not_depend_on_segments(
    method: str, models: dict[str, tiny.Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What threads share out among themselves is not in the result either, except in sums over columns."""
    expected = gm.merge_state_dicts(recipe(method), models)
    monkeypatch.setattr(tile, "SEGMENT", 1 << 13)
    monkeypatch.setattr(execute, "LARGE", 1 << 13)
    cut = gm.merge_state_dicts(recipe(method), models)
    if method == "nuslerp":  # its Gram matrices over columns are added up segment by segment
        assert all(torch.allclose(cut[n].float(), expected[n].float(), rtol=1e-2, atol=0) for n in expected)
    else:
        assert tiny.same(cut, expected)


@pytest.mark.usefixtures("_small_segments")
@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_gives_the_same_directory(method: str, folder: Path, tmp_path: Path) -> None:
    """Stopped three times and resumed, on other numbers of threads: every file's bytes are an undisturbed run's."""
    text = recipe(method, f"{folder}/", "rounding: stochastic\nseed: 7\n")
    gm.merge(text, tmp_path / "whole" / "out")
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(KeyboardInterrupt):
            gm.merge(text, tmp_path / "out", resume=True, threads=1, tile=8192, progress=tiny.Interrupt(share))
        assert not (tmp_path / "out").exists()
    report = gm.merge(text, tmp_path / "out", resume=True, threads=2)
    assert 0 < report.resumed < report.tensors
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.usefixtures("_small_segments")
@pytest.mark.parametrize("method", METHODS)
def test_read_ahead_gives_the_same_bits(method: str, models: dict[str, tiny.Tensors], folder: Path) -> None:
    """The double-buffered path of accelerators, on CPU tensors: from memory and from files."""
    expected = gm.merge_state_dicts(recipe(method), models)
    for text, given in ((recipe(method), models), (recipe(method, f"{folder}/"), {})):
        memory = {name: from_state_dict(tensors, name=name) for name, tensors in given.items()}
        plan, inputs = make_plan(gm.load_recipe(text), models=memory)
        sink = MemorySink(plan)
        builder = Builder(plan, inputs, tile=8192, read_ahead=True)
        work = execute.Work(builder, sink, lambda nbytes: None, threading.Event())
        execute.Threads(work, 2).run(list(enumerate(plan.output_nodes())), lambda entries: None)
        for checkpoint in inputs:
            checkpoint.close()
        assert tiny.same(sink.tensors, expected)


def test_an_accelerator_that_is_not_there_is_a_usage_error(folder: Path, tmp_path: Path) -> None:
    """``device="cuda"`` without one: a clear error, and nothing is left behind."""
    if torch.cuda.is_available():
        pytest.skip("this machine has an accelerator")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(gm.UsageError, match=f"'{device}' cannot be used"):
            gm.merge(recipe("linear", f"{folder}/"), tmp_path / "out", device=device)
        assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_none_is_a_usage_error(folder: Path, tmp_path: Path) -> None:
    """A misspelt device is refused by name before anything is made; so is one that holds no numbers."""
    for device in ("gpu", "meta"):
        with pytest.raises(gm.UsageError, match=f"'{device}' cannot be used"):
            gm.merge(recipe("linear", f"{folder}/"), tmp_path / "out", device=device)
    assert list(tmp_path.iterdir()) == []


def _parameters(tensors: tiny.Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name, t in tensors.items():
        yield name, torch.nn.Parameter(t.clone()) if t.is_floating_point() else t


def test_parameters_of_a_module_can_be_merged(models: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """State dicts may hold parameters that require gradients and tensors that are not contiguous; results never do."""
    given = {name: dict(_parameters(t)) for name, t in models.items()}
    given["a"]["only.a"] = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    given["b"]["model.conv"] = torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4).t()
    text = recipe("linear", extra="unmatched: copy\n")
    merged = gm.merge_state_dicts(text, {k: given[k] for k in ("a", "b")})
    assert not any(t.requires_grad for t in merged.values())
    assert torch.equal(merged["only.a"], torch.ones(3, 2, dtype=torch.bfloat16))
    assert torch.equal(merged["model.conv"], given["b"]["model.conv"])
    gm.merge(text, tmp_path / "out", models={k: given[k] for k in ("a", "b")})
    assert tiny.same(tiny.read(tmp_path / "out"), merged)
