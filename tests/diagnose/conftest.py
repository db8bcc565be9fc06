"""Fixtures of the diagnosis's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))


from cli_samples import Program


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    """The command line."""
    return Program(capsys)
