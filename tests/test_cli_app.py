"""The program itself: start-up, exit codes, messages, colours."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli_samples import Program, weights, write_model, write_models, write_recipe
from geomerge.cli import console
from geomerge.version import __version__

HEAVY = ("torch", "numpy", "transformers", "rich", "pydantic", "ruamel", "huggingface_hub", "safetensors", "jinja2")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Program:
    """The program in this process."""
    return Program(capsys)


def test_help_imports_nothing_heavy() -> None:
    """`geomerge --help` loads none of the libraries that take long to load, and lists the verbs."""
    code = (
        "import sys\nfrom geomerge.cli.app import main\ncode = main(['--help'])\n"
        f"print('loaded', sorted(set({HEAVY!r}) & set(sys.modules)), len(sys.modules) < 600, code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("loaded [] True 0\n")
    for verb in ("merge", "plan", "inspect", "methods", "schema"):
        assert f"\n  {verb} " in done.stdout


def test_the_module_is_the_same_program() -> None:
    """`python -m geomerge` answers under the name geomerge."""
    words = [sys.executable, "-m", "geomerge", "--help"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("Usage: geomerge [OPTIONS] COMMAND")


def test_verbs_start_in_a_fresh_process(tmp_path: Path) -> None:
    """The verbs that do most import what they need themselves: none relies on another having run before."""
    write_models(tmp_path)
    recipe = write_recipe(tmp_path)
    verbs = [["inspect", "a"], ["plan", recipe], ["merge", recipe, "out"]]
    program = [sys.executable, "-m", "geomerge"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    running = [subprocess.Popen([*program, *map(str, verb)], cwd=tmp_path, **streams) for verb in verbs]
    errors = [process.communicate(timeout=120)[1].decode() for process in running]
    assert errors == [""] * len(verbs)
    assert [process.returncode for process in running] == [0] * len(verbs)


def test_version(run: Program) -> None:
    """`--version` prints name and version."""
    assert run("--version") == (0, f"geomerge {__version__}\n", "")


def test_no_verb_shows_the_help_and_fails(run: Program) -> None:
    """Without a verb there is nothing to do: help, and the code for wrong usage."""
    code, out, err = run()
    assert code == 2
    assert "Commands:" in out + err


@pytest.mark.parametrize(
    "words", [["marge"], ["merge"], ["plan", "x", "--thread", "2"], ["merge", "a", "b", "--threads", "0"]]
)
def test_wrong_usage_is_code_2(run: Program, words: list[str]) -> None:
    """An unknown verb, a missing argument, an unknown option and a bad number are usage errors on stderr."""
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "Error" in err


def test_unknown_parameters_are_code_2_with_the_line(run: Program, tmp_path: Path) -> None:
    """A recipe error names file and line and suggests the right word."""
    write_models(tmp_path)
    recipe = write_recipe(tmp_path, "merge_method: slarp\nbase_model: {0}/a\nmodels: [{{model: {0}/b}}]\n")
    code, out, err = run("plan", recipe)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {recipe}:1: ")
    assert "\n  did you mean 'slerp'" in err


@pytest.mark.parametrize("verb", ["merge", "plan", "diagnose", "inspect"])
def test_errors_as_json(run: Program, tmp_path: Path, verb: str) -> None:
    """With --json stdout is one document, also when nothing comes of it: the error, which stderr tells as well."""
    write_models(tmp_path)
    missing = tmp_path / "bb"
    recipe = write_recipe(tmp_path, "merge_method: slerp\nbase_model: {0}/a\nmodels: [{{model: {0}/bb}}]\n")
    words = {
        "merge": [recipe, tmp_path / "out"],
        "plan": [recipe],
        "diagnose": [tmp_path / "a", missing],
        "inspect": [missing],
    }
    code, out, err = run(verb, *words[verb], "--json")
    error = json.loads(out)["error"]
    assert (code, error["exit_code"]) == (3, 3)
    assert "no such file" in error["what"]
    assert error["where"].endswith(str(missing))
    assert (error["where"] == str(missing)) == (verb in {"diagnose", "inspect"}), "only a recipe has lines"
    assert err.startswith(f"error: {error['where']}: {error['what']}\n  {error['hint']}")
    assert run(verb, *words[verb])[1] == ""


def test_errors_after_an_answer(run: Program, tmp_path: Path) -> None:
    """What has been answered in JSON is not answered again."""
    tensors = weights(1)
    tensors["model.norm.weight"][3] = float("nan")
    write_model(tmp_path / "damaged", tensors)
    code, out, err = run("inspect", tmp_path / "damaged", "--json")
    assert code == 3
    assert list(json.loads(out)["not_finite"]) == ["model.norm.weight"]
    assert "NaN" in err


def test_a_directory_is_no_recipe(run: Program, tmp_path: Path) -> None:
    write_models(tmp_path)
    code, out, err = run("plan", tmp_path / "a")
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path / 'a'}: this is a directory, not a recipe\n  a recipe is a YAML text file\n"


@pytest.mark.parametrize("words", [[], ["adapter"], ["lab"]])
def test_the_help_says_whole_sentences(run: Program, words: list[str]) -> None:
    commands = run(*words, "--help").out.partition("Commands:")[2]
    assert commands
    assert "..." not in commands


def test_a_damaged_model_is_code_3(run: Program, tmp_path: Path) -> None:
    """A truncated file is named, and nothing appears under the output's name."""
    write_models(tmp_path)
    whole = (tmp_path / "b" / "model.safetensors").read_bytes()
    (tmp_path / "b" / "model.safetensors").write_bytes(whole[:-10])
    code, out, err = run("merge", write_recipe(tmp_path), tmp_path / "out")
    assert (code, out) == (3, "")
    assert "model.safetensors" in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_code_2(run: Program, tmp_path: Path) -> None:
    """The hint names the option that replaces it."""
    write_models(tmp_path)
    code, _, err = run("merge", write_recipe(tmp_path), tmp_path / "base")
    assert code == 2
    assert "the output exists" in err
    assert "--force" in err


