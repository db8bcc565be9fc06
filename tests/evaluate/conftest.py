"""Models that are written once, a cache of its own for every test, and the program with the verb `evaluate`."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluate_models import save_image_classifier, save_language_model

from cli_samples import Program


@pytest.fixture(scope="session")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the language models ``a``, ``b`` and ``merged``."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b", "merged")):
        save_language_model(root / name, seed)
    return root


@pytest.fixture(scope="session")
def image_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of two classes."""
    return save_image_classifier(tmp_path_factory.mktemp("vit"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "geomerge" / "scores"


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    """The program."""
    return Program(capsys)
