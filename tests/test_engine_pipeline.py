"""Recipes of several documents: streamed through, with the bits that stage after stage on disk would give."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import geomerge as gm
import tiny
from geomerge.engine import execute
from geomerge.engine.build import Builder
from geomerge.engine.planner import make_plan
from geomerge.engine.sinks import MemorySink
from geomerge.methods import tile

STAGES = {
    "span": "merge_method: slerp\nbase_model: {root}/a\nmodels: [{{model: {root}/b}}]\nparameters: {{t: 0.3}}\n",
    "elementwise": (
        "merge_method: ties\nbase_model: {root}/base\nmodels: [{{model: {root}/a}}, {{model: {root}/b}}]\n"
        "parameters: {{density: 0.4, weight: 1}}\n"
    ),
    "random": (
        "merge_method: dare_linear\nbase_model: {root}/base\nmodels: [{{model: {root}/a}}, {{model: {root}/b}}]\n"
        "parameters: {{density: 0.4, weight: 0.5}}\nseed: 11\n"
    ),
    "rows": (
        "merge_method: model_stock\nbase_model: {root}/base\nmodels: [{{model: {root}/a}}, {{model: {root}/b}}]\n"
        "parameters: {{filter_wise: true}}\n"
    ),
    "slices": (
        "merge_method: passthrough\nslices:\n- sources: [{{model: {root}/a, layer_range: [0, 2]}}]\n"
        "- sources: [{{model: {root}/b, layer_range: [2, 3]}}]\n"
    ),
    "rounded": (
        "merge_method: linear\nmodels:\n- {{model: {root}/a, parameters: {{weight: 1}}}}\n"
        "- {{model: {root}/b, parameters: {{weight: 2}}}}\ndtype: bfloat16\n"
    ),
    "stochastic": (
        "merge_method: linear\nmodels:\n- {{model: {root}/a, parameters: {{weight: 1}}}}\n"
        "- {{model: {root}/b, parameters: {{weight: 2}}}}\ndtype: bfloat16\nrounding: stochastic\nseed: 5\n"
    ),
}
LAST = {
    "span": "merge_method: slerp\nbase_model: {stage}\nmodels: [{{model: {root}/c}}]\nparameters: {{t: 0.6}}\n",
    "elementwise": (
        "merge_method: ties\nbase_model: {root}/base\nmodels: [{{model: {stage}}}, {{model: {root}/c}}]\n"
        "parameters: {{density: 0.5, weight: 1}}\n"
    ),
    "rows": (
        "merge_method: della\nbase_model: {root}/base\nmodels: [{{model: {root}/c}}, {{model: {stage}}}]\n"
        "parameters: {{density: 0.6, epsilon: 0.1, weight: 0.5}}\n"
    ),
    "slices": (
        "merge_method: linear\nslices:\n- sources:\n  - {{model: {stage}, layer_range: [1, 3], parameters: {{weight: 1}}}}\n"
        "  - {{model: {stage}, layer_range: [0, 2], parameters: {{weight: 2}}}}\n"
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four models of tensors of several small segments."""
    folder = tmp_path_factory.mktemp("models")
    tiny.family(folder, vocab_size=301, hidden_size=48, intermediate_size=131)
    return folder


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "SEGMENT", 1 << 13)
    monkeypatch.setattr(execute, "LARGE", 1 << 13)


def document(text: str, root: Path, *, name: str = "", stage: object = "") -> str:
    """A document of a recipe, with its name if it has one."""
    return (f"name: {name}\n" if name else "") + text.format(root=root, stage=stage)


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("first", STAGES)
def test_streamed_is_materialised(first: str, last: str, root: Path, tmp_path: Path) -> None:
    """Two documents in one run give the bits of two runs, and leave nothing but the output."""
    text = f"{document(STAGES[first], root, name='mid')}---\n{document(LAST[last], root, stage='mid')}"
    gm.merge(text, tmp_path / "out", threads=3, tile=8192)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    streamed = tiny.read(tmp_path / "out")
    gm.merge(document(STAGES[first], root), tmp_path / "mid")
    materialised = gm.merge_state_dicts(document(LAST[last], root, stage=tmp_path / "mid"))
    assert tiny.same(streamed, materialised)
    assert tiny.same(gm.merge_state_dicts(text, threads=1), streamed)


