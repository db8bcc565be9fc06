"""Where built suites are kept: ``$XDG_CACHE_HOME/geomerge/lab/``, one directory for each content of the settings."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FORMAT = 1
"""The version of a suite's directory; part of the key."""


def lab_cache() -> Path:
    """The directory of all built suites; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME")
    # The specification of XDG says that a relative path is to be ignored.
    root = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return root / "geomerge" / "lab"


def suite_place(name: str, size: str, seed: int, settings: dict[str, Any]) -> Path:
    """The directory of one suite: its name for people, and a hash of all that its models depend on."""
    content = json.dumps([FORMAT, name, size, seed, settings], sort_keys=True, separators=(",", ":"))
    return lab_cache() / f"{name}-{size}-{seed}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold a suite's directory for one build at a time; a second waits. The lock ends with the process that holds it."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_directory(place: Path, fill: Callable[[Path], None]) -> None:
    """Make a directory that appears whole or not at all.

    Args:
        place: Its name. When it exists, nothing is done.
        fill: Writes its content into the empty directory that it is given.
    """
    if place.exists():
        return
    unfinished = place.with_name(f"{place.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    fill(unfinished)
    unfinished.rename(place)


def write_json(place: Path, data: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    unfinished = place.with_name(f"{place.name}.partial")
    unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(place)
