"""``geomerge evaluate``: tables, JSON, files, errors, interruption."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import jsonschema
import pytest

from cli_samples import Program
from geomerge.cli import evaluate_page
from geomerge.evaluate import Scores
from geomerge.evaluate.models import Model
from geomerge.evaluate.references import of_harness
from geomerge.evaluate.scores import SCHEMA

SCORE = """\
OUTCOMES = {'merged': [1, 1, 1, 0], 'a': [1, 1, 0, 0], 'b': [0, 0, 1, 0]}
def score(path):
    return OUTCOMES[path.name]
score.metric, score.version = 'accuracy', 1
def stop(path):
    if path.name == 'b':
        raise KeyboardInterrupt
    return OUTCOMES[path.name]
stop.metric, stop.version = 'accuracy', 1
def surprise(path):
    return {'merged': [5.0, 6.0], 'a': [6.0, 7.0], 'b': [8.0, 9.5]}[path.name]
surprise.metric, surprise.higher_is_better = 'nats', False
"""


@pytest.fixture
def place(language_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the models and a file of tasks, which is the current one."""
    for name in ("a", "b", "merged"):
        (tmp_path / name).symlink_to(language_models / name)
    (tmp_path / "mine.py").write_text(SCORE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(line: str) -> list[str]:
    return shlex.split(line)


def test_table(program: Program, place: Path) -> None:
    """Models by tasks with intervals (both ends where half would leave 0 to 100), shares, paired differences, synergy."""
    ran = program(*words("evaluate merged --tasks mine.py:score --parents a,b"))
    assert (ran.code, ran.err) == (0, "")
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["merged", "75.0", "(30.1", "to", "95.4)", "150.0", "%"] in lines
    assert ["b", "parent", "25.0", "(4.6", "to", "69.9)", "50.0", "%"] in lines
    assert ["merged", "mine.py:score", "a", "+25.0", "+0.0", "…", "+75.0", "1.000"] in lines
    assert ["merged", "mine.py:score", "37.5", "+37.5", "+100.0", "%", "+25.0", "25.0"] in lines
    assert ["merged", "mean", "37.5", "+37.5", "+100.0", "%", "+25.0", "25.0"] in lines


def test_parents_with_commas_or_repeated(program: Program, place: Path) -> None:
    """Both ways name the same parents; so do tasks."""
    one = json.loads(program(*words("evaluate merged --tasks mine.py:score,mine.py:surprise --parents a,b --json")).out)
    two = json.loads(
        program(
            *words("evaluate merged --tasks mine.py:score --tasks mine.py:surprise --parents a --parents b --json")
        ).out
    )
    assert [m["role"] for m in one["models"]] == ["model", "parent", "parent"]
    assert one["models"] == two["models"]
    assert (
        [t["name"] for t in one["tasks"]] == ["mine.py:score", "mine.py:surprise"] == [t["name"] for t in two["tasks"]]
    )
    # Lower is better on one of them, so values have no mean; shares have.
    assert one["means"][0]["value"] is None
    assert one["means"][0]["normalised"] == pytest.approx((0.75 / 0.5 + 6.5 / 5.5) / 2)


def test_json_and_file(program: Program, place: Path) -> None:
    """--json prints what --out writes, and both fit the schema."""
    ran = program(*words("evaluate merged a --tasks mine.py:score --base b --json --out scores.json"))
    printed = json.loads(ran.out)
    jsonschema.validate(printed, json.loads(SCHEMA.read_text()))
    assert json.loads((place / "scores.json").read_text()) == printed
    scores = Scores.read(place / "scores.json")
    assert [(m.name, m.role) for m in scores.models] == [("merged", "model"), ("a", "model"), ("b", "base")]
    assert not scores.paired


def test_lower_is_better(program: Program, place: Path) -> None:
    """The table says where lower is better, and that more synergy is better all the same."""
    ran = program(*words("evaluate merged --tasks mine.py:surprise --parents a,b"))
    assert "lower is better: mine.py:surprise" in ran.out
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["merged", "mine.py:surprise", "7.625", "+2.125", "+27.9", "%", "+1", "2.25"] in lines


def test_the_second_call_loads_no_model(program: Program, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text's perplexity is known the second time: nothing is loaded, and the table says so."""
    (place / "text.txt").write_text("a text\n")
    loaded = []
    load = Model.causal_lm

    def watched(model: Model, *args: object) -> object:
        loaded.append(model.name)
        return load(model, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "causal_lm", watched)
    line = words("evaluate merged a --tasks perplexity:text.txt")
    first, second = program(*line), program(*line)
    assert loaded == ["merged", "a"]
    assert "2 of 2 scores were known" in second.out
    assert "known" not in first.out
    assert first.out.splitlines()[:3] == second.out.splitlines()[:3]
    program(*line, "--no-cache")
    assert loaded == ["merged", "a"] * 2


def test_interrupted(program: Program, place: Path) -> None:
    """Ctrl-C: what is known is shown, written and kept, and the exit code is 130."""
    ran = program(*words("evaluate merged --tasks mine.py:stop --parents a,b --out scores.json"))
    assert ran.code == 130
    assert "1 scores are missing" in ran.err
    assert "the same command goes on" in ran.err
    assert any(line.split()[:3] == ["b", "parent", "?"] for line in ran.out.splitlines())
    assert [s.model for s in Scores.read(place / "scores.json").scores] == ["merged", "a"]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("missing --tasks mine.py:score", 3, "no such file"),
        ("merged --tasks mine.py:scoer", 2, "did you mean 'score'"),
        ("merged --tasks perplexity:none.txt", 3, "none.txt: there is no such file"),
        ("merged --tasks mine.py:score --limit 0", 2, "--limit"),
        ("merged --tasks mine.py:score --dtype float31", 2, "did you mean 'float32'"),
        ("merged --tasks mine.py:score --out nowhere/s.json", 2, "its directory does not exist"),
        ("merged --tasks mine.py:score --out a", 2, "it is a directory"),
        ("merged", 2, "--tasks"),
        ("merged --tasks perplexity:mine.py --device abacus", 2, "'abacus' cannot be used"),
    ],
)
def test_errors(program: Program, place: Path, line: str, code: int, said: str) -> None:
    """Exit 2 for what was asked wrongly, 3 for models and data that cannot be had."""
    ran = program(*words(f"evaluate {line}"))
    assert ran.code == code
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_names_from_models_are_shown_not_obeyed(program: Program, place: Path, language_models: Path) -> None:
    """A directory's name with an escape sequence and markup reaches the terminal as text."""
    name = "\x1b[31m[bold]x"
    (place / name).symlink_to(language_models / "a")
    (place / "mine.py").write_text("def score(path): return 1.0\n")
    ran = program("evaluate", name, "--tasks", "mine.py:score")
    assert "\x1b" not in ran.out
    assert "[bold]" in ran.out


