"""A base model for the adapter tests, made once, and a way to run the program."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from adapter_samples import llama  # noqa: E402

from cli_samples import Program  # noqa: E402


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks in float64, its head not tied."""
    return llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tied head."""
    return llama(tmp_path_factory.mktemp("tied") / "llama", tie=True)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Program:
    """Runs the program."""
    return Program(capsys)
