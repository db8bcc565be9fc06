"""The compiled loops give the very bytes of the torch code that they stand for."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

import geomerge as gm
from cli_samples import write_models, write_recipe
from geomerge.cli.app import main
from geomerge.errors import NotFiniteError
from geomerge.lab.cache import locked
from geomerge.methods import gram, native, registry, tile
from geomerge.methods.elementwise.arcee_fusion import _divergences, _far_divergences
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


@compiled
@pytest.mark.parametrize("density", [0.3, 0.5, 1 / 3])
@pytest.mark.parametrize(
    "method", ["ties", "breadcrumbs_ties", "breadcrumbs", "dare_ties", "dare_linear", "task_arithmetic"]
)
def test_same_bytes_of_task_vectors(method: str, density: float) -> None:
    """With ties among magnitudes, unequal and negative weights, on coarse grids, where float32 is doubtful most often."""
    for kind, weights in itertools.product(KINDS, ([1.0, 1.0, 1.0], [1.0, 0.3, -0.7], [0.0, 0.5, 2.0])):
        values: dict[str, Any] = {"weight": weights, "density": density, "gamma": 0.1}
        made = registry.get(method)
        made_with = made.make({k: v for k, v in values.items() if k in made.parameters()}, count=3)
        tensors = stored(models(4, (3, 50_003), kind), torch.bfloat16)
        same(lambda m=made_with, t=tensors: merge(m, t, dtype=torch.bfloat16, tile=1 << 13))  # type: ignore[misc]


@compiled
@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties", "dare_ties", "dare_linear", "ram", "ramplus_tl"])
def test_same_bytes_for_any_number_of_experts(method: str, count: int) -> None:
    """Up to four have a loop of their own."""
    made = registry.get(method)
    values: dict[str, Any] = {"weight": [1.0, 0.5, 0.7, 0.3, 0.9][:count], "density": 0.5, "gamma": 0.1}
    ready = made.make({k: v for k, v in values.items() if k in made.parameters()}, count=count)
    for kind in KINDS:
        tensors = stored(models(count + 1, (3, 50_003), kind), torch.bfloat16)
        same(lambda t=tensors: merge(ready, t, dtype=torch.bfloat16))  # type: ignore[misc]


@compiled
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 0.3, 30.0])
def test_same_bytes_of_scores(count: int, size: float) -> None:
    """PCB-Merging's own loop looks at float32 first: task vectors of all sizes, cancelling, equal, with signed zeros."""
    torch.manual_seed(count)
    for seed, (weight, factor, winsor, density) in enumerate(
        [(1.0, 1.0, 0.01, 0.2), (-0.5, -0.7, 0.0, 0.5), (0.0, 1.0, 0.2, 1.0), (0.3, 1.5, 0.49, 0.01)]
    ):
        torch.manual_seed(seed)
        base = torch.randn(5, 5_003) * 0.02
        base[0, ::7], base[1, ::5] = -0.0, 0.0
        base[4, ::2] *= 1e-9  # float32 does not hold the difference to large ones
        experts = [base + size * torch.randn(base.shape) * torch.rand(5, 1) for _ in range(count)]
        experts[-1][2] = 2 * base[2] - experts[0][2]  # opposite to another
        experts[-1][3] = experts[0][3] = base[3]
        values = {"weight": weight, "lambda": factor, "winsor": winsor, "density": density}
        ready = registry.get("pcb").make(values, count=count)
        tensors = stored([base, *experts], torch.bfloat16)
        for out in (torch.float32, torch.bfloat16):  # the latter's results, too, are looked at in float32 first
            same(lambda t=tensors, out=out: merge(ready, t, dtype=out, tile=1 << 13))  # type: ignore[misc]  # noqa: B023


@compiled
@pytest.mark.parametrize("shape", [(60, 896), (40, 1000), (3, 40_000), (900, 64), (700, 63)], ids=str)
@pytest.mark.parametrize("size", [1e-12, 3e-3, 2.0])
def test_same_bytes_of_importances(shape: tuple[int, int], size: float) -> None:
    """Changes that float32 holds and does not, signed zeros, rows that are as they were, equal importances of rows alike."""
    base = torch.randn(shape, dtype=torch.float64) * 0.05
    other = base + torch.randn(shape, dtype=torch.float64) * size * torch.logspace(-2, 1, shape[0]).unsqueeze(1)
    base[:, ::7], other[:, 1::7] = 0.0, -0.0
    base[:, 2::7] = other[:, 2::7] = -0.0
    other[::5] = base[::5]
    base[1], other[1] = base[-1], other[-1]
    base[2, 5] = other[2, 5] = 1.5  # which the quick sums leave to the others
    made = registry.get("arcee_fusion").make({}, count=1)
    for dtype in DTYPES:
        tensors = stored([base, other], dtype)
        for out in (dtype, torch.float64):
            same(lambda tensors=tensors, out=out: merge(made, tensors, dtype=out, tile=1 << 13))  # type: ignore[misc]


@compiled
@pytest.mark.parametrize("size", [1e-19, 5e-21, 1e-21])
def test_same_bytes_of_the_smallest_scores(size: float) -> None:
    """Products of such task vectors are below what float32 holds."""
    torch.manual_seed(0)
    expert = torch.randn(16, 1024) * size
    ready = registry.get("pcb").make({"scope": "tensor", "density": 0.2}, count=1)
    same(lambda: merge(ready, stored([torch.zeros_like(expert), expert], torch.bfloat16), dtype=torch.bfloat16))


