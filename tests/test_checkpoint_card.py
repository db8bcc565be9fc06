"""The model card: front matter that YAML reads, a body that a model's strings cannot break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from checkpoint_samples import write
from geomerge.checkpoint import Parent, combine_licences, model_card, read_licence

RECIPE = "merge_method: slerp\nparameters:\n  t: 0.5\n"


def card(*parents: Parent, **changes: Any) -> str:
    """A card of these parents."""
    given: dict[str, Any] = {"name": "merged", "method": "slerp", "recipe": RECIPE, "version": "0.1.0"}
    return model_card(parents=parents, **{**given, **changes})


def front(text: str) -> dict[str, Any]:
    """The front matter as YAML reads it."""
    assert text.startswith("---\n")
    return dict(YAML(typ="safe").load(text.split("\n---\n")[0].removeprefix("---\n")))


ONE = Parent("owner/one", "f" * 64, hub_id="owner/one", revision="a" * 40, licence="apache-2.0", base=True)
TWO = Parent("owner/two", "e" * 64, hub_id="owner/two", licence="apache-2.0")
LOCAL = Parent("my-expert", "d" * 64)


def test_front_matter() -> None:
    """What the hub reads; a local directory never becomes an id."""
    assert front(card(ONE, TWO, LOCAL)) == {
        "base_model": ["owner/one", "owner/two"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "geomerge", "slerp"],
    }
    assert front(card(ONE, TWO))["license"] == "apache-2.0"
    assert "base_model" not in front(card(LOCAL))


def test_body() -> None:
    """Method, parents with role, revision and fingerprint, the recipe as it was, how to make it again."""
    text = card(ONE, LOCAL, title="SLERP", paper="Shoemake 1985", command="geomerge merge recipe.yml out")
    assert "A merge of 2 models with the method **SLERP** (`slerp`)" in text
    assert "A merge of 1 model onto a base with the method" in card(ONE, LOCAL, onto_base=True)
    assert "Shoemake 1985." in text
    assert "| owner/one | base | `aaaaaaaaaaaa` | apache-2.0 | `ffffffffffffffff` |" in text
    assert "| my-expert |  |  | not stated | `dddddddddddddddd` |" in text
    assert f"```yaml\n{RECIPE}```" in text
    assert "```\ngeomerge merge recipe.yml out\n```" in text
    assert text == card(ONE, LOCAL, title="SLERP", paper="Shoemake 1985", command="geomerge merge recipe.yml out")


def test_strings_from_models_stay_text() -> None:
    """Names, licences, recipes and warnings cannot open tags, cells, fences, templates or YAML."""
    evil = "<script>alert(1)</script>|x\n# {{ 7 * 7 }} [a](b)"
    text = card(
        Parent(evil, "0" * 64, hub_id="no", licence=evil),
        name=evil,
        recipe="# ````\nmerge_method: linear # {{ 7 * 7 }} {% raw %}\n",
        method="true",
        warnings=[evil],
    )
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body
    assert body.count("\\|x \\# {{ 7 \\* 7 }} \\[a\\](b)") >= 3
    assert "49" not in body
    assert "`````yaml\n# ````\nmerge_method: linear # {{ 7 * 7 }} {% raw %}\n`````" in text
    assert front(text)["base_model"] == ["no"]
    assert front(text)["tags"] == ["merge", "geomerge", "true"]
    assert front(card(TWO, method='a: "b"\n- c'))["tags"][2] == 'a: "b"\n- c'


@pytest.mark.parametrize(
    ("licences", "licence", "words"),
    [
        ({"a": "mit", "b": "mit"}, "mit", "The parents' licence is mit."),
        ({"a": "mit", "b": None}, None, "No licence is stated by b"),
        ({"a": None}, None, "None of the parents states a licence"),
        ({"a": "apache-2.0", "b": "cc-by-nc-4.0"}, "other", "differ (a: apache-2.0; b: cc-by-nc-4.0)"),
        ({"a": "apache-2.0", "b": "llama3.1", "c": None}, "other", "No licence is stated by c"),
    ],
)
def test_licences(licences: dict[str, str | None], licence: str | None, words: str) -> None:
    """One licence is passed on; different or missing ones are reported, never resolved."""
    found, note = combine_licences(licences)
    assert found == licence
    assert words in note


def test_conflict_is_on_the_card() -> None:
    """Readers and the hub both see that the licences differ."""
    text = card(ONE, Parent("b", "0" * 64, licence="cc-by-nc-4.0"))
    assert front(text)["license"] == "other"
    assert "licences differ" in text


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A", "apache-2.0"),
        ('---\r\nlicense: "mit"\r\n---\r\n', "mit"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: []\n---\nlicense: gpl", None),
        ("# no front matter\nlicense: mit", None),
        ("", None),
    ],
)
def test_licence_of_a_parent(tmp_path: Path, readme: str, licence: str | None) -> None:
    """Read from the front matter of the parent's own card, and from nowhere else."""
    write(tmp_path / "README.md", readme.encode())
    assert read_licence(tmp_path) == licence


def test_parent_without_a_card(tmp_path: Path) -> None:
    """No card, or a model in memory, has no licence."""
    assert read_licence(tmp_path) is None
    assert read_licence(None) is None
