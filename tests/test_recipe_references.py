"""Model references: paths, hub ids, revisions, adapters, and directories whose names look like references."""

from __future__ import annotations

from pathlib import Path

import pytest

from geomerge.errors import RecipeError
from geomerge.recipe import ModelRef, Where, loads, parse_reference

HERE = Where("r.yml", 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/model", ModelRef("org/model")),
        ("org/model@main", ModelRef("org/model", "main")),
        ("org/model@refs/pr/1", ModelRef("org/model", "refs/pr/1")),
        ("org/model+org/lora", ModelRef("org/model", lora=ModelRef("org/lora"))),
        ("a@r+b@s", ModelRef("a", "r", ModelRef("b", "s"))),
        ("./models/a", ModelRef("./models/a")),
        ("/missing/u@corp/m", ModelRef("/missing/u@corp/m")),
        ("D:\\models\\a@b", ModelRef("D:\\models\\a@b")),
    ],
)
def test_grammar(text: str, expected: ModelRef) -> None:
    """path[@revision][+lora[@revision]]; a local path has no revision."""
    found = parse_reference(text, HERE)
    assert found == expected
    assert hash(found) == hash(expected)
    assert str(found) == text
    assert str(expected) == text


@pytest.mark.parametrize("text", ["", "@main", "a@", "a@b@c", "a+b+c", "a+", "+b", "a@r+", " "])
def test_refused(text: str) -> None:
    """What cannot be told apart is refused with its line."""
    with pytest.raises(RecipeError) as caught:
        parse_reference(text, HERE)
    assert caught.value.where == "r.yml:3"


def test_existing_paths_are_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with @ or + in its name is itself; what follows it is still revision or adapter."""
    model, lora = tmp_path / "u@corp" / "m+x", tmp_path / "l@ra+1"
    model.mkdir(parents=True)
    lora.mkdir()
    assert parse_reference(str(model), HERE) == ModelRef(str(model))
    assert parse_reference(f"{model}+org/l", HERE) == ModelRef(str(model), lora=ModelRef("org/l"))
    assert parse_reference(f"{model}+{lora}", HERE) == ModelRef(str(model), lora=ModelRef(str(lora)))
    assert parse_reference(f"org/m@v1+{lora}", HERE) == ModelRef("org/m", "v1", ModelRef(str(lora)))
    monkeypatch.chdir(tmp_path / "u@corp")
    assert parse_reference("m+x", HERE) == ModelRef("m+x")


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home directory, in every part; messages keep it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = parse_reference("~/a+~/l", HERE)
    assert found == ModelRef(f"{tmp_path}/a", lora=ModelRef(f"{tmp_path}/l"))
    assert str(found) == "~/a+~/l"


def test_mapping_form() -> None:
    """The mapping form says each part by itself, so nothing is told apart."""
    recipe = loads(
        """\
merge_method: linear
base_model: {model: plain@main}
models:
- model: {model: {path: "a@b+c", revision: "1.0"}, lora: {path: l, revision: 12}}
- model: {model: {path: x}, lora: l@r, override_architecture: Llama}
""",
        "r.yml",
    ).output
    assert recipe.models() == (
        ModelRef("a@b+c", "1.0", ModelRef("l", "12")),
        ModelRef("x", lora=ModelRef("l", "r")),
        ModelRef("plain", "main"),
    )
    assert len(recipe.notes) == 1
    assert "'override_architecture' has no effect" in recipe.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{path: a}", "a model given as a mapping has no key 'path'"),
        ("{model: {path: a, revison: b}}", "did you mean 'revision'"),
        ("{model: {revision: b}}", "a model's place needs 'path'"),
        ("{lora: a}", "a model given as a mapping needs 'model'"),
        ("[a]", "a model given as a mapping must be a mapping, not a list"),
    ],
)
def test_bad_mappings(text: str, message: str) -> None:
    """Wrong mappings are refused."""
    with pytest.raises(RecipeError) as caught:
        loads(f"merge_method: linear\nmodels: [{{model: {text}}}]", "r.yml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("r.yml:2: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name:unet", ("owner/name", None, "unet")),
        ("owner/name@v1:a/b", ("owner/name", "v1", "a/b")),
        ("owner/name@v1", ("owner/name", "v1", None)),
        ("./gone:unet", ("./gone:unet", None, None)),
    ],
)
def test_subfolders(text: str, expected: tuple[str, str | None, str | None]) -> None:
    """`path[@revision][:subfolder]`; of a local path that does not exist a colon is a part. `str` writes it back."""
    ref = parse_reference(text, HERE)
    assert (ref.path, ref.revision, ref.subfolder) == expected
    assert str(ModelRef(ref.path, ref.revision, subfolder=ref.subfolder)) == text


def test_subfolder_of_a_lora() -> None:
    """Each side has its own."""
    ref = parse_reference("a/b:x+c/d@r:y", HERE)
    assert ref.lora is not None
    assert (ref.subfolder, ref.lora.path, ref.lora.revision, ref.lora.subfolder) == ("x", "c/d", "r", "y")


@pytest.mark.parametrize("text", ["a/b:", "a/b:x:y", ":x"])
def test_refused_subfolders(text: str) -> None:
    """Said with how it is written."""
    with pytest.raises(RecipeError, match="owner/name:folder"):
        parse_reference(text, HERE)
