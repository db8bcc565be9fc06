"""Killed at any moment and continued: the same bytes; and when not to believe what an earlier run left."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import geomerge as gm
import tiny
from geomerge.engine import journal as journal_module
from geomerge.engine import survey
from geomerge.engine.findings import plain, restored
from geomerge.engine.journal import Journal
from geomerge.engine.plan import Plan
from geomerge.methods import registry
from geomerge.methods.combine import Surveyed
from geomerge.methods.elementwise.emr import Emr
from geomerge.methods.matrix import opcm
from geomerge.methods.selection import Selection

# Imports once; then each merge runs in a forked child that tells through a pipe when it has begun and, slowed down by its
# progress, is killed after a random time. What is left is continued by the next child.
KILLER = """
import os, random, signal, sys, time
import geomerge as gm
from geomerge.checkpoint.writer import JOURNAL
from geomerge.engine import execute, run

recipe, out, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
run.suitable = lambda elements, threads: sys.argv[4] == "processes"
make = execute.Work.make

def slow(self, node, *rest):
    time.sleep(0.015)  # long enough for a kill to find it at work, however fast the loops are
    return make(self, node, *rest)

execute.Work.make = slow
dice = random.Random(os.getpid())

class Slow:
    def __init__(self, begun):
        self.begun = begun
    def start(self, total, done):
        os.write(self.begun, b"x")
    def advance(self, nbytes):
        pass
    def finish(self):
        pass

def merge(begun):
    for _ in range(200):
        try:
            gm.merge(recipe, out, resume=True, threads=2, tile=8192, shard_size=8_000_000, progress=Slow(begun))
            return
        except gm.UsageError:  # the killed run's workers may still be dying
            time.sleep(0.01)

def recorded():
    try:
        with open(f"{out}.partial/{JOURNAL}") as journal:
            return any('"tensor"' in line for line in journal)
    except OSError:
        return False

killed = 0
# On a busy machine six moments may all come before the first tensor: then it goes on, and waits longer.
while killed < kills or (killed < 100 and not recorded()):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            merge(write)
        finally:
            os._exit(0)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    time.sleep(dice.uniform(0.0, 0.14 + (0.0 if recorded() else 0.05 * killed)))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.path.exists(out):
        break
    killed += 1
print(killed)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bfloat16 models of 30 MB each: many tensors of all sizes."""
    return write_large(tmp_path_factory.mktemp("large"))


def write_large(root: Path) -> Path:
    """The models of `large`."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (300, 1000) for i in range(40)}
    shapes |= {f"model.layers.{i}.self_attn.q_proj.weight": (100, 1000) for i in range(40)}
    shapes |= {f"model.layers.{i}.input_layernorm.weight": (1000,) for i in range(40)}
    base = tiny.random_tensors(shapes, 1, dtype=torch.bfloat16)
    tiny.save(root / "base", base)
    tiny.save(root / "a", tiny.random_tensors(shapes, 2, like=base, dtype=torch.bfloat16))
    return root


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_kill_9_at_random_moments(executor: str, large: Path, tmp_path: Path) -> None:
    """Six runs die by SIGKILL at random moments, each continues the last; the finished directory is byte-identical."""
    assert kill_and_resume(executor, large, tmp_path, 6) >= 2


def kill_and_resume(executor: str, large: Path, tmp_path: Path, kills: int) -> int:
    """Kill runs at random moments, finish what they left, compare. Returns how many were killed."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: dare_ties\nbase_model: {large}/base\nmodels: [{{model: {large}/a}}]\n"
        "parameters: {density: 0.5, weight: 1}\n"
    )
    gm.merge(recipe, tmp_path / "whole" / "out", shard_size=8_000_000)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, str(recipe), str(tmp_path / "out"), str(kills), executor],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=600 + 20 * kills,  # only against a hang: a busy machine may take ten times as long as an idle one
    )
    assert killed.stdout, killed.stderr
    if not (tmp_path / "out").exists():  # on a fast machine the last of them may have ended in time
        assert continued(recipe, tmp_path / "out").resumed > 0
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole" / "out")
    return int(killed.stdout)


def continued(recipe: Path, out: Path) -> gm.Report:
    """The rest of a killed run, once its workers are dead."""
    last = time.monotonic() + 60
    while True:
        try:
            return gm.merge(recipe, out, resume=True, shard_size=8_000_000)
        except gm.UsageError:
            if time.monotonic() > last:
                raise
            time.sleep(0.05)


RECIPE = """\
merge_method: linear
models:
- {{model: {0}/a, parameters: {{weight: {1}}}}}
- {{model: {0}/b, parameters: {{weight: 1}}}}
"""


@pytest.fixture
def stopped(tmp_path: Path) -> Callable[..., Path]:
    """Makes two models and an output that was interrupted half-way; returns its `OUT.partial`."""

    def make(**options: Any) -> Path:
        tiny.family(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            gm.merge(RECIPE.format(tmp_path, 1), tmp_path / "out", threads=1, progress=tiny.Interrupt(0.5), **options)
        return tmp_path / "out.partial"

    return make


@pytest.fixture(autouse=True)
def _journal_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles of one tensor, so that a tiny model's run can be half finished."""
    monkeypatch.setattr("geomerge.engine.execute._BUNDLE_TENSORS", 1)


