"""Angles, norms and task vectors: literal cases, a dense float64 reference, several models, many tiles, damaged tensors."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diagnose_samples import TENSORS, damage, in_memory

import tiny
from geomerge.diagnose import diagnose, task_vectors
from geomerge.methods.tile import Scan, TensorSource

Q, OUT = TENSORS


def tensor(*values: float) -> torch.Tensor:
    """A row."""
    return torch.tensor([values], dtype=torch.float32)


def test_literal_angles() -> None:
    """45° in one tensor and 90° in the other; the group's vectors are (1, 0, 2, 0) and (1, 1, 0, 1)."""
    a = {Q: tensor(1, 0), OUT: tensor(2, 0)}
    b = {Q: tensor(1, 1), OUT: tensor(0, 1)}
    found = in_memory({"a": a, "b": b}).pairs[0].angles
    q, o = found.tensors
    assert q.angle == pytest.approx(math.pi / 4)
    assert q.cosine == pytest.approx(math.sqrt(0.5))
    assert q.norms == pytest.approx((1, math.sqrt(2)))
    assert q.ratio == pytest.approx(math.sqrt(2))
    assert o.angle == pytest.approx(math.pi / 2)
    (group,) = found.groups
    assert (group.group.role, group.group.column, group.numel) == ("attention", "0", 4)
    assert group.cosine == pytest.approx(1 / math.sqrt(5 * 3))
    assert found.omega_bar == pytest.approx(math.acos(1 / math.sqrt(15)))


def test_means_over_groups() -> None:
    """ω̄ counts every group once, ω weighted counts elements, and Ā is the mean of the groups' cosines."""
    mlp = "model.layers.0.mlp.up_proj.weight"
    a = {Q: tensor(1, 0), mlp: tensor(1, 0, 0, 0, 0, 0)}
    b = {Q: tensor(0, 1), mlp: tensor(1, 0, 0, 0, 0, 0)}
    found = in_memory({"a": a, "b": b})
    angles = found.pairs[0].angles
    assert angles.omega_bar == pytest.approx(math.pi / 4)
    assert angles.omega_weighted == pytest.approx(math.pi / 2 * 2 / 8)
    assert angles.mean_cosine == pytest.approx(0.5)
    assert found.pairs[0].score.similarity == pytest.approx(0.5)


def test_tiny_angles_are_exact() -> None:
    """An angle of 10⁻⁷ between float64 models, which a cosine in double precision could not tell from 0."""
    a = {Q: torch.ones(1, 1000, dtype=torch.float64)}
    turned = torch.ones(1, 1000, dtype=torch.float64)
    turned[0, ::2] += 1e-7
    turned[0, 1::2] -= 1e-7
    assert in_memory({"a": a, "b": {Q: turned}}).pairs[0].angles.omega_bar == pytest.approx(1e-7, rel=1e-6)


def test_zero_tensors() -> None:
    """Zero has no direction: no angle with anything else, none from itself."""
    zero, one = tensor(0, 0), tensor(1, 2)
    found = in_memory({"a": {Q: zero, OUT: zero}, "b": {Q: one, OUT: zero}}).pairs[0].angles
    assert [t.angle for t in found.tensors] == [None, 0.0]
    assert found.tensors[0].ratio is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_dense_reference(dtype: torch.dtype) -> None:
    """Every statistic of a family with a base, beside plain NumPy in float64."""
    shapes = tiny.llama_shapes(tiny.LLAMA)
    base = tiny.random_tensors(shapes, 1, dtype=dtype)
    a, b = (tiny.random_tensors(shapes, seed, like=base, dtype=dtype) for seed in (2, 3))
    found = in_memory({"base": base, "a": a, "b": b}, base="base", exact=True).pairs[0].angles
    assert {t.name for t in found.tensors} == set(shapes)
    for reading in found.tensors:
        t0, ta, tb = (m[reading.name].double().numpy().ravel() for m in (base, a, b))
        assert reading.angle == pytest.approx(angle(ta, tb), rel=2e-5)
        assert reading.norms == pytest.approx((np.linalg.norm(ta), np.linalg.norm(tb)), rel=1e-6)
        x, y = ta - t0, tb - t0
        assert reading.task is not None
        assert reading.task.angle == pytest.approx(angle(x, y), rel=1e-5)
        assert reading.task.norms == pytest.approx((np.linalg.norm(x), np.linalg.norm(y)), rel=1e-6)
        moved = (x != 0) & (y != 0)
        assert reading.task.signs == pytest.approx((np.sign(x) == np.sign(y))[moved].mean())
        assert reading.task.support == pytest.approx(overlap(x, y, 0.2))
    for group in found.groups:
        members = [t for t in found.tensors if t.group == group.group]
        ta, tb = (np.concatenate([m[t.name].double().numpy().ravel() for t in members]) for m in (a, b))
        assert group.angle == pytest.approx(angle(ta, tb), rel=2e-5)
        assert group.numel == ta.size


