"""Forked workers: the same bytes as threads, errors that arrive whole, and no worker that outlives its parent."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import geomerge as gm
import tiny
from geomerge.engine import execute, processes, run, survey
from geomerge.errors import NotFiniteError, RunError
from geomerge.methods import native

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux only")


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork whatever the size of the work and the number of the test runner's threads."""
    monkeypatch.setattr(run, "suitable", lambda elements, threads: True)
    monkeypatch.setattr(execute, "_BUNDLE_ELEMENTS", 1 << 8)


def recipe(root: Path, method: str = "ties", parameters: str = "weight: 0.5, density: 0.4") -> str:
    """A base and two fine-tunes of it below `root`, and a recipe that merges them."""
    base = tiny.random_tensors(tiny.llama_shapes(tiny.LLAMA), 0, dtype=torch.bfloat16)
    for name, seed in (("base", None), ("a", 1), ("b", 2)):
        tensors = base if seed is None else tiny.random_tensors(
            tiny.llama_shapes(tiny.LLAMA), seed, like=base, dtype=torch.bfloat16
        )  # fmt: skip
        tiny.save(root / name, tensors, tiny.LLAMA)
    entries = "".join(f"  - {{model: {root / n}, parameters: {{{parameters}}}}}\n" for n in "ab")
    return f"merge_method: {method}\nbase_model: {root / 'base'}\nmodels:\n{entries}dtype: bfloat16\n"


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
@pytest.mark.usefixtures("forking")
def test_same_bytes_as_threads(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers write every file as two threads do; a tensor that all must share is made by threads first."""
    text = recipe(tmp_path, method, "weight: 0.5, density: 0.6")
    monkeypatch.setattr(processes, "LARGE", 500)
    gm.merge(text, tmp_path / "forked", threads=3)
    monkeypatch.setattr(run, "suitable", lambda elements, threads: False)
    gm.merge(text, tmp_path / "threaded", threads=2)
    names = sorted(p.name for p in (tmp_path / "threaded").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "forked").iterdir())
    for name in names:
        ours, theirs = ((tmp_path / d / name).read_bytes() for d in ("forked", "threaded"))
        assert ours.replace(b"forked", b"threaded") == theirs, name


@pytest.mark.usefixtures("forking")
def test_progress_counts_every_byte(tmp_path: Path) -> None:
    """What the workers report adds up to the output."""
    counted = []

    class Counter:
        def start(self, total: int, done: int) -> None:
            counted.append((total, done))

        def advance(self, nbytes: int) -> None:
            counted.append(nbytes)

        def finish(self) -> None:
            counted.append("finished")

    report = gm.merge(recipe(tmp_path), tmp_path / "out", threads=2, progress=Counter())
    assert counted[0] == (report.nbytes, 0)
    assert counted[-1] == "finished"
    assert sum(counted[1:-1]) == report.nbytes


@pytest.mark.usefixtures("forking")
def test_an_error_arrives_whole(tmp_path: Path) -> None:
    """A NaN that a worker meets is the same error as in this process, and nothing stands under the output's name."""
    text = recipe(tmp_path)
    tensors = tiny.random_tensors(tiny.llama_shapes(tiny.LLAMA), 3, dtype=torch.bfloat16)
    tensors["model.norm.weight"][3] = float("nan")
    tiny.save(tmp_path / "b", tensors, tiny.LLAMA)
    with pytest.raises(NotFiniteError, match="NaN") as caught:
        gm.merge(text, tmp_path / "out", threads=2)
    assert "model.norm.weight" in str(caught.value.where)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("forking")
def test_a_killed_worker_is_told_and_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies (as for want of memory) ends the run with one error; --resume finishes with the same bytes."""
    text = recipe(tmp_path)
    gm.merge(text, tmp_path / "whole", threads=2)
    parent, make = os.getpid(), execute.Work.make

    def deadly(self: execute.Work, node: object, *rest: object) -> object:
        if os.getpid() != parent and getattr(node, "name", "") == "model.layers.1.mlp.up_proj.weight":
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, node, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(execute.Work, "make", deadly)
    with pytest.raises(RunError, match="killed"):
        gm.merge(text, tmp_path / "out", threads=2)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(execute.Work, "make", make)
    gm.merge(text, tmp_path / "out", threads=2, resume=True)
    for name in ("model.safetensors", "geomerge.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_errors_survive_pickling() -> None:
    """What, where and hint come out of a pipe as they went in."""
    error = NotFiniteError("the tensor holds NaN", where="a: w", hint="repair it")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is NotFiniteError
    assert (str(copy), copy.where, copy.hint) == (str(error), error.where, error.hint)


ORPHANS = """
import sys, time
import geomerge as gm
from geomerge.engine import execute, run

run.suitable = lambda elements, threads: True
execute._BUNDLE_ELEMENTS = 1 << 8
make = execute.Work.make

def slow(self, node, *rest):
    time.sleep(60)
    return make(self, node, *rest)

execute.Work.make = slow

class Told:
    def start(self, total, done):
        print("begun", flush=True)
    def advance(self, nbytes): pass
    def finish(self): pass

gm.merge(open(sys.argv[1]).read(), sys.argv[2], threads=2, progress=Told())
"""


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    """After kill -9 of the run its workers end at once, so that the lock on the output is free for --resume."""
    (tmp_path / "r.yml").write_text(recipe(tmp_path))
    command = [sys.executable, "-c", ORPHANS, str(tmp_path / "r.yml"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.kill()
    # Its death may take the system a moment.
    for _ in range(100):
        with contextlib.suppress(gm.UsageError):
            gm.merge((tmp_path / "r.yml").read_text(), tmp_path / "out", threads=2, resume=True)
            break
        time.sleep(0.05)
    assert (tmp_path / "out" / "model.safetensors").exists(), "a worker still holds the lock"


SURVEYS = {
    "ties": "weight: 0.5, density: 0.4, scope: global",
    "pcb": "density: 0.3",
    "emr": "task: 2",
    "consensus_ties": "density: 0.3, k: 1",
}


@pytest.mark.parametrize("counting", [False, True], ids=["", "counting"])
@pytest.mark.parametrize("method", SURVEYS)
@pytest.mark.usefixtures("forking")
def test_a_survey_by_workers(method: str, counting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers find of the whole model is what threads find, by bracket and by counting; all bytes are told."""
    text = recipe(tmp_path, method, "").replace("dtype:", f"parameters: {{{SURVEYS[method]}}}\ndtype:")
    if counting:
        monkeypatch.setattr("geomerge.methods.order.choose", lambda *a: None)
    told: list[int] = []

    class Counter:
        def start(self, total: int, done: int) -> None:
            told.append(-total)

        def advance(self, nbytes: int) -> None:
            told.append(nbytes)

        def finish(self) -> None: ...

    crews: list[int] = []
    in_workers = survey.in_workers
    monkeypatch.setattr(survey, "in_workers", lambda *a, **k: crews.append(1) or in_workers(*a, **k))
    gm.merge(text, tmp_path / "forked", threads=3, progress=Counter())
    assert len(crews) >= gm.plan(text).nodes[0].method.surveys  # type: ignore[union-attr]
    assert sum(told) == 0
    monkeypatch.setattr(run, "suitable", lambda elements, threads: False)
    gm.merge(text, tmp_path / "threaded", threads=2)
    assert tiny.same(tiny.read(tmp_path / "forked"), tiny.read(tmp_path / "threaded"))


@pytest.mark.usefixtures("forking")
def test_an_error_in_a_survey(tmp_path: Path) -> None:
    """A NaN that a worker meets while it surveys, like any other."""
    text = recipe(tmp_path).replace("dtype:", "parameters: {scope: global}\ndtype:")
    tensors = tiny.read(tmp_path / "b")
    tensors["model.norm.weight"][3] = float("nan")
    tiny.save(tmp_path / "b", tensors, tiny.LLAMA)
    with pytest.raises(NotFiniteError, match="NaN") as caught:
        gm.merge(text, tmp_path / "out", threads=2)
    assert "model.norm.weight" in str(caught.value.where)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not native.available(), reason="the compiled loops were not built")