def resume(tmp_path: Path, weight: float = 1, **options: Any) -> Any:
    """Continue the interrupted output of `stopped` and compare it with an undisturbed run."""
    report = gm.merge(RECIPE.format(tmp_path, weight), tmp_path / "out", resume=True, **options)
    gm.merge(RECIPE.format(tmp_path, weight), tmp_path / "whole" / "out")
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole" / "out")
    return report


def lines(partial: Path) -> list[dict[str, Any]]:
    """The journal's lines."""
    return [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines() if line]


def poison(partial: Path) -> None:
    """Overwrite all tensor bytes of an interrupted output."""
    file = partial / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\x7f" * (len(data) - start)
    file.write_bytes(data)


def test_finished_tensors_are_not_made_again(stopped: Callable[..., Path], tmp_path: Path) -> None:
    """A resumed run keeps what the journal vouches for, and says how many tensors that were."""
    partial = stopped()
    finished = len(lines(partial)) - 1
    report = resume(tmp_path)
    assert 0 < report.resumed == finished < report.tensors


def test_saved_plan_is_resumed_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of relative paths goes on from elsewhere with what the journal vouches for."""
    tiny.family(tmp_path)
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    plan = gm.plan(RECIPE.format(".", 1))
    plan.save("plan.json")
    with pytest.raises(KeyboardInterrupt):
        gm.merge(plan, "out", threads=1, progress=tiny.Interrupt(0.5))
    gm.merge(plan, "whole/out")
    monkeypatch.chdir(tmp_path / "whole")
    report = gm.merge(Plan.load("../plan.json"), "../out", resume=True)
    assert report.resumed > 0
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole" / "out")


def test_another_recipe_is_refused(stopped: Callable[..., Path], tmp_path: Path) -> None:
    """Resuming with another recipe would mix two merges: refused, what is there stays; --force starts anew."""
    partial = stopped()
    before = tiny.digests(partial)
    with pytest.raises(gm.UsageError, match="another plan") as caught:
        gm.merge(RECIPE.format(tmp_path, 3), tmp_path / "out", resume=True)
    assert "--force" in str(caught.value)
    assert "out.partial" in str(caught.value)
    assert tiny.digests(partial) == before
    assert gm.merge(RECIPE.format(tmp_path, 3), tmp_path / "out", force=True).resumed == 0


def test_other_options_are_refused(stopped: Callable[..., Path], tmp_path: Path) -> None:
    """Another shard size gives other files: it cannot continue these."""
    stopped()
    with pytest.raises(gm.UsageError, match=r"does not fit|another plan"):
        gm.merge(RECIPE.format(tmp_path, 1), tmp_path / "out", resume=True, shard_size=5000)


def test_neither_resume_nor_force_is_refused(stopped: Callable[..., Path], tmp_path: Path) -> None:
    """Without a word, an interrupted run is neither continued nor thrown away."""
    partial = stopped()
    before = tiny.digests(partial)
    with pytest.raises(gm.UsageError, match="interrupted run") as caught:
        gm.merge(RECIPE.format(tmp_path, 1), tmp_path / "out")
    assert "--resume" in str(caught.value)
    assert tiny.digests(partial) == before


def test_journal_of_another_boot_is_not_believed(stopped: Callable[..., Path], tmp_path: Path) -> None:
    """After a power cut the bytes may be lost although the journal names them: everything is made again."""
    partial = stopped()
    head, *rest = lines(partial)
    text = "".join(json.dumps(line) + "\n" for line in (head | {"boot": "before the power cut"}, *rest))
    (partial / "journal.jsonl").write_text(text)
    poison(partial)
    assert resume(tmp_path).resumed == 0


def test_durable_journal_outlives_a_boot(
    stopped: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that flushed its files can be continued even then; one that continues it without flushing takes that back."""
    partial = stopped(durable=True)
    assert lines(partial)[0]["durable"] is True
    finished = len(lines(partial)) - 1
    monkeypatch.setattr(journal_module, "boot_id", lambda: "after the power cut")
    with pytest.raises(KeyboardInterrupt):
        gm.merge(
            RECIPE.format(tmp_path, 1),
            tmp_path / "out",
            resume=True,
            threads=1,
            durable=False,
            progress=tiny.Interrupt(0.8),
        )
    assert lines(partial)[0]["durable"] is False
    assert len(lines(partial)) - 1 > finished
    monkeypatch.setattr(journal_module, "boot_id", lambda: "after another power cut")
    poison(partial)
    assert resume(tmp_path).resumed == 0


