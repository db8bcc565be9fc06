"""Methods of other packages: found by their entry points, and given the whole conformance suite."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import geomerge as gm
import tiny
from geomerge import testing
from geomerge.methods import registry
from geomerge.methods.base import Elementwise, Method, parameter
from geomerge.methods.direct import Function
from geomerge.methods.program import Value
from geomerge.methods.properties import SCALE
from geomerge.methods.tile import Tile
from geomerge.testing import conformance

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str, heading: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text[text.index(f"## {heading}") :], re.DOTALL)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An installed package with the methods that the documentation shows, and a broken one."""
    (tmp_path / "mine.py").write_text("\n".join(blocks("docs/python.md", "A method of your own", "python")))
    for name, module in (("mine", "mine"), ("broken", "not_there")):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[geomerge.methods]\n{name} = {module}\n")
    return tmp_path


def run(package: Path, *words: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(package), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=package, capture_output=True, text=True, check=False
    )


def test_the_suite_of_ten_lines(package: Path) -> None:
    """What CONTRIBUTING shows, for the methods that the documentation shows: all of it passes."""
    (text,) = blocks("CONTRIBUTING.md", "A method in another package", "python")
    for name in ("geometric", "cautious"):
        (package / f"test_{name}.py").write_text("import mine\n" + text.replace("my_method", name))
    done = run(package, "pytest", "-o", "addopts=", "-p", "no:cacheprovider", package)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-3000:]
    assert int(passed[1]) > 40


def test_entry_points(package: Path) -> None:
    """The command line merges by a method that a package registers; one that cannot be loaded is told, and stops nothing."""
    tiny.family(package, "a b", num_hidden_layers=1)
    (package / "r.yml").write_text("merge_method: geometric\nmodels: [{model: a}, {model: b}]\n")
    done = run(package, "geomerge", "merge", "r.yml", "out", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "not_there" in done.stderr
    a, b, out = (tiny.read(package / name) for name in ("a", "b", "out"))
    assert all(torch.allclose(out[n], (a[n] + b[n] / 2) / 1.5, atol=1e-2) for n in a)


def test_another_packages_mistake_is_no_bug_of_geomerge(package: Path) -> None:
    """What a method of another package raises names its module, and who is to hear of it."""
    tiny.family(package, "a b", num_hidden_layers=1)
    mine = package / "mine.py"
    mine.write_text(mine.read_text().replace("c = np.cumprod", "raise KeyError('mine')\n        c = np.cumprod"))
    (package / "r.yml").write_text("merge_method: geometric\nmodels: [{model: a}, {model: b}]\n")
    done = run(package, "geomerge", "merge", "r.yml", "out", "--quiet")
    assert done.returncode == 1
    assert "error: mine, which adds methods to geomerge, failed: KeyError: 'mine'" in done.stderr
    assert "bug in geomerge" not in done.stderr


def test_types_need_no_future_import() -> None:
    """A parameter's type may be the type itself; one that is none of a parameter's is named."""
    from dataclasses import field, make_dataclass

    made = make_dataclass("Made", [("c", float, parameter(1.0, doc="a factor"))], bases=(Method,), frozen=True)
    assert made.parameters()["c"].kind is float  # type: ignore[attr-defined]
    odd = make_dataclass(
        "Odd",
        [("c", complex, parameter(1.0, doc="a factor")), ("d", int, field(default=1))],
        bases=(Method,),
        frozen=True,
    )
    with pytest.raises(TypeError, match="the parameter 'c' of Odd is complex, which is none of"):
        odd.parameters()  # type: ignore[attr-defined]


def test_functions_of_torch_are_not_recorded() -> None:
    with pytest.raises(TypeError, match=r"torch.stack cannot be recorded"):
        torch.stack([Value(None, 0)])  # type: ignore[list-item, arg-type]


def test_wrong_calls() -> None:
    """Mistakes of Python users are told as those of recipes are."""
    a, b = torch.ones(3), torch.zeros(3)
    for says, models, options in (
        ("there is no profile 'mergkit'", [a, b], {"compat": "mergkit"}),
        ("must be a floating-point one", [a, b], {"dtype": torch.int8}),
        ("must be a floating-point one", [a, b], {"dtype": 16}),
        ("from_numpy", [a.numpy(), b.numpy()], {}),
        ("with a list, not Linear", torch.nn.Linear(2, 2), {}),
        ("tensors of torch.int64 are not merged", [torch.arange(3), torch.arange(3)], {}),
        ("tensors of torch.complex64", [torch.ones(2) * 1j, torch.ones(2) * 1j], {}),
    ):
        with pytest.raises(gm.UsageError, match=re.escape(says)):
            gm.methods.linear(models, weight=1, **options)
    with pytest.raises(gm.RecipeError, match="bfloat61"):
        gm.methods.linear([a, b], weight=1, dtype="bfloat61")
    assert gm.methods.linear([a, b], weight=1, dtype="bfloat16").dtype == torch.bfloat16


def test_threads_are_counted(tmp_path: Path) -> None:
    tiny.family(tmp_path, "a b", num_hidden_layers=1)
    models = ", ".join(f"{{model: {tmp_path / name}}}" for name in "ab")
    recipe = f"merge_method: linear\nmodels: [{models}]\nparameters: {{weight: 1}}\n"
    with pytest.raises(gm.UsageError, match="1 thread at least, not -1"):
        gm.merge(recipe, tmp_path / "out", threads=-1)
    assert not list(tmp_path.glob("out*"))


def test_a_blend_of_another_size() -> None:
    """Refused with the method's name."""
    shape = (8, 4)

    @dataclass(frozen=True)
    class Short(Elementwise):
        name: ClassVar[str] = "short"

        def blend(self, tile: Tile, stats: object) -> torch.Tensor:
            return tile.base[:3]

    with pytest.raises(gm.UsageError, match=r"short made \d+ elements of a tile of 32"):
        Function(Short)(torch.ones(shape), [torch.ones(shape)])


def test_a_method_of_four_models_has_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a number that is not among those that are tried for others."""
    monkeypatch.setattr(registry.get("ties"), "models", (4, 4))
    assert {case.count for case in testing.cases("ties")} == {4}


def test_a_method_that_rounds_on_its_way_is_found() -> None:
    """In any dtype its result is that of itself in float64."""

    @dataclass(frozen=True)
    class Sloppy(Elementwise):
        name: ClassVar[str] = "sloppy"
        properties: ClassVar[frozenset[str]] = frozenset({SCALE})
        digits: ClassVar[torch.dtype] = torch.bfloat16

        def blend(self, tile: Tile, stats: object) -> torch.Tensor:
            return tile.base + sum(d.to(self.digits).double() for d in tile.task_vectors())

    @dataclass(frozen=True)
    class Careful(Sloppy):
        digits: ClassVar[torch.dtype] = torch.float32

    conformance.check_precision(testing.Case(Careful, 2, based=True))
    with pytest.raises(AssertionError, match="do not feel"):
        conformance.check_precision(testing.Case(Sloppy, 2, based=True))