def test_a_failed_run_is_code_1(run: Program, tmp_path: Path) -> None:
    """A saved plan whose input has changed since is refused as a failure of the run."""
    write_models(tmp_path)
    assert run("plan", write_recipe(tmp_path), "--no-estimate", "--save", tmp_path / "plan.json").code == 0
    (tmp_path / "b" / "model.safetensors").unlink()
    (tmp_path / "b").joinpath("config.json").unlink()
    (tmp_path / "b").rmdir()
    write_model(tmp_path / "b", weights(7))
    code, _, err = run("merge", tmp_path / "plan.json", tmp_path / "out")
    assert code == 1
    assert "is not the one that the plan was made for" in err


def test_a_bug_is_a_sentence_and_a_traceback_only_with_debug(run: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody foresaw says that it is a bug; `--debug` shows where, before or behind the verb."""

    def broken() -> None:
        raise ZeroDivisionError("oops \x1b[2J")

    monkeypatch.setattr("geomerge.recipe.json_schema", broken)
    code, out, err = run("schema")
    assert (code, out) == (1, "")
    assert err.startswith("error: this is a bug in geomerge: ZeroDivisionError: oops \\x1b[2J\n")
    assert "Traceback" not in err
    for words in (["--debug", "schema"], ["schema", "--debug"]):
        code, _, err = run(*words)
        assert code == 1
        assert "Traceback" in err
        assert "in broken" in err


def test_a_full_disk_is_no_bug(run: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it was met, and whether or not the system says in which file."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("geomerge.recipe.json_schema", full)
    code, _, err = run("schema")
    assert code == 1
    assert err == "error: No space left on device\n  make room, or choose an output on another disk\n"


def test_what_the_system_refuses_is_no_bug(run: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the system's reason, whichever verb met them."""
    monkeypatch.setattr("geomerge.recipe.json_schema", lambda: Path("/nowhere/to/be/found").read_bytes())
    assert run("schema") == (1, "", "error: /nowhere/to/be/found: No such file or directory\n")


def test_known_errors_show_a_traceback_with_debug(run: Program) -> None:
    """`--debug` also tells where a foreseen error was raised."""
    assert "Traceback" not in run("methods", "tis").err
    assert "Traceback" in run("methods", "tis", "--debug").err


def test_an_interruption_of_any_verb_is_130(run: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a verb with 130 and one line."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("geomerge.recipe.json_schema", interrupted)
    assert run("schema") == (130, "", "interrupted: nothing was changed\n")


def test_colours_follow_the_environment(run: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """No escape codes into a pipe; FORCE_COLOR asks for them; NO_COLOR wins over it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def both() -> str:
        return run("methods", "slerp").out + run("methods", "tis").err

    assert "\x1b" not in both()
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = both()
    assert "\x1b[1m" in text
    assert "\x1b[31;1merror:" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in both()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0", "model.layers.0"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb", "a\\nb"),
        ("\u202eevil", "\\u202eevil"),
        ("\x9b2J", "\\x9b2J"),
        ("\ud800", "\\ud800"),
        ("θ [bold]x[/bold]", "θ [bold]x[/bold]"),
    ],
)
def test_unprintable_characters_are_shown(text: str, shown: str) -> None:
    """Control characters, direction marks and lone surrogates appear as escapes; everything else as it is."""
    assert console.clean(text) == shown


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (988_097_824, "988 MB"), (1_980_000_000, "1.98 GB"),
     (999_600, "1 MB"), (99_960, "100 kB"), (5e15, "5000 TB")],
)  # fmt: skip
def test_amounts(nbytes: float, text: str) -> None:
    """Three digits in decimal units."""
    assert console.amount(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "under 0.1 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.7, "1 min 0 s"),
        (250, "4 min 10 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Rounded to what a person wants to know."""
    assert console.duration(seconds) == text


def test_the_librarys_warnings_reach_stderr_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    """A logger below geomerge writes one line on stderr, without control characters; what is less is not shown."""
    console.show_warnings()
    console.show_warnings()
    logger = logging.getLogger("geomerge.checkpoint")
    logger.info("nothing")
    logger.warning("%s cannot be locked", "a\x07b")
    assert capsys.readouterr() == ("", "warning: a\\x07b cannot be locked\n")


def test_a_schema_is_json(run: Program) -> None:
    """`geomerge schema` prints the JSON schema and nothing else."""
    code, out, err = run("schema")
    assert (code, err) == (0, "")
    assert json.loads(out)["title"] == "geomerge recipe"


def test_facts_in_a_pipe_are_those_of_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the library that lays out tables the lines are the same; a wide terminal shows them alike."""
    rows = [
        ("merged", "/a/b c"),
        ("loss", "rounding takes 8 %: `dtype: float32` keeps it"),
        ("note", "one\ntwo"),
        ("x", ""),
    ]
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    console.show_facts(rows)
    plain = capsys.readouterr().out
    console.show(console.facts(rows))
    assert capsys.readouterr().out == plain
    monkeypatch.setenv("COLUMNS", "200")
    console.show_facts(rows)
    assert capsys.readouterr().out == plain


def test_numbers_are_never_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of numbers that a terminal has no room for go below, in a table of their own; calls break before arguments."""
    monkeypatch.setenv("COLUMNS", "60")
    names = [f"model-of-{k} (parent)" for k in range(5)]
    rows = [[f"task {t}", *(f"{10 * t + k}.0 ± 4.0" for k in range(5))] for t in range(3)]
    console.show(console.table(["task", *names], rows, right=names))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert all(name in out for name in names)
    assert all(cell in out for row in rows for cell in row[1:])
    assert out.count("task 1") == 3
    for width in (60, 30, 22):
        monkeypatch.setenv("COLUMNS", str(width))
        console.show(console.table(["model", "how", "size"], [["x" * 60, "y" * 40, "123,456,789"]], right=["size"]))
        out = capsys.readouterr().out
        assert "123,456,789" in out
        assert (out.count("x"), out.count("y")) == (60, 40)
        assert max(map(len, out.splitlines())) <= width
    monkeypatch.setenv("COLUMNS", "60")
    console.show(console.table(["tensors", "how"], [["x" * 40, "layer_adaptive_slerp(t=0.25)"]]))
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "layer_adaptive_slerp",
        "(t=0.25)",
    ]


def test_all_models_that_cannot_be_opened_are_told(run: Program, tmp_path: Path) -> None:
    """Each with its line; nothing is asked of the network once something is missing."""
    write_models(tmp_path)
    text = "merge_method: ties\nbase_model: {0}/no\nmodels:\n- model: {0}/aa\n- model: {0}/b\n- model: owner/name\n"
    recipe = write_recipe(tmp_path, text + "parameters: {{weight: 1}}\n")
    code, _, err = run("plan", recipe)
    assert code == 3
    assert err.startswith(f"error: {recipe}:4: {tmp_path}/aa: there is no such file")
    assert f"\n  also {recipe}:2: {tmp_path}/no: there is no such file" in err
    assert "owner/name" not in err