def test_touched_input_is_not_mixed_in(
    stopped: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A parent that was touched since may have changed where its fingerprint does not look: nothing old is kept."""
    stopped()
    file = tmp_path / "a" / "model.safetensors"
    os.utime(file, ns=(1, 1))
    assert resume(tmp_path).resumed == 0
    assert "a parent's file has been changed, or touched, since the interrupted run" in caplog.text


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_cut_off_last_line_is_survived(cut: int, stopped: Callable[..., Path], tmp_path: Path) -> None:
    """A kill in the middle of a journal's line loses that tensor only, and the next line is not glued to its rest."""
    partial = stopped()
    journal = partial / "journal.jsonl"
    whole = journal.read_bytes()
    finished = len(lines(partial)) - 1
    last = whole.rstrip(b"\n").rsplit(b"\n", 1)[1]
    journal.write_bytes(whole[: len(whole) - 1 - min(cut, len(last) - 1)])
    with pytest.raises(KeyboardInterrupt):
        gm.merge(RECIPE.format(tmp_path, 1), tmp_path / "out", resume=True, threads=1, progress=tiny.Interrupt(0.8))
    assert resume(tmp_path).resumed > finished


def test_journal_of_noise_is_not_believed(stopped: Callable[..., Path], tmp_path: Path) -> None:
    """An empty journal, or one of random bytes, vouches for nothing."""
    partial = stopped()
    for noise in (b"", b"\0\xff\xfe" * 99, b"null\n[1]\n"):
        (partial / "journal.jsonl").write_bytes(noise)
        poison(partial)
        with pytest.raises(KeyboardInterrupt):
            gm.merge(RECIPE.format(tmp_path, 1), tmp_path / "out", resume=True, threads=1, progress=tiny.Interrupt(0.4))
    assert resume(tmp_path).resumed > 0


def test_journal_round_trip(tmp_path: Path) -> None:
    """What the manifest shall say of a tensor comes back bit for bit."""
    path = tmp_path / "journal.jsonl"
    facts = {3: {"coefficients": [0.1, 1 / 3, -1e-300]}, 0: {"loss": [1e-17, 2.5, 4096]}, 7: {}}
    journal = Journal(path, "hash", resume=False)
    journal.record(facts.items())
    journal.close()
    again = Journal(path, "hash", resume=True)
    again.close()
    assert again.finished == facts
    with pytest.raises(gm.UsageError, match="another plan"):
        Journal(path, "other", resume=True)


def test_journal_on_a_full_disk() -> None:
    """A journal that cannot be written is an error of the run, not a traceback."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(gm.RunError, match="not enough room"):
        Journal(Path("/dev/full"), "hash", resume=False)


def test_finished_output_cannot_be_resumed(tmp_path: Path) -> None:
    """`resume` on a finished output is no licence to touch it."""
    tiny.family(tmp_path)
    gm.merge(RECIPE.format(tmp_path, 1), tmp_path / "out")
    before = tiny.digests(tmp_path / "out")
    with pytest.raises(gm.UsageError, match="exists"):
        gm.merge(RECIPE.format(tmp_path, 1), tmp_path / "out", resume=True)
    assert tiny.digests(tmp_path / "out") == before


def test_what_lines_asks_of_a_tensor_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at the merged model that finds LiNeS' α goes on where it was interrupted."""
    tiny.family(tmp_path)
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in "ab"]
    head = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": models}
    text = json.dumps(head | {"steps": [{"lines": {"alpha": "auto", "beta": 0.5}}]}, indent=1)
    gm.merge(text, tmp_path / "whole")
    monkeypatch.setattr(survey, "_LONG", 0.0)
    asked: list[str] = []
    real = survey._norms

    def norms(builder: Any, node: Any) -> tuple[float, float]:
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(node.name)
        return real(builder, node)

    monkeypatch.setattr(survey, "_norms", norms)
    with pytest.raises(KeyboardInterrupt):
        gm.merge(text, tmp_path / "out", threads=1)
    before, asked = asked, []
    monkeypatch.setattr(survey, "_norms", lambda builder, node: (asked.append(node.name), real(builder, node))[1])
    gm.merge(text, tmp_path / "out", threads=1, resume=True)
    assert len(before) == 5
    assert asked
    assert not set(before) & set(asked)
    assert tiny.read(tmp_path / "out").keys() == {*before, *asked}
    for name, tensor in tiny.read(tmp_path / "whole").items():
        assert torch.equal(tiny.read(tmp_path / "out")[name], tensor), name


