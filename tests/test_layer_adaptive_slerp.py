"""Layer-adaptive SLERP: the invariants of the sphere, groups that share an angle, several parents, statistics, traffic."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import geomerge as gm
import references as ref
import tiny
from geomerge.engine import sinks, sources
from geomerge.engine.schedule import PRESETS
from geomerge.methods import native

SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n"
ADAPTIVE = "merge_method: layer_adaptive_slerp\nbase_model: a\nmodels: [{model: b}]\n"
slerp = gm.methods.slerp


def pair(seed: int = 0, *, spread: float = 1.0, equal_norms: bool = False) -> tuple[Tensor, Tensor]:
    """Two float64 tensors."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    b = a + spread * torch.randn(7, 5, generator=generator, dtype=torch.float64)
    return (a / a.norm(), b / b.norm()) if equal_norms else (a, b)


def angle(a: Tensor, b: Tensor) -> float:
    """The angle by Kahan's formula."""
    u, v = a / a.norm(), b / b.norm()
    return 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))


class TestTheSphere:
    """What holds for every schedule."""

    @pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
    def test_swap(self, t: float) -> None:
        """slerp(θ₁, θ₂, c) = slerp(θ₂, θ₁, 1 − c)."""
        a, b = pair()
        assert torch.allclose(slerp(a, [b], t=t), slerp(b, [a], t=1 - t), rtol=0, atol=1e-14)

    @pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
    def test_equal_norms_are_kept_at_constant_angular_speed(self, t: float) -> None:
        a, b = pair(equal_norms=True)
        merged = slerp(a, [b], t=t)
        assert float(merged.norm()) == pytest.approx(1, abs=1e-12)
        assert angle(merged, a) == pytest.approx(t * angle(a, b), abs=1e-12)

    def test_collinear_is_a_straight_line(self) -> None:
        a, _ = pair()
        assert torch.allclose(slerp(a, [3 * a], t=0.3), 1.6 * a, rtol=1e-9)

    def test_small_angles_give_one_minus_c_and_c(self) -> None:
        """ω → 0: a → 1 − c, b → c, up to ω²/8 of the difference between the parents' norms and directions."""
        a, b = pair(spread=1e-6)
        assert float((slerp(a, [b], t=0.3) - (0.7 * a + 0.3 * b)).norm() / a.norm()) < 1e-12

    def test_scale(self) -> None:
        a, b = pair()
        assert torch.allclose(slerp(4 * a, [4 * b], t=0.3), 4 * slerp(a, [b], t=0.3), rtol=1e-14)

    @pytest.mark.parametrize("norm", ["geo", "lin"])
    def test_norms_by_option(self, norm: str) -> None:
        """The merged norm is the geometric or linear mean; the endpoints are the parents, bit for bit."""
        a, b = pair()
        n, m, t = float(a.norm()), float(b.norm()), 0.3
        expected = n ** (1 - t) * m**t if norm == "geo" else (1 - t) * n + t * m
        assert float(slerp(a, [b], t=t, norm=norm).norm()) == pytest.approx(expected, rel=1e-12)
        assert torch.equal(slerp(a, [b], t=0, norm=norm), a)
        assert torch.equal(slerp(a, [b], t=1, norm=norm), b)

    def test_opposite_vectors_are_joined_by_a_line(self) -> None:
        a, _ = pair()
        assert torch.allclose(slerp(a, [-2 * a], t=0.25), 0.25 * a)


class TestSeveralParents:
    def test_two_parents_are_slerp(self) -> None:
        a, b = pair()
        for arrangement in ("barycentre", "star", "iterative"):
            merged = gm.methods.layer_adaptive_slerp(a, [b], t=0.3, arrangement=arrangement)
            assert torch.equal(merged, slerp(a, [b], t=0.3))

    def test_barycentre_is_the_mean_of_the_sphere(self) -> None:
        """Against an iteration in the full space: the direction, and with `lin` the norm Σ wᵢ‖xᵢ‖."""
        models = [pair(s)[0] for s in range(3)]
        weights = [0.4, 0.6 * 0.25, 0.6 * 0.75]
        merged = gm.methods.layer_adaptive_slerp(models[0], models[1:], t=0.6, weight=[1, 3], norm="lin")
        expected = ref.sphere_mean([m.numpy() for m in models], weights)
        length = sum(w * float(m.norm()) for w, m in zip(weights, models, strict=True))
        assert np.allclose(merged.numpy(), expected * length, rtol=0, atol=1e-9)

    def test_barycentre_of_the_far_parents_alone_is_their_slerp(self) -> None:
        """t = 1 leaves the first parent out: two equal others meet at the middle of their arc."""
        a, (b, c) = pair(5)[0], pair()
        assert torch.allclose(gm.methods.layer_adaptive_slerp(a, [b, b], t=1), b)
        merged = gm.methods.layer_adaptive_slerp(a, [b, c], t=1)
        assert torch.allclose(merged, slerp(b, [c], t=0.5), rtol=1e-9)

    def test_all_shares_zero(self) -> None:
        a, b = pair()
        with pytest.raises(gm.UsageError, match="sum to 0"):
            gm.methods.layer_adaptive_slerp(a, [b, b], weight=0)


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tiny.Tensors]:
    """Models base, a, b, c of five blocks in the working directory."""
    monkeypatch.chdir(tmp_path)
    return tiny.family(tmp_path, num_hidden_layers=5)


