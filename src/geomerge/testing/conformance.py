"""What every merge method must keep, whatever it computes; each check takes a `Case` and raises `AssertionError`."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomerge.errors import NotFiniteError, UsageError
from geomerge.methods import native, properties, registry
from geomerge.methods.base import Method
from geomerge.methods.direct import Function
from geomerge.testing.inputs import KINDS, merge, models

Transform = Callable[[Tensor], Tensor]

SHAPES: tuple[tuple[int, ...], ...] = ((137,), (3, 500), (211, 5), (4, 3, 5, 2), (1,), (1, 1), (), (0,), (5, 0), (0, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILES = (1 << 13, 1 << 14, 1 << 16, 1 << 22)
LARGE: tuple[tuple[int, ...], ...] = ((3, 50_003), (111_111,), (2101, 53))
"""Shapes that any tile cuts: rows longer than a tile, odd numbers of elements."""

THINNING = {"density": 0.5, "select_topk": 0.5, "lambda": 0.5}
"""Parameters whose neutral value hides what a method does: where it has them, it is checked with these values, too."""

_NEUTRAL: Mapping[str, Mapping[str, Any]] = {
    "slerp": {"t": 0.3},
    "nearswap": {"t": 1e-4},
    # What is true of twenty steps is true of hundreds.
    "wudi": {"steps": 20},
    "optmerge": {"steps": 20},
    "doge_ta": {"steps": 20},
}

_WEIGHTS = (1.0, 0.5, 0.75, 1.25, 2.0)
_TOLERANCE = 1e-7
"""Of the largest magnitude: far below any change in the models, and above the methods' own small constants (1e-8)."""


@dataclass(frozen=True)
class Case:
    """A method with a number of models and parameters.

    Attributes:
        method: The class.
        count: The number of models beside the base.
        based: Whether there is a base.
        values: Parameters that are not neutral.
        neutral: What the required parameters are set to.
    """

    method: type[Method]
    count: int
    based: bool
    values: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{name}={value}" for name, value in self.values.items()]
        return "-".join([self.method.name, str(self.count), *(["base"] if self.based else []), *settings])

    @property
    def inputs(self) -> int:
        """The number of models, the base included."""
        return self.count + self.based

    def made(self, order: Sequence[int] | None = None, *, plain: bool = False) -> Method:
        """The method; its per-model parameters in the given order. `plain`: all parameters neutral, all weights equal."""
        values: dict[str, Any] = {}
        order = range(self.count) if order is None else order
        for name, p in self.method.parameters().items():
            if p.required or name in self.neutral:
                values[name] = self.neutral.get(name, 1.0)
                if p.per_model and not plain:
                    values[name] = [_WEIGHTS[k % len(_WEIGHTS)] * values[name] for k in order]
        return self.method.make(values | ({} if plain else dict(self.values)), count=self.count)

    def possible(self) -> bool:
        """Whether the method takes these parameters for so many models."""
        try:
            self.made()
        except UsageError:
            return False
        return True

    def models(self, shape: Sequence[int] = (24, 40), kind: str = "dense") -> list[Tensor]:
        """Inputs for the method, base first."""
        return models(self.inputs, shape, kind)


def cases(
    *names: str, parameters: Mapping[str, Mapping[str, Any]] | None = None, counts: Sequence[int] = (1, 2, 3, 5)
) -> list[Case]:
    """The cases of the named methods, or of all that are registered.

    Args:
        names: Of methods.
        parameters: For each method neutral values of required parameters; those not given are 1.
        counts: Numbers of models, of which a method gets those it takes; if it takes none of them, the fewest that it takes.
    """
    given = {**_NEUTRAL, **(parameters or {})}
    found = []
    for name in names or registry.all_methods():
        method = registry.get(name)
        low, high = method.models
        based = {"required": (True,), "optional": (False, True), "ignored": (False,)}[method.base_use]
        thinned = {key: value for key, value in THINNING.items() if key in method.parameters()}
        for values in [{}, thinned] if thinned else [{}]:
            counted = [c for c in counts if c >= low and (high is None or c <= high)] or [low]
            alike = [Case(method, count, b, values, given.get(name, {})) for count in counted for b in based]
            # Some defaults are for several models; where none is possible all stay, and say so.
            found += [case for case in alike if case.possible()] or ([] if values else alike)
    return found