def test_four_stages_and_a_diamond(root: Path, tmp_path: Path) -> None:
    """Stages of stages, written in any order, one of them used twice: as four runs would do it."""
    documents = {
        "left": ("ties", "base", ["one", "b"], "density: 0.5, weight: 1"),
        "one": ("linear", None, ["a", "b"], "weight: 0.5"),
        "right": ("dare_ties", "base", ["one", "c"], "density: 0.5, weight: 1"),
        "": ("slerp", "left", ["right"], "t: 0.25"),
    }
    where: dict[str, str] = {n: f"{root}/{n}" for n in ("base", "a", "b", "c")}

    def written(key: str, places: dict[str, str], *, named: bool) -> str:
        method, base, models, parameters = documents[key]
        listed = ", ".join(f"{{model: {places[m]}}}" for m in models)
        return (
            (f"name: {key}\n" if named and key else "")
            + f"merge_method: {method}\nmodels: [{listed}]\nparameters: {{{parameters}}}\nseed: 3\n"
            + (f"base_model: {places[base]}\n" if base else "")
        )

    stages = {"left": "left", "one": "one", "right": "right"}
    text = "---\n".join(written(key, where | stages, named=True) for key in documents)
    for key in ("one", "left", "right"):
        gm.merge(written(key, where, named=False), tmp_path / key)
        where[key] = str(tmp_path / key)
    assert tiny.same(gm.merge_state_dicts(text), gm.merge_state_dicts(written("", where, named=False)))


def test_read_ahead_reads_through_stages(root: Path) -> None:
    """The double-buffered path of accelerators pulls a stage's tiles from its reading thread: the same bits."""
    for first in ("elementwise", "rows", "stochastic"):
        text = f"{document(STAGES[first], root, name='mid')}---\n{document(LAST['elementwise'], root, stage='mid')}"
        plan, inputs = make_plan(gm.load_recipe(text))
        sink = MemorySink(plan)
        work = execute.Work(
            Builder(plan, inputs, tile=8192, read_ahead=True), sink, lambda nbytes: None, threading.Event()
        )
        execute.Threads(work, 2).run(list(enumerate(plan.output_nodes())), lambda entries: None)
        for checkpoint in inputs:
            checkpoint.close()
        assert tiny.same(sink.tensors, gm.merge_state_dicts(text)), first


def test_a_stage_keeps_integers_buffers_and_config(tmp_path: Path) -> None:
    """What a stage copies is copied through, and the output's config is the donor's, edited by all stages."""
    family = tiny.family(tmp_path, "base a b", num_hidden_layers=2)
    for name, tensors in family.items():
        tensors["model.position_ids"] = torch.arange(7)
        config = tiny.config(tmp_path / name) | {"keep": "me"}
        tiny.save(tmp_path / name, tensors, config)
    text = document(STAGES["slices"].replace("[2, 3]", "[0, 2]"), tmp_path, name="deep")
    text += "---\nmerge_method: passthrough\nmodels: [{model: deep}]\ndtype: bfloat16\nparameters: {scale: 2}\n"
    gm.merge(text, tmp_path / "out")
    merged, config = tiny.read(tmp_path / "out"), tiny.config(tmp_path / "out")
    assert torch.equal(merged["model.position_ids"], torch.arange(7))
    assert (config["num_hidden_layers"], config["dtype"], config["keep"]) == (4, "bfloat16", "me")
    expected = (family["b"]["model.layers.1.mlp.up_proj.weight"] * 2).bfloat16()
    assert torch.equal(merged["model.layers.3.mlp.up_proj.weight"], expected)


def test_stage_names_come_before_paths(root: Path, tmp_path: Path) -> None:
    """The plan of a pipeline lists files only, and says which stage makes what."""
    text = f"{document(STAGES['span'], root, name='mid')}---\n{document(LAST['elementwise'], root, stage='mid')}"
    plan = gm.plan(text)
    assert [s.name for s in plan.stages] == ["mid", None]
    assert {Path(i.path).name for i in plan.inputs} == {"a", "b", "base", "c"}
    assert len(plan.nodes) == 2 * len(plan.outputs)
    assert all(plan.nodes[i].stage == 1 for i in plan.outputs)


def test_nan_in_a_stage_names_the_model(root: Path, tmp_path: Path) -> None:
    """A parent of an early stage holds NaN: it is named, not the stage."""
    tensors = tiny.read(root / "b")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    tiny.save(tmp_path / "b", tensors, tiny.config(root / "b"))
    text = f"{document(STAGES['span'], root, name='mid')}---\n{document(LAST['elementwise'], root, stage='mid')}"
    with pytest.raises(gm.NotFiniteError) as caught:
        gm.merge(text.replace(f"{root}/b}}", f"{tmp_path}/b}}"), tmp_path / "out")
    assert caught.value.where == f"{tmp_path}/b: model.layers.1.mlp.up_proj.weight"
    assert not (tmp_path / "out").exists()
