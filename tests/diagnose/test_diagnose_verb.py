"""The verb: the page, JSON, the recipe that merges, the HTML report, the gate, and what goes wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from diagnose_samples import damage, vocabulary

import geomerge as gm
import tiny
from cli_samples import Program
from geomerge.diagnose import Thresholds, diagnose

BIG = Thresholds(small=1e-9, one=2e-9, two=3e-9, three=1)
"""Thresholds for which a tiny model is of the class 3B."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A base and three fine-tunes."""
    tiny.family(tmp_path, "base a b c")
    return tmp_path


def test_page(root: Path, program: Program) -> None:
    """The decision, its path, the score and a map, readable without colour."""
    ran = program("diagnose", root / "a", root / "b", "--base", root / "base", "--threshold", "small=1e-7")
    assert (ran.code, ran.err) == (0, "")
    for said in (
        "How far apart are the weights?",
        "S ",
        "O ",
        "ω̄",
        "attention",
        "│",
        "same sign",
        "to the base",
        "size class",
    ):
        assert said in ran.out
    assert "\x1b" not in ran.out


def test_page_of_several(root: Path, program: Program) -> None:
    """All pairs, the nearest marked; a name cannot reach the terminal as it is."""
    (root / "c").rename(root / "c\x1b[31m")
    ran = program("diagnose", root / "a", root / "b", root / "c\x1b[31m")
    assert ran.code == 0
    assert ran.out.count("global slerp") == 3
    assert ran.out.count("(nearest)") == 1
    assert "\x1b" not in ran.out
    assert "c\\x1b[31m" in ran.out


def test_json(root: Path, program: Program) -> None:
    """Everything as one JSON object."""
    ran = program("diagnose", root / "a", root / "b", root / "c", "--json")
    said = json.loads(ran.out)
    assert said["kind"] == "diagnosis"
    assert len(said["pairs"]) == 3
    assert {"angle", "cosine", "norms", "role", "block"} <= set(said["pairs"][0]["tensors"][0])
    assert said["decision"]["mode"] == "global_slerp"
    assert said["thresholds"]["angle"] == 0.5


def test_recipe_runs(root: Path, program: Program) -> None:
    """The written recipe merges as it is, and gives what it says: SLERP at one half."""
    ran = program("diagnose", root / "a", root / "b", "--write-recipe", root / "r.yml")
    assert ran.code == 0
    text = (root / "r.yml").read_text()
    assert "merge_method: slerp" in text
    assert "# - below 1B" in text
    gm.merge(root / "r.yml", root / "out")
    expected = gm.methods.slerp(tiny.read(root / "a"), [tiny.read(root / "b")], t=0.5)
    merged = tiny.read(root / "out")
    assert all(merged[n].sub(expected[n]).abs().max() < 1e-5 for n in merged)