def angle(x: np.ndarray, y: np.ndarray) -> float:
    """The angle by Kahan's formula on the unit vectors."""
    u, v = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return float(2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))


def overlap(x: np.ndarray, y: np.ndarray, top: float) -> float:
    """The share of common places of the largest elements, by sorting."""
    k = max(round(top * x.size), 1)
    supports = []
    for v in (x, y):
        order = np.argsort(-np.abs(v), kind="stable")[:k]
        supports.append(set(order[v[order] != 0].tolist()))
    return len(supports[0] & supports[1]) / min(map(len, supports))


def shares(
    base: np.ndarray, *models: np.ndarray, exact: bool, top: float = 0.2, tile: int = 1 << 13
) -> tuple[float | None, float | None]:
    """What the first two models share."""
    sources = [TensorSource(torch.from_numpy(x)) for x in (base, *models)]
    return task_vectors.compare(Scan(sources, base.shape, tile=tile), top, exact=exact)[0, 1]


def test_literal_signs_and_support() -> None:
    """Task vectors (3, −2, 0, 1, −1) and (2, 2, 1, 0, −1): two of three moved alike; of the largest two one is common."""
    base = np.zeros(5)
    x, y = np.array([3.0, -2, 0, 1, -1]), np.array([2.0, 2, 1, 0, -1])
    signs, support = shares(base, x, y, exact=True, top=0.4)
    assert signs == pytest.approx(2 / 3)
    assert support == 1.0
    _, support = shares(base, x, np.array([0.0, 0, 5, 4, 1]), exact=True, top=0.4)
    assert support == 0.0


def test_zeros_are_no_support() -> None:
    """A task vector with one element that is not zero has a support of one, whatever the share."""
    base = np.zeros(10)
    x, y = np.zeros(10), np.arange(10.0)
    assert shares(base, x, y, exact=True) == (None, None)
    x[9] = 1
    assert shares(base, x, y, exact=True) == (1.0, 1.0)


def test_exact_support_over_many_tiles() -> None:
    """Bracket, ties and tiles: 300,000 elements on a coarse grid."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=300_000)
    x, y = (np.round(rng.normal(size=base.size) * 8) / 8 for _ in range(2))
    y[::3] = x[::3]
    signs, support = shares(base * 0, x, y, exact=True)
    moved = (x != 0) & (y != 0)
    assert signs == pytest.approx((np.sign(x) == np.sign(y))[moved].mean(), abs=1e-12)
    assert support == pytest.approx(overlap(x, y, 0.2), abs=1e-12)


def test_sample_estimates() -> None:
    """The sample's shares are within two points of the exact ones."""
    rng = np.random.default_rng(1)
    base = np.zeros(400_000)
    x = rng.normal(size=base.size)
    y = 0.5 * x + rng.normal(size=base.size)
    sampled, exact = shares(base, x, y, exact=False), shares(base, x, y, exact=True)
    assert sampled != exact
    for estimate, value in zip(sampled, exact, strict=True):
        assert estimate == pytest.approx(value, abs=0.02)


