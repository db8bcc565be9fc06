"""Every method against its independent float64 reference: the result rounded once, in every dtype and shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import geomerge as gm
import optimised_references
import references as ref
import test_methods_survey
from geomerge.methods import registry, tile
from geomerge.methods.kernel import prepare
from geomerge.methods.tile import Scan, TensorSource
from geomerge.testing import models

Array = ref.Array
Reference = Callable[[Array | None, list[Array]], Array]

SHAPES = [(1031,), (7, 150), (150, 7), (6, 5, 4, 9), (1,), (), (0, 3)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
W = {1: [0.75], 2: [0.75, 0.5], 3: [0.75, 0.5, 1.25], 4: [1.0, -0.5, 0.75, 0.25]}
SEED = 11


@dataclass(frozen=True)
class Row:
    """A method with parameters and what the reference says."""

    method: str
    count: int
    reference: Reference
    parameters: dict[str, Any] = field(default_factory=dict)
    based: bool = True

    def __str__(self) -> str:
        return "-".join([self.method, str(self.count), *(f"{k}={v}" for k, v in self.parameters.items())])


def drawn(method: str, taus: Sequence[Array], **parameters: Any) -> list[Array]:
    """The masks that a random method draws: which elements of one task vector after the other survive."""
    masks = []
    for k in range(len(taus)):
        experts = [torch.from_numpy(np.asarray(t if i == k else np.zeros_like(t))) for i, t in enumerate(taus)]
        base = torch.zeros(taus[0].shape, dtype=torch.float64)
        out = gm.methods.__getattr__(method)(base, experts, weight=1.0, rescale=False, seed=SEED, **parameters)
        masks.append((out.numpy() != 0).astype(np.float64))
    return masks


def dare(elect: bool, density: float, w: list[float], **parameters: Any) -> Reference:
    """DARE's reference for a density and weights; the parameters are those of `references.combine`."""

    def reference(base: Array | None, experts: list[Array]) -> Array:
        assert base is not None
        masks = drawn("dare_linear", [np.ones_like(base)] * len(experts), density=density)
        taus = [(x - base) * m / density for x, m in zip(experts, masks, strict=True)]
        return ref.combine(base, taus, w, elect=elect, **parameters)

    return reference


def della(elect: bool, density: float, epsilon: float, w: list[float], **parameters: Any) -> Reference:
    """DELLA's reference."""

    def reference(base: Array | None, experts: list[Array]) -> Array:
        assert base is not None
        taus = [x - base for x in experts]
        masks = drawn("della_linear", taus, density=density, epsilon=epsilon)
        kept = [t * m / ref.keep_probability(t, density, epsilon) for t, m in zip(taus, masks, strict=True)]
        return ref.combine(base, kept, w, elect=elect, **parameters)

    return reference


def thinned(step: Callable[[Array], Array], w: list[float], **parameters: Any) -> Reference:
    """The reference of a method that thins task vectors by a step without chance."""

    def reference(base: Array | None, experts: list[Array]) -> Array:
        assert base is not None
        return ref.combine(base, [step(x - base) for x in experts], w, **parameters)

    return reference


