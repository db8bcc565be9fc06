"""Promises of the engine that need a process, a stage or an executor of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import geomerge as gm
import tiny
from geomerge.engine.execute import Work
from geomerge.engine.plan import Node
from geomerge.engine.planner import make_plan
from geomerge.engine.run import run_plan
from geomerge.recipe import loads

LINEAR = """\
merge_method: linear
models:
  - {{model: {0}/a, parameters: {{weight: 1}}}}
  - {{model: {0}/b, parameters: {{weight: 1}}}}
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_computed_tensor_is_not_copied_from_a_parent(dtype: str, tmp_path: Path) -> None:
    """`unmatched: copy` of a tensor that only an earlier stage has takes what the stage computes, in its dtype."""
    shapes = tiny.llama_shapes(tiny.LLAMA)
    for name, value in (("a", 1.0), ("b", 3.0)):
        tensors = tiny.random_tensors(shapes, 1)
        tiny.save(tmp_path / name, tensors | {"model.extra.weight": torch.full((8, 8), value)}, tiny.LLAMA)
    tiny.save(tmp_path / "c", tiny.random_tensors(shapes, 1), tiny.LLAMA)
    text = (
        LINEAR.format(tmp_path)
        + f"dtype: {dtype}\nname: stage\n---\nmerge_method: linear\nunmatched: copy\nmodels:\n"
        + f"  - {{model: {tmp_path}/c, parameters: {{weight: 1}}}}\n  - {{model: stage, parameters: {{weight: 1}}}}\n"
    )
    gm.merge(text, tmp_path / "out")
    assert torch.equal(tiny.read(tmp_path / "out")["model.extra.weight"].float(), torch.full((8, 8), 2.0))


def test_a_base_twice_in_a_slice_is_refused(tmp_path: Path) -> None:
    """Two ranges of the base in one slice: one of them would be dropped."""
    tiny.family(tmp_path, "base a")
    sources = "".join(
        f"      - {{model: {tmp_path}/{m}, layer_range: [{i}, {i + 1}], parameters: {{weight: 1}}}}\n"
        for m, i in (("base", 0), ("base", 1), ("a", 0))
    )
    text = f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\nslices:\n  - sources:\n{sources}"
    with pytest.raises(gm.RecipeError, match="two sources"):
        gm.plan(text)


def test_an_executor_of_ones_own(tmp_path: Path) -> None:
    """Whatever makes the nodes, in whatever order, the bytes are the same."""
    tiny.family(tmp_path, "a b")
    text = LINEAR.format(tmp_path)

    class Backwards:
        def __init__(self, work: Work) -> None:
            self.work = work

        def run(
            self,
            nodes: Sequence[tuple[int, Node]],
            done: Callable[[list[tuple[int, Any]]], None],
            begin: Callable[[], None] = lambda: None,
        ) -> None:
            begin()
            for index, node in reversed(nodes):
                done([(index, self.work.make(node))])

    plan, opened = make_plan(loads(text))
    run_plan(plan, tmp_path / "backwards", inputs=opened, executor=Backwards)
    gm.merge(text, tmp_path / "usual")
    for name in ("model.safetensors", "geomerge.json"):
        assert (tmp_path / "backwards" / name).read_bytes() == (tmp_path / "usual" / name).read_bytes()


def test_nan_leaves_nothing_behind(tmp_path: Path) -> None:
    """A parent with NaN: there is nothing to resume, so no OUT.partial stays either."""
    tensors = tiny.family(tmp_path, "a b")["b"]
    tensors["model.norm.weight"][0] = float("nan")
    tiny.save(tmp_path / "b", tensors, tiny.LLAMA)
    with pytest.raises(gm.NotFiniteError):
        gm.merge(LINEAR.format(tmp_path), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


MEASURE = """
import json, sys, threading, time
import torch
import geomerge.engine.planner, geomerge.engine.run
import geomerge as gm

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

before = peak = anonymous()
over = False

def watch():
    global peak
    while not over:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
gm.merge(sys.argv[1], sys.argv[2], threads=2)
over = True
watcher.join()
print(json.dumps({"peak": peak - before, "transformers": "transformers" in sys.modules}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_does_not_grow_and_transformers_stays_out(tmp_path: Path) -> None:
    """A TIES merge of models eight times as large takes no more anonymous memory; a merge never imports transformers."""
    found = []
    for rows in (1000, 8000):
        shapes = {f"model.layers.{i}.mlp.up_proj.weight": (rows, 1024) for i in range(4)}
        base = tiny.random_tensors(shapes, 0, dtype=torch.bfloat16)
        for seed, name in enumerate(("base", "a", "b")):
            tensors = tiny.random_tensors(shapes, seed, like=base, dtype=torch.bfloat16) if seed else base
            tiny.save(tmp_path / str(rows) / name, tensors, {"model_type": "llama", "num_hidden_layers": 4})
        where = tmp_path / str(rows)
        (where / "r.yml").write_text(
            f"merge_method: ties\nbase_model: {where}/base\nmodels: [{{model: {where}/a}}, {{model: {where}/b}}]\n"
            "parameters: {weight: 1, density: 0.3}\ndtype: bfloat16\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", MEASURE, str(where / "r.yml"), str(where / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert not any(f["transformers"] for f in found)
    small, large = (f["peak"] for f in found)
    assert large < 150
    assert large < small + 40  # a model eight times as large has 57 MB more of each of its four files


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "sce", "tsvm", "iso_c"])
def test_cuda_agrees_with_the_processor(method: str, tmp_path: Path) -> None:
    """The same code on a device, with transfers that overlap: tensors of several tiles and segments, and whole matrices."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (1500, 1024) for i in range(2)} | {"model.norm.weight": (1024,)}
    base = tiny.random_tensors(shapes, 0, dtype=torch.bfloat16)
    for seed, name in enumerate(("base", "a", "b")):
        tiny.save(tmp_path / name, tiny.random_tensors(shapes, seed, like=base, dtype=torch.bfloat16) if seed else base)
    head = f"base_model: {tmp_path}/base\n" if method != "linear" else ""
    parameters = {
        "linear": "{weight: 0.5}",
        "ties": "{weight: 0.5, density: 0.4}",
        "dare_ties": "{weight: 0.5, density: 0.4}",
    }.get(method, "{}")
    text = f"merge_method: {method}\n{head}models:\n" + "".join(
        f"  - {{model: {tmp_path}/{n}, parameters: {parameters}}}\n" for n in "ab"
    )
    gm.merge(text, tmp_path / "cpu")
    gm.merge(text, tmp_path / "cuda", device="cuda")
    ours, theirs = tiny.read(tmp_path / "cuda"), tiny.read(tmp_path / "cpu")
    for name, expected in theirs.items():
        assert torch.allclose(ours[name].float(), expected.float(), rtol=2**-7), name
