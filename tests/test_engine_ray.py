"""The Ray executor: the bytes of one machine, errors that arrive whole, and a worker that is killed in the middle."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import geomerge as gm
import tiny

RECIPE = """\
merge_method: ties
base_model: {0}/base
models: [{{model: {0}/a}}, {{model: {0}/b}}]
parameters: {{weight: 1, density: 0.5}}
"""
HAVE_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAVE_RAY, reason='Ray is not installed (pip install "geomerge[ray]")')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three models of a few megabytes, and the output of an undisturbed run."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (300, 1000) for i in range(24)}
    base = tiny.random_tensors(shapes, 1, dtype=torch.bfloat16)
    tiny.save(tmp_path / "base", base)
    for seed, name in enumerate("ab", 2):
        tiny.save(tmp_path / name, tiny.random_tensors(shapes, seed, like=base, dtype=torch.bfloat16))
    gm.merge(RECIPE.format(tmp_path), tmp_path / "whole" / "out", shard_size=4_000_000)
    return tmp_path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A local cluster of two workers."""
    import ray

    paths = os.pathsep.join(p for p in sys.path if p)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield ray
    ray.shutdown()


class KillOne:
    """A progress that kills one of the cluster's workers as soon as the first tensors are written."""

    def __init__(self) -> None:
        self.killed: int | None = None

    def start(self, total: int, done: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        if self.killed is None:
            deadline = time.monotonic() + 30
            while self.killed is None and time.monotonic() < deadline:
                self.killed = next(iter(_busy(os.getpid())), None)
            if self.killed is not None:
                os.kill(self.killed, signal.SIGKILL)

    def finish(self) -> None:
        pass


def _busy(root: int) -> list[int]:
    """The processes among the descendants of `root` that carry out one of our tasks."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
    found = []
    for pid, name in names.items():
        above = pid
        while above not in (0, 1, root):
            above = parents.get(above, 0)
        if above == root and name.startswith("ray::make_tensors"):
            found.append(pid)
    return found


@needs_ray
@pytest.mark.slow
def test_same_bytes_though_a_worker_is_killed(cluster: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker dies by SIGKILL while it makes tensors: its task is made again, and the directory is byte-identical."""
    monkeypatch.setattr("geomerge.engine.ray_tasks._SMALLEST", 1)
    progress = KillOne()
    report = gm.merge(RECIPE.format(root), root / "out", executor="ray", shard_size=4_000_000, progress=progress)
    assert report.tensors == 24
    assert progress.killed is not None
    assert tiny.digests(root / "out") == tiny.digests(root / "whole" / "out")


@needs_ray
@pytest.mark.slow
def test_interrupted_and_resumed_by_threads(cluster: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is the driver's: what the cluster finished is kept, whoever goes on."""
    monkeypatch.setattr("geomerge.engine.ray_tasks._SMALLEST", 1)
    with pytest.raises(KeyboardInterrupt):
        gm.merge(RECIPE.format(root), root / "out", executor="ray", shard_size=4_000_000, progress=tiny.Interrupt(0.4))
    report = gm.merge(RECIPE.format(root), root / "out", resume=True, shard_size=4_000_000)
    assert 0 < report.resumed < 24
    assert tiny.digests(root / "out") == tiny.digests(root / "whole" / "out")


@needs_ray
@pytest.mark.slow
def test_statistics_of_the_whole_model(cluster: Any, root: Path) -> None:
    """A method that looks at the whole model before its first tensor finds the same in each worker."""
    text = f"merge_method: pcb\nbase_model: {root}/base\nmodels: [{{model: {root}/a}}, {{model: {root}/b}}]\n"
    gm.merge(text, root / "alone" / "out")
    gm.merge(text, root / "out", executor="ray")
    assert tiny.digests(root / "out") == tiny.digests(root / "alone" / "out")


@needs_ray
@pytest.mark.slow
def test_errors_arrive_as_they_are(cluster: Any, root: Path) -> None:
    """A NaN found by a worker is the error that one machine gives, and nothing stays."""
    tensors = tiny.read(root / "b")
    tensors["model.layers.7.mlp.up_proj.weight"].view(-1)[-1] = float("nan")
    tiny.save(root / "b", tensors)
    with pytest.raises(gm.NotFiniteError, match=r"b: model\.layers\.7\.mlp\.up_proj\.weight"):
        gm.merge(RECIPE.format(root), root / "out", executor="ray")
    assert not (root / "out.partial").exists()


def test_without_ray(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed, the error says how to get it; an unknown name is answered with the known ones."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(gm.UsageError, match=r"geomerge\[ray\]"):
        gm.merge(RECIPE.format(root), root / "out", executor="ray")
    with pytest.raises(gm.UsageError, match="there is no executor 'rai'"):
        gm.merge(RECIPE.format(root), root / "out2", executor="rai")
    assert not list(root.glob("*.partial"))


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_executors_by_name(executor: str, root: Path) -> None:
    """Threads and processes can be asked for; the bytes do not depend on it."""
    gm.merge(RECIPE.format(root), root / "out", executor=executor, shard_size=4_000_000)
    assert tiny.digests(root / "out") == tiny.digests(root / "whole" / "out")