def near_rows(columns: int) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Rows of a base and their changes whose divergences come from sums: of all kinds that sums might not be good at."""
    draw = np.random.default_rng(columns)
    noise = draw.standard_normal(columns).clip(-4, 4)
    wide, usual = draw.standard_normal((2, columns)).clip(-2.5, 2.5) * [[0.2], [0.02]]
    ends = np.where(draw.random(columns) < 0.5, 0.5, -0.5)
    few = np.where(draw.random(columns) < 0.02, -0.5, 0.5)
    one = np.zeros(columns)
    one[-1] = 2.0**-5
    return {
        "usual": (usual, 1e-4 * noise),
        "tiny": (usual, 1e-5 * noise),
        "large": (wide, 7e-3 * noise),
        "all up": (wide, 0.02 + 1e-4 * noise),
        "all up and tiny": (wide, 0.02 + 1e-6 * noise),
        "scaled": (wide, 0.03 * wide),
        "at the ends": (ends, 1e-3 * noise),
        "in few places": (few, np.where(few < 0, 5e-3 * noise, 0)),
        "in one place": (wide, one),
        "nowhere": (wide, np.zeros(columns)),
    }


@pytest.mark.parametrize("columns", [2, 7, 64, 900, 4_864])
def test_divergences_are_right(columns: int) -> None:
    """Against forty digits: to a billionth of rows that are near, where the sum of the terms loses 10⁻⁸ and more."""

    def softmax(row: NDArray[np.float64]) -> list[Decimal]:
        powers = [Decimal(float(x)).exp() for x in row]
        total = sum(powers)
        return [power / total + Decimal("1e-8") for power in powers]

    rows = near_rows(columns)
    far = rows["usual"][0] + 0.6, rows["large"][1] * 50
    with localcontext() as context:
        context.prec = 40
        for kind, (base, change) in {**rows, "far": far}.items():
            other = base + change
            found = _divergences(torch.from_numpy(base[None]), torch.from_numpy(other[None]))[0]
            right = float(sum(p * (p / q).ln() for p, q in zip(softmax(other), softmax(base), strict=True)))
            assert found == pytest.approx(right, rel=1e-6 if kind == "far" else 1e-9, abs=1e-22), kind
            if kind == "tiny" and columns > 64:  # what the sum of the terms loses
                as_written = _far_divergences(torch.from_numpy(base[None]), torch.from_numpy(other[None])).item()
                assert 1e-8 < abs(as_written / right - 1) < 1e-4


def same_divergences() -> None:
    """What the loops find is what torch does, for every length of a row's end and every dtype."""
    for columns, dtype in itertools.product((64, 65, 71, 900, 1_003, 4_864), DTYPES):
        base, change = (np.stack(each) for each in zip(*near_rows(columns).values(), strict=True))
        changes = np.concatenate([change, -change, change, change, 40 * change])
        bases = np.concatenate([base, base, base, 1.5 * base, base])
        bases[2 * len(base) : 3 * len(base), ::3] = -0.0
        one, two = (torch.from_numpy(each).to(dtype) for each in (bases, bases + changes))
        near = (one.double().abs().amax(1) <= 0.5) & ((two.double() - one.double()).abs().amax(1) <= 2.0**-5)
        assert 8 < near.sum() < len(near) - 8
        rows = native.Rows(columns, np.full(len(one), math.nan), 1e-8, known=False)
        inputs = [native.in_memory(t.reshape(-1)) for t in (one, two)]
        assert all(each is not None for each in inputs)
        assert native.importance_survey(native.Inputs(inputs, one.numel()), 0, rows, [], check=True)[0]  # type: ignore[arg-type]
        expected = np.maximum(_divergences(one.double(), two.double()), 0.0)
        np.testing.assert_array_equal(rows.divergences, expected)
        assert (expected > 0).sum() > len(near) / 2


@compiled
def test_same_divergences() -> None:
    same_divergences()


class Computed(TensorSource):
    """A tensor that lies nowhere as it is, such as one that is made of codes."""

    stored = None  # type: ignore[assignment]


@compiled
@pytest.mark.parametrize("shape", [(60, 896), (3, 64)], ids=str)
def test_same_importances_of_what_lies_nowhere(shape: tuple[int, int]) -> None:
    base = torch.randn(shape) * 0.05
    tensors = stored([base, base + torch.randn(shape) * 1e-3], torch.bfloat16)
    made: Any = registry.get("arcee_fusion").make({}, count=1)
    found = []
    for kind in (TensorSource, Computed):
        scan = Scan([kind(t) for t in tensors], shape, columns=shape[1], tile=1 << 10)
        assert scan.compiled
        assert scan.in_place == (kind is TensorSource)
        divergences, columns, least = made.measure(scan)
        found.append((divergences.tolist(), columns, least))
    assert found[0] == found[1]
    assert all(value > 0 for value in found[0][0])


