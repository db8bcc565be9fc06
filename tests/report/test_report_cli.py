"""``geomerge report``: what it prints and writes, and that nothing is written when something is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from samples import merged, scores
from typer.main import get_command

from geomerge.cli.report import report
from geomerge.errors import GeomergeError, ModelError, UsageError

Call = Callable[..., str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the verb by itself; its errors come through."""
    app = typer.Typer()
    app.command()(report)
    command = get_command(app)

    def run(*words: object) -> str:
        capsys.readouterr()
        command.main(args=[str(word) for word in words], standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A merged model with scores beside it."""
    made = merged(tmp_path, "slerp")
    scores(("slerp",), source=str(made)).write(tmp_path / "scores.json")
    return made


def test_writes_page_and_figures(call: Call, run: Path, tmp_path: Path) -> None:
    """The page, and its figures as PNG; the text says what came of it; a second call replaces both."""
    page, figures = tmp_path / "r.html", tmp_path / "figures"
    out = call(run, tmp_path / "scores.json", "--out", page, "--figures", figures)
    assert "points above its best parent" in out
    assert str(page) in out
    assert sorted(p.name for p in figures.iterdir()) == [
        "coefficient.png",
        "kept.png",
        "means.png",
        "synergy.png",
        "tasks.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for p in figures.iterdir())
    first = page.read_bytes()
    assert b"geomerge report " in first
    told = json.loads(call(run, tmp_path / "scores.json", "--out", page, "--figures", figures, "--json"))
    assert page.read_bytes() == first
    assert told["bytes"] == len(first)
    assert len(told["figures"]) == 5
    assert told["models"] == ["slerp", "expert-a", "expert-b", "base"]


def test_default_place(call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """report.html where it was started; with --card alone the card and no page."""
    monkeypatch.chdir(tmp_path)
    call("scores.json")
    assert (tmp_path / "report.html").is_file()
    (tmp_path / "report.html").unlink()
    assert "README.md" in call(run, "scores.json", "--card")
    assert "## Scores" in (run / "README.md").read_text()
    assert not (tmp_path / "report.html").exists()
    assert "(as it was)" in call(run, "scores.json", "--card")


def bad(tmp_path: Path) -> dict[str, list[object]]:
    """Command lines that must be refused."""
    (tmp_path / "empty").mkdir()
    written = {
        "text.json": "hello",
        "list.json": "[1, 2]",
        "other.json": '{"kind": "recipe"}',
        "later.json": '{"kind": "scores", "format": 99}',
        "types.json": '{"kind": "scores", "format": 1, "models": 3, "tasks": {}, "scores": "x"}',
        "deep.json": "[" * 100_000,
        "none.json": '{"kind": "scores", "format": 1}',
        "binary.json": "\x00\x01",
        "merge.json": '{"out": "x", "plan": 3, "seconds": "soon"}',
        "mine.html": "<p>mine</p>",
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(300_000_000)
    os.mkfifo(tmp_path / "pipe")
    found: dict[str, list[object]] = {name: [tmp_path / name] for name in written if name.endswith(".json")}
    found |= {"missing": [tmp_path / "missing"], "no manifest": [tmp_path / "empty"], "huge": [huge], "nul": ["a\0b"]}
    found["pipe"] = [tmp_path / "pipe"]
    good = tmp_path / "scores.json"
    found |= {
        "taken": [good, "--out", tmp_path / "mine.html"],
        "directory": [good, "--out", tmp_path / "empty"],
        "nowhere": [good, "--out", tmp_path / "no" / "r.html"],
        "figures": [good, "--out", tmp_path / "r.html", "--figures", tmp_path / "mine.html"],
        "card without run": [good, "--card"],
        "second is bad": [good, tmp_path / "missing"],
    }
    return found


def everything(folder: Path) -> dict[str, object]:
    """All that lies in a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() and p.stat().st_size < 1 << 20 else None
        for p in sorted(folder.rglob("*"))
    }


def test_bad_inputs_write_nothing(call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one clear error of exit code 2 or 3, and the folder stays as it was."""
    cases = bad(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    for name, words in cases.items():
        with pytest.raises(GeomergeError) as caught:
            call(*words)
        assert caught.value.exit_code in (2, 3), name
        assert caught.value.what, name
        assert everything(tmp_path) == before, name


def test_damaged_run_and_strange_card(call: Call, run: Path, tmp_path: Path) -> None:
    """A damaged manifest is the model's fault (3); scores of other models cannot go into its card (2)."""
    page = tmp_path / "r.html"
    scores(("another",)).write(tmp_path / "other.json")
    card = (run / "README.md").read_bytes()
    with pytest.raises(UsageError, match="do not hold this model"):
        call(run, tmp_path / "other.json", "--card", "--out", page)
    assert (run / "README.md").read_bytes() == card
    (run / "geomerge.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        call(run, "--out", page)
    assert not page.exists()


def test_unwritable_place(call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that refuses is an error of the run, and leaves no half of a page."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(GeomergeError, match="No space left") as caught:
        call(run, "--out", tmp_path / "r.html")
    assert caught.value.exit_code == 1
    assert not list(tmp_path.glob("*r.html*"))
