"""A merge in shards: in any order, repeated, killed, run twice, and the bytes of one machine's run; all else is refused."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import geomerge as gm
import tiny
from cli_samples import Program
from geomerge.checkpoint.output_lock import LOCK, own_lock, take_lock
from geomerge.checkpoint.shared_output import ShardedOutput
from geomerge.engine import journal as journal_module
from geomerge.engine.plan import Node, Operand
from geomerge.engine.shards import divide, finalize, parse_shard, run_shard

RECIPE = """\
merge_method: linear
models:
- {{model: {0}/a, parameters: {{weight: {1}}}}}
- {{model: {0}/b, parameters: {{weight: 1}}}}
"""
SIZE = 20_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two models, and the output of an undisturbed run on one machine."""
    tiny.family(tmp_path, "base a b", dtype=torch.bfloat16)
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    gm.merge(RECIPE.format(tmp_path, 1), tmp_path / "whole" / "out", shard_size=SIZE)
    return tmp_path


def shard(root: Path, which: str, *, weight: float = 1, **options: Any) -> gm.Report:
    """Make one shard."""
    plan = gm.plan(RECIPE.format(root, weight))
    return run_shard(plan, root / "out", *parse_shard(which), **{"shard_size": SIZE, "threads": 1} | options)


def check(root: Path) -> None:
    """The output is the undisturbed run's, file for file, and nothing else is left."""
    assert tiny.digests(root / "out") == tiny.digests(root / "whole" / "out")
    assert not (root / "out.partial").exists()
    assert sorted(p.name for p in (root / "out").iterdir()) == sorted(
        p.name for p in (root / "whole" / "out").iterdir()
    )


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 50])
def test_any_order_gives_the_bytes_of_one_machine(shards: int, root: Path) -> None:
    """Shards made in a random order, one of them twice; also more shards than tensors."""
    order = random.Random(shards).sample(range(1, shards + 1), shards)
    for i in [*order, order[0]]:
        shard(root, f"{i}/{shards}")
    assert finalize(root / "out").tensors == len(tiny.read(root / "whole" / "out"))
    check(root)