def test_what_is_looked_for_among_other_tasks() -> None:
    """Names that none of our own sources has, one of which takes seconds to look up, are told beforehand."""
    given = ["skills,mmlu@acc", "glyphs/a", "leaderboard/bbh", "own.py:f", "perplexity:x.txt", "hellaswag"]
    assert of_harness(given) == ["mmlu@acc", "hellaswag"]


def test_progress_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain lines tell the item, its share and the time that is left; neither known items nor the loading count."""
    now = [0.0]
    watcher = evaluate_page.Lines(lambda: now[0])
    watcher.start(5, 1)
    watcher.begin("m", "t")
    now[0] = 90.0  # a model was loaded
    watcher.step(0.1)
    assert watcher.left() is None
    now[0] = 98.0
    watcher.step(0.5)
    assert watcher.left() == pytest.approx(70.0)  # 3.5 items at 20 s
    assert "evaluating: 1 of 5, m on t 50 %, 1 min 10 s left" in capsys.readouterr().err


def test_bar_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The bar draws and goes; when all is known it is never drawn."""
    with evaluate_page.Bar() as bar:
        bar.start(2, 2)
    assert capsys.readouterr().err == ""
    with evaluate_page.Bar() as bar:
        bar.start(2, 0)
        bar.begin("m", "t")
        bar.step(0.5)
        bar.end()
    assert bar._bar is None


def test_other_files_are_not_written_over(program: Program, place: Path) -> None:
    """Scores replace scores, and nothing else."""
    asked = words("evaluate merged --tasks mine.py:score --out scores.json")
    assert [program(*asked).code, program(*asked).code] == [0, 0]
    before = (place / "mine.py").read_bytes()
    ran = program(*words("evaluate merged --tasks mine.py:score --out mine.py"))
    assert (ran.code, "exists and is not a file of scores" in ran.err) == (2, True)
    assert (place / "mine.py").read_bytes() == before
