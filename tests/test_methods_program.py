"""Recorded arithmetic: every operation has torch's bits, and what cannot be recorded is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from geomerge.methods import native, order, program, steps
from geomerge.methods.functions import exp, log, log_of_ratio, tanh
from geomerge.methods.native.build import GROUPS
from geomerge.methods.program import Recorded, Value
from geomerge.methods.tile import Scan, TensorSource, Tile
from geomerge.testing.inputs import merge
from recorded_groups import recorded, recorded_cases

compiled = pytest.mark.skipif(not native.available(), reason="the compiled loops were not built (no C compiler?)")

N = 3 * 256 + 77


def values(seed: int = 0) -> list[Tensor]:
    """Of all sizes, with zeros of both signs, and equal ones."""
    torch.manual_seed(seed)
    found = [torch.randn(N, dtype=torch.float64) * 10.0 ** torch.randint(-3, 2, (N,)) for _ in range(3)]
    for x in found:
        x[::17], x[5::17] = 0.0, -0.0
    found[1][::5] = found[0][::5]
    found[2][::7] = -found[0][::7]
    return found


def scan(inputs: list[Tensor], columns: int | None = None) -> Scan:
    return Scan([TensorSource(x) for x in inputs], inputs[0].shape, columns=columns, tile=256)


def both(compute: Callable[[Any], Any], inputs: list[Tensor]) -> None:
    """What torch makes of a tile, and what the loop makes of it, bit for bit."""
    tile = next(iter(scan(inputs).tiles(scan(inputs).segments[0])))
    whole = Tile(torch.stack(inputs), 0, 0, tile.scan)
    expected = compute(whole).reshape(-1).contiguous()
    out = torch.empty(N, dtype=torch.float64)
    stored = native.in_memory(out)
    assert stored is not None
    opened = scan(inputs)
    assert program.loop(opened, compute)(next(opened.places(opened.segments[0])), stored, None)
    assert torch.equal(out.view(torch.int64), expected.view(torch.int64))


OPERATIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda a, b, c: a + b,
    "add with a factor": lambda a, b, c: a.add(b, alpha=0.3),
    "add a number": lambda a, b, c: a.add(0.3).add_(c),
    "subtract": lambda a, b, c: (a - b).sub_(0.7),
    "zeros of both signs": lambda a, b, c: a.sub(0.0) / (a.add(0.0).abs() + 0.1) + a.clamp(max=-0.0),
    "zero taken away": lambda a, b, c: a.sub(0.0),
    "multiply": lambda a, b, c: (a * b) * 0.3,
    "divide": lambda a, b, c: a / (b.square() + 0.1),
    "divide by a number": lambda a, b, c: a.div(0.3),
    "reciprocal": lambda a, b, c: b.square().add_(0.1).reciprocal_(),
    "product added": lambda a, b, c: a.addcmul(b, c),
    "product added with a factor": lambda a, b, c: a.addcmul_(b, c, value=0.7),
    "quotient added": lambda a, b, c: a.addcdiv_(b, c.abs().add_(0.1)),
    "quotient added with a factor": lambda a, b, c: a.addcdiv_(b, c.abs().add_(0.1), value=0.7),
    "sizes": lambda a, b, c: a.abs().add_(b.sign()),
    "larger": lambda a, b, c: a.maximum(b),
    "at least": lambda a, b, c: a.clamp(min=0.0),
    "at most": lambda a, b, c: a.clamp(max=0.1),
    "between": lambda a, b, c: a.clamp(-0.2, 0.1).add_(b.clamp_(0.3, 0.4)),
    "shrink": lambda a, b, c: a.hardshrink(0.05),
    "less": lambda a, b, c: a.lt(b).to(a.dtype) * 2 + a.le(b).to(a.dtype),
    "more": lambda a, b, c: a.gt(b).to(a.dtype) * 2 + a.ge(b).to(a.dtype),
    "equal": lambda a, b, c: a.eq(b).to(a.dtype) * 2 + a.ne(c).to(a.dtype),
    "less than a number": lambda a, b, c: a.lt(0.1).to(a.dtype) * 2 + b.le(0.0).to(a.dtype),
    "more than a number": lambda a, b, c: a.gt(0.1).to(a.dtype) * 2 + b.ge(0.0).to(a.dtype),
    "equal to a number": lambda a, b, c: a.eq(0.0).to(a.dtype) * 2 + b.ne(0.0).to(a.dtype),
    "masked": lambda a, b, c: a.masked_fill(b.gt(0.0), 0.7),
    "zeros": lambda a, b, c: a.zero_().add_(b),
    "exponential": lambda a, b, c: exp(a) + exp(b * 1e-6),
    "tangent": lambda a, b, c: tanh(a) + tanh(b * 1e-6),
    "one register twice": lambda a, b, c: (a + a).mul_(a).clone().add_(b),
    "elected": lambda a, b, c: (a + b).add_(2.0**-1022).sign_(),
    "agreeing": lambda a, b, c: (a * b).clamp_(min=0.0),
    "agreeing, at least": lambda a, b, c: (a * b).clamp_(min=0.1),
    "distance": lambda a, b, c: (a - b).abs_().mul_(c),
    "weight": lambda a, b, c: a.abs().mul_(0.3),
    "lighter": lambda a, b, c: a.abs().mul_(0.3).lt(b).to(a.dtype),
    "outweighed": lambda a, b, c: (c - a).abs_().mul_(0.4).lt(b.abs()).to(a.dtype),
    "signs added": lambda a, b, c: a.add(b.sign(), alpha=0.3),
    "used twice": lambda a, b, c: (a - b).abs_().add_((a - b).sign()),
}


@compiled
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    """One by one, of inputs and of task vectors."""
    both(lambda tile: OPERATIONS[name](*tile.inputs), values())
    both(lambda tile: OPERATIONS[name](tile.base, *tile.task_vectors()), values(1))


@compiled
@pytest.mark.parametrize("run", [1, 13])
def test_numbers_along_rows_and_columns(run: int) -> None:
    """Of 65 rows of 13."""
    table = np.random.default_rng(0).random(13 if run == 1 else 65)
    inputs = values()
    expected = torch.stack(inputs).view(3, 65, 13)[1] * torch.from_numpy(table).view((1, 13) if run == 1 else (65, 1))

    def compute(tile: Tile) -> Tensor:
        return tile.inputs[1] * tile.along(table, run)

    both(compute, inputs)
    out = torch.empty(N, dtype=torch.float64)
    opened = scan([x.view(65, 13) for x in inputs], columns=13)
    stored = native.in_memory(out)
    assert stored is not None
    program.loop(opened, compute)(next(opened.places(opened.segments[0])), stored, None)
    assert torch.equal(out.view(65, 13), expected)


@compiled
def test_sums_counts_and_ranks() -> None:
    """Of recorded quantities: what torch finds."""
    inputs = values()
    counted: list[int] = []

    def quantities(tile: Tile) -> list[Tensor]:
        first, second = tile.task_vectors()
        tile.count(first.gt(0.0).to(first.dtype), counted.append)
        return [first * second, first * second, second.abs()]

    recorded = scan(inputs).sums(quantities, recorded=True)
    whole, counted = sum(counted), []
    assert recorded == scan(inputs).sums(quantities)
    assert whole == sum(counted)
    assert recorded[0] == recorded[1] == pytest.approx(float(((inputs[1] - inputs[0]) * (inputs[2] - inputs[0])).sum()))

    def scores(tile: Tile) -> list[Tensor]:
        first, second = tile.task_vectors()
        return [first.square().add_(second.abs())] * 2

    found = order.largest(scan(inputs), scores, [100, 300], recorded=True)
    assert found == order.largest(scan(inputs), scores, [100, 300])


class TestRefused:
    """What a recording does not know."""

    def record(self, compute: Callable[[Any], Any]) -> None:
        program.record(2, compute, "store")

    def test_unknown_operations(self) -> None:
        with pytest.raises(AttributeError, match="'erf' cannot be recorded"):
            self.record(lambda tile: tile.base.erf())
        with pytest.raises(AttributeError, match="'erf_' cannot be recorded"):
            self.record(lambda tile: tile.base.erf_())

    def test_decisions(self) -> None:
        """Elements have no value that anything could depend on."""
        with pytest.raises(TypeError, match="no value yet"):
            self.record(lambda tile: tile.base if tile.base.gt(0.0) else tile.inputs[1])

    def test_other_dtypes(self) -> None:
        with pytest.raises(TypeError, match=r"float64, not torch\.float32"):
            self.record(lambda tile: tile.base.to(torch.float32))

    def test_tensors(self) -> None:
        """Such as statistics that were not asked for by row or column."""
        with pytest.raises(TypeError):
            self.record(lambda tile: tile.base * torch.ones(3))

    def test_too_much_at_once(self) -> None:
        def many(tile: Recorded) -> Value:
            kept = [tile.base + float(i) for i in range(200)]
            total = kept[-1].clone()
            for each in reversed(kept):
                total.mul_(each)
            return total

        with pytest.raises(TypeError, match="intermediate results at once"):
            self.record(many)


def test_notes_what_is_needed_once() -> None:
    """The same operation twice is one step; what nothing depends on is none."""

    def compute(tile: Recorded) -> list[Value]:
        (delta,) = tile.task_vectors()
        tile.base.mul(3.0)
        return [delta.square(), delta * delta]

    found = program.record(2, compute, "sums")  # type: ignore[arg-type]
    names = [steps.OPERATIONS[step.operation] for step in found.steps]
    assert names == ["load", "load", "subtract", "multiply", "sums", "sums"]


def test_what_can_be_done_together_follows_each_other() -> None:
    """Operations on chunks as a whole come when nothing else is left to do; groups say what they read and what is kept."""

    def compute(tile: Recorded) -> list[Value]:
        (delta,) = tile.task_vectors()
        steep = (delta * 2.0).tanh()
        return [steep * delta.abs(), delta]

    notes: list[steps.Structure] = []
    with mock.patch.object(program, "laid_out", lambda found: notes.append(found) or steps.laid_out(found)):
        program.record(2, compute, "sums")  # type: ignore[arg-type]
    order = steps.ordered(notes[0])
    names = [notes[0][index][0] for index in order]
    assert names == ["load", "load", "subtract", "scale", "size", "tanh", "sums", "multiply", "sums"]
    assert steps.groups(notes[0], order) == [(2, "subtract(i0,i1) scale(0) size(0) > 0 1 2")]


@compiled
def test_what_methods_record_is_compiled_as_groups() -> None:
    """The list is that of the methods as they are; if not, ``python tests/recorded_groups.py`` writes it again."""
    assert GROUPS.read_text().splitlines() == recorded()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_have_the_bits_of_single_steps_and_of_torch(dtype: torch.dtype) -> None:
    """All that is on the list, in whole chunks and what is left; one by one is how it goes for more experts than listed."""
    for case in recorded_cases():
        inputs = [x.to(dtype) for x in case.models((31, 67))]
        steps.laid_out.cache_clear()
        found = merge(case.made(), inputs)
        with native.turned_off():
            assert torch.equal(found, merge(case.made(), inputs)), case
        steps.laid_out.cache_clear()
        with mock.patch.object(steps, "_known", dict):
            assert torch.equal(found, merge(case.made(), inputs)), case
    steps.laid_out.cache_clear()


def test_sums_of_groups() -> None:
    """What a group may sum up itself: all that is kept, each once, by the steps that follow it, in their order."""

    def written(compute: Callable[[Recorded], list[Value]]) -> list[str]:
        notes: list[steps.Structure] = []
        with mock.patch.object(program, "laid_out", lambda found: notes.append(found) or steps.laid_out(found)):
            program.record(2, compute, "sums")  # type: ignore[arg-type]
        return [text for _, text in steps.groups(notes[0], steps.ordered(notes[0]))]

    def reversed_(tile: Recorded) -> list[Value]:
        (delta,) = tile.task_vectors()
        size = delta.abs()
        return [delta.square(), size]

    assert written(reversed_) == ["subtract(i0,i1) size(0) multiply(0,0) > 2 1 summed"]

    def twice(tile: Recorded) -> list[Value]:
        (delta,) = tile.task_vectors()
        return [delta.square(), delta.square()]

    def also(tile: Recorded) -> list[Value]:
        (delta,) = tile.task_vectors()
        return [delta.abs(), delta.abs().tanh()]

    assert not any(text.endswith("summed") for text in written(twice) + written(also))


class TestFunctions:
    """Against NumPy, within a few units in the last place, and where the answer is known."""

    @pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-2, 1.0, 30.0])
    def test_near_the_truth(self, scale: float) -> None:
        x = torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
        for ours, theirs, argument in ((exp, np.exp, x), (tanh, np.tanh, x), (log, np.log, x.abs() + 1e-300)):
            expected = torch.from_numpy(theirs(argument.numpy()))
            error = (ours(argument) - expected).abs()
            assert float((error / torch.from_numpy(np.spacing(expected.abs().numpy()))).max()) <= 4

    @pytest.mark.parametrize("scale", [1e-9, 1e-3, 0.06, 0.2, 30.0])
    def test_logarithms_of_ratios(self, scale: float) -> None:
        """Also of numbers that are nearly equal, against twice as many digits; and of equal ones."""
        generator = torch.Generator().manual_seed(2)
        q = torch.rand(5000, dtype=torch.float64, generator=generator) + 1e-3
        p = q * (torch.randn(5000, dtype=torch.float64, generator=generator) * scale).exp()
        with mpmath.workdps(40):
            pairs = zip(p.tolist(), q.tolist(), strict=True)
            expected = [float(mpmath.log(mpmath.mpf(a) / mpmath.mpf(b))) for a, b in pairs]
        error = np.abs(log_of_ratio(p, q).numpy() - expected)
        assert (error <= 8 * np.spacing(np.maximum(np.abs(expected), scale * 1e-16))).all()
        assert log_of_ratio(q, q).eq(0).all()

    def test_known(self) -> None:
        """Zero and one, both ends, and what is beyond."""
        assert exp(torch.tensor([0.0, -1e9, 709.0, 1e9], dtype=torch.float64)).tolist() == [
            1.0,
            pytest.approx(math.exp(-708)),
            pytest.approx(math.exp(709)),
            pytest.approx(math.exp(709)),
        ]
        assert tanh(torch.tensor([0.0, 50.0, -50.0, 1e-200], dtype=torch.float64)).tolist() == [0.0, 1.0, -1.0, 1e-200]
        assert log(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)).tolist() == [0.0, math.log(2), -math.log(2)]
