"""``geomerge lab`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_samples import Program
from geomerge.cli.steps import StepLines
from geomerge.lab import kinds, mlp
from geomerge.lab.kinds import Requirement


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


class TestBuild:
    """Training a suite."""

    def test_table(self, program: Program, cache: Path, tmp_path: Path) -> None:
        """Results on stdout: a line for each task, the means, and where the suite is."""
        ran = program("lab", "build", "mlp", "--seed", 1, "--out", tmp_path / "here")
        assert ran.code == 0, ran.err
        lines = ran.out.splitlines()
        assert lines[0].split() == ["task", "base", "expert", "gain", "average"]
        assert [line.split()[0] for line in lines[1:6]] == ["a", "b", "c", "d", "mean"]
        assert f"written to {tmp_path / 'here'}" in ran.out
        scores = json.loads((tmp_path / "here" / "suite.json").read_text())["scores"]
        base, own = scores["base"]["b"], scores["b"]["b"]
        assert lines[2].split()[1:] == [
            f"{100 * base:.1f}",
            f"{100 * own:.1f}",
            f"{100 * (own - base):+.1f}",
            f"{100 * scores['average']['b']:.1f}",
        ]

    def test_json(self, program: Program, warm: Path) -> None:
        """One JSON object, and nothing else."""
        ran = program("lab", "build", "mlp", "--json")
        data = json.loads(ran.out)
        assert (data["suite"], data["size"], data["seed"], ran.err) == ("mlp", "tiny", 0, "")
        assert data["average"] == pytest.approx(sum(data["scores"]["average"].values()) / 4)
        assert data["experts"] == pytest.approx(sum(data["scores"][t][t] for t in "abcd") / 4)

    def test_requirement_fails(self, program: Program, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The table is shown all the same; the exit code says that the run failed."""
        monkeypatch.setattr(mlp.MlpKind, "requirement", lambda self, size: Requirement(gain=0.5))
        ran = program("lab", "build", "mlp")
        assert ran.code == 1
        assert ran.out.splitlines()[5].startswith("mean")
        assert "50 are required" in ran.err

    @pytest.mark.parametrize("words", [("nosuch",), ("mlp", "--size", "huge"), ("mlp", "--seed", "-1")])
    def test_usage(self, program: Program, cache: Path, words: tuple[str, ...]) -> None:
        """Wrong names and numbers are usage errors."""
        ran = program("lab", "build", *words)
        assert ran.code == 2
        assert ran.out == ""


class TestList:
    """What there is."""

    def test_list(self, program: Program, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every suite and size; what ships and what was built is marked."""
        two = {name: kinds.KINDS[name] for name in ("glyphs", "mlp")}
        monkeypatch.setattr("geomerge.lab.suite.KINDS", two)
        text = program("lab", "list").out
        rows = [line.split() for line in text.splitlines()]
        assert ["glyphs", "tiny"] in [row[:2] for row in rows]
        assert "ships with geomerge" in text
        assert "built: seeds 0, 1" in text
        data = json.loads(program("lab", "list", "--json").out)
        found = {(entry["suite"], entry["size"]): entry for entry in data}
        assert list(found["mlp", "tiny"]["built"]) == ["0", "1"]
        assert found["mlp", "tiny"]["shipped"] is None
        assert len(found["glyphs", "small"]["tasks"]) == 8


class TestProgress:
    """Steps on stderr."""

    def test_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The first line after two seconds, with the time that is left at the pace since the first step."""
        now = [0.0]
        progress = StepLines("training", clock=lambda: now[0])
        progress.start(100, 20)
        for seconds in (60.0, 61.0, 64.0):
            now[0] = seconds
            progress.advance(10)
        now[0] = 70.0
        progress.advance(10)
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            "training: 30 of 100 steps (30 %)",
            "training: 60 of 100 steps (60 %), 13 s left",
        ]