def check_declaration(case: Case) -> None:
    """The class says what documentation, schema and recipes need, and its parameters survive a round trip."""
    method = case.method
    for attribute in ("name", "title", "paper", "formula", "when", "example", "family"):
        assert getattr(method, attribute).strip(), f"{method.name} has no {attribute}"
    assert method.properties <= set(properties.NAMES), f"unknown properties: {method.properties}"
    assert f"merge_method: {method.name}" in method.example
    assert all(p.doc for p in method.parameters().values())
    made = case.made()
    assert method.make(made.values(), count=case.count) == made
    assert dataclasses.is_dataclass(made)
    assert hash(made) == hash(case.made())


def check_shapes(case: Case) -> None:
    """Any shape, empty ones included, gives that shape; the inputs stay as they are."""
    for shape in SHAPES:
        for dtype in DTYPES:
            inputs = [m.to(dtype) for m in case.models(shape)]
            before = [m.clone() for m in inputs]
            out = merge(case.made(), inputs, dtype=dtype)
            assert out.shape == torch.Size(shape)
            assert bool(torch.isfinite(out).all()), f"{shape} {dtype}: {out}"
            assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was overwritten"


def check_not_finite(case: Case) -> None:
    """NaN or Inf in any input is refused, and the message names the model."""
    for bad, word in ((float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")):
        for i in range(case.inputs):
            inputs = case.models()
            inputs[i].view(-1)[777] = bad
            try:
                merge(case.made(), inputs)
            except NotFiniteError as error:
                assert f"model {i}" in str(error)  # noqa: PT017 - this is no test but a function for tests
                assert word in str(error)  # noqa: PT017
            else:
                raise AssertionError(f"{word} in input {i} went through")


def check_tiles(case: Case) -> None:
    """The same bits for every size of tiles, on several threads, and with reading ahead; in float64 and in bfloat16."""
    for shape, dtype in zip(LARGE, (torch.float64, torch.bfloat16, torch.float64), strict=True):
        inputs = [m.to(dtype) for m in case.models(shape, "wide")]

        def merged(**way: Any) -> Tensor:
            return merge(case.made(), inputs, dtype=dtype, **way)  # noqa: B023 - used in this turn of the loop only

        expected = merged(tile=TILES[0])
        for tile in TILES[1:]:
            assert torch.equal(merged(tile=tile), expected), f"tiles of {tile} differ at {shape}"
        with ThreadPoolExecutor(3) as pool:
            assert torch.equal(merged(run=pool.map), expected), f"threads differ at {shape}"
        assert torch.equal(merged(read_ahead=True), expected), f"reading ahead differs at {shape}"


def check_seed(case: Case) -> None:
    """One seed, one result; the global random generators are left alone."""
    states = torch.get_rng_state(), repr(np.random.get_state())
    inputs = case.models()
    first = merge(case.made(), inputs, seed=3)
    assert torch.equal(first, merge(case.made(), inputs, seed=3)), "the same seed gives another result"
    assert torch.equal(torch.get_rng_state(), states[0]), "torch's global generator was used"
    assert repr(np.random.get_state()) == states[1], "NumPy's global generator was used"


def check_loops(case: Case) -> None:
    """Compiled loops, recorded or written for the method, give the very bits of torch, where they are used."""
    if case.method.family == "matrix":
        return  # which has none
    for kind, dtype in itertools.product(KINDS, (torch.bfloat16, torch.float32)):
        inputs = [m.to(dtype) for m in case.models((31, 67), kind)]
        found = merge(case.made(), inputs, dtype=dtype)
        with native.turned_off():
            expected = merge(case.made(), inputs, dtype=dtype)
        assert torch.equal(found, expected), f"{kind} models of {dtype}: the compiled loop differs from torch"


def check_rounding(case: Case) -> None:
    """A result is that of the same models in float64, rounded once: within one unit in the last place, for every dtype."""
    for kind, dtype in itertools.product(KINDS, DTYPES):
        inputs = [m.to(dtype) for m in case.models(kind=kind)]
        with native.turned_off():
            exact = merge(case.made(), [m.double() for m in inputs])
        error = (merge(case.made(), inputs, dtype=dtype).double() - exact).abs()
        _, exponent = torch.frexp(exact.abs().clamp(min=torch.finfo(dtype).tiny))
        unit = torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), exponent - 1)
        worst = float((error / unit).max())
        assert worst <= 1, f"{kind} models of {dtype}: {worst:.2f} units in the last place off the result in float64"


