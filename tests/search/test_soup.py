"""Greedy soup: against the algorithm written out, on models whose score is a known function of their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import geomerge as gm
import tiny
from cli_samples import Program
from geomerge.lab.suite import load_suite
from geomerge.search.objective import Half, Measured
from geomerge.search.soup import GreedySoup, Tried, greedy_soup
from geomerge.search.study import Objective


class Module(nn.Module):
    """One matrix under the name that it has on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6, bias=False)


class Distance:
    """Scores a module by how near its matrix is to a target, the two halves of its elements apart."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def load(self, path: str) -> nn.Module:
        return Module()

    def measure(self, module: nn.Module, half: Half) -> Measured:
        weight = module.get_submodule("layer").weight.detach()  # type: ignore[union-attr, operator]
        samples = -((weight - self.target) ** 2).reshape(-1).double().numpy()
        mine = samples[: 12 if half == "search" else None][0 if half == "search" else 12 :]
        return Measured(float(mine.mean()), {"x": float(mine.mean())}, {"x": mine})


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Program:
    """The program in this process."""
    return Program(capsys)


@pytest.fixture
def models(tmp_path: Path) -> tuple[list[str], list[torch.Tensor], torch.Tensor]:
    """Seven models around a target, the further ones of no use to a soup."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(6, 4, generator=generator)
    weights = []
    for i in range(7):
        weights.append(target + (0.6 + 0.25 * i) * torch.randn(6, 4, generator=generator))
        tiny.save(tmp_path / f"m{i}", {"layer.weight": weights[-1]})
    return [str(tmp_path / f"m{i}") for i in range(7)], weights, target


def test_the_algorithm(models: tuple[list[str], list[torch.Tensor], torch.Tensor]) -> None:
    """Sorted by score; each added if the average of the soup with it is at least as good."""
    paths, weights, target = models

    def score(chosen: list[int]) -> float:
        mean = torch.stack([weights[i] for i in chosen]).mean(0)
        return -float(((mean - target) ** 2).reshape(-1)[:12].mean())

    order = sorted(range(7), key=lambda i: -score([i]))
    soup = order[:1]
    for i in order[1:]:
        if score([*soup, i]) >= score(soup):
            soup.append(i)
    told: list[Tried] = []
    found = greedy_soup(paths, Objective(("x",)), judge=Distance(target), progress=told.append)
    assert found.kept == tuple(paths[i] for i in soup)
    assert [t.model for t in found.tried] == [paths[i] for i in order]
    assert found.tried[1:] == tuple(told)
    assert 1 < len(soup) < 7
    made = gm.merge_state_dicts(found.recipe)["layer.weight"]
    torch.testing.assert_close(
        made, torch.stack([weights[i].double() for i in soup]).mean(0).float(), rtol=0, atol=1e-7
    )


def test_never_worse_than_the_best_model(models: tuple[list[str], list[torch.Tensor], torch.Tensor]) -> None:
    """On the half that it looks at; the other half is scored beside it."""
    paths, _, target = models
    found = greedy_soup(paths, Objective(("x",)), judge=Distance(target))
    assert max(t.together for t in found.tried if t.kept) >= max(t.alone for t in found.tried)
    names = [h.name for h in found.held_out]
    assert names == ["greedy soup", "average of all", found.tried[0].model]
    value, low, high = found.difference
    assert low <= value <= high
    assert value == pytest.approx(found.held_out[0].value - found.held_out[2].value)


def test_identical_models(models: tuple[list[str], list[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    """The property that its page lists: they give that model, bit for bit."""
    paths, weights, target = models
    tiny.save(tmp_path / "again", {"layer.weight": weights[3]})
    found = greedy_soup([paths[3], str(tmp_path / "again")], Objective(("x",)), judge=Distance(target))
    assert torch.equal(gm.merge_state_dicts(found.recipe)["layer.weight"], weights[3])
    assert GreedySoup.properties == {"identical"}


@pytest.mark.parametrize("paths", [["a"], ["a", "a"]])
def test_too_few(paths: list[str]) -> None:
    with pytest.raises(gm.UsageError, match="at least two"):
        greedy_soup(paths, Objective(("x",)), judge=Distance(torch.zeros(6, 4)))


def test_models_of_other_shapes(tmp_path: Path) -> None:
    """What keeps them apart is said of the models, not of a recipe that the user never wrote."""
    for name, rows in (("a", 6), ("b", 5)):
        tiny.save(tmp_path / name, {"layer.weight": torch.randn(rows, 4)})
    with pytest.raises(gm.GeomergeError, match=r"layer\.weight") as caught:
        greedy_soup([str(tmp_path / n) for n in "ab"], Objective(("x",)), judge=Distance(torch.zeros(6, 4)))
    assert "recipe" not in str(caught.value)


def test_no_score(models: tuple[list[str], list[torch.Tensor], torch.Tensor]) -> None:
    paths, _, _ = models
    with pytest.raises(gm.RunError, match="no model could be scored"):
        greedy_soup(paths[:2], Objective(("x",)), judge=Distance(torch.full((6, 4), float(np.nan))))


def test_as_a_newcomer_runs_it(run: Program, tmp_path: Path) -> None:
    """On the lab's experts: the recipe that it writes is the soup that it scored."""
    experts = load_suite("skills").experts
    recipe, out = tmp_path / "soup.yml", tmp_path / "soup"
    options: list[Any] = ["--tasks", "skills/choice,skills/recall", "--limit", 40, "--quiet", "--json"]
    done = run("soup", experts["choice"], experts["recall"], *options, "--write-recipe", recipe, "--merge", out)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert sum(t["kept"] for t in found["tried"]) >= 1
    assert recipe.read_text() == found["recipe"]
    assert (out / "model.safetensors").is_file()
    again = run("soup", experts["choice"], experts["recall"], *options, "--merge", out)
    assert again.code == 2
    assert "the output exists" in again.err
