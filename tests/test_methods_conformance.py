"""Every registered method through the conformance suite, in several segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from geomerge.methods import properties, registry, tile
from geomerge.methods.base import Elementwise, Span, parameter
from geomerge.methods.gram import Gram
from geomerge.methods.random import words
from geomerge.methods.tile import Scan, Tile
from geomerge.testing import CHECKS, Case, cases, check_properties_complete
from geomerge.testing.conformance import check_not_finite, check_properties_hold, check_seed, check_tiles


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that tensors of a hundred thousand elements fill several of."""
    monkeypatch.setattr(tile, "SEGMENT", 1 << 15)


@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(case: Case, check: Callable[[Case], None]) -> None:
    """The method keeps what every method must keep."""
    check(case)


@pytest.mark.parametrize("method", registry.all_methods())
def test_lists_all_its_properties(method: str) -> None:
    """What a method does not list, it lacks."""
    check_properties_complete(method)