def check_precision(case: Case) -> None:
    """A method that scales with the task vectors sees a millionth of them: it rounds nothing to 16 bits on its way."""
    if properties.SCALE not in case.method.properties:
        return
    inputs = [m.double() for m in case.models()]
    base = inputs[0] if case.based else torch.zeros_like(inputs[0])
    noise = torch.rand(base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = [m + (m - base) * (1 + noise) * 1e-6 for m in inputs]
    one, other = (merge(case.made(), given) for given in (inputs, moved))
    change = (one - base).abs()
    clear = change > 1e-2 * change.max()
    seen = float((one != other)[clear].double().mean()) if bool(clear.any()) else 1.0
    assert seen > 0.9, f"{1 - seen:.0%} of the elements do not feel a change of 10⁻⁶ of their task vectors"


def check_endpoints(case: Case) -> None:
    """What interpolates with one other model by a parameter t gives the base at its least, the other model at its most."""
    t = case.method.parameters().get("t")
    if not case.method.interpolates or case.count > 1 or t is None or t.within is None:
        return
    for kind, dtype in itertools.product(KINDS, DTYPES):
        inputs = [m.to(dtype) for m in case.models(kind=kind)]
        for bound, end in zip(t.within, inputs, strict=True):
            made = case.method.make({**case.made().values(), "t": bound}, count=1)
            assert torch.equal(merge(made, inputs, dtype=dtype), end), f"t = {bound:g} gives no end of {kind} models"


def check_properties_hold(case: Case) -> None:
    """Each property that the class lists holds on every kind of models."""
    for name in sorted(case.method.properties):
        found = list(violations(case, name))
        assert not found, f"{case} does not keep {name!r}: {found[0]}"


def check_properties_complete(method: str, parameters: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Each property that a method's class does not list is violated by some models, numbers of experts or parameters.

    Args:
        method: Its name.
        parameters: As for `cases`.
    """
    alike = cases(method, parameters=parameters)
    for name in sorted(set(properties.NAMES) - registry.get(method).properties):
        # A property that cannot even be stated (`single` of a method for two) is not one that holds.
        stated = [c for c in alike if name != properties.SINGLE or c.count == 1]
        assert not stated or any(any(violations(c, name)) for c in stated), f"{method} keeps {name!r}: list it"


def digests(*names: str, parameters: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, str]:
    """Of the result of every case of the named methods, or of all: its SHA-256."""
    found = {}
    for case in cases(*names, parameters=parameters):
        inputs = [m.to(torch.float32) for m in case.models((31, 67))]
        out = merge(case.made(), inputs, seed=5)
        found[str(case)] = hashlib.sha256(out.numpy().tobytes()).hexdigest()
    return found


def check_processes_agree(*names: str, parameters: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Another process, with other hashes of strings and one thread, computes the very bits of this one.

    Args:
        names: Of methods; all that are registered, if none are given.
        parameters: As for `cases`.
    """
    methods = [registry.get(name) for name in names or registry.all_methods()]
    asked = {"modules": sorted({m.__module__ for m in methods}), "names": names, "parameters": dict(parameters or {})}
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONHASHSEED": "123",
        "OMP_NUM_THREADS": "1",
    }
    there = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE],
        env=os.environ | environment,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert there.returncode == 0, there.stderr
    found = json.loads(there.stdout)
    for case, digest in digests(*names, parameters=parameters).items():
        assert found[case] == digest, f"{case} gives other bits in another process"


