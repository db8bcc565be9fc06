"""The demo: merges of shipped experts, scored, reported; run as a newcomer runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

import geomerge
from geomerge.evaluate import Scores
from geomerge.lab.demo import PAIR, RECIPES, run_demo


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The demo's outcome in a directory of its own."""
    return run_demo(tmp_path_factory.mktemp("work") / "demo")


def test_it_shows_what_merging_is_for(made: object) -> None:
    """The best merge is better at both skills together than either parent; everything that was printed is there."""
    assert isinstance(made.scores, Scores)  # type: ignore[attr-defined]
    scores = made.scores  # type: ignore[attr-defined]

    def both(model: str) -> float:
        return sum(scores.value(model, t.name) for t in scores.tasks if t.name.split("/")[-1] in PAIR) / 2

    parents = [m.name for m in scores.models if m.role == "parent"]
    assert max(both(m) for m in RECIPES) > max(both(p) for p in parents)
    report: Path = made.report  # type: ignore[attr-defined]
    page = report.read_text()
    assert "<script" not in page.lower() or "http" not in page.split("<script")[1][:50]
    assert all(name in page for name in RECIPES)
    assert {p.name for p in report.parent.iterdir()} >= {"scores.json", "ties.yml", "ties", "report.html"}


def test_a_second_run_replaces_the_first(made: object) -> None:
    out: Path = made.report.parent  # type: ignore[attr-defined]
    again = run_demo(out)
    assert again.scores.value("ties", "reasoning") == made.scores.value("ties", "reasoning")  # type: ignore[attr-defined]


def test_another_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(geomerge.UsageError, match="not a demo"):
        run_demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]
