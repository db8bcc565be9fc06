"""Imports that are put off: the module is there when it is needed, and merges by compiled loops do not need torch."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import tiny
from geomerge import late
from geomerge.methods import native, registry


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that takes its time, notes that it is loaded, and has a submodule."""
    package = tmp_path / "slow_module"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import pathlib, time\ntime.sleep(0.1)\nwith open('loaded', 'a') as f: f.write('x')\nvalue = [1]\n"
    )
    (package / "inner.py").write_text("deep = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return "slow_module"


def test_is_loaded_when_something_is_used(slow: str, tmp_path: Path) -> None:
    """Once, with what it has and nothing else."""
    late.put_off(slow)
    module = sys.modules[slow]
    assert not late.loaded(slow)
    assert not (tmp_path / "loaded").exists()
    assert module.value == [1]
    assert late.loaded(slow)
    assert module.value is sys.modules[slow].value
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing
    assert (tmp_path / "loaded").read_text() == "x"


def test_submodules(slow: str) -> None:
    """Their import loads it, as it would have."""
    late.put_off(slow)
    stand_in = sys.modules[slow]
    __import__(f"{slow}.inner")
    assert late.loaded(slow)
    assert stand_in.inner.deep == 2


def test_threads_that_need_it_at_once(slow: str, tmp_path: Path) -> None:
    """One loads it, and the others wait."""
    late.put_off(slow)
    module, found = sys.modules[slow], list[object]()
    crew = [threading.Thread(target=lambda: found.append(module.value)) for _ in range(8)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert found == [[1]] * 8
    assert (tmp_path / "loaded").read_text() == "x"


def test_it_is_not_loaded_while_it_is_being_loaded(slow: str) -> None:
    """A thread that begins meanwhile, as those of a pool do, sees no half of it."""
    late.put_off(slow)
    stand_in = sys.modules[slow]
    halves = 0
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(lambda: stand_in.value)
        while not loading.done():
            there, now = late.loaded(slow), sys.modules.get(slow, stand_in)
            if now is not stand_in and not hasattr(now, "value"):
                halves += 1
                assert not there
    assert halves
    assert late.loaded(slow)


def test_what_cannot_be_put_off(slow: str, tmp_path: Path) -> None:
    """What is loaded stays; what is not installed stays missing; what fails to load fails each time it is used."""
    before = sys.modules["torch"]
    late.put_off("torch")
    assert sys.modules["torch"] is before
    late.put_off("no_such_module")
    assert "no_such_module" not in sys.modules
    (tmp_path / slow / "__init__.py").write_text("raise ImportError('broken')\n")
    late.put_off(slow)
    for _ in range(2):
        with pytest.raises(ImportError, match="broken"):
            _ = sys.modules[slow].value


def test_torch_is_alone_as_soon_as_it_is_there() -> None:
    """Put off or loaded before: one thread within, also in threads that were started before, and as it was afterwards."""
    code = """
from concurrent.futures import ThreadPoolExecutor
from geomerge.late import load, loaded, put_off, torch_alone
put_off("torch")
import torch
pool = ThreadPoolExecutor(2)
with torch_alone():
    assert not loaded("torch")
    assert pool.submit(lambda: torch.get_num_threads()).result() == 1
    assert torch.get_num_threads() == 1
assert loaded("torch")
torch.set_num_threads(3)
with torch_alone():
    assert torch.get_num_threads() == 1
assert torch.get_num_threads() == 3
load("torch")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


PROGRAM = """
import sys
from geomerge.late import loaded, put_off
for name in ("torch", "numpy"):
    put_off(name)
from geomerge.cli.app import main
code = main(sys.argv[1:])
print(*(name for name in ("torch", "numpy") if loaded(name)), file=sys.stderr)
raise SystemExit(code)
"""

PARAMETERS = {
    "linear": "weight: 0.5",
    "slerp": "t: 0.3",
    "task_arithmetic": "weight: 0.5",
    "ties": "weight: 0.5, density: 0.4",
    "dare_ties": "weight: 0.5, density: 0.4",
    "breadcrumbs": "weight: 0.5, density: 0.4, gamma: 0.1",
    "dare_linear": "weight: 0.5, density: 0.4",
    "breadcrumbs_ties": "weight: 0.5, density: 0.4, gamma: 0.1",
    "model_stock": "",
    "karcher": "",
    "multislerp": "weight: 0.5",
    "nearswap": "t: 0.0001",
    "ram": "",
    "ramplus_tl": "",
    "ties_global": "weight: 0.5, density: 0.4, scope: global",
    "passthrough": "",
    "sce": "select_topk: 0.5",
    "sce_whole": "",
    "emr": "task: 2",
    "tall_mask": "task: 1",
    "consensus": "",
    "consensus_ties": "",
    "widen": "",
    "pcb": "",
    "arcee_fusion": "",
    "della": "weight: 0.5, density: 0.4, epsilon: 0.1",
    "della_linear": "weight: 0.5, density: 0.4, epsilon: 0.1",
    "tsvm": "",
}

WITHOUT_NUMPY = (
    "linear", "task_arithmetic", "passthrough", "nearswap", "ram", "ramplus_tl", "emr", "tall_mask", "consensus",
    "dare_linear", "dare_ties", "della", "della_linear", "sce_whole",
)  # fmt: skip


def run(root: Path, method: str) -> subprocess.CompletedProcess[str]:
    """Merge two models, of several segments and of one tile, as the program does."""
    names = ("a",) if method in ("passthrough", "slerp", "nearswap", "arcee_fusion") else ("a", "b")
    base = "" if method in ("linear", "passthrough", "karcher", "multislerp") else f"base_model: {root / 'base'}\n"
    models = ", ".join(f"{{model: {root / n}}}" for n in names)
    (root / "recipe.yml").write_text(
        f"merge_method: {method.removesuffix('_global').removesuffix('_whole')}\nmodels: [{models}]\n"
        f"{base}parameters: {{{PARAMETERS[method]}}}\n"
    )
    return program("merge", str(root / "recipe.yml"), str(root / "out"), "--quiet", "--force")


def program(*words: str) -> subprocess.CompletedProcess[str]:
    """The program with torch and NumPy put off; the last line that it writes says which of them were needed."""
    return subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    shapes = {"model.layers.0.mlp.up_proj.weight": (1300, 1000), "model.layers.0.input_layernorm.weight": (1000,)}
    base = tiny.random_tensors(shapes, 1, dtype=torch.bfloat16)
    tiny.save(root / "base", base)
    for seed, name in enumerate("ab"):
        tiny.save(root / name, tiny.random_tensors(shapes, 2 + seed, like=base, dtype=torch.bfloat16))
    return root


@pytest.mark.skipif(not native.available(), reason="the compiled loops were not built (no C compiler?)")
@pytest.mark.parametrize("method", PARAMETERS)
def test_merges_by_loops_do_without_torch(method: str, models: Path) -> None:
    """And those that cannot load it, once they do; so do plans, whose estimate tries what a merge would do."""
    for done in (run(models, method), program("plan", str(models / "recipe.yml"))):
        assert done.returncode == 0, done.stderr
        needed = "torch numpy" if method == "tsvm" else "" if method in WITHOUT_NUMPY else "numpy"
        assert done.stderr.splitlines()[-1] == needed, done.stderr


@pytest.mark.parametrize(
    "words", ["--help", "methods", "methods --json", "methods tsvm", "methods opcm", "search --help"]
)
def test_verbs_that_only_tell(words: str) -> None:
    """What methods there are is known without anything that computes."""
    done = program(*words.split())
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "", done.stderr


@pytest.mark.skipif(not native.available(), reason="the compiled loops were not built (no C compiler?)")
@pytest.mark.parametrize("verb", ["inspect", "diagnose"])
def test_verbs_that_only_read(verb: str, models: Path) -> None:
    """Looking at one model, and at a pair."""
    done = program(verb, *(str(models / name) for name in ("a", "b")[: 1 if verb == "inspect" else 2]))
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "passthrough"])
def test_damage_is_named_all_the_same(method: str, models: Path, tmp_path: Path) -> None:
    """What the loops find is told by torch, which is loaded for it."""
    for name in ("base", "b"):
        (tmp_path / name).symlink_to(models / name)
    tensors = tiny.read(models / "a")
    tensors["model.layers.0.mlp.up_proj.weight"][1200, 7] = float("nan")
    tiny.save(tmp_path / "a", tensors)
    done = run(tmp_path, method)
    assert done.returncode == 3, done.stderr
    assert "up_proj.weight" in done.stderr
    assert "NaN" in done.stderr


@pytest.mark.parametrize("method", sorted(registry.all_methods()))
def test_a_recipe_loads_its_methods_file_alone(method: str) -> None:
    """Which is called as the method is, or as its name begins: no other need be looked through."""
    stem = registry.get(method).__module__.rpartition(".")[2]
    assert f"{method}_".startswith(f"{stem}_")


def test_a_method_that_hides_another_is_told(tmp_path: Path) -> None:
    """Though a recipe loads no more than its method's file: under its name or an alias."""
    for name in ("ties", "average"):
        code = f"""
from dataclasses import dataclass
from typing import ClassVar
from geomerge.methods import registry
from geomerge.methods.base import Span
@registry.register
@dataclass(frozen=True)
class Mine(Span):
    name: ClassVar[str] = {name!r}
try:
    registry.get({name!r})
except ValueError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert f"two methods are called '{name}'" in done.stdout


@pytest.mark.skipif(not native.available(), reason="the compiled loops were not built (no C compiler?)")
def test_the_first_processor_is_the_processor(models: Path) -> None:
    """`cpu:0` is another word for `cpu`."""
    run(models, "linear")
    done = program("merge", str(models / "recipe.yml"), str(models / "out"), "--quiet", "--force", "--device", "cpu:0")
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.stderr.splitlines()[-1]