@compiled
@pytest.mark.parametrize("n", [0, 1, 2, 300, 5_000, 70_001])
@pytest.mark.parametrize("kind", ["any", "grid", "same", "wide"])
def test_sorts(n: int, kind: str) -> None:
    """Numbers of either sign, equal ones, zeros of both signs, infinite ones; places of equal ones are by index."""
    draw = np.random.default_rng(n)
    values = draw.standard_normal(n)
    if kind == "grid":
        values = np.round(values, 1)
    elif kind == "same":
        values = np.full(n, 0.1)
    elif kind == "wide":
        values = np.exp(values.clip(-3, 3) * 25) * draw.choice([-1.0, 0.0, 1.0], n)
        values[: n // 9] = np.inf
    for dtype in (np.float32, np.float64):
        ready = values.astype(dtype)
        expected = np.sort(ready)
        native.sort(ready)
        np.testing.assert_array_equal(ready, expected)
    assert (native.ranks(values)[np.argsort(values, kind="stable")] == np.arange(n)).all()


RECORDED = sorted(name for name, method in registry.all_methods().items() if getattr(method, "recorded", False))


@compiled
@pytest.mark.parametrize("method", RECORDED)
def test_room_for_many_experts(method: str) -> None:
    """As many as the loops take, all of whose intermediate results have a register; and one more, which torch merges."""
    made = registry.get(method)
    most = native.MOST - 1 if made.models[1] is None else made.models[1]
    values = {key: value for key, value in VALUES.items() if key in made.parameters()}
    for count in {most, *([most + 1] if made.models[1] is None else [])}:
        tensors = stored(models(count + 1, (7, 53), "dense"), torch.bfloat16)
        same(lambda c=count, t=tensors: merge(made.make(values, count=c), t, dtype=torch.bfloat16))  # type: ignore[misc]


@compiled
@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("shape", [(5, 9001), (801, 37), (33, 1), (700,)], ids=str)
def test_same_ranks_in_rows(method: str, shape: tuple[int, ...]) -> None:
    """Long and short rows, of odd lengths, with equal magnitudes, and such as only double precision tells apart."""
    values = {"weight": [1.0, 0.4, -0.3], "density": [0.5, 1.0, 0.3], "epsilon": 0.2}
    ready = registry.get(method).make(values, count=3)
    for kind, dtype in itertools.product(KINDS, (torch.bfloat16, torch.float32)):
        tensors = models(4, shape, kind)
        tensors[1].view(-1)[3:] *= 1e-12  # the difference to one element that is left is all that 24 bits show
        tensors[2].view(-1)[::3] = tensors[0].view(-1)[::3]
        same(lambda t=stored(tensors, dtype): merge(ready, t, dtype=torch.bfloat16))  # type: ignore[misc]  # noqa: B008
    far = torch.randn(shape, dtype=torch.float64) * 1e-14
    far.view(-1)[:1] = 1.0
    same(
        lambda: merge(ready, [torch.zeros(shape, dtype=torch.float64), far, far * 2, far.flip(0)], dtype=torch.float64)
    )
    near = torch.randn(shape, dtype=torch.float64).round(decimals=1) + torch.randint(9, shape) * 2.0**-49
    same(lambda: merge(ready, [far * 0, near, near.flip(0), -near], dtype=torch.float64))


@compiled
@pytest.mark.parametrize("power", range(24, 37))
def test_same_ranks_about_what_float32_holds(power: int) -> None:
    """A few differences 2⁻⁷ − k·2⁻ᵖ, k 252 or 253, of bfloat16 numbers: of p = 32 on float32 takes them for equal."""
    torch.manual_seed(power)
    base = torch.randint(252, 254, (40, 896)) * 2.0**-power
    base[torch.rand(base.shape) < 0.85] = 2.0**-9
    tensors = stored([base, torch.full_like(base, 2.0**-7), base * 1.5], torch.bfloat16)
    assert tensors[0].double().unique().numel() == 3
    ready = registry.get("della_linear").make({"weight": [1.0, 0.5], "density": 0.5}, count=2)
    same(lambda: merge(ready, tensors, dtype=torch.bfloat16))


@compiled
@pytest.mark.parametrize("density", [[0.4, 1 / 3, 0.5], [0.5, 1.0, 0.3]], ids=str)
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear", "ties", "breadcrumbs_ties"])
def test_same_norms_before_and_after_thinning(method: str, density: list[float]) -> None:
    """Rescaled to the L1 norm that each task vector had; rows and tensors of odd lengths, several segments."""
    values = {"weight": [1.0, 0.4, 0.3], "density": density, "rescale": True, "rescale_norm": "l1", "epsilon": 0.2}
    made = registry.get(method)
    ready = made.make({key: value for key, value in values.items() if key in made.parameters()}, count=3)
    for shape, kind, dtype in itertools.product(((5, 9001), (131, 896), (33, 1), (700,)), KINDS, DTYPES):
        same(lambda t=stored(models(4, shape, kind), dtype), d=dtype: merge(ready, t, dtype=d))  # type: ignore[misc]  # noqa: B008


RULES = [
    {"weight": 1.0},
    {"weight": [0.7, 0.4, 1.3, 0.2], "lambda": 1.1},
    {"weight": [0.7, 0.4, 1.3, 0.2], "normalize": False},
    {"weight": 0.6, "rescale": False},
    {"weight": [0.5, -0.3, 0.2, 0.1]},
]


@compiled
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_same_pruning_where_float32_decides(method: str, rule: dict[str, Any]) -> None:
    """Small differences of bfloat16 models, many of them equal; such as have keys of their own, and such as share them."""
    torch.manual_seed(0)
    for count, shape in itertools.product((1, 2, 3, 4), ((96, 896), (7, 4864), (3, 9001), (257, 33), (1, 5))):
        base = torch.randn(shape) * 0.02
        experts = [base + torch.randn(shape) * size for size in (3e-4, 2e-3, 1e-4, 3e-2)[:count]]
        # Rows of nothing, of zeros of either sign, of one bit, of tiny and huge numbers, without a change, ...
        if shape[0] > 3:
            base[0], experts[0][0] = 0.0, -0.0
            base[1] = -0.0
            experts[-1][2] = base[2] * 2
            experts[0][3] = torch.randn(shape[1]) * 1e-25
            base[3] = torch.randn(shape[1]) * 1e-30
            experts[0][4] = base[4] * 1e30
            experts[-1][5] = base[5]
            experts[0][6, ::3] = base[6, ::3] * 1e-6
        # ... of such as float32 has few bits for, and whose differences it does not hold.
        if shape[0] > 7:
            base[7:20] = 0.0
            for expert in experts:
                expert[7:20] = torch.randn(13, shape[1]) * 10 ** (torch.rand(13, 1) * 4 - 41)
            for model in (base, *experts):
                model[20:22] = (1 + torch.rand(2, shape[1])) * 1.1e38 * torch.randn(2, shape[1]).sign()
        weight = rule["weight"]
        values = {"density": 0.5, "epsilon": 0.2} | rule
        values["weight"] = weight[:count] if isinstance(weight, list) else weight
        try:
            ready = registry.get(method).make(values, count=count)
            ready.check(count)
        except ValueError:
            continue  # weights that add up to nothing
        tensors = stored([base, *experts], torch.bfloat16)
        same(lambda r=ready, t=tensors: merge(r, t, dtype=torch.bfloat16))  # type: ignore[misc]


@compiled
@pytest.mark.parametrize("method", ["arcee_fusion", "pcb", "ties", "della"])
def test_same_where_float32_does_not_hold_the_differences(method: str) -> None:
    """Of numbers that bfloat16 holds."""
    torch.manual_seed(0)
    case = next(c for c in cases(method) if c.inputs >= 2)
    tensors = [(1 + torch.rand(64, 4096)) * 1.1e38 * torch.randn(64, 4096).sign() for _ in range(case.inputs)]
    known = registry.get(method).parameters()
    values = {key: value for key, value in (VALUES | {"lambda": 0.01}).items() if key in known}
    ready = registry.get(method).make(values, count=case.count)
    same(lambda: merge(ready, stored(tensors, torch.bfloat16), dtype=torch.bfloat16))


@compiled
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "t", [1e-6, 2.0**-13, 2.0**-13 * (1 + 2.0**-26), 1 + 2.0**-8 + 0.6 * 2.0**-23, 1.7e-4, 0.01, 3.0, 1e6, 1e30]
)
def test_same_bytes_of_near(t: float, out: torch.dtype) -> None:
    """NearSwap's own loop looks at float32 first: all finite numbers, beside their neighbours, others of their size and any."""
    torch.manual_seed(0)
    finite = torch.arange(1 << 16).to(torch.int32)
    finite = finite[(finite & 0x7F80) != 0x7F80].to(torch.int16)
    others = [finite, finite + 1, finite ^ 3, finite ^ 64, finite + (1 << 15), finite[torch.randperm(len(finite))]]
    pairs = [(finite, other) for other in others] + [
        (torch.zeros_like(finite), finite),
        (finite, torch.zeros_like(finite)),
    ]
    apart = (
        torch.full((64,), -0.2 * 2.0**-23).bfloat16(),
        torch.full((64,), 2.0).bfloat16(),
    )  # a block with nothing else
    pairs.append((apart[0].view(torch.int16), apart[1].view(torch.int16)))
    base, other = (torch.cat(side).view(torch.bfloat16) for side in zip(*pairs, strict=True))
    kept = other.isfinite()
    tensors = [base[kept], other[kept]]
    ready = registry.get("nearswap").make({"t": t}, count=1, extrapolate=True)
    found = same(lambda: merge(ready, tensors, dtype=out))
    near = (tensors[1].double() - tensors[0].double()).abs() <= t
    plain = near & (tensors[0].double() + (tensors[1].double() - tensors[0].double()) == tensors[1].double())
    assert plain.any()
    assert torch.equal(found[plain].float(), tensors[1][plain].float())