ROWS = [
    Row("linear", 1, lambda b, x: ref.linear(x, W[1]), {"weight": W[1]}, False),
    Row("linear", 4, lambda b, x: ref.linear(x, W[4]), {"weight": W[4]}, False),
    Row("linear", 3, lambda b, x: ref.linear(x, W[3], False), {"weight": W[3], "normalize": False}, False),
    *(Row("slerp", 1, lambda b, x, t=t: ref.slerp(b, x[0], t), {"t": t}) for t in (0.0, 0.3, 1.0)),
    *(
        Row("slerp", 1, lambda b, x, norm=norm: ref.slerp_norm(b, x[0], 0.3, norm), {"t": 0.3, "norm": norm})
        for norm in ("geo", "lin")
    ),
    Row("layer_adaptive_slerp", 1, lambda b, x: ref.slerp(b, x[0], 0.3), {"t": 0.3}),
    Row(
        "layer_adaptive_slerp",
        2,
        lambda b, x: 0.25 * ref.slerp(b, x[0], 0.3) + 0.75 * ref.slerp(b, x[1], 0.3),
        {"t": 0.3, "weight": [1, 3], "arrangement": "star"},
    ),
    Row(
        "layer_adaptive_slerp",
        3,
        lambda b, x: ref.slerp(ref.slerp(ref.slerp(b, x[0], 0.3), x[1], 0.3), x[2], 0.3),
        {"t": 0.3, "arrangement": "iterative"},
    ),
    Row("nuslerp", 2, lambda b, x: ref.nuslerp(x, W[2]), {"weight": W[2]}, False),
    Row("nuslerp", 2, lambda b, x: ref.nuslerp(x, W[2], b), {"weight": W[2]}),
    Row("nuslerp", 2, lambda b, x: ref.nuslerp(x, W[2], b, "row"), {"weight": W[2], "nuslerp_flatten": False}),
    Row(
        "nuslerp",
        2,
        lambda b, x: ref.nuslerp(x, W[2], None, "column"),
        {"weight": W[2], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        False,
    ),
    Row("multislerp", 3, lambda b, x: ref.multislerp(x, W[3]), {"weight": W[3]}, False),
    Row("multislerp", 3, lambda b, x: ref.multislerp(x, W[3], b), {"weight": W[3]}),
    Row("multislerp", 2, lambda b, x: ref.multislerp(x, W[2], b), {"weight": W[2]}),
    Row("karcher", 2, lambda b, x: ref.karcher(x), {}, False),
    Row("karcher", 4, lambda b, x: ref.karcher(x), {}, False),
    Row("task_arithmetic", 1, lambda b, x: x[0], {"weight": 1.0}),
    Row("chat_vector", 2, lambda b, x: x[0] + (x[1] - b), {}),
    Row("chat_vector", 2, lambda b, x: x[0] + 0.4 * (x[1] - b), {"lambda": 0.4}),
    Row("task_arithmetic", 4, lambda b, x: ref.task_arithmetic(b, x, W[4], 0.3), {"weight": W[4], "lambda": 0.3}),
    Row("model_stock", 2, ref.model_stock),
    Row("model_stock", 4, ref.model_stock),
    Row("model_stock", 3, lambda b, x: ref.model_stock(b, x, filter_wise=True), {"filter_wise": True}),
    Row("nearswap", 1, lambda b, x: ref.nearswap(b, x[0], 0.01), {"t": 0.01}),
    *(
        Row(
            "ties",
            k,
            thinned(lambda t: ref.magnitude(t, 0.3), W[k], elect=True, normalize=n, lambda_=0.7),
            {"weight": W[k], "density": 0.3, "normalize": n, "lambda": 0.7},
        )
        for k, n in ((1, True), (3, True), (4, False))
    ),
    Row("dare_linear", 2, dare(False, 0.4, W[2], normalize=False), {"weight": W[2], "density": 0.4}),
    Row("dare_ties", 3, dare(True, 0.4, W[3], normalize=True), {"weight": W[3], "density": 0.4, "normalize": True}),
    Row("della", 3, della(True, 0.5, 0.2, W[3], normalize=True), {"weight": W[3], "density": 0.5, "epsilon": 0.2}),
    Row(
        "della_linear",
        4,
        della(False, 0.5, 0.2, W[4], normalize=False),
        {"weight": W[4], "density": 0.5, "epsilon": 0.2, "normalize": False},
    ),
    Row(
        "breadcrumbs",
        4,
        thinned(lambda t: ref.outliers(t, 0.6, 0.05), W[4], elect=False, normalize=False),
        {"weight": W[4], "density": 0.6, "gamma": 0.05},
    ),
    Row(
        "breadcrumbs_ties",
        3,
        thinned(lambda t: ref.outliers(t, 0.6, 0.05), W[3], elect=True, normalize=False),
        {"weight": W[3], "density": 0.6, "gamma": 0.05},
    ),
    Row(
        "breadcrumbs",
        3,
        thinned(lambda t: ref.outliers_of_rows(t, 0.6, 0.15), W[3], elect=False, normalize=False),
        {"weight": W[3], "density": 0.6, "gamma": 0.15, "scope": "row"},
    ),
    Row("sce", 1, ref.sce),
    Row("sce", 3, ref.sce),
    Row("sce", 3, lambda b, x: ref.sce(b, x, 0.4), {"select_topk": 0.4}),
    Row("sce", 2, lambda b, x: ref.sce(b, x, 0.4, True), {"select_topk": 0.4, "select_only_for_weights": True}),
    Row("arcee_fusion", 1, lambda b, x: ref.arcee_fusion(b, x[0])),
    Row("ram", 3, lambda b, x: ref.ram(b, x, 0.02), {"epsilon": 0.02}),
    Row("ramplus_tl", 3, lambda b, x: ref.ramplus_tl(b, x, 0.3, 0.5, 0.02), {"r": 0.3, "alpha": 0.5, "epsilon": 0.02}),
    Row("widen", 1, lambda b, x: x[0]),
    Row(
        "widen",
        3,
        lambda b, x: optimised_references.widen(b, x, 0.5, 0.75),
        {"above_average_ratio": 0.5, "score_calibration": 0.75},
    ),
    Row("passthrough", 1, lambda b, x: 1.5 * x[0], {"scale": 1.5}, False),
]


def test_every_method_has_a_row() -> None:
    """No method escapes the comparison; those of whole matrices or whole models have tests of their own."""
    elsewhere = {name for name, method in registry.all_methods().items() if method.family == "matrix"}
    elsewhere |= {method for method, _, _ in test_methods_survey.CASES} - {"ties"}
    assert {row.method for row in ROWS} == set(registry.all_methods()) - elsewhere


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_agrees_with_the_reference(row: Row, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element is the reference rounded to nearest, in every shape, on changes of any size and on a coarse grid."""
    monkeypatch.setattr(tile, "SEGMENT", 1 << 10)
    for shape in SHAPES:
        for kind in ("dense", "grid"):
            tensors = [m.to(DTYPES[dtype]) for m in models(row.count + row.based, shape, kind)]
            arrays = [m.double().numpy() for m in tensors]
            base, experts = (tensors[0], tensors[1:]) if row.based else (None, tensors)
            function = getattr(gm.methods, row.method)
            if function.method.base_use == "required":
                out = function(base, experts, seed=SEED, **row.parameters)
            else:
                extra = {"base": base} if row.based else {}
                out = function(experts, seed=SEED, **extra, **row.parameters)
            assert out.dtype == DTYPES[dtype]
            found = out.double().numpy()
            exact = row.reference(arrays[0] if row.based else None, arrays[1:] if row.based else arrays)
            assert found.shape == shape
            # Half an ulp: rounded once, to nearest. A little more, for the halves are reached by way of float32, and 10⁻¹⁵
            # of the inputs for what float64 leaves where they cancel.
            allowed = ref.ulp(exact, dtype) / 2 * (1 + 2**-13) + 1e-15 * max([0.0, *np.abs(arrays).ravel()])
            error = np.abs(found - exact)
            assert np.all(error <= allowed), (shape, kind, np.max(error / ref.ulp(exact, dtype)))


def test_rounding_of_the_references() -> None:
    """The references' rounding is that of the formats: float32 against NumPy, halves at their ties and subnormals."""
    values = np.random.default_rng(0).standard_normal(10_000) * 10.0 ** np.arange(-44, 36).repeat(125)
    assert np.array_equal(ref.round_once(values, "float32"), values.astype(np.float32).astype(np.float64))
    small = values[np.abs(values) < 6e4]
    assert np.array_equal(ref.round_once(small, "float16"), small.astype(np.float16).astype(np.float64))
    # bfloat16 has 8 bits: 1 + 1/256 lies between 1 and 1 + 1/128 and goes to the even 1; 1 + 3/256 to the even 1 + 2/128.
    ties = np.array([1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 256 + 1e-12])
    assert ref.round_once(ties, "bfloat16").tolist() == [1.0, 1 + 2 / 128, 1 + 1 / 128]


# Float32 tiles of 16-bit models (geomerge.methods.combine): as exact as float64 ones, on numbers made to betray them.


def scattered(random: np.random.Generator, n: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of any sign and of exponents in a range."""
    values = random.choice([-1, 1], n) * (1 + random.random(n)) * 2.0 ** random.integers(low, high + 1, n)
    return torch.from_numpy(values).to(dtype)


def hostile(kind: str, dtype: torch.dtype, n: int = 60_000) -> list[torch.Tensor]:
    """A base and three experts.

    ``independent``: of sizes that have nothing to do with each other, so that differences do not fit float32.
    ``crossing``: experts far smaller than the base, which the task vector all but cancels.
    ``opposite``: two task vectors that all but cancel each other on a tiny base.
    """
    random = np.random.default_rng(17)
    low = -30 if dtype == torch.bfloat16 else -20
    if kind == "independent":
        return [scattered(random, n, low, 3, dtype) for _ in range(4)]
    if kind == "crossing":
        return [scattered(random, n, 0, 1, dtype), *(scattered(random, n, low, -10, dtype) for _ in range(3))]
    large = scattered(random, n, -3, 1, dtype)
    return [scattered(random, n, low, -12, dtype), large, -large, scattered(random, n, low, 3, dtype)]


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"weight": [1.0, 0.75, 0.5]}),
    ("ties", {"weight": [0.7, 0.35, 1.1], "normalize": False, "lambda": 0.9}),
    ("dare_linear", {"weight": [0.7, 0.35, 0.3]}),
    ("dare_linear", {"weight": [1.0, -1.0, 0.5]}),
    ("breadcrumbs_ties", {"weight": [0.5, -0.75, 0.5], "gamma": 0.0}),
]


@pytest.mark.parametrize("kind", ["independent", "crossing", "opposite"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("method", "parameters"), HOSTILE, ids=str)
def test_hostile_halves(method: str, parameters: dict[str, Any], dtype: str, kind: str) -> None:
    """Well within an ulp everywhere, as float64 tiles are."""
    base, *experts = hostile(kind, DTYPES[dtype])
    found = getattr(gm.methods, method)(base, experts, **parameters).double().numpy()
    origin = base.double().numpy()
    weights = parameters["weight"]
    taus = [x.double().numpy() - origin for x in experts]
    elect, normalize = "ties" in method, parameters.get("normalize", method == "ties")
    exact = ref.combine(origin, taus, weights, elect=elect, normalize=normalize, lambda_=parameters.get("lambda", 1.0))
    size = np.abs(origin) + sum(abs(w) * np.abs(t) for w, t in zip(weights, taus, strict=True))
    error = np.maximum(np.abs(found - exact) - 1e-15 * size, 0) / ref.ulp(exact, dtype)
    assert error.max() < 0.6, f"{np.count_nonzero(error > 0.6)} elements are off by up to {error.max():.3g} ulp"


@pytest.mark.parametrize("kind", ["independent", "crossing", "opposite"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("count", [1, 3])
def test_hostile_halves_of_equal_weight(count: int, dtype: str, kind: str) -> None:
    """Equal weights, whose votes float32 counts without multiplying: the same, but for ties of changes 2¹⁶ times apart."""
    base, *experts = hostile(kind, DTYPES[dtype])
    experts = experts[:count]
    found = gm.methods.ties(base, experts, weight=1).double().numpy()
    origin = base.double().numpy()
    taus = [x.double().numpy() - origin for x in experts]
    exact = ref.combine(origin, taus, [1.0] * count, elect=True, normalize=True)
    clear = np.abs(sum(taus)) >= 2.0**-20 * sum(np.abs(t) for t in taus)
    error = (np.maximum(np.abs(found - exact) - 1e-15 * np.abs(origin), 0) / ref.ulp(exact, dtype))[clear]
    assert error.max() < 0.6, f"{np.count_nonzero(error > 0.6)} elements are off by up to {error.max():.3g} ulp"
    assert clear.mean() > 0.8


@pytest.mark.parametrize(("method", "parameters"), HOSTILE, ids=str)
def test_float32_results_do_not_depend_on_tiles(
    method: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed again in float64 is chosen element by element: float32 results are the same, bit for bit."""
    monkeypatch.setattr(tile, "SEGMENT", 1 << 14)
    tensors = hostile("independent", torch.bfloat16)
    made = registry.get(method).make(parameters, count=3)

    def computed(size: int) -> torch.Tensor:
        sources = [TensorSource(t) for t in tensors]

        def open_scan(**tiling: Any) -> Scan:
            return Scan(sources, tensors[0].shape, tile=size, **tiling)

        prepared = prepare(made, open_scan, tuple(tensors[0].shape), dtype="BF16")
        assert prepared.scan.dtype == torch.float32
        return torch.cat([v.clone() for segment in prepared.scan.segments for _, v in prepared.tiles(segment)])

    expected = computed(1 << 13)
    for size in (1 << 14, 1 << 20):
        assert torch.equal(computed(size), expected)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "breadcrumbs"])
def test_a_float32_output_of_halves_is_rounded_once(method: str) -> None:
    """Who merges bfloat16 models into float32 gets float32's precision."""
    base, *experts = [m.bfloat16() for m in models(4, (20_000,))]
    settings = {"weight": [0.7, 0.35, 0.3]}
    narrow = getattr(gm.methods, method)(base, experts, dtype=torch.float32, **settings)
    wide = getattr(gm.methods, method)(base.double(), [x.double() for x in experts], **settings)
    assert torch.equal(narrow, wide.float())