SURVEYS: dict[str, dict[str, Any]] = {
    "ties": {"scope": "global", "density": 0.3, "weight": 1.0},
    "pcb": {},
    "emr": {"task": 1},
    "tall_mask": {"task": 1, "merged": "ties"},
    "consensus_ties": {},
    "resm": {},
    "knots": {"scope": "global", "full_weights": True},
    "doge_ta": {"steps": 2},
    "opcm": {},
}


def surveying(root: Path, method: str) -> str:
    models = [{"model": str(root / name)} for name in "abc"]
    head = {"merge_method": method, "base_model": str(root / "base"), "models": models}
    return json.dumps(head | {"parameters": SURVEYS[method]}, indent=1)


@pytest.mark.parametrize("method", SURVEYS)
def test_what_surveys_found_outlives_the_run(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run goes on after the look at the whole model, and gives the same bytes."""
    tiny.family(tmp_path)
    text, cls = surveying(tmp_path, method), registry.get(method)
    gm.merge(text, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        gm.merge(text, tmp_path / "out", threads=1, progress=tiny.Interrupt(0.9))
    looked: list[str] = []
    real = cls.survey
    monkeypatch.setattr(cls, "survey", lambda self, walk: (looked.append(method), real(self, walk))[1])
    shutil.copytree(tmp_path / "out.partial", tmp_path / "other.partial")
    assert 0 < gm.merge(text, tmp_path / "out", threads=1, resume=True).resumed < len(tiny.read(tmp_path / "whole"))
    assert not looked
    assert tiny.same(tiny.read(tmp_path / "out"), tiny.read(tmp_path / "whole"))
    # A line that no survey wrote is worth nothing: the run looks again.
    journal = tmp_path / "other.partial" / "journal.jsonl"
    lines = [line for line in journal.read_text().splitlines() if '"survey"' not in line]
    journal.write_text("\n".join([lines[0], '{"survey":0,"found":{"Selection":[1]}}', *lines[1:], ""]))
    gm.merge(text, tmp_path / "other", threads=1, resume=True)
    assert looked == [method]
    assert tiny.same(tiny.read(tmp_path / "other"), tiny.read(tmp_path / "whole"))


@pytest.mark.parametrize(("method", "place", "look"), [("opcm", opcm, "_squares"), ("emr", Emr, "_norms")])
def test_a_survey_goes_on_where_it_was_interrupted(
    tmp_path: Path, method: str, place: Any, look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it found in single tensors is not looked for again, unless that line of the journal is damaged."""
    tiny.family(tmp_path)
    text = surveying(tmp_path, method)
    gm.merge(text, tmp_path / "whole")
    monkeypatch.setattr(survey, "_LONG", 0.0)
    real, asked, limit = getattr(place, look), list[str](), 5

    def looked(first: Any, scan: Any) -> Any:
        if len(asked) == limit:
            raise KeyboardInterrupt
        asked.append(scan.name)
        return real(first, scan)

    monkeypatch.setattr(place, look, looked)
    with pytest.raises(KeyboardInterrupt):
        gm.merge(text, tmp_path / "out", threads=1)
    before, asked, limit = asked, list[str](), -1
    journal = tmp_path / "out.partial" / "journal.jsonl"
    written = journal.read_text().splitlines()
    damaged = next(i for i, line in enumerate(written) if '"look"' in line)
    line = json.loads(written[damaged])
    written[damaged] = json.dumps(line | {"found": {"Other": []}})
    journal.write_text("\n".join([*written, ""]))
    gm.merge(text, tmp_path / "out", threads=1, resume=True)
    again = [name for name in before if name in asked]
    assert len(before) == 5
    assert len(again) == 1
    assert set(asked) | set(before) == set(tiny.read(tmp_path / "out"))
    assert tiny.same(tiny.read(tmp_path / "out"), tiny.read(tmp_path / "whole"))


def test_findings_round_trip() -> None:
    """Numbers bit for bit, infinities among them; what is no number, word, tuple or dictionary is refused."""
    found = {
        "w": [Selection(0.1 + 0.2, 3, (1, 0)), Selection(math.inf, 0, (), last=5)],
        "": [],
        "numpy": [np.float64(1 / 3), np.int64(7), True, None],
    }
    text = json.dumps(plain(Surveyed(found, -1.0), (Surveyed, Selection)))
    back = restored(json.loads(text), (Surveyed, Selection))
    assert back == Surveyed({key: tuple(value) for key, value in found.items()}, -1.0)
    for bad in (torch.ones(2), {1: 2.0}, Selection(1.0, 1, (1,)), object()):
        with pytest.raises(TypeError):
            plain([bad], (Surveyed,))
    for text in ('{"Selection": [1]}', '{"Selection": {}}', '{"Other": []}', '{"": []}', '{"": {}, "Selection": []}'):
        with pytest.raises(ValueError, match=r"missing|no finding"):
            restored(json.loads(text), (Selection,))