def moved(base: Tensor, most: int) -> Tensor:
    """A model whose numbers are up to so many last places away."""
    bits = base.view(torch.int16) + torch.randint(-most, most + 1, base.shape).to(torch.int16)
    made = bits.view(torch.bfloat16)
    return torch.where(made.isfinite(), made, base)


def agreeing(kind: str, count: int) -> list[Tensor]:
    """A base and experts whose changes are such that float32 does not tell how a mean is rounded, or which sign is elected."""
    torch.manual_seed(count)
    n = 1 << 15
    base = (torch.randn(n) * 0.02).bfloat16()
    if kind == "ties":  # last places: means lie in the middle between two, or as near as weights are alike
        return [base, *(moved(base, 3) for _ in range(count))]
    if kind == "alike":  # so are the energies
        change = moved(base, 3)
        turns = [torch.cat([base, change]).roll(k * n) for k in range(2)]
        return [torch.cat([base, base]), *(turns[k % 2] for k in range(count))]
    if kind == "apart":  # votes are lost
        sizes = 2.0 ** torch.randint(-60, 20, (count + 1, n)).float()
        made = (torch.randn(count + 1, n) * sizes).bfloat16()
        made[:, : n // 2 : 3] = 0.0
        if count > 2:  # a large one, its opposite, and a small one
            made[1, ::2], made[3, ::2] = made[1, ::2].abs() + 1, -made[1, ::2].abs() - 1
            made[0, ::2] = 2.0**-30
        return list(made)
    if kind == "tiny":  # products that float32 does not hold
        return [*((torch.randn(count + 1, n) * 1e-38).bfloat16())]
    return [*((base.float() + torch.randn(n) * 0.03 * k).bfloat16() for k in range(count + 1))]


@compiled
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["ties", "alike", "apart", "tiny", "far"])
def test_same_bytes_of_agreement(kind: str, count: int, called: set[str]) -> None:
    """SCE's own loop looks at float32 first."""
    tensors = agreeing(kind, count)
    for values in ({}, {"divisor_floor": 1e-6, "energy_floor": 1e-6}, {"divisor_floor": 0.4}):
        ready = registry.get("sce").make(values, count=count)
        for out in (torch.bfloat16, torch.float32):
            same(lambda: merge(ready, tensors, dtype=out))  # noqa: B023 - called at once
    assert "geomerge_agreement" in called


