"""The compiled loops give the very bytes of the torch code that they stand for."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geomerge.errors import NotFiniteError
from geomerge.methods import gram, native, order, registry, tile
from geomerge.methods.native import build
from geomerge.methods.tile import Scan, TensorSource
from geomerge.testing import Case, cases
from geomerge.testing.inputs import KINDS, merge, models

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SHAPES = ((3, 50_003), (137,), (2101, 53), (1,), (0, 3), ())

compiled = pytest.mark.skipif(not native.available(), reason="the compiled loops were not built (no C compiler?)")


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "SEGMENT", 1 << 15)


def same(compute: Callable[[], Tensor]) -> Tensor:
    """What is computed with the compiled loops, which must be what is computed without."""
    assert native.available()
    with native.turned_off():
        assert not native.available()
        expected = compute()
    found = compute()
    assert found.dtype == expected.dtype
    assert found.contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8))
    return found


def stored(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]


@compiled
@pytest.mark.parametrize("case", cases(counts=(1, 3)), ids=str)
def test_same_bytes(case: Case) -> None:
    """Every method, dtype in and out, odd sizes, several segments and tiles."""
    if case.method.family == "matrix":
        pairs = [(torch.bfloat16, torch.bfloat16)]
        shapes: tuple[tuple[int, ...], ...] = ((21, 13),)
    else:
        pairs = [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
        shapes = SHAPES
    for (kind, shape), (dtype, out) in zip(itertools.cycle(itertools.product(KINDS, shapes)), pairs * 3):
        tensors = stored(case.models(shape, kind), dtype)
        same(lambda tensors=tensors, out=out: merge(case.made(), tensors, dtype=out, tile=1 << 13))  # type: ignore[misc]