@pytest.mark.parametrize("models", [("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("limits", [Thresholds(), BIG])
def test_every_recipe_runs(root: Path, models: tuple[str, ...], limits: Thresholds) -> None:
    """Two models or three, one coefficient or a schedule."""
    found = diagnose(*(root / m for m in models), thresholds=limits)
    assert found.decision.schedule == ("S" if limits is BIG else None)
    plan = gm.plan(found.recipe())
    assert len(plan.inputs) == len(models)
    gm.merge(found.recipe(), root / "out")
    assert tiny.read(root / "out").keys() == tiny.read(root / "a").keys()


def test_recipe_with_policy_runs(root: Path) -> None:
    """Vocabularies in different orders: the recipe has the policy that `merge` needs."""
    words = ["[UNK]", *(f"w{i}" for i in range(39))]
    vocabulary(root / "a", words)
    vocabulary(root / "b", [words[0], *words[:0:-1]])
    found = diagnose(root / "a", root / "b")
    assert found.decision.mode == "global_slerp"
    gm.merge(found.recipe(), root / "out")


def test_report(root: Path, program: Program) -> None:
    """One page without anything from elsewhere: path, score, two maps, coefficients, differences; names are escaped."""
    (root / "b").rename(root / "<b>")
    ran = program(
        "diagnose",
        root / "a",
        root / "<b>",
        "--base",
        root / "base",
        "--report",
        root / "d.html",
        "--config",
        limits(root),
    )
    assert ran.code == 0, ran.err
    page = (root / "d.html").read_text()
    assert page.count("<figure") >= 5
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for said in ("Decision", "How far apart", "schedule S", "Differences", "merge_method: layer_adaptive_slerp"):
        assert said in page
    again = root / "again.html"
    program("diagnose", root / "a", root / "<b>", "--base", root / "base", "--report", again, "--config", limits(root))
    assert again.read_text() == page


def test_report_of_strangers(root: Path, program: Program) -> None:
    """Three models that cannot be merged: a section for each pair, no recipe, and not over a file that is no report."""
    for seed, name in enumerate(("x", "y"), 70):
        tiny.llama(root / name, seed)
    ran = program("diagnose", root / "a", root / "x", root / "y", "--report", root / "d.html")
    assert ran.code == 0, ran.err
    page = (root / "d.html").read_text()
    assert "Do not merge." in page
    assert "The recipe" not in page
    assert all(f"{a} and {b}" in page for a, b in ("ax", "ay", "xy"))
    (root / "mine.html").write_text("my own")
    assert program("diagnose", root / "a", root / "b", "--report", root / "mine.html").code == 2
    assert (root / "mine.html").read_text() == "my own"


def limits(root: Path) -> Path:
    """`BIG` as a file."""
    path = root / "limits.yml"
    path.write_text("small: 1e-9\none: 2e-9\ntwo: 3e-9\nthree: 1\n")
    return path


def test_gate(root: Path, program: Program) -> None:
    """4 when the decision is not to merge and it was asked for; no recipe is written then."""
    tiny.llama(root / "stranger", 77)
    damage(root / "stranger", "model.norm.weight", math.nan)
    assert program("diagnose", root / "a", root / "stranger").code == 0
    ran = program("diagnose", root / "a", root / "stranger", "--gate")
    assert ran.code == 4
    assert "model.norm.weight holds 1 NaN" in ran.err
    assert "do not merge" in ran.out
    ran = program("diagnose", root / "a", root / "stranger", "--write-recipe", root / "r.yml")
    assert ran.code == 4
    assert not (root / "r.yml").exists()
    assert program("diagnose", root / "a", root / "b", "--gate").code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("a",), 2, "at least two"),
        (("a", "a"), 2, "same model"),
        (("a", "b", "--base", "deep"), 3, "different architectures"),
        (("a", "deep"), 3, "different architectures"),
        (("a", "none"), 3, "none"),
        (("a", "b", "--probe", "empty.txt"), 2, "empty"),
        (("a", "b", "--probe", "latin.txt"), 2, "not UTF-8"),
        (("a", "b", "--threshold", "angel=1"), 2, "did you mean 'angle'"),
        (("a", "b", "--config", "none.yml"), 2, "none.yml"),
        (("a", "b", "--specialist", "x"), 2, "none of the models"),
        (("a", "b", "--report", "a/config.json"), 2, "not a report"),
        (("a", "b", "--write-recipe", "no/r.yml"), 2, "does not exist"),
    ],
)
def test_bad_input(
    root: Path, program: Program, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, said: str
) -> None:
    """Each a clear error with its exit code, and nothing is written."""
    tiny.llama(root / "deep", 5, num_hidden_layers=4)
    (root / "empty.txt").write_text("")
    (root / "latin.txt").write_bytes("é\nü".encode("latin-1"))
    monkeypatch.chdir(root)
    before = tiny.digests(root)
    more = () if {"--report", "--write-recipe"} & set(words) else ("--report", "out.html", "--write-recipe", "out.yml")
    ran = program("diagnose", *words, *more)
    assert ran.code == code
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert tiny.digests(root) == before
