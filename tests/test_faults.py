"""What machines and people do to a run: kills by the dozen, a disk that fills up, inputs that change under it.

`make fault` sets ``GEOMERGE_FAULTS=many``; the ordinary tests take the short forms.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import geomerge as gm
import tiny
from geomerge.engine.plan import Node
from geomerge.engine.shards import finalize, run_shard
from geomerge.engine.sinks import FileSink
from geomerge.methods import native
from test_engine_resume import kill_and_resume, write_large
from test_engine_shards import kill_shards

FULL = Path("/dev/full")
MANY = os.environ.get("GEOMERGE_FAULTS") == "many"
many = pytest.mark.skipif(not MANY, reason="`make fault` runs it; the short form is in test_engine_resume and _shards")
RECIPE = "merge_method: linear\nmodels: [{{model: {0}/a}}, {{model: {0}/b}}]\nparameters: {{weight: 1}}\n"


@many
@pytest.mark.slow
@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_fifty_kills(executor: str, tmp_path: Path) -> None:
    """Fifty SIGKILLs at random moments, spread over as many merges as that takes; every output is byte-identical."""
    large = write_large(tmp_path / "large")
    killed = rounds = 0
    while killed < 50:
        rounds += 1
        (tmp_path / str(rounds)).mkdir()
        killed += kill_and_resume(executor, large, tmp_path / str(rounds), 10)
        shutil.rmtree(tmp_path / str(rounds))


@many
@pytest.mark.slow
def test_fifty_kills_of_shards(tmp_path: Path) -> None:
    """The same for shards, two at a time."""
    killed = rounds = 0
    while killed < 50:
        rounds += 1
        root = tmp_path / str(rounds)
        root.mkdir()
        killed += kill_shards(root, root / "out", 12)
        shutil.rmtree(root)


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two models of 2.4 MB in many tensors, and the output of an undisturbed run."""
    shapes = {f"model.layers.{i}.w": (100, 500) for i in range(24)}
    a = tiny.random_tensors(shapes, 1, dtype=torch.bfloat16)
    tiny.save(tmp_path / "a", a)
    tiny.save(tmp_path / "b", tiny.random_tensors(shapes, 2, like=a, dtype=torch.bfloat16))
    gm.merge(RECIPE.format(tmp_path), tmp_path / "whole" / "out")
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)], check=False, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount program")
    if done.returncode:
        pytest.skip("this process may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(autouse=True)
def _journal_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles of one tensor, so that a small run can be half finished."""
    monkeypatch.setattr("geomerge.engine.execute._BUNDLE_TENSORS", 1)


def fill(disk: Path, left: int) -> Path:
    """Take the disk's room but for `left` bytes."""
    filler = disk / "filler"
    free = shutil.disk_usage(disk).free
    with filler.open("wb") as out:
        os.posix_fallocate(out.fileno(), 0, free - left)
    return filler


def unsupported(descriptor: int, offset: int, size: int) -> None:
    """A file system that cannot allocate."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def merge(root: Path, out: Path, **options: Any) -> gm.Report:
    """The merge of these tests."""
    return gm.merge(RECIPE.format(root), out, **{"threads": 1, "executor": "threads"} | options)


def test_disk_too_small_from_the_beginning(root: Path, small_disk: Path) -> None:
    """Refused before a tensor is read, with the path and the bytes that are needed; with room the same command works."""
    filler = fill(small_disk, 1 << 20)
    with pytest.raises(gm.RunError, match=r"out.*not enough room: 2,4\d\d,\d\d\d bytes are needed"):
        merge(root, small_disk / "out")
    with pytest.raises(gm.RunError, match=r"2,4\d\d,\d\d\d bytes are needed"):
        run_shard(gm.plan(RECIPE.format(root)), small_disk / "shards", 1, 1)
    filler.unlink()
    merge(root, small_disk / "out")
    assert tiny.digests(small_disk / "out") == tiny.digests(root / "whole" / "out")


def test_disk_that_fills_up_while_tensors_are_written(
    root: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where room cannot be allocated: a real ENOSPC in the middle names the file; after room is made, --resume ends it."""
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    free = shutil.disk_usage(small_disk).free
    filler = small_disk / "filler"
    filler.write_bytes(b"\1" * (free - (1 << 20)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(1 << 40))
    with pytest.raises(gm.RunError, match=r"model\.safetensors.*not enough room: 2,4\d\d,\d\d\d bytes"):
        merge(root, small_disk / "out")
    assert not (small_disk / "out").exists()
    filler.unlink()
    report = merge(root, small_disk / "out", resume=True)
    assert 0 < report.resumed < report.tensors
    assert tiny.digests(small_disk / "out") == tiny.digests(root / "whole" / "out")


class _Usage:
    """What `shutil.disk_usage` would say of a disk with so much room."""

    def __init__(self, free: int) -> None:
        self.free = free


class Once:
    """A progress that does something when half of the bytes are written."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act, self.seen, self.total = act, 0, 0
        self.acted = False

    def start(self, total: int, done: int) -> None:
        self.total, self.seen = total, done

    def advance(self, nbytes: int) -> None:
        self.seen += nbytes
        if not self.acted and self.seen * 2 > self.total:
            self.acted = True
            self.act()

    def finish(self) -> None:
        pass


def test_disk_that_somebody_else_fills(root: Path, small_disk: Path) -> None:
    """The tensors have their room, the journal or the side files do not: named, kept, and continued when there is room."""
    with pytest.raises(gm.RunError, match=r"not enough room") as caught:
        merge(root, small_disk / "out", progress=Once(lambda: fill(small_disk, 0)))
    assert str(small_disk) in str(caught.value)
    assert not (small_disk / "out").exists()
    (small_disk / "filler").unlink()
    report = merge(root, small_disk / "out", resume=True)
    assert report.resumed > 0
    assert tiny.digests(small_disk / "out") == tiny.digests(root / "whole" / "out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_write_that_fails(code: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the tenth tensor, whatever the reason: the file is named, with the bytes where it is room that lacks; then resumed."""
    write, count = os.pwrite, 0

    def failing(descriptor: int, data: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count > 10:
            raise OSError(code, os.strerror(code))
        return write(descriptor, data, offset)

    says = "cannot be written" if code == errno.EIO else r"not enough room: 2,4\d\d,\d\d\d bytes"
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", failing)
        with native.turned_off(), pytest.raises(gm.RunError, match=rf"model\.safetensors.*{says}"):
            merge(root, root / "out")
    assert merge(root, root / "out", resume=True).resumed > 0
    assert tiny.digests(root / "out") == tiny.digests(root / "whole" / "out")


@pytest.mark.skipif(
    not native.available() or not FULL.exists(), reason="no compiled loops, or no device that is always full"
)
@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_a_write_of_a_compiled_loop_that_fails(method: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops write by themselves; what the system says to them reaches the user all the same."""
    recipe = RECIPE if method == "linear" else "merge_method: passthrough\nmodels: [{{model: {0}/a}}]\n"
    stored, count = FileSink.stored, 0
    with FULL.open("wb") as full, monkeypatch.context() as patched:

        def somewhere(sink: FileSink, node: Node) -> native.Stored | None:
            nonlocal count
            count += 1
            found = stored(sink, node)
            return found if found is None or count <= 10 else dataclasses.replace(found, file=full.fileno(), offset=0)

        patched.setattr(FileSink, "stored", somewhere)
        with pytest.raises(gm.RunError, match=r"model\.safetensors.*not enough room: 2,4\d\d,\d\d\d bytes"):
            gm.merge(recipe.format(root), root / "out", threads=1)
    assert not (root / "out").exists()
    assert gm.merge(recipe.format(root), root / "out", resume=True).resumed > 0


def test_a_write_that_is_cut_short_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal or a quota may let a write take a part only: the rest follows."""
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda d, data, at: write(d, data[: max(len(data) // 2, 1)], at))
    with native.turned_off():
        merge(root, root / "out")
    assert tiny.digests(root / "out") == tiny.digests(root / "whole" / "out")


def test_flush_that_fails(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server may report a full disk only at fsync: the shard is then not complete, and finalize says so."""

    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    plan = gm.plan(RECIPE.format(root))
    run_shard(plan, root / "out", 2, 2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(gm.RunError, match="not enough room"):
            run_shard(plan, root / "out", 1, 2)
    with pytest.raises(gm.RunError, match=r"1/2 .*not known to have reached the disk"):
        finalize(root / "out")
    run_shard(plan, root / "out", 1, 2)
    finalize(root / "out")
    assert tiny.digests(root / "out") == tiny.digests(root / "whole" / "out")


@pytest.mark.parametrize("durable", [False, True])
def test_durable_flush_that_fails(durable: bool, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --durable a failing flush ends the run with an error of its own; without it nothing is flushed."""

    sync = os.fdatasync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 1 << 20:  # the weights, not the journal
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", full)
    if not durable:
        merge(root, root / "out")
        return
    with pytest.raises(gm.RunError, match="not enough room"):
        merge(root, root / "out", durable=True)


# -- inputs ------------------------------------------------------------------------------------------------------------


def overwrite(file: Path) -> None:
    """Change one byte in place."""
    with file.open("r+b") as out:
        out.seek(-1, os.SEEK_END)
        last = out.read(1)
        out.seek(-1, os.SEEK_END)
        out.write(bytes([last[0] ^ 1]))


def replace(file: Path) -> None:
    """Put a copy in its place."""
    shutil.copyfile(file, file.with_suffix(".copy"))
    file.with_suffix(".copy").rename(file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "grown": lambda file: os.truncate(file, file.stat().st_size + 1),
    "overwritten": overwrite,
    "replaced": replace,
    "removed": Path.unlink,
    "moved": lambda file: file.rename(file.with_name("elsewhere")),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("way", ["threads", "processes", "shard"])
def test_an_input_that_changes_during_the_run(how: str, way: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detected, named, and no output; when the input is as it was, the same command makes the right bytes."""
    monkeypatch.setattr("geomerge.engine.processes._REPORT", 1)
    file = root / "b" / "model.safetensors"
    kept = shutil.copy2(file, root / "kept")
    plan = gm.plan(RECIPE.format(root))

    def run(**options: Any) -> None:
        if way == "shard":
            options.pop("resume", None)
            run_shard(plan, root / "out", 1, 1, threads=1, tile=8192, **options)
            finalize(root / "out")
        else:
            merge(root, root / "out", executor=way, threads=2, tile=8192, **options)

    with pytest.raises(gm.RunError, match=r"/b(/model\.safetensors|: model\.layers)") as caught:
        run(progress=Once(lambda: CHANGES[how](file)))
    assert caught.value.exit_code == 1
    assert not (root / "out").exists()
    file.unlink(missing_ok=True)
    shutil.move(kept, file)
    run(resume=True)
    assert tiny.digests(root / "out") == tiny.digests(root / "whole" / "out")


def test_a_second_run_of_the_same_output(root: Path) -> None:
    """While one is writing, another is refused whatever it asks for, and the first is not disturbed."""
    refused: list[str] = []

    def second() -> None:
        for options in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(gm.UsageError, match="another run") as caught:
                merge(root, root / "out", **options)
            refused.append(str(caught.value))

    merge(root, root / "out", progress=Once(second))
    assert len(refused) == 3
    assert tiny.digests(root / "out") == tiny.digests(root / "whole" / "out")
