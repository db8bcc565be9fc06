"""``geomerge merge``: what it writes, what it says, and what an interruption leaves."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli_samples import SLERP, TIES, Program, write_model, write_models, write_recipe
from geomerge.cli import progress
from geomerge.cli.progress import Lines, Silent


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Program:
    """The program in this process."""
    return Program(capsys)


def test_the_summary(run: Program, tmp_path: Path) -> None:
    """It names the output, its tensors and bytes, the speed; a short run shows no progress; no escape codes."""
    write_models(tmp_path)
    code, out, err = run("merge", write_recipe(tmp_path), tmp_path / "out")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"merged  {tmp_path / 'out'}"
    assert lines[1].startswith("output  32 tensors, ")
    assert "/s)" in lines[1]
    assert "\x1b" not in out
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 32


def test_json(run: Program, tmp_path: Path) -> None:
    """One object on stdout with these keys, whatever else happens."""
    write_models(tmp_path)
    code, out, err = run("merge", write_recipe(tmp_path), tmp_path / "out", "--json", "--quiet", "--compat", "mergekit")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert set(said) == {
        "out", "plan", "method", "compat", "tensors", "resumed", "bytes", "seconds", "bytes_per_second",
        "rounding_loss", "codes", "notes",
    }  # fmt: skip
    assert (said["method"], said["compat"], said["tensors"], said["resumed"]) == ("slerp", "mergekit", 32, 0)
    assert said["bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())


def test_a_large_rounding_loss_is_said(run: Program, tmp_path: Path) -> None:
    """Small task vectors averaged in bfloat16: the summary says how much is lost and what keeps it."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(256, 256, generator=generator)
    for name in ("a", "b"):
        near = base * 0.02 + 1e-4 * torch.randn(256, 256, generator=generator)
        write_model(tmp_path / name, {"model.embed_tokens.weight": near.to(torch.bfloat16)})
    text = "merge_method: linear\nmodels: [{{model: {0}/a}}, {{model: {0}/b}}]\nparameters: {{weight: 1}}\n"
    _, out, _ = run("merge", write_recipe(tmp_path, text), tmp_path / "out")
    flat = " ".join(out.split())
    assert " loss rounding to bfloat16 takes " in flat
    assert "% of the task vectors' norm: `dtype: float32` or `rounding: stochastic` keep it" in flat
    _, out, _ = run("merge", write_recipe(tmp_path, text + "dtype: float32\n"), tmp_path / "out32")
    assert "\nloss" not in out


def test_a_saved_plan_merges_to_the_same_bytes(run: Program, tmp_path: Path) -> None:
    """`plan --save` and `merge FILE` give what `merge RECIPE` gives; its profile cannot be changed any more."""
    write_models(tmp_path)
    recipe = write_recipe(tmp_path, TIES)
    assert run("merge", recipe, tmp_path / "direct", "--quiet").code == 0
    assert run("plan", recipe, "--save", tmp_path / "plan.json", "--no-estimate").code == 0
    assert run("merge", tmp_path / "plan.json", tmp_path / "saved", "--quiet").code == 0
    _same(tmp_path / "direct", tmp_path / "saved")
    code, _, err = run("merge", tmp_path / "plan.json", tmp_path / "other", "--compat", "mergekit")
    assert code == 2
    assert "a saved plan's profile cannot be changed" in err


def test_options_reach_the_run(run: Program, tmp_path: Path) -> None:
    """Shards of the size asked for, one thread, an output replaced with --force; a bad size or device is refused."""
    write_models(tmp_path)
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    assert run("merge", recipe, out, "--shard-size", "2kB", "--threads", "1", "--durable").code == 0
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert run("merge", recipe, out, "--force").code == 0
    assert (out / "model.safetensors").exists()
    assert run("merge", recipe, tmp_path / "x", "--shard-size", "5B").code == 2
    assert run("merge", recipe, tmp_path / "x", "--device", "quantum").code == 2
    assert not list(tmp_path.glob("x*"))