@compiled
@pytest.mark.parametrize(
    ("models", "weights"),
    [
        ([-3e38, 3e38], None),  # a difference that float32 does not hold
        ([2.0**115, *[1.5 * 2.0**127] * 2, *[-1.5 * 2.0**127] * 3], None),  # a sum of votes
        ([-(2.0**-96), -(2.0**-96), 2.0**-96], [1 - 2.0**-60, 2.0**-60]),  # a product that is nothing
        # A sum above a power of two, below which bfloat16 numbers are twice as dense, so far smaller than what is added that
        # the error of that takes it there.
        (
            [3424, 1 - 2.0**-8, 1, 1, 1, 1, 1, 1, 3424],
            [float.fromhex("0x1.35fd382db2610p-2"), float.fromhex("0x1.3004062fce716p-2")]
            + [float.fromhex("0x1.0150ae6b6c458p-25")] * 5
            + [float.fromhex("0x1.99feb795585d4p-2")],
        ),
    ],
)
def test_same_agreement_at_the_ends_of_float32(models: list[float], weights: list[float] | None) -> None:
    """What float32 cannot tell is found, of the largest and the smallest numbers, too."""
    tensors = [torch.full((128,), x, dtype=torch.float64).bfloat16() for x in models]
    ready = registry.get("sce").make({}, count=len(models) - 1)
    if weights is None:
        same(lambda: merge(ready, tensors, dtype=torch.bfloat16))
        return
    assert torch.equal(*both_agree(ready, tensors, weights))