_ELSEWHERE = """
import importlib, json, sys
from geomerge.testing.conformance import digests
asked = json.load(sys.stdin)
for module in asked["modules"]:
    importlib.import_module(module)
print(json.dumps(digests(*asked["names"], parameters=asked["parameters"])))
"""

CHECKS: tuple[Callable[[Case], None], ...] = (
    check_declaration,
    check_shapes,
    check_not_finite,
    check_tiles,
    check_seed,
    check_loops,
    check_rounding,
    check_precision,
    check_endpoints,
    check_properties_hold,
)


def violations(case: Case, name: str) -> Iterator[str]:
    """What shows that a property does not hold for a case."""
    shapes = [(24, 40), (40, 24)] if case.method.family == "matrix" else [(24, 40)]
    for kind, shape in itertools.product(KINDS, shapes):
        for what, found, expected in _pairs(case, name, kind, shape):
            size = float(expected.abs().max())
            error = float((found.double() - expected.double()).abs().max())
            if error > (0.0 if name == properties.BASE else _TOLERANCE * size):
                yield f"{what} of {kind} models: off by {error:.3g} where {size:.3g} is the largest element"


def _pairs(case: Case, name: str, kind: str, shape: tuple[int, int]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Results that a property says are equal."""
    inputs = case.models(shape, kind)
    base, experts = inputs[: case.based], inputs[case.based :]
    lone = case.count == 1 and case.based  # an only expert: what is said of experts is said of the two models
    if name == properties.BASE:
        for dtype in DTYPES:
            same = inputs[0].to(dtype)
            yield f"equal {dtype}", merge(case.made(), [same] * case.inputs, dtype=dtype), same
    elif name == properties.SINGLE:
        if case.count == 1:
            yield "a single one", merge(case.made(plain=True), inputs), experts[0]
    elif name == properties.IDENTICAL:
        several = (
            [experts[0]] * case.inputs if lone and case.method.models == (1, 1) else base + experts[:1] * case.count
        )
        yield "copies", merge(case.made(plain=True), several), experts[0]
        if case.based and case.made(plain=True).surveys:
            # What is found in all tensors may not fit each: here a vector beside the weight.
            models = [{"weight": m, "vector": m[0]} for m in several]
            found = Function(case.method)(models[0], models[1:], **case.made(plain=True).values())
            assert isinstance(found, dict)
            yield "copies with a vector", found["vector"], models[1]["vector"]
    elif name == properties.PERMUTATION:
        if lone and case.method.models == (1, 1):
            yield "exchange", merge(case.made(), inputs[::-1]), merge(case.made(), inputs)
        else:
            order = [*range(1, case.count), 0]
            yield (
                "rotation of the order",
                merge(case.made(order), base + [experts[k] for k in order]),
                merge(case.made(), inputs),
            )
    else:
        exact = [torch.round(m * 2**20) / 2**20 for m in inputs]  # so that sums with the base are exact
        still = exact[0] if case.based and case.method.adds_to_base() else torch.zeros_like(exact[0])
        merged = merge(case.made(), exact)
        for what, transform in _transforms(name, inputs[0]):
            moved = [still + transform(m - still) for m in exact]
            yield what, merge(case.made(), moved), still + transform(merged - still)


def _transforms(name: str, like: Tensor) -> list[tuple[str, Transform]]:
    if name == properties.SCALE:
        return [("multiplication by 4", lambda x: x * 4), ("multiplication by ¼", lambda x: x / 4)]
    if name == properties.SIGN:
        return [("negation", torch.neg)]
    random = np.random.default_rng(5)
    left, right = (torch.from_numpy(np.linalg.qr(random.standard_normal((n, n)))[0]) for n in like.shape)
    return [("rotation", lambda x: left @ x @ right.T)]
