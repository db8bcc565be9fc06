"""Every method on another device: on_elsewhere.py, in a process of its own, because torch does not forget a device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_elsewhere() -> None:
    """All of its tests pass."""
    tests = Path(__file__).with_name("on_elsewhere.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tests.parents[1])
    assert done.returncode == 0, done.stdout[-10_000:]
    assert " passed" in done.stdout