def both_agree(ready: Any, tensors: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
    """What SCE's loop makes of models with these weights, and what torch does."""
    n = tensors[0].numel()
    rule = native.Agreement(floor=0.0, quick=1)
    rule.weight[: len(weights)] = weights
    scan = Scan([TensorSource(t, "model") for t in tensors], (n,))
    (inputs,) = scan.tiles(scan.segments[0])
    found = torch.empty_like(tensors[0])
    places = [native.in_memory(t) for t in tensors]
    native.agreement(native.Inputs(places, n), rule, native.in_memory(found))  # type: ignore[arg-type]
    return found, ready.blend(inputs, (None, weights)).float().bfloat16()


@compiled
def test_same_agreement_next_to_a_tie() -> None:
    """Means half a float32 from the middle between two bfloat16, where the error of a mean decides; small and large ones."""
    torch.manual_seed(0)
    blocks = 1 << 9  # of 64 equal elements: an element in doubt has its block made in float64
    one = (128 + torch.arange(blocks) % 128).float().bfloat16()
    ready = registry.get("sce").make({}, count=2)
    decided = 0
    for most, far in itertools.product((2, 8, 30, 120), (False, True)):
        near = one + torch.randint(0 if far else 1, most, (blocks,))
        base = (-8 * one if far else one).repeat_interleave(64)
        tensors = [base, *(t.repeat_interleave(64) for t in (near, near + 1 + 2 * torch.randint(0, 2, (blocks,))))]
        for exponent, share in itertools.product(range(12, 18), np.linspace(-3e-2, 3e-2, 21)):
            off = 2.0**-exponent * (1 + share)
            found, expected = both_agree(ready, tensors, [0.35 * (1 - off), 0.35 * (1 + off)])
            assert torch.equal(found, expected)
            decided += len(set((expected - base).tolist()))
    assert decided > 1000


@compiled
def test_same_pruning_where_sixteen_bits_do_not_decide() -> None:
    """Of two million elements' words some thirty are the first half of their limit."""
    torch.manual_seed(0)
    shape = (2048, 1024)
    base = torch.randn(shape) * 0.02
    tensors = stored([base, base + torch.randn(shape) * 1e-2], torch.bfloat16)
    ready = registry.get("della_linear").make({"weight": 1.0, "density": 0.5, "epsilon": 0.1}, count=1)
    same(lambda: merge(ready, tensors, dtype=torch.bfloat16))


LOOPS = {
    "linear": {"geomerge_span"},
    "slerp": {"geomerge_gram_float", "geomerge_span"},
    "task_arithmetic": {"geomerge_span"},
    "ties": {"geomerge_survey_float", "geomerge_task_vectors_float"},
    "dare_ties": {"geomerge_task_vectors_float"},
    "dare_linear": {"geomerge_task_vectors_float"},
    "breadcrumbs": {"geomerge_survey_float", "geomerge_task_vectors_float"},
    "breadcrumbs_ties": {"geomerge_survey_float", "geomerge_task_vectors_float"},
    "arcee_fusion": {"geomerge_importance_survey", "geomerge_importance"},
    "nearswap": {"geomerge_near"},
    "ram": {"geomerge_program"},
    "ramplus_tl": {"geomerge_program"},
    "sce": {"geomerge_program"},
    "della": {"geomerge_pruned"},
    "della_linear": {"geomerge_pruned"},
    "widen": {"geomerge_gram_columns", "geomerge_program"},
    "pcb": {"geomerge_survey_double", "geomerge_competition_survey", "geomerge_competition"},
    "emr": {"geomerge_program"},
    "tall_mask": {"geomerge_program"},
    "consensus": {"geomerge_program"},
    "consensus_ties": {"geomerge_program", "geomerge_survey_double"},
}
"""What a merge of bfloat16 models calls."""

VALUES: dict[str, Any] = {"density": 0.4, "epsilon": 0.1, "weight": 0.3, "t": 0.3, "select_topk": 0.5}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The loops over inputs that were called."""
    names: set[str] = set()
    library = native.call.loaded()

    class Spy:
        def __getattr__(self, name: str) -> Any:
            other = ("sort_", "largest_", "ranks", "generator", "map", "unmap", "unread", "let_go")
            if not name.startswith(tuple(f"geomerge_{each}" for each in other)):
                names.add(name)
            return getattr(library, name)

    monkeypatch.setattr(native.call, "loaded", Spy)
    return names


@compiled
@pytest.mark.parametrize("method", LOOPS)
def test_takes_the_loops(method: str, called: set[str]) -> None:
    """Those that the method has, and no other."""
    found = registry.get(method)
    values = {key: value for key, value in VALUES.items() if key in found.parameters()}
    count = 1 if method in ("slerp", "arcee_fusion", "nearswap") else 2
    inputs = 2 if method == "linear" else count + 1
    made = found.make(values, count=count)
    tensors = stored(models(inputs, (31, 4801), "dense"), torch.bfloat16)
    merge(made, tensors, dtype=torch.bfloat16, tile=1 << 13)
    assert called == LOOPS[method]


@compiled
@pytest.mark.parametrize(
    ("method", "loops"),
    [
        ("dare_ties", {"geomerge_norms_float", "geomerge_task_vectors_float"}),
        ("della", {"geomerge_pruned_norms", "geomerge_pruned"}),
        ("sce", {"geomerge_program"}),
    ],
)
def test_which_loops_the_profile_of_mergekit_calls(method: str, loops: set[str], called: set[str]) -> None:
    made = registry.get(method)
    values = {key: value for key, value in VALUES.items() if key in made.parameters()}
    ready = made.make(values, count=3, compat="mergekit")
    merge(ready, stored(models(4, (31, 4801), "dense"), torch.bfloat16), dtype=torch.bfloat16, tile=1 << 13)
    assert called == loops


@compiled
@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties", "breadcrumbs", "della"])
def test_same_files(method: str, tmp_path: Path, called: set[str]) -> None:
    """A merge on disk, with the loops and without; tensors of several segments, of one tile, of nothing."""
    names = {"linear": ("a", "b"), "slerp": ("base", "a")}.get(method, ("base", "a", "b"))
    for name, values in zip(names, models(len(names), (150, 1333), "dense"), strict=True):
        (tmp_path / name).mkdir()
        weights = {
            "x": values.bfloat16(),
            "y": values[0, :97].bfloat16().contiguous(),
            "z": torch.zeros(0, 3).bfloat16(),
        }
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    experts = [{"model": str(tmp_path / name)} for name in names if name != "base"]
    document: dict[str, Any] = {"merge_method": method, "models": experts}
    if names[0] == "base":
        document["base_model"] = str(tmp_path / "base")
    known = registry.get(method).parameters()
    document["parameters"] = {key: value for key, value in VALUES.items() if key in known}
    text = json.dumps(document, indent=1)
    with native.turned_off():
        gm.merge(text, tmp_path / "torch")
    assert not called
    gm.merge(text, tmp_path / "compiled")
    beside = {
        *("geomerge_change", "geomerge_finite"),
        *(["geomerge_load"] if method == "slerp" else []),
    }  # rounding's loss, whether small tensors are in range, the guardrails' sample
    assert called == LOOPS[method] | beside
    found = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("torch", "compiled")]
    assert found[0] == found[1]


@compiled
@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties", "breadcrumbs", "arcee_fusion", "nearswap"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_names_the_same_damage(method: str, bad: float) -> None:
    """A parent with NaN or Inf is refused in the same words."""
    case = next(c for c in cases(method) if c.inputs >= 2)
    tensors = stored(case.models((60, 2_501) if method == "arcee_fusion" else (3, 50_003)), torch.bfloat16)
    tensors[1].view(-1)[90_003] = bad
    said = []
    for switch in (native.turned_off, contextlib.nullcontext):
        with switch(), pytest.raises(NotFiniteError) as caught:
            merge(case.made(), tensors, dtype=torch.bfloat16)
        said.append(str(caught.value))
    assert said[0] == said[1]


@compiled
@pytest.mark.parametrize("values", [{}, {"rescale_norm": "l1"}], ids=str)
@pytest.mark.parametrize("density", [[0.5, 1.0, 0.3], [0.5, 0.6, 0.3]], ids=str)
@pytest.mark.parametrize("which", range(4))
def test_pruning_finds_damage(which: int, density: list[float], values: dict[str, Any]) -> None:
    """In the base, in what is pruned, and in what is kept whole; also beside a base of 0, and the same in both."""
    ready = registry.get("della").make(
        {"weight": [1.0, 0.7, 0.4], "density": density, "rescale": True} | values, count=3
    )
    torch.manual_seed(0)
    base = torch.randn(70, 640) * 0.02
    base[41, 18] = 0.0
    tensors = stored([base, *(base + torch.randn(70, 640) * 2e-4 for _ in range(3))], torch.bfloat16)
    merge(ready, tensors, dtype=torch.bfloat16)
    for column, bad in itertools.product((17, 18), (math.nan, math.inf, -math.inf)):
        kept = tensors[which][41, column].item()
        tensors[which][41, column] = bad
        with pytest.raises(NotFiniteError):
            merge(ready, tensors, dtype=torch.bfloat16)
        tensors[which][41, column] = kept


@compiled
@pytest.mark.parametrize("spread", [0.5, 1.6, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("columns", [40, 896, 4096])
def test_same_pruning_of_heavy_tails(columns: int, spread: float) -> None:
    """Rows of which some elements change a thousand times as much as others; one column far from all others."""
    torch.manual_seed(0)
    base = torch.randn(24, columns) * 0.02
    experts = [base + torch.randn(24, columns) * 2e-4 * torch.exp(spread * torch.randn(24, columns)) for _ in range(2)]
    experts[1][:, 0] += 5
    ready = registry.get("della").make({"weight": 1.0, "density": 0.5, "epsilon": 0.2}, count=2)
    for dtype in (torch.bfloat16, torch.float32):
        same(lambda t=stored([base, *experts], dtype): merge(ready, t, dtype=torch.bfloat16))  # type: ignore[misc]  # noqa: B008


@compiled
@pytest.mark.parametrize("columns", [40, 896, 4096])
def test_same_pruning_of_rows_of_other_sizes(columns: int) -> None:
    """What was found for the row before does not do for the next: smaller, larger, alike, nothing, and what must be sorted."""
    torch.manual_seed(0)
    base = torch.randn(60, columns) * 0.02
    size = 2e-4 * 4.0 ** torch.randint(-6, 4, (60, 1))
    size[10:13] = 0
    experts = [base + torch.randn(60, columns) * size, base + torch.randn(60, columns) * size.roll(1, 0)]
    experts[0][20:40:3] = torch.randn(7, columns)
    ready = registry.get("della").make({"weight": 1.0, "density": 0.5, "epsilon": 0.2}, count=2)
    same(lambda: merge(ready, stored([base, *experts], torch.bfloat16), dtype=torch.bfloat16))


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_gram_sums(dtype: torch.dtype, count: int) -> None:
    """The same sums in the same order, which are right."""
    tensors = stored(models(count, (100_003,)), dtype)

    def measure() -> np.ndarray:
        single = dtype in (torch.bfloat16, torch.float16)
        scan = Scan([TensorSource(t) for t in tensors], (100_003,), single=single)
        return gram.measure(scan, "tensor").centred

    found = same(lambda: torch.from_numpy(measure())).numpy()
    wide = [t.double().numpy() for t in tensors]
    centred = np.array([wide[0], *(w - wide[0] for w in wide[1:])])
    norms = np.sqrt((centred**2).sum(1))
    assert (np.abs(found - centred @ centred.T) <= 1e-6 * np.outer(norms, norms)).all()


@compiled
def test_brackets_count_and_collect() -> None:
    """By hand: above 4, equal to the common 2 (and 4), and what else lies in [1, 4]; of few and of many."""
    none = math.nan
    for dtype in (np.float32, np.float64):
        for times in (1, 2, 100):
            values = np.tile(np.array([0.5, 1, 2, 2, 3, 4, 4.5, 5, 0, 1], dtype=dtype), times)
            above, equal, found = native.bracket(values, (1.0, 4.0, (2.0, none)))
            assert (above, equal, found.tolist()) == (2 * times, (2 * times, 0), [1, 3, 4, 1] * times)
            above, equal, found = native.bracket(values, (1.0, 4.0, (2.0, 4.0)))
            assert (above, equal, found.tolist()) == (2 * times, (2 * times, times), [1, 3, 1] * times)
            assert native.bracket(values, (1.0, 4.0, (none, none)))[2].tolist() == [1, 2, 2, 3, 4, 1] * times


@compiled
def test_rounds_to_nearest_even() -> None:
    """Halves go to the even neighbour, by hand for bfloat16, whose numbers between 1 and 2 are 1/128 apart."""
    x = torch.tensor([1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 256 + 2**-20, -1 - 3 / 256], dtype=torch.float32)
    out = torch.empty(4, dtype=torch.bfloat16)
    places = native.in_memory(x), native.in_memory(out)
    assert places[0] is not None
    assert places[1] is not None
    assert native.span(native.Inputs([places[0]], 4), [1.0], places[1])
    assert out.tolist() == [1.0, 1 + 2 / 128, 1 + 1 / 128, -1 - 2 / 128]


def test_can_be_turned_off() -> None:
    """The variable, in a process of its own."""
    code = "from geomerge.methods import native; print(native.available())"
    env = {"PATH": "", "PYTHONPATH": str(Path(native.__file__).parents[3]), "GEOMERGE_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "False"


@compiled
def test_no_process_sees_what_another_one_works_with() -> None:
    """The buffers of a thread are its process's own, also when that is forked."""
    code = """
import os
from geomerge.methods.native import call
room = call.room(1 << 16)
room[:] = 1
if (child := os.fork()) == 0:
    room[:] = 2
    os._exit(0)
os.waitpid(child, 0)
assert (room == 1).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@compiled
def test_windows_move_where_copies_would_be_slow(tmp_path: Path) -> None:
    """Wherever a file's bytes lie beside the windows in memory, what is read and written is the same."""
    values = np.random.default_rng(0).integers(0, 0x7F00, 70_000).astype(np.uint16)
    beginning = native.call.room(1 << 20).ctypes.data  # more than is needed, so that it stays
    for apart in range(-40, 42, 2):
        source, target = tmp_path / "source", tmp_path / "target"
        at, to = (beginning - apart) % 4096, (beginning + 2 * native.call.WINDOW + 576 + apart) % 4096
        source.write_bytes(bytes(at) + values.tobytes())
        target.write_bytes(bytes(to))
        with source.open("rb") as reads, target.open("r+b") as writes:
            stored = native.Stored(native.CODES["BF16"], file=reads.fileno(), offset=at)
            out = native.Stored(native.CODES["BF16"], file=writes.fileno(), offset=to)
            assert native.span(native.Inputs([stored], values.size), [1.0], out)
        assert target.read_bytes()[to:] == values.tobytes()


def test_a_merge_says_why_it_is_slow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """And what to do, where there is something to do; with the loops it says nothing."""
    request.addfinalizer(native.call._found.cache_clear)
    write_models(tmp_path)
    recipe = write_recipe(tmp_path)

    def told(out: str) -> str:
        native.call._found.cache_clear()
        assert main(["merge", str(recipe), str(tmp_path / out)]) == 0
        return " ".join(capsys.readouterr().out.split())

    if native.available():
        assert "slow" not in told("first")
        monkeypatch.setattr(native.call, "fingerprint", lambda: "0" * 16)
        assert "of another version than the package; build them: " in told("second")
    monkeypatch.setattr(native.call, "LIBRARY", tmp_path / "none.so")
    assert "they were not built with the package; with a C compiler here, build them: " in told("third")
    monkeypatch.setenv("GEOMERGE_NATIVE", "0")
    assert "GEOMERGE_NATIVE is 0" in told("fourth")


@compiled
def test_a_stale_library_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one without a fingerprint, nor what is no library; torch does all then."""
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O0"))
    source = tmp_path / "kernels.c"
    source.write_bytes(build.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCE", source)
    assert native.call._load(build.LIBRARY) is None
    assert build.build(tmp_path / "fresh.so") is None
    assert native.call._load(tmp_path / "fresh.so") is not None
    source.write_text("int nothing;")
    assert build.build(tmp_path / "other.so") is None
    (tmp_path / "torn.so").write_bytes((tmp_path / "other.so").read_bytes()[:100])
    for name in ("fresh.so", "other.so", "torn.so", "none.so"):
        assert native.call._load(tmp_path / name) is None


@pytest.fixture(scope="session")
def plain(shared: Path) -> Path:
    """The library for any processor, compiled once for all workers."""
    place = shared / "native" / "plain.so"
    with locked(place.parent), pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_FLAGS", (*build._FLAGS, "-U__AVX2__", "-U__FMA__"))
        assert place.exists() or build.build(place) is None
    return place


@pytest.fixture(params=["any", "AVX2"])
def other_processor(request: pytest.FixtureRequest, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library for another kind of processor."""
    other = native.call._load(plain if request.param == "any" else build.LIBRARY)
    assert other is not None
    monkeypatch.setattr(native.call, "loaded", lambda: other)


def redone(method: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """The share of elements of which float32 does not tell the result."""
    torch.manual_seed(0)
    base = torch.randn(200, 896) * 0.02
    tensors = stored([base, *(base + torch.randn(200, 896) * 3e-4 for _ in range(3))], torch.bfloat16)
    calls: list[Any] = []

    class Kept(native.call._Work):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            calls.append(self)

    monkeypatch.setattr(native.call, "_Work", Kept)
    merge(
        registry.get(method).make({"weight": 1.0, "density": 0.5} if method == "della" else {}, count=3),
        tensors,
        dtype=torch.bfloat16,
    )
    assert calls
    return float(sum(call.redone for call in calls) / base.numel())


@compiled
@pytest.mark.parametrize("method", ["della", "pcb"])
def test_float32_tells_most(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < redone(method, monkeypatch) < 0.03


@compiled
@pytest.mark.usefixtures("other_processor")
@pytest.mark.parametrize("method", ["della", "pcb"])
def test_float32_tells_most_on_other_processors(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < redone(method, monkeypatch) < 0.03


@compiled
@pytest.mark.usefixtures("other_processor")
def test_same_bytes_on_other_processors() -> None:
    """What is written for one kind of processor does what is written for all; this one's runs in all other tests."""
    methods = (
        "ties",
        "dare_ties",
        "dare_linear",
        "slerp",
        "linear",
        "sce",
        "widen",
        "pcb",
        "model_stock",
        "arcee_fusion",
        "della",
    )
    same_divergences()
    for method, kind in itertools.product(methods, KINDS):
        made = registry.get(method)
        count = {"slerp": 1, "arcee_fusion": 1, "linear": 3}.get(method, 2)
        values = {key: value for key, value in VALUES.items() if key in made.parameters()}
        tensors = stored(
            models(3 if count > 1 else 2, (70, 2_001) if method == "della" else (3, 50_003), kind), torch.bfloat16
        )
        if method == "della":  # differences of few bits, which are counted
            tensors[1:] = [(tensors[0].double() + torch.randn(70, 2_001) * 2e-3).bfloat16() for _ in tensors[1:]]
        ready = made.make(values, count=count)
        same(lambda m=ready, t=tensors: merge(m, t, dtype=torch.bfloat16))  # type: ignore[misc]


@compiled
def test_the_widest_library_that_the_processor_can_run(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The one for AVX-512 where there is that, and else the other; also where the wide one is missing or stale."""
    request.addfinalizer(native.call._found.cache_clear)

    def name() -> str:
        native.call._found.cache_clear()
        return Path(native.call.loaded()._name).name

    able = native.call._has(native.call._WIDE_FLAGS)
    assert name() == (build.WIDE if able and build.WIDE.exists() else build.LIBRARY).name
    monkeypatch.setattr(native.call, "_flags", lambda: frozenset({"avx2", "fma", "avx512f"}))
    assert name() == build.LIBRARY.name
    monkeypatch.undo()
    monkeypatch.setattr(native.call, "WIDE", build.WIDE.with_name("none.so"))
    assert name() == build.LIBRARY.name


def test_says_why_nothing_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, and with one that fails, and leaves nothing."""
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build.build(tmp_path / "kernels.so") == "there is no C compiler"
    monkeypatch.setenv("CC", "false")
    assert "failed" in str(build.build(tmp_path / "kernels.so"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(build, "WIDE", tmp_path / "wide.so")
    (tmp_path / "wide.so").touch()  # of an earlier compiler
    monkeypatch.setattr(build, "build", lambda target=build.LIBRARY: "none" if target != build.LIBRARY else None)
    assert build.build_all() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_tensors_with_gaps(method: str) -> None:
    """A slice with steps is read by its elements, not by its memory."""
    torch.manual_seed(3)
    base, expert = torch.randn(2, 10_000)[:, ::2], torch.randn(5_000, 3)[:, 1]
    merge = getattr(gm.methods, method)

    def merged(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if method == "linear":
            return merge([x, y], weight=[0.3, 0.7])
        return merge(x, [y], t=0.3) if method == "slerp" else merge(x, [y], weight=1.0, density=0.5)

    assert torch.equal(merged(base[0], expert), merged(base[0].contiguous(), expert.contiguous()))