def merged(recipe: str, **options: Any) -> dict[str, Tensor]:
    """A recipe's output."""
    gm.merge(recipe, "out", force=True, **options)
    return tiny.read(Path("out"))


class TestRecipes:
    def test_constant_schedule_is_global_slerp(self, family: dict[str, tiny.Tensors]) -> None:
        one = merged(ADAPTIVE + "schedule: {attention: [0.4, 0.4], default: 0.4}\n")
        other = merged(SLERP + "parameters: {t: 0.4}\n")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_without_a_schedule_it_is_s(self, family: dict[str, tiny.Tensors]) -> None:
        one, other = merged(ADAPTIVE), merged(SLERP + "schedule: S\n")
        assert all(torch.equal(one[name], other[name]) for name in one)
        constant = merged(ADAPTIVE + "parameters: {t: 0.3}\n")
        assert torch.equal(constant["lm_head.weight"], merged(SLERP + "parameters: {t: 0.3}\n")["lm_head.weight"])

    @pytest.mark.parametrize("preset", list(PRESETS))
    def test_equal_parents_are_kept_by_every_schedule(self, preset: str, family: dict[str, tiny.Tensors]) -> None:
        same = f"merge_method: slerp\nbase_model: a\nmodels: [{{model: a2}}]\nschedule: {preset}\n"
        os.symlink("a", "a2")
        assert all(torch.equal(x, family["a"][name]) for name, x in merged(same).items())

    def test_a_group_shares_one_angle(self, family: dict[str, tiny.Tensors]) -> None:
        """The angle of a block's four attention matrices laid end to end; norms of the parents play no part in it."""
        found = merged(SLERP + "parameters: {t: 0.3, angle_scope: group}\ndtype: float64\n")
        names = [f"model.layers.2.self_attn.{p}_proj.weight" for p in "qkvo"]
        a, b = (torch.cat([family[m][n].double().flatten() for n in names]) for m in "ab")
        expected = torch.from_numpy(ref.slerp(a.numpy(), b.numpy(), 0.3))
        assert torch.allclose(torch.cat([found[n].flatten() for n in names]), expected, rtol=1e-12, atol=1e-14)

    def test_a_model_shares_one_angle(self, family: dict[str, tiny.Tensors]) -> None:
        """All tensors laid end to end; as a recipe and as a function."""
        found = merged(SLERP + "parameters: {t: 0.3, angle_scope: model}\ndtype: float64\n")
        a, b = (torch.cat([family[m][n].double().flatten() for n in found]) for m in "ab")
        expected = torch.from_numpy(ref.slerp(a.numpy(), b.numpy(), 0.3))
        assert torch.allclose(torch.cat([x.flatten() for x in found.values()]), expected, rtol=1e-12, atol=1e-14)
        parents = [{n: family[m][n] for n in found} for m in "ab"]
        again = gm.methods.slerp(parents[0], parents[1:], t=0.3, angle_scope="model", dtype="float64")
        assert all(torch.equal(again[n], x) for n, x in found.items())
        empty = [{**p, "empty": torch.zeros(0, 3)} for p in parents]
        assert torch.equal(
            gm.methods.slerp(empty[0], empty[1:], t=0.3, angle_scope="model", dtype="float64")["lm_head.weight"],
            found["lm_head.weight"],
        )
        with pytest.raises(gm.UsageError, match="by role"):
            gm.methods.slerp(parents[0], parents[1:], t=0.3, angle_scope="group")

    def test_a_group_of_one_tensor_is_that_tensor(self, family: dict[str, tiny.Tensors]) -> None:
        one = merged(SLERP + "parameters: {t: 0.3, angle_scope: group}\ndtype: float64\n")
        other = merged(SLERP + "parameters: {t: 0.3}\ndtype: float64\n")
        assert torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
        assert not torch.equal(one["model.layers.2.mlp.up_proj.weight"], other["model.layers.2.mlp.up_proj.weight"])

    def test_statistics_weight_the_angle(self, family: dict[str, tiny.Tensors]) -> None:
        """⟨x, y⟩ = Σ F·x·y with F = F₁ + F₂; constant statistics change nothing."""
        shape = {
            name: torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) for name, x in family["a"].items()
        }
        for name in ("fisher-a", "fisher-b"):
            Path(name).mkdir()
            save_file(shape, f"{name}/model.safetensors")
        text = SLERP + "parameters: {t: 0.3}\ndtype: float64\nstatistics: [fisher-a, fisher-b]\n"
        found = merged(text)
        name = "model.layers.1.mlp.up_proj.weight"
        a, b, root = (x.double() for x in (family["a"][name], family["b"][name], (2 * shape[name].double()).sqrt()))
        omega = angle(a * root, b * root)
        expected = (math.sin(0.7 * omega) * a + math.sin(0.3 * omega) * b) / math.sin(omega)
        assert torch.allclose(found[name], expected, rtol=1e-12, atol=1e-15)
        for each in ("fisher-a", "fisher-b"):
            save_file({n: torch.full_like(x, 7.0) for n, x in shape.items()}, f"{each}/model.safetensors")
        plain = merged(SLERP + "parameters: {t: 0.3}\ndtype: float64\n")
        assert torch.allclose(merged(text)[name], plain[name], rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("model.norm.weight"), "have no model.norm.weight"),
            (lambda s: s.update({"model.norm.weight": torch.ones(3)}), r"\[3\] values for model.norm.weight"),
            (lambda s: s["model.norm.weight"].mul_(-1), "negative number"),
        ],
        ids=["missing", "shape", "negative"],
    )
    def test_bad_statistics(self, change: Any, message: str, family: dict[str, tiny.Tensors]) -> None:
        statistics = {name: torch.ones(x.shape) for name, x in family["a"].items()}
        change(statistics)
        Path("fisher").mkdir()
        save_file(statistics, "fisher/model.safetensors")
        with pytest.raises(gm.GeomergeError, match=message):
            merged(SLERP + "parameters: {t: 0.3}\nstatistics: [fisher]\n")
        assert not Path("out").exists()

    def test_methods_without_angles_take_no_statistics(self, family: dict[str, tiny.Tensors]) -> None:
        text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nstatistics: [a]\n"
        with pytest.raises(gm.RecipeError, match="takes no statistics") as refused:
            gm.plan(text)
        assert "slerp" in str(refused.value.hint)

    @pytest.mark.parametrize("options", [{"tile": 64}, {"threads": 2}, {"tile": 1 << 20, "threads": 1}])
    def test_groups_do_not_depend_on_tiles(self, options: dict[str, int], family: dict[str, tiny.Tensors]) -> None:
        text = SLERP + "parameters: {t: 0.3, angle_scope: group}\n"
        one, other = merged(text, **options), merged(text)
        assert all(torch.equal(one[name], other[name]) for name in one)


