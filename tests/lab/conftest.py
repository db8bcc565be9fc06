"""Suites for the tests of the lab: a cache of their own, and one mlp suite that is built once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from geomerge.lab.build import build
from geomerge.lab.suite import Suite


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def built(shared: Path) -> Callable[..., Suite]:
    """Builds suites in a cache of the whole run."""

    def once(*arguments: Any) -> Suite:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
            return build(*arguments)

    return once


@pytest.fixture(scope="session")
def mlp(built: Callable[..., Suite]) -> Suite:
    """The suite mlp of seed 0."""
    return built("mlp")


@pytest.fixture
def warm(cache: Path, built: Callable[..., Suite], mlp: Suite) -> Path:
    """A cache of the test's own, in which mlp is there with the seeds 0 and 1."""
    place = cache / "geomerge" / "lab"
    for suite in (mlp, built("mlp", "tiny", 1)):
        assert suite.root.parts[-3:-1] == place.parts[-2:]
        shutil.copytree(suite.root, place / suite.root.name)
    return cache


@pytest.fixture
def random_state_kept() -> Iterator[None]:
    """Fails the test when any of the three global generators has moved."""
    import random

    import numpy as np
    import torch

    def state() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    yield
    assert state() == before


@pytest.fixture
def files() -> Callable[[Path], dict[str, bytes]]:
    """Reads the content of every file under a directory."""

    def read(root: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.name != "lock"
        }

    return read