def test_the_program(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same by the command line; an unfinished output names the shard that is missing, with exit code 1."""
    run = Program(capsys)
    recipe = root / "recipe.yml"
    recipe.write_text(RECIPE.format(root, 1))
    words = ("merge", recipe, root / "out", "--shard-size", SIZE, "--quiet", "--shard")
    code, out, err = run(*words, "2/2")
    assert (code, err) == (0, "")
    assert f"geomerge finalize {root / 'out'}\n" in out
    assert run("finalize", root / "out").code == 1
    assert run(*words, "1/2", "--json").code == 0
    assert run("finalize", root / "out", "--json").code == 0
    text = json.loads((root / "whole/out/geomerge.json").read_text())
    assert {**tiny.manifest(root / "out"), "plan": text["plan"]} == text
    for bad in ("0/2", "3/2", "2", "1/0", "-1/2", "a/b"):
        assert run(*words, bad).code == 2


def test_missing_shards_are_named(root: Path) -> None:
    """Which have not begun, which are half made and what they lack; what is there stays."""
    shard(root, "1/3")
    with pytest.raises(KeyboardInterrupt):
        shard(root, "2/3", progress=tiny.Interrupt(0.3))
    with pytest.raises(
        gm.RunError, match=r"2 of 3 shards are missing: 2/3 .*such as model.* 3/3 \(not begun"
    ) as caught:
        finalize(root / "out")
    assert "--shard" in str(caught.value)
    assert not (root / "out").exists()
    shard(root, "3/3")
    shard(root, "2/3")
    finalize(root / "out")
    check(root)


def test_nothing_to_finalize(root: Path) -> None:
    """No shard has begun, an ordinary run was interrupted, or it is no output at all: refused, and nothing is left behind."""
    with pytest.raises(gm.UsageError, match="no shard has begun"):
        finalize(root / "out")
    assert not (root / "out.partial").exists()
    with pytest.raises(KeyboardInterrupt):
        gm.merge(RECIPE.format(root, 1), root / "out", progress=tiny.Interrupt(0.5))
    before = tiny.digests(root / "out.partial")
    with pytest.raises(gm.UsageError, match="no shard has begun"):
        finalize(root / "out")
    with pytest.raises(gm.UsageError, match="interrupted run without shards"):
        shard(root, "1/2")
    assert tiny.digests(root / "out.partial") == before


def test_repeated_on_a_finished_output(root: Path) -> None:
    """A late twin of a shard, and a second finalize, change nothing and are no error; another merge is refused as ever."""
    for i in (1, 2):
        shard(root, f"{i}/2")
    finalize(root / "out")
    report = shard(root, "1/2")
    assert report.resumed == report.tensors
    finalize(root / "out")
    check(root)
    with pytest.raises(gm.UsageError, match="the output exists"):
        shard(root, "1/2", weight=3)
    assert not (root / "out.partial").exists()


def test_finalize_killed_after_the_rename(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own files may be left in the output; the next finalize takes them away."""
    for i in (1, 2):
        shard(root, f"{i}/2")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finalize(root / "out")
    assert (root / "out" / ".geomerge").exists()
    finalize(root / "out")
    check(root)


def test_existing_output_is_replaced_at_the_end_only(root: Path) -> None:
    """--force on shards lets them work beside an old model; finalize replaces it, when it is told to as well."""
    tiny.llama(root / "out", 9)
    before = tiny.digests(root / "out")
    with pytest.raises(gm.UsageError, match="the output exists"):
        shard(root, "1/1")
    shard(root, "1/1", force=True)
    with pytest.raises(gm.UsageError, match="the output exists"):
        finalize(root / "out")
    assert tiny.digests(root / "out") == before
    finalize(root / "out", force=True)
    check(root)


@pytest.mark.parametrize(
    ("which", "options", "says"),
    [
        ("2/2", {"weight": 3}, "plan"),
        ("2/3", {}, r"shards \(2 there, 3 here\)"),
        ("2/2", {"shard_size": SIZE * 2}, rf"shard_size \({SIZE} there, {SIZE * 2} here\)"),
    ],
)
def test_another_merge_is_refused(which: str, options: dict[str, Any], says: str, root: Path) -> None:
    """Another recipe, another number of shards, another layout: what differs is named, nothing is touched."""
    shard(root, "1/2")
    before = tiny.digests(root / "out.partial")
    with pytest.raises(gm.UsageError, match=f"begun otherwise: (another )?{says}"):
        shard(root, which, **options)
    left = tiny.digests(root / "out.partial")
    assert {name: digest for name, digest in left.items() if not name.endswith(".lock")} == {
        name: digest for name, digest in before.items() if not name.endswith(".lock")
    }


def test_another_version_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with another torch could write other bits, and the manifest could tell only one of the two."""
    shard(root, "1/2")
    monkeypatch.setattr("geomerge.engine.shards.versions", lambda: {"python": "3", "torch": "1.0", "numpy": "1"})
    with pytest.raises(gm.UsageError, match=r"torch \(.* there, 1\.0 here\)"):
        shard(root, "2/2")


def test_a_run_without_shards_leaves_them_alone(root: Path) -> None:
    """--resume without --shard would find no journal and start anew: it must not sweep away what machines have made."""
    shard(root, "1/2")
    for options in ({}, {"resume": True}):
        with pytest.raises(gm.UsageError, match=r"is being made in shards|interrupted run"):
            gm.merge(RECIPE.format(root, 1), root / "out", shard_size=SIZE, **options)
    shard(root, "2/2")
    finalize(root / "out")
    check(root)


def test_same_shard_at_the_same_time(root: Path) -> None:
    """The second process is refused; other shards are not; neither finalize nor an ordinary run comes between."""
    shard(root, "1/2")
    with ShardedOutput(root / "out", 2, 2):
        with pytest.raises(gm.UsageError, match="shard 2/2 is being made by another process"):
            shard(root, "2/2")
        assert shard(root, "1/2").resumed > 0
        with pytest.raises(gm.UsageError, match="another run"):
            finalize(root / "out")
        with pytest.raises(gm.UsageError, match="another run"):
            gm.merge(RECIPE.format(root, 1), root / "out", force=True)
    lock, _ = take_lock(root / "out.partial", root / "out")
    with pytest.raises(gm.UsageError, match="another run"):
        shard(root, "2/2")
    os.close(lock)
    shard(root, "2/2")
    finalize(root / "out")
    check(root)


def test_without_locks_twins_are_harmless(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that knows no locks the same shard made by two at once still gives the right bytes."""

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    plan = gm.plan(RECIPE.format(root, 1))
    failed: list[BaseException] = []

    def work(i: int) -> None:
        try:
            run_shard(plan, root / "out", i, 2, shard_size=SIZE, threads=1)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    twins = [threading.Thread(target=work, args=(i,)) for i in (1, 1, 2, 2)]
    for twin in twins:
        twin.start()
    for twin in twins:
        twin.join()
    assert not failed
    finalize(root / "out")
    check(root)


def test_a_finished_output_is_told_alike(root: Path) -> None:
    """As large the second time as the first."""
    for which in ("1/2", "2/2"):
        shard(root, which)
    told = [finalize(root / "out") for _ in range(2)]
    assert told[0].nbytes == told[1].nbytes > 0


def test_another_shard_begins_between_two_looks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes meanwhile is not taken for an interrupted run without shards."""
    listed = Path.iterdir

    def beaten(path: Path) -> Iterator[Path]:
        if path.name != "out.partial":
            return listed(path)
        if not (path / LOCK).exists():  # made while the directory is listed: the list may lack it
            (path / LOCK).touch()
        else:
            (path / ".geomerge").mkdir(exist_ok=True)
        (path / "model-00001-of-00002.safetensors").touch()
        return (p for p in listed(path) if p.name.startswith("model"))

    monkeypatch.setattr(Path, "iterdir", beaten)
    ShardedOutput(root / "out", 1, 2).close()


def test_many_start_at_once(root: Path) -> None:
    """Four processes that begin together prepare the files once, and none is in another's way."""
    recipe = root / "recipe.yml"
    recipe.write_text(RECIPE.format(root, 1))
    code = (
        "import os, sys, time, geomerge as gm\nfrom geomerge.engine.shards import run_shard\n"
        f"plan = gm.plan({RECIPE.format(root, 1)!r})\n"
        "children = []\n"
        "for i in range(1, 5):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        status = 1\n"
        "        try:\n"
        f"            run_shard(plan, {str(root / 'out')!r}, i, 4, shard_size={SIZE}, threads=1)\n"
        "            status = 0\n"
        "        finally:\n"
        "            os._exit(status)\n"
        "    children.append(child)\n"
        "print([os.waitpid(c, 0)[1] for c in children])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 0, 0, 0]", done.stderr
    finalize(root / "out")
    check(root)


def test_preparation_killed_half_way(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next shard prepares again: files that are there are taken as they are."""
    with monkeypatch.context() as patched:
        patched.setattr(ShardedOutput, "_place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shard(root, "1/2")
    assert (root / "out.partial").is_dir()
    for i in (2, 1):
        shard(root, f"{i}/2")
    finalize(root / "out")
    check(root)


def test_resumed_shard_makes_the_rest_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same machine a killed shard goes on; on another its unflushed bytes are not believed, a complete one's are."""
    monkeypatch.setattr("geomerge.engine.execute._BUNDLE_TENSORS", 1)
    shard(root, "2/2")
    with pytest.raises(KeyboardInterrupt):
        shard(root, "1/2", progress=tiny.Interrupt(0.5))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(journal_module, "boot_id", lambda: "another machine")
        report = shard(root, "2/2")
        assert report.resumed == report.tensors
    with pytest.raises(KeyboardInterrupt):
        shard(root, "1/2", progress=tiny.Interrupt(0.9))
    report = shard(root, "1/2")
    assert 0 < report.resumed < report.tensors
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(journal_module, "boot_id", lambda: "another machine")
        report = shard(root, "1/2")
        assert report.resumed == report.tensors
    finalize(root / "out")
    check(root)


def test_incomplete_shard_of_another_machine_is_made_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine that died had not flushed may be lost, whatever its journal says."""
    monkeypatch.setattr("geomerge.engine.execute._BUNDLE_TENSORS", 1)
    with pytest.raises(KeyboardInterrupt):
        shard(root, "1/1", progress=tiny.Interrupt(0.5))
    monkeypatch.setattr(journal_module, "boot_id", lambda: "another machine")
    assert shard(root, "1/1").resumed == 0
    finalize(root / "out")
    check(root)


def test_input_changed_between_two_shards(root: Path) -> None:
    """Where the plan's fingerprint does not look either: the older shard is named, and making it again heals it."""
    shard(root, "1/2")
    os.utime(root / "a" / "model.safetensors", ns=(1, 1))
    shard(root, "2/2")
    with pytest.raises(gm.RunError, match="input was changed between the shards") as caught:
        finalize(root / "out")
    assert "run shard 1/2 again" in str(caught.value)
    assert shard(root, "1/2").resumed == 0
    finalize(root / "out")
    check(root)


def test_damaged_working_files(root: Path) -> None:
    """A weight file that shrank, a plan or a description that is noise: an error with the file's name."""
    shard(root, "1/1")
    partial = root / "out.partial"
    weights = next(partial.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(gm.RunError, match="was changed since"):
        finalize(root / "out")
    with pytest.raises(gm.RunError, match="was changed since"):
        shard(root, "1/1")
    weights.write_bytes(content)
    for name in ("plan.json", "shards.json"):
        good = (partial / ".geomerge" / name).read_bytes()
        for noise in (b"", b"[]", b"{", b"\xff"):
            (partial / ".geomerge" / name).write_bytes(noise)
            with pytest.raises(gm.GeomergeError, match=rf"{name}|plan"):
                finalize(root / "out")
        (partial / ".geomerge" / name).write_bytes(good)
    finalize(root / "out")
    check(root)


def test_statistics_of_the_whole_model_are_every_shards(root: Path) -> None:
    """A method that looks at the whole model before its first tensor finds the same on each machine."""
    text = f"merge_method: pcb\nbase_model: {root}/base\nmodels: [{{model: {root}/a}}, {{model: {root}/b}}]\n"
    plan = gm.plan(text)
    gm.merge(text, root / "alone" / "out", shard_size=SIZE)
    for i in (2, 1):
        run_shard(plan, root / "out", i, 2, shard_size=SIZE, threads=1)
    finalize(root / "out")
    assert tiny.digests(root / "out") == tiny.digests(root / "alone" / "out")


def test_models_in_memory_have_no_shards(tmp_path: Path) -> None:
    """Another machine could not see them."""
    models = {name: {"w": torch.ones(3)} for name in "ab"}
    plan = gm.plan("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n", models=models)
    with pytest.raises(gm.UsageError, match="in memory"):
        run_shard(plan, tmp_path / "out", 1, 1)
    assert not list(tmp_path.iterdir())


def test_division_is_complete_and_as_even_as_it_can_be() -> None:
    """Every position once, in order; for small cases no division into contiguous pieces has a smaller largest one."""
    dice = random.Random(0)
    for _ in range(200):
        sizes = [dice.choice([0, 1, 2, 3, 10, 50]) for _ in range(dice.randint(1, 8))]
        nodes = [Node(str(i), (n,), "F32", (Operand(0, "x"),), None) for i, n in enumerate(sizes)]
        shards = dice.randint(1, 4)
        pieces = divide(nodes, shards)
        assert len(pieces) == shards
        assert [i for piece in pieces for i in piece] == list(range(len(nodes)))
        cuts = itertools.combinations_with_replacement(range(len(sizes) + 1), shards - 1)
        best = min(max(sum(sizes[a:b]) for a, b in itertools.pairwise([0, *c, len(sizes)])) for c in cuts)
        assert max(sum(sizes[i] for i in piece) for piece in pieces) == best


KILLER = """
import os, random, signal, sys, time
import geomerge as gm
from geomerge.engine.shards import run_shard

recipe, out, kills, shards, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
plan = gm.plan(recipe)
dice = random.Random(seed)

class Slow:
    def start(self, total, done):
        pass
    def advance(self, nbytes):
        time.sleep(0.02)  # long enough for a kill to find it at work, however fast the loops are
    def finish(self):
        pass

killed = 0
for attempt in range(kills):
    children = []
    for shard in dice.sample(range(1, shards + 1), 2):
        child = os.fork()
        if not child:
            try:
                run_shard(plan, out, shard, shards, threads=1, tile=8192, shard_size=8_000_000, progress=Slow())
            finally:
                os._exit(0)
        children.append(child)
    time.sleep(dice.uniform(0.0, 0.25))
    for child in children:
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(killed)
"""


def kill_shards(root: Path, out: Path, kills: int) -> int:
    """Start shards of four, two at a time, and kill them at random moments; then make all of them. How many were killed."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (300, 1000) for i in range(20)}
    shapes |= {f"model.layers.{i}.input_layernorm.weight": (1000,) for i in range(20)}
    base = tiny.random_tensors(shapes, 1, dtype=torch.bfloat16)
    tiny.save(root / "base", base)
    tiny.save(root / "a", tiny.random_tensors(shapes, 2, like=base, dtype=torch.bfloat16))
    recipe = root / "recipe.yml"
    recipe.write_text(
        f"merge_method: dare_ties\nbase_model: {root}/base\nmodels: [{{model: {root}/a}}]\n"
        "parameters: {density: 0.5, weight: 1}\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    words = [sys.executable, "-c", KILLER, str(recipe), str(out), str(kills), "4", str(os.getpid())]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=600 + 20 * kills)
    plan = gm.plan(recipe)
    for i in (3, 1, 4, 2):
        run_shard(plan, out, i, 4, shard_size=8_000_000)
    finalize(out)
    gm.merge(recipe, root / "whole" / "out", shard_size=8_000_000)
    assert tiny.digests(out) == tiny.digests(root / "whole" / "out")
    return int(done.stdout)


def test_shards_killed_at_random_moments(tmp_path: Path) -> None:
    """Two of four shards at a time die by SIGKILL, six times; made again, the directory is byte-identical."""
    assert kill_shards(tmp_path, tmp_path / "out", 6) >= 2


def test_locks_of_shards_are_the_processes_own(tmp_path: Path) -> None:
    """Within one process a second descriptor is refused, too; closing frees it."""
    lock = own_lock(tmp_path / "1.lock")
    assert lock is not None
    assert own_lock(tmp_path / "1.lock") is None
    os.close(lock)
    again = own_lock(tmp_path / "1.lock")
    assert again is not None
    os.close(again)