def test_interrupted_and_resumed(run: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the run with 130, keeps OUT.partial and says how to go on; that command gives the same bytes."""
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        tensors = {f"model.layers.{i}.w": torch.randn(600, 500, generator=generator) for i in range(8)}
        write_model(tmp_path / name, tensors, {"model_type": "toy", "num_hidden_layers": 8})
    recipe, out = write_recipe(tmp_path, SLERP.split("parameters")[0] + "parameters: {{t: 0.3}}\n"), tmp_path / "out"
    assert run("merge", recipe, tmp_path / "whole", "--quiet").code == 0

    class Interrupting(Silent):
        """Sends the signal that Ctrl-C sends when half of the bytes are written, and lets no tensor finish after."""

        def advance(self, nbytes: int) -> None:
            super().advance(nbytes)
            if self.done > self.total / 2:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                time.sleep(0.2)

    # A shell that started the tests in the background has set SIGINT to be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patched:
        patched.setattr(progress, "watch", lambda title, quiet: Interrupting(title))
        code, said, err = run("merge", recipe, out, "--threads", "2")
    signal.signal(signal.SIGINT, before)
    assert (code, said) == (130, "")
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    assert err.splitlines() == [
        f"interrupted: what is finished is kept in {tmp_path / 'out.partial'}",
        f"  continue with: geomerge merge {recipe} {out} --resume --threads 2",
    ]
    words = err.splitlines()[1].split("geomerge ")[1].split()
    code, said, err = run(*words, "--json")
    assert (code, err) == (0, "")
    assert 0 < json.loads(said)["resumed"] < 8
    assert not (tmp_path / "out.partial").exists()
    _same(tmp_path / "whole", out)


def test_interrupted_before_anything_was_written(run: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the models are opened there is nothing to resume, and nothing is claimed."""

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("geomerge.diagnose.guarded.make_plan", interrupted)
    write_models(tmp_path)
    assert run("merge", write_recipe(tmp_path), tmp_path / "out") == (130, "", "interrupted: nothing was written\n")


def test_a_resumed_run_says_so(run: Program, tmp_path: Path) -> None:
    """--resume without anything to resume is an ordinary run, and says that it was."""
    write_models(tmp_path)
    code, out, _ = run("merge", write_recipe(tmp_path), tmp_path / "out", "--resume")
    assert code == 0
    assert "\nresumed  nothing: no tensor of an earlier run could be kept\n" in out
    assert "\nresumed" not in run("merge", write_recipe(tmp_path), tmp_path / "out", "--force").out


def test_lines_come_after_two_seconds_and_then_every_five(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes, share, rate and the time left, of this run alone; silent before the second second."""
    now = 100.0
    lines = Lines("merging", clock=lambda: now)
    with lines:
        lines.start(10_000_000_000, 2_000_000_000)
        for second in range(1, 9):
            now = 100.0 + second
            lines.advance(1_000_000_000)
    assert capsys.readouterr() == (
        "",
        "merging: 4 GB of 10 GB (40 %), 1 GB/s, 6.0 s left\nmerging: 9 GB of 10 GB (90 %), 1 GB/s, 1.0 s left\n",
    )


def test_what_comes_before_the_first_bytes_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run that measures for a minute and then writes as ever is told as quick as it is."""
    times = iter([0.0, 0.0, 60.0, 60.5])
    lines = Lines("merging", clock=lambda: next(times))
    lines.start(10_000_000_000, 8_000_000_000)
    lines.advance(250_000_000)
    lines.advance(250_000_000)
    assert capsys.readouterr().err == "merging: 8.5 GB of 10 GB (85 %), 500 MB/s, 3.0 s left\n"


def test_progress_suits_the_stream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar on a terminal, lines elsewhere (a terminal without control codes counts as elsewhere), nothing when asked."""
    assert type(progress.watch("x")) is Lines
    assert type(progress.watch("x", quiet=True)) is Silent
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert type(progress.watch("x")) is progress.Bar
    monkeypatch.setenv("TERM", "dumb")
    assert type(progress.watch("x")) is Lines


def test_the_bar_is_taken_away_by_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving the context stops the bar, so that the message after it is not overwritten; it never has a thread of its own."""
    monkeypatch.setenv("TERM", "xterm")
    before = set(threading.enumerate())
    bar = progress.Bar("merging")

    def fail() -> None:
        with bar:
            bar.start(10, 0)
            bar.advance(5)
            assert bar._bar is not None
            # A run may fork only while there is no other thread; one of an earlier test may just be ending.
            assert not set(threading.enumerate()) - before
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert bar._bar is None


def _same(one: Path, other: Path) -> None:
    files = sorted(p.name for p in one.iterdir())
    assert sorted(p.name for p in other.iterdir()) == files
    for name in files:
        if name != "README.md":  # the card's title is the directory's name
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
