"""The documentation agrees with the code: examples parse, generated pages are up to date, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import geomerge
from geomerge.cli.catalogue import catalogue
from geomerge.methods import registry
from geomerge.moe.spec import read_spec
from geomerge.recipe import loads
from geomerge.recipe.grammar import RECIPE, STEPS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def yaml_blocks() -> list[tuple[str, str]]:
    """Every YAML block of the documentation, with the place where it stands."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            found.append((f"{page.relative_to(ROOT)}:{line}", match[1]))
    return found


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_examples() -> None:
    """The search for YAML blocks finds those of the recipe page, of every method and of the README."""
    places = [place.split(":")[0] for place, _ in yaml_blocks()]
    assert places.count("docs/recipes.md") >= 15
    assert "README.md" in places
    steps = [method for method in catalogue().values() if method.family == "step"]
    assert len([p for p in places if p.startswith("docs/methods/")]) == len(registry.all_methods()) + len(steps)


@pytest.mark.parametrize(("place", "text"), yaml_blocks(), ids=[place for place, _ in yaml_blocks()])
def test_examples_parse(place: str, text: str) -> None:
    """Every YAML block is a recipe, or a mixture of experts."""
    if "source_model" in text:
        assert read_spec(text).experts
    else:
        assert loads(text, place).recipes


def test_method_examples_are_of_that_method() -> None:
    """The example in a method's class uses that method and leaves nothing unexplained."""
    for name, method in registry.all_methods().items():
        pipeline = loads(method.example, name)
        assert pipeline.output.method == name
        assert not pipeline.notes


def test_generated_pages_are_up_to_date(generate: ModuleType) -> None:
    """`make docs` would change nothing."""
    there = {path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "methods").glob("*.md")}
    stale = sorted(
        name for name in generate.pages().keys() | there.keys() if generate.pages().get(name) != there.get(name)
    )
    assert not stale, "run `make docs`"


def test_generate_writes_what_changed_and_removes_what_is_gone(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The generator restores an edited page, removes a stray one, and then has nothing to do."""
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    (tmp_path / "ties.md").write_text("edited")
    (tmp_path / "gone.md").write_text("of a method that is no more")
    assert generate.main(check=True) == 1
    assert (tmp_path / "ties.md").read_text() == "edited"
    generate.main(check=False)
    assert not (tmp_path / "gone.md").exists()
    assert "# TIES-Merging" in (tmp_path / "ties.md").read_text("utf-8")
    capsys.readouterr()
    assert generate.main(check=True) == 0
    assert capsys.readouterr().out == ""


def test_links_lead_somewhere() -> None:
    """Relative links name files that exist, and anchors name headings."""
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            if not file.is_file() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_recipe_page_tells_every_key() -> None:
    """Each key of a recipe stands in the table, each step and each preset of a schedule is named."""
    from geomerge.engine.schedule import PRESETS

    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    table = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| `.*?\|", text, re.MULTILINE))))
    assert set(RECIPE.names()) <= table
    for word in (*STEPS, *PRESETS):
        assert f"`{word}`" in text


def test_readme_lists_every_method() -> None:
    """The list of methods is whole, and holds no other."""
    text = (ROOT / "README.md").read_text("utf-8")
    listed = re.search(r"## Methods\n\n(.*?)\n\n", text, re.DOTALL)
    assert listed is not None
    assert {name.strip() for name in listed[1].split("·")} == set(registry.all_methods())


def test_readme_keeps_the_benchmark_markers() -> None:
    """The benchmark finds its place."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.index("<!-- bench:start -->") < text.index("<!-- bench:end -->")


def test_architecture_names_what_there_is() -> None:
    """Files and classes that the page names in code style exist, in the package or where it says."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    source = {str(p.relative_to(ROOT / "src/geomerge")): p.read_text("utf-8") for p in (ROOT / "src").rglob("*.py")}
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(named) > 10
    assert {n for n in named if n.removeprefix("geomerge/") not in source and not (ROOT / n).is_file()} == set()
    constants = set(re.findall(r"`([A-Z]{4,})`", text)) - {"OUT"}
    assert {"TILE", "BLOCK", "SEGMENT"} <= constants
    assert all(re.search(rf"^{c} = ", source["methods/tile.py"], re.MULTILINE) for c in constants)
    for name in set(re.findall(r"`([A-Z][a-z]+[A-Z][A-Za-z]+)`", text)):
        assert any(f"class {name}" in code for code in source.values()), name


def test_python_page_runs() -> None:
    """Methods as functions and the method of one's own work as written."""
    import torch

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
    functions = next(b for b in blocks if "gm.methods.linear" in b)
    own = next(b for b in blocks if "class Geometric" in b)
    recorded = next(b for b in blocks if "class Cautious" in b)
    tensors = {name: torch.arange(6.0) * (i + 1) for i, name in enumerate(("base", "a", "b", "c"))}
    exec(functions, {"gm": geomerge, **tensors})
    before = dict(registry._registered)
    module = ModuleType("an_example")
    sys.modules["an_example"] = module
    try:
        exec(own, module.__dict__)
        merged = geomerge.methods.geometric([tensors["a"], tensors["b"]])
        assert torch.allclose(merged, (tensors["a"] + 0.5 * tensors["b"]) / 1.5)
        exec(recorded, module.__dict__)
        changed = [tensors["base"] + torch.tensor([1.0, -2.0, 3.0, 1.0, 0.0, 2.0]) * s for s in (1.0, 0.5)]
        changed[1][3] = tensors["base"][3] - 1.0
        merged = geomerge.methods.cautious(tensors["base"], changed)
        assert torch.equal(merged, tensors["base"] + torch.tensor([0.5, -1.0, 1.5, 0.0, 0.0, 1.0]))
    finally:
        registry._registered.clear()
        registry._registered.update(before)
        del sys.modules["an_example"]


def test_versions_agree() -> None:
    """The citation and the changelog name the package's version."""
    assert f"version: {geomerge.__version__}" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"[{geomerge.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_constraints_pin_what_the_project_needs() -> None:
    """Every dependency of the core and of the development extra has one tested version, torch first."""
    import tomllib

    pinned = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    assert next(iter(pinned)) == "torch"
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pinned.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        name = re.split(r"[\[<>=~! ]", requirement)[0]
        assert re.sub(r"[-_.]+", "-", name).lower() in pinned, requirement