def test_three_models_are_all_pairs() -> None:
    """One pass over three models gives what three diagnoses of two give."""
    shapes = tiny.llama_shapes(tiny.LLAMA)
    base = tiny.random_tensors(shapes, 1)
    models = {n: tiny.random_tensors(shapes, s, like=base, step=0.02 * s) for s, n in enumerate("abc", 2)}
    found = in_memory(models)
    assert [(found.names[p.a], found.names[p.b]) for p in found.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    for pair in found.pairs:
        names = found.names[pair.a], found.names[pair.b]
        alone = in_memory({n: models[n] for n in names}).pairs[0]
        assert pair.score.omega_bar == pytest.approx(alone.score.omega_bar, rel=1e-9)
        for one, other in zip(pair.angles.tensors, alone.angles.tensors, strict=True):
            assert (one.angle, one.norms) == (pytest.approx(other.angle, rel=1e-9), pytest.approx(other.norms))
    assert found.nearest == 0
    assert found.pairs[0].score.omega_bar < found.pairs[1].score.omega_bar < found.pairs[2].score.omega_bar


def test_not_finite_is_named(tmp_path: Path) -> None:
    """NaN and Inf are counted and named, the rest is measured, and the decision is not to merge."""
    tiny.family(tmp_path, "base a b")
    damage(tmp_path / "b", "model.layers.1.mlp.up_proj.weight", math.nan)
    damage(tmp_path / "a", "model.norm.weight", math.inf)
    found = diagnose(tmp_path / "a", tmp_path / "b")
    assert {(n.model, n.tensor, n.nan, n.inf) for n in found.not_finite} == {
        ("b", "model.layers.1.mlp.up_proj.weight", 1, 0),
        ("a", "model.norm.weight", 0, 1),
    }
    measured = {t.name for t in found.pairs[0].angles.tensors}
    assert "model.norm.weight" not in measured
    assert "lm_head.weight" in measured
    assert found.decision.mode == "do_not_merge"
    assert any("model.norm.weight holds 1 Inf" in r for r in found.decision.reasons)


def test_threads_and_tiles_do_not_matter(tmp_path: Path) -> None:
    """The same numbers from one thread and three."""
    tiny.family(tmp_path, "base a b", hidden_size=128, intermediate_size=512, vocab_size=3000)
    one, three = (diagnose(tmp_path / "a", tmp_path / "b", base=tmp_path / "base", threads=n) for n in (1, 3))
    assert one.to_json() == three.to_json()


_PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from geomerge.diagnose import diagnose
small = diagnose(*sys.argv[1:3], threads=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
large = diagnose(*sys.argv[3:5], base=sys.argv[5], threads=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Three models of 50 MB each take a few MB more than two tiny ones."""
    tiny.family(tmp_path / "small", "a b")
    shape = {"model.embed_tokens.weight": (8000, 1600)}
    config = tiny.LLAMA | {"vocab_size": 8000, "hidden_size": 1600}
    for seed, name in enumerate(("base", "a", "b")):
        made = {**tiny.random_tensors(shape, seed), **tiny.random_tensors({Q: (16, 16)}, seed)}
        tiny.save(tmp_path / "large" / name, made, config)
    words = [str(tmp_path / p) for p in ("small/a", "small/b", "large/a", "large/b", "large/base")]
    ran = subprocess.run([sys.executable, "-c", _PEAK, *words], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 30_000  # kB


def test_angles_grow_with_distance() -> None:
    """Farther fine-tunes stand at larger angles, and S falls."""
    shapes = tiny.llama_shapes(tiny.LLAMA)
    base = tiny.random_tensors(shapes, 1)
    scores = [
        in_memory({"a": base, "b": tiny.random_tensors(shapes, 2, like=base, step=step)}).pairs[0].score
        for step in (0.01, 0.1, 0.5)
    ]
    assert all(x.omega_bar < y.omega_bar and x.value > y.value for x, y in pairwise(scores))