IO = Path("/proc/self/io")


def counted() -> tuple[int, int]:
    """The bytes that this process has read and written so far."""
    lines = dict(line.split(": ") for line in IO.read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


class TestTraffic:
    """Averaging moves 3d bytes, SLERP 5d, and 3d again when the tiles are held between its passes."""

    @pytest.mark.parametrize(
        ("method", "tile", "reads"),
        [
            ("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n", 512, 2),
            (SLERP + "parameters: {t: 0.3}\n", 512, 4),
            (SLERP + "parameters: {t: 0.3}\n", 1 << 20, 2),
        ],
        ids=["average", "slerp", "slerp, held"],
    )
    def test_bytes(self, method: str, tile: int, reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for seed, name in enumerate("ab"):
            Path(name).mkdir()
            x = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(seed))
            save_file({f"w{i}.weight": x[i].clone() for i in range(3)}, f"{name}/model.safetensors")
        d = 3 * 40 * 50 * 4
        moved = {"read": 0, "written": 0}
        fill, write = sources.fill, sinks.FileSink.write

        def counted_read(descriptor: int, view: memoryview, offset: int, label: str) -> None:
            moved["read"] += len(view)
            fill(descriptor, view, offset, label)

        def counted_write(sink: Any, node: Any, start: int, values: Tensor) -> None:
            moved["written"] += values.nbytes
            write(sink, node, start, values)

        monkeypatch.setattr(sources, "fill", counted_read)
        monkeypatch.setattr(sinks.FileSink, "write", counted_write)
        with native.turned_off():
            gm.merge(method + "guardrails: off\n", "out", tile=tile, threads=1)  # which look at a sample of the parents
        assert moved == {"read": reads * d, "written": d}

    @pytest.mark.skipif(not native.available() or not IO.exists(), reason="counted by Linux, where loops were compiled")
    @pytest.mark.parametrize(
        ("method", "reads"), [("merge_method: linear\nmodels: [{model: a}, {model: b}]\n", 2), (SLERP, 4)]
    )
    def test_bytes_of_loops(self, method: str, reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compiled loops read and write themselves; beside the weights there are a few small files, and samples."""
        monkeypatch.chdir(tmp_path)
        for seed, name in enumerate("ab"):
            Path(name).mkdir()
            x = torch.randn(5, 1000, 1000, generator=torch.Generator().manual_seed(seed))
            save_file({f"w{i}.weight": x[i].clone() for i in range(5)}, f"{name}/model.safetensors")
        parameters = "parameters: {weight: 1}\n" if reads == 2 else "parameters: {t: 0.3}\n"
        gm.merge(method + parameters + "guardrails: off\n", "warm", threads=1)  # what is imported is read as well
        before = counted()
        gm.merge(method + parameters + "guardrails: off\n", "out", threads=1)
        read, written = (after - b for after, b in zip(counted(), before, strict=True))
        d = 5 * 1000 * 1000 * 4
        assert reads * d <= read <= (reads + 0.15) * d
        assert d <= written <= 1.05 * d
