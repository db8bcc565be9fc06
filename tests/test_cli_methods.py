"""``geomerge methods``: the list and the page of each method."""

from __future__ import annotations

import json

import pytest

from cli_samples import Program
from geomerge.cli.catalogue import catalogue, cost
from geomerge.methods import registry
from geomerge.recipe import loads
from geomerge.recipe.grammar import AFTER


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program in this process, into a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return Program(capsys)


def test_all_methods_are_listed(run: Program) -> None:
    """One line each, with family, number of models, use of the base and title."""
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    lines = out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == ["method", *catalogue()]
    assert [*catalogue()][-13:] == [
        "continual_average", "continual_opcm", "continual_task_arithmetic", "continual_ties", "greedy_soup",
        "trim", "step_dare", "step_della", "step_breadcrumbs", "step_svd_compress", "scale", "lines", "aim",
    ]  # fmt: skip
    assert next(line.split() for line in lines if line.startswith("slerp ")) == [
        "slerp", "span", "1", "required", "Spherical", "linear", "interpolation", "(SLERP)",
    ]  # fmt: skip


def test_one_method(run: Program) -> None:
    """Formula, paper, parameters with ranges and both profiles' defaults, properties in words, an example."""
    _, out, _ = run("methods", "slerp")
    method = registry.get("slerp")
    assert " ".join(f"cost {cost(method)}".split()) in " ".join(out.split())
    for text in (method.title, " ".join(method.formula.split()), "Shoemake 1985", "identical experts give that expert"):
        assert text in " ".join(out.split())
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("t number in [0, 1], more with `extrapolate` required ") for line in lines)
    assert any(line.startswith("lerp_threshold number in [0, 1] none (mergekit: 0.9995) ") for line in lines)
    assert "  merge_method: slerp\n" in out.split("\nexample\n")[1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("linear", "a base that is named but not listed counts as one more model"),
        ("karcher", "a base that is named but not listed counts as one more model"),
        ("passthrough", "there is no base"),
        ("greedy_soup", "there is no base"),
        ("ties", "the base is required"),
    ],
)
def test_what_becomes_of_the_base(name: str, said: str, run: Program) -> None:
    """A method that knows no base takes one as one more model, if it takes any number."""
    assert f"; {said} family" in " ".join(run("methods", name).out.split())


def test_an_alias_is_its_method(run: Program) -> None:
    """Every alias shows its method's page."""
    aliases = [(a, name) for name, method in registry.all_methods().items() for a in method.aliases]
    for alias, name in aliases[:2]:
        assert run("methods", alias).out == run("methods", name).out
        assert alias in run("methods", name).out


@pytest.mark.parametrize("name", list(registry.all_methods()))
def test_every_page_and_example(run: Program, name: str) -> None:
    """Each method's page can be drawn, and the example on it is a recipe for this method."""
    code, out, _ = run("methods", name)
    assert code == 0
    example = "\n".join(line[2:] for line in out.split("\nexample\n")[1].splitlines())
    assert registry.get(loads(example + "\n").output.method).name == name


STEPS = [name for name, method in catalogue().items() if method.family == "step"]


@pytest.mark.parametrize("name", STEPS)
def test_steps(run: Program, name: str) -> None:
    """Where a step stands, and an example that has it and no other."""
    code, out, _ = run("methods", name)
    step = catalogue()[name]
    assert code == 0
    assert f"family step, {'after' if name in AFTER else 'before'} a method" in " ".join(out.split())
    recipe = loads("\n".join(line[2:] for line in out.split("\nexample\n")[1].splitlines()) + "\n").output
    assert [s.name for s in recipe.steps] == [step.name]
    assert set(recipe.steps[0].parameters) <= set(step.parameters())


def test_steps_and_methods_of_one_name(run: Program) -> None:
    """A method goes before a step that is called alike, and says where the step is explained; a step has aliases, too."""
    assert run("methods", "dare").out == run("methods", "dare_linear").out
    assert "`geomerge methods step_dare`" in run("methods", "dare").out
    assert "`geomerge methods step_svd_compress`" in run("methods", "tsv_compress").out
    assert "as a step" not in run("methods", "ties").out + run("methods", "step_dare").out
    assert run("methods", "magnitude").out == run("methods", "trim").out


@pytest.mark.parametrize("name", [n for n in catalogue() if n not in registry.all_methods() and n not in STEPS])
def test_methods_that_are_verbs(run: Program, name: str) -> None:
    """Their page names the command, and the example is one that the program knows."""
    code, out, _ = run("methods", name)
    assert code == 0
    assert catalogue()[name].usage() in " ".join(out.split())
    for line in out.split("\nexample\n")[1].strip().splitlines():
        program, verb, *options = line.split()
        assert program == "geomerge"
        known = run(verb, "--help").out
        assert all(option in known for option in options if option.startswith("--"))


def test_json(run: Program) -> None:
    """A list of objects, or one, with the same keys."""
    everything = json.loads(run("methods", "--json").out)
    assert [m["name"] for m in everything] == list(catalogue())
    one = json.loads(run("methods", "ties", "--json").out)
    assert one in everything
    assert set(one) == {
        "name", "usage", "aliases", "family", "title", "formula", "paper", "when", "models", "base", "properties",
        "cost", "parameters", "example",
    }  # fmt: skip
    assert all(m["cost"].endswith(".") for m in everything)
    assert "read once" in next(m["cost"] for m in everything if m["name"] == "linear")
    whole = {m["name"] for m in everything if "whole model first" in m["cost"]}
    assert whole >= {"ties", "pcb", "emr", "knots", "opcm", "resm", "doge_ta"}
    assert not whole & {"linear", "sce", "tsvm", "wudi", "trim", "continual_opcm"}
    assert "read twice" in next(m["cost"] for m in everything if m["name"] == "model_stock")
    density = next(p for p in one["parameters"] if p["name"] == "density")
    assert density == {
        "name": "density", "type": "number", "per_model": True, "required": False, "default": 1.0,
        "mergekit_default": 1.0, "least": 0, "most": 1, "above": 0, "choices": [],
        "doc": "share of the elements that is kept",
    }  # fmt: skip


def test_a_misspelt_method(run: Program) -> None:
    """The closest names are offered, with the code for a usage error."""
    code, out, err = run("methods", "slurp")
    assert (code, out) == (2, "")
    assert err.startswith("error: there is no method or step 'slurp'\n  did you mean 'slerp' or ")


def test_a_method_in_other_letters(run: Program) -> None:
    """The one that differs in case alone is offered."""
    assert run("methods", "TIES").err == "error: there is no method or step 'TIES'\n  did you mean 'ties'?\n"