def test_no_forks_for_what_compiled_loops_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fork has to be worth it for what torch makes: nothing of TIES and DELLA with the loops, all without."""
    asked: list[int] = []

    def suitable(elements: int, threads: int | None) -> bool:
        asked.append(elements)
        return False

    monkeypatch.setattr(run, "suitable", suitable)
    monkeypatch.setattr(processes, "TINY", -1)
    ties, della = recipe(tmp_path), recipe(tmp_path, "della")
    gm.merge(ties, tmp_path / "compiled")
    gm.merge(della, tmp_path / "della")
    with native.turned_off():
        gm.merge(ties, tmp_path / "torch")
    assert asked == [0, 0, sum(math.prod(shape) for shape in tiny.llama_shapes(tiny.LLAMA).values())]


FORKS_FOR_TINY_TENSORS = """
import sys
from geomerge.late import loaded, put_off
put_off("torch")
from geomerge.cli.app import main
from geomerge.engine import processes
processes.WORTH = int(sys.argv[1]) * processes.TINY
in_workers, forks = processes.in_workers, []
processes.in_workers = lambda *a, **k: forks.append(1) or in_workers(*a, **k)
print(main(["merge", *sys.argv[2:], "--threads", "2", "--quiet"]), len(forks), loaded("torch"))
"""


@pytest.mark.skipif(not native.available(), reason="the compiled loops were not built")
def test_forks_for_very_many_tiny_tensors(tmp_path: Path) -> None:
    """They cost the interpreter's time, so two interpreters make them; nobody needs torch."""
    (tmp_path / "recipe.yml").write_text(recipe(tmp_path))
    count = len(tiny.llama_shapes(tiny.LLAMA))
    for worth, forks in ((count, 1), (count + 1, 0)):
        command = [
            sys.executable,
            "-c",
            FORKS_FOR_TINY_TENSORS,
            str(worth),
            tmp_path / "recipe.yml",
            tmp_path / str(forks),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"0 {forks} False"
    assert tiny.same(tiny.read(tmp_path / "0"), tiny.read(tmp_path / "1"))
    assert (tmp_path / "0/geomerge.json").read_bytes() == (tmp_path / "1/geomerge.json").read_bytes()
