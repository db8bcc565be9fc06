"""Every method on a few numbers whose answer is worked out by hand. Without a word on it, the base is zero."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import geomerge as gm
from geomerge.errors import IncompatibleModels, NotFiniteError, OutOfRange, UsageError
from geomerge.methods.sparsify import MagPrune

HALF = math.sqrt(0.5)


def vector(*values: Any) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def near(found: Tensor, *expected: Any, error: float = 1e-12) -> bool:
    """Equal up to rounding."""
    return torch.allclose(found, vector(*expected), rtol=error, atol=error)


def zero(*experts: Tensor) -> Tensor:
    """A base of zeros for these experts: their task vectors are themselves."""
    return torch.zeros_like(experts[0])


class TestLinear:
    """θ = Σ wᵢθᵢ / Σ wᵢ."""

    def test_weighted_mean(self) -> None:
        """(1·[1, 2] + 3·[3, 6]) / 4 = [10/4, 20/4]."""
        assert near(gm.methods.linear([vector(1, 2), vector(3, 6)], weight=[1, 3]), 2.5, 5)

    def test_without_normalisation(self) -> None:
        """1·[1, 2] + 3·[3, 6] = [10, 20]."""
        assert near(gm.methods.linear([vector(1, 2), vector(3, 6)], weight=[1, 3], normalize=False), 10, 20)

    def test_negative_weight(self) -> None:
        """(2·[1, 2] − 1·[3, 6]) / 1 = [−1, −2]."""
        assert near(gm.methods.linear([vector(1, 2), vector(3, 6)], weight=[2, -1]), -1, -2)

    def test_weight_of_one_model_returns_its_bits(self) -> None:
        """w = (0, 2): the second model, though 0.1 + 0.2 is not 0.3."""
        b = vector(0.1 + 0.2, 1 / 3)
        assert torch.equal(gm.methods.linear([vector(5, 7), b], weight=[0, 2]), b)

    def test_weights_that_cancel_are_refused(self) -> None:
        """1 − 1 = 0 cannot be divided by; without division it is the difference."""
        with pytest.raises(UsageError, match="sum to zero"):
            gm.methods.linear([vector(1), vector(2)], weight=[1, -1])
        assert near(gm.methods.linear([vector(1), vector(3)], weight=[1, -1], normalize=False), -2)


class TestSlerp:
    """sin((1−t)ω)/sin ω·a + sin(tω)/sin ω·b."""

    def test_right_angle(self) -> None:
        """ω = 90°, t = ⅓: sin 60° = √¾ of a, sin 30° = ½ of b."""
        assert near(gm.methods.slerp(vector(1, 0), [vector(0, 1)], t=1 / 3), math.sqrt(0.75), 0.5)

    def test_unequal_lengths(self) -> None:
        """The same coefficients on [2, 0] and [0, 4]: [2·√¾, 4·½]."""
        assert near(gm.methods.slerp(vector(2, 0), [vector(0, 4)], t=1 / 3), 2 * math.sqrt(0.75), 2)

    def test_sixty_degrees(self) -> None:
        """ω = 60°, t = ½: both coefficients sin 30°/sin 60° = 1/√3; ([1, 0] + [½, √¾])/√3 = [√¾, ½]: 30°."""
        a, b = vector(1, 0), vector(0.5, math.sqrt(0.75))
        assert near(gm.methods.slerp(a, [b], t=0.5), math.sqrt(0.75), 0.5)

    def test_endpoints_are_bits(self) -> None:
        """t = 0 gives the base, t = 1 the other model."""
        a, b = vector(1 / 3, 0.1), vector(0.7, -1 / 7)
        assert torch.equal(gm.methods.slerp(a, [b], t=0), a)
        assert torch.equal(gm.methods.slerp(a, [b], t=1), b)

    def test_extrapolation(self) -> None:
        """t = 2 goes on to 180°: sin(−90°) = −1 of a, sin 180° = 0 of b; refused unless asked for."""
        assert near(gm.methods.slerp(vector(1, 0), [vector(0, 1)], t=2, extrapolate=True), -1, 0)
        with pytest.raises(UsageError, match="extrapolate"):
            gm.methods.slerp(vector(1, 0), [vector(0, 1)], t=2)

    def test_parallel_and_opposite(self) -> None:
        """No angle, no arc: ½·[1, 0] + ½·[3, 0] = [2, 0]; ¾·[1, 0] + ¼·[−1, 0] = [½, 0]."""
        assert near(gm.methods.slerp(vector(1, 0), [vector(3, 0)], t=0.5), 2, 0)
        assert near(gm.methods.slerp(vector(1, 0), [vector(-1, 0)], t=0.25), 0.5, 0)

    def test_nearly_opposite_stays_small(self) -> None:
        """[1, 3] and −0.7·[1, 3] rounded: the line, ½ − 0.35 = 0.15 of it, and not 10⁸ of rounding errors."""
        a = vector(1, 3) / 7
        assert near(gm.methods.slerp(a, [-0.7 * a], t=0.5) / a, 0.15, 0.15)

    def test_zeros(self) -> None:
        """Zeros have no direction: ½·0 + ½·[2, 4]; with `zero_angle` 90° stand between: sin 45°/sin 90° of [2, 4]."""
        a, b = vector(0, 0), vector(2, 4)
        assert near(gm.methods.slerp(a, [b], t=0.5), 1, 2)
        assert near(gm.methods.slerp(a, [b], t=0.5, zero_angle=True), 2 * HALF, 4 * HALF)

    def test_threshold_of_linear_interpolation(self) -> None:
        """cos ω = 0.8 is above 0.7, so ½·[1, 0] + ½·[0.8, 0.6] = [0.9, 0.3]; it is below 0.9995."""
        a, b = vector(1, 0), vector(0.8, 0.6)
        assert near(gm.methods.slerp(a, [b], t=0.5, lerp_threshold=0.7), 0.9, 0.3)
        # cos(ω/2) = √((1 + 0.8)/2) = √0.9, both coefficients are 1/(2 cos(ω/2)): [1.8, 0.6]/(2√0.9).
        arc = 0.9 / math.sqrt(0.9), 0.3 / math.sqrt(0.9)
        assert near(gm.methods.slerp(a, [b], t=0.5), *arc)
        assert near(gm.methods.slerp(a, [b], t=0.5, compat="mergekit"), *arc)

    def test_epsilon_clips_the_angle(self) -> None:
        """a = b has ω = 0, raised to 0.1: twice sin 0.05/sin 0.1 = 1/cos 0.05."""
        a = vector(1, 0)
        assert near(gm.methods.slerp(a, [a], t=0.5, epsilon=0.1), 1 / math.cos(0.05), 0)


class TestNuSlerp:
    """Slerp at t = w₂/(w₁ + w₂)."""

    def test_weights_give_t(self) -> None:
        """w = (1, 2): t = ⅔, so sin 30° of a and sin 60° of b."""
        assert near(gm.methods.nuslerp([vector(1, 0), vector(0, 1)], weight=[1, 2]), 0.5, math.sqrt(0.75))

    def test_weights_that_cancel_mean_half(self) -> None:
        """w = (1, −1): t = ½, so sin 45° of both."""
        assert near(gm.methods.nuslerp([vector(1, 0), vector(0, 1)], weight=[1, -1]), HALF, HALF)

    def test_base(self) -> None:
        """Task vectors [1, 0] and [0, 1] on [1, 1]: [1 + ½, 1 + √¾]."""
        found = gm.methods.nuslerp([vector(2, 1), vector(1, 2)], weight=[1, 2], base=vector(1, 1))
        assert near(found, 1.5, 1 + math.sqrt(0.75))

    def test_rows(self) -> None:
        """Row by row: [1, 0] and [0, 1] are 90° apart, [2, 0] and [2, 0] not at all."""
        a, b = vector([1, 0], [2, 0]), vector([0, 1], [2, 0])
        found = gm.methods.nuslerp([a, b], weight=[1, 1], nuslerp_flatten=False)
        assert near(found, [HALF, HALF], [2, 0])

    def test_columns(self) -> None:
        """Column 0: (1, 2) and (0, 2) with cos ω = 2/√5; both coefficients 1/(2 cos(ω/2)), cos²(ω/2) = (1 + 2/√5)/2.
        Column 1: (0, 0) and (1, 0), a straight line."""
        a, b = vector([1, 0], [2, 0]), vector([0, 1], [2, 0])
        found = gm.methods.nuslerp([a, b], weight=[1, 1], nuslerp_flatten=False, nuslerp_row_wise=True)
        half = 0.5 / math.sqrt((1 + 2 / math.sqrt(5)) / 2)
        assert near(found, [half, 0.5], [4 * half, 0])

    def test_opposite_task_vectors(self) -> None:
        """x and −0.7x, rounded, at t = ½: 0.15 of x; the arc is not determined and must not blow up."""
        x = vector(1, 3, -2) / 7
        assert near(gm.methods.nuslerp([x, -0.7 * x], weight=[1, 1]) / x, 0.15, 0.15, 0.15)


class TestMultiSlerp:
    """u/‖u‖·Σ wᵢ‖xᵢ‖ with u = Σ wᵢ xᵢ/‖xᵢ‖."""

    def test_two_norms(self) -> None:
        """[3, 0], [0, 4]: u = [½, ½], direction [√½, √½], norm ½·3 + ½·4 = 3.5."""
        found = gm.methods.multislerp([vector(3, 0), vector(0, 4)], weight=[1, 1], eps=0)
        assert near(found, 3.5 * HALF, 3.5 * HALF)

    def test_weights(self) -> None:
        """w = (¼, ¾): u = [¼, ¾] of length √10/4, direction [1, 3]/√10, norm ¾ + 3 = 3.75."""
        found = gm.methods.multislerp([vector(3, 0), vector(0, 4)], weight=[1, 3], eps=0)
        assert near(found, 3.75 / math.sqrt(10), 3.75 * 3 / math.sqrt(10))

    def test_unnormalised_weights(self) -> None:
        """w = (1, 1) as they are: the same direction, norm 3 + 4 = 7."""
        found = gm.methods.multislerp([vector(3, 0), vector(0, 4)], weight=[1, 1], normalize_weights=False, eps=0)
        assert near(found, 7 * HALF, 7 * HALF)

    def test_eps(self) -> None:
        """eps = ½ is added to 3 and 4: u = ½[3/3.5, 4/4.5] = [27, 28]/63, of length √1513/63 = 0.617.
        eps = 1: u = ½[¾, ⅘] of length √481/40 = 0.548 is shorter than eps, so the two are averaged."""
        models = [vector(3, 0), vector(0, 4)]
        found = gm.methods.multislerp(models, weight=[1, 1], eps=0.5)
        assert near(found, 3.5 * 27 / math.sqrt(1513), 3.5 * 28 / math.sqrt(1513))
        assert near(gm.methods.multislerp(models, weight=[1, 1], eps=1), 1.5, 2)

    def test_base(self) -> None:
        """Task vectors [3, 0] and [0, 4] on [1, 1]."""
        found = gm.methods.multislerp([vector(4, 1), vector(1, 5)], weight=[1, 1], base=vector(1, 1), eps=0)
        assert near(found, 1 + 3.5 * HALF, 1 + 3.5 * HALF)

    def test_one_model(self) -> None:
        """It is returned."""
        assert torch.equal(gm.methods.multislerp([vector(3, 1)], weight=[0.2]), vector(3, 1))

    def test_a_task_vector_of_zeros(self) -> None:
        """Two task vectors, 0 and [0, 2]: direction [0, 1], norm ½·0 + ½·2 = 1; the base's 10⁸ stays exact beside it."""
        base = vector(1e8, 1 / 3)
        found = gm.methods.multislerp([base, base + vector(0, 2)], weight=[1, 1], base=base)
        assert torch.equal(found[:1], base[:1])
        assert near(found[1:], 4 / 3)

    def test_directions_that_cancel(self) -> None:
        """[1, 0] and [−2, 0] have no mean direction: averaged to [−½, 0]; three of them are refused."""
        assert near(gm.methods.multislerp([vector(1, 0), vector(-2, 0)], weight=[1, 1]), -0.5, 0)
        thirds = [vector(math.cos(a), math.sin(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
        with pytest.raises(UsageError, match=r"^head\.weight: .*cancel out"):
            gm.methods.multislerp([{"head.weight": x} for x in thirds], weight=1)

    def test_weights_that_cancel_are_refused(self) -> None:
        """1 − 1 = 0."""
        with pytest.raises(UsageError, match="sum to zero"):
            gm.methods.multislerp([vector(1, 0), vector(0, 1)], weight=[1, -1])


class TestKarcher:
    """The point of least squared angles, at the mean norm."""

    def test_right_angle(self) -> None:
        """[3, 0] and [0, 4]: 45°, norm 3.5."""
        assert near(gm.methods.karcher([vector(3, 0), vector(0, 4)]), 3.5 * HALF, 3.5 * HALF)

    def test_on_a_circle_it_is_the_mean_angle(self) -> None:
        """Unit vectors at 0°, 30° and 120°: 50°. Without a step it is the direction of their sum,
        [1 + √¾ − ½, ½ + √¾] = [1.366, 1.366]: 45°."""
        degrees = [0, 30, 120]
        units = [vector(math.cos(math.radians(d)), math.sin(math.radians(d))) for d in degrees]
        fifty = math.radians(50)
        assert near(gm.methods.karcher(units), math.cos(fifty), math.sin(fifty), error=1e-9)
        assert near(gm.methods.karcher(units, max_iter=0), HALF, HALF)

    def test_tolerance_ends_the_iteration(self) -> None:
        """The first step from 45° is 5° = 0.0873 long: a tolerance of 0.09 leaves it out."""
        units = [vector(math.cos(math.radians(d)), math.sin(math.radians(d))) for d in (0, 30, 120)]
        assert near(gm.methods.karcher(units, tol=0.09), HALF, HALF)

    def test_zeros_count_for_the_norm_only(self) -> None:
        """[2, 0] and [0, 0]: direction [1, 0], norm (2 + 0)/2 = 1."""
        assert near(gm.methods.karcher([vector(2, 0), vector(0, 0)]), 1, 0)

    def test_all_zeros(self) -> None:
        """Zero, and no NaN."""
        assert near(gm.methods.karcher([vector(0, 0), vector(0, 0)]), 0, 0)


class TestTaskArithmetic:
    """θ₀ + λ Σ wₖτₖ."""

    def test_weights_and_lambda(self) -> None:
        """On [1, 1] the task vectors [1, 0] and [0, 2] with w = (½, −1): [1.5, −1]; with λ = 2: [2, −3]."""
        base, experts = vector(1, 1), [vector(2, 1), vector(1, 3)]
        assert near(gm.methods.task_arithmetic(base, experts, weight=[0.5, -1]), 1.5, -1)
        assert near(gm.methods.task_arithmetic(base, experts, weight=[0.5, -1], lambda_=2), 2, -3)

    def test_normalize(self) -> None:
        """w = (1, 3)/4: [1 + ¼, 1 + ¾·2]."""
        found = gm.methods.task_arithmetic(vector(1, 1), [vector(2, 1), vector(1, 3)], weight=[1, 3], normalize=True)
        assert near(found, 1.25, 2.5)

    def test_bits(self) -> None:
        """λ = 0 gives the base's bits, one expert at λ = 1 the expert's."""
        base, expert = vector(0.1, 1 / 3), vector(0.3, 1e-9)
        assert torch.equal(gm.methods.task_arithmetic(base, [expert], weight=1, lambda_=0), base)
        assert torch.equal(gm.methods.task_arithmetic(base, [expert], weight=1), expert)


class TestModelStock:
    """s = K c/(1 + (K−1) c) of the way from the base to the mean."""

    def test_two(self) -> None:
        """τ = [1, 0], [0.6, 0.8]: c = 0.6, s = 1.2/1.6 = ¾, mean [0.8, 0.4]: [0.6, 0.3]."""
        assert near(gm.methods.model_stock(vector(0, 0), [vector(1, 0), vector(0.6, 0.8)]), 0.6, 0.3)

    def test_three(self) -> None:
        """Cosines 1, 0, 0: c = ⅓, s = 1/(1 + ⅔) = 0.6, mean [⅔, ⅓]: [0.4, 0.2]."""
        found = gm.methods.model_stock(vector(0, 0), [vector(1, 0), vector(1, 0), vector(0, 1)])
        assert near(found, 0.4, 0.2)

    def test_negative_cosine(self) -> None:
        """c = −0.6 counts as 0: the base. Unclamped: s = −1.2/0.4 = −3, mean [0.2, 0.4]: [−0.6, −1.2]."""
        experts = [vector(1, 0), vector(-0.6, 0.8)]
        assert torch.equal(gm.methods.model_stock(vector(0, 0), experts), vector(0, 0))
        assert near(gm.methods.model_stock(vector(0, 0), experts, clamp_negative=False), -0.6, -1.2)

    def test_filter_wise_of_any_tile(self) -> None:
        """Cosines of eight pairs and more are added in one order, however many rows a tile has."""
        base = torch.linspace(-1, 1, 24 * 5000, dtype=torch.float64).view(24, 5000)
        experts = [base + 0.05 * torch.sin(base * 1e4 + k) for k in range(7)]
        found = [gm.methods.model_stock(base, experts, filter_wise=True, tile=tile) for tile in (1 << 13, 1 << 17)]
        assert torch.equal(*found)

    def test_filter_wise(self) -> None:
        """An angle for each row: the first as in `test_two`, the second orthogonal and so the base's."""
        experts = [vector([1, 0], [1, 0]), vector([0.6, 0.8], [0, 1])]
        assert near(gm.methods.model_stock(torch.zeros(2, 2), experts, filter_wise=True), [0.6, 0.3], [0, 0])
        # Over the whole tensor: dot 0.6, norms √2 and √2: c = 0.3, s = 0.6/1.3.
        s = 0.6 / 1.3
        assert near(gm.methods.model_stock(torch.zeros(2, 2), experts), [0.8 * s, 0.4 * s], [0.5 * s, 0.5 * s])

    def test_filters_of_a_convolution(self) -> None:
        """An output filter is all of a row of the flattened weight: [1, 0] and [0.6, 0.8] as 2 × 1 × 1 and 1 × 1 × 2 each."""
        for shape in ((2, 2, 1, 1), (2, 1, 1, 2)):
            experts = [vector([1, 0], [1, 0]).reshape(shape), vector([0.6, 0.8], [0, 1]).reshape(shape)]
            found = gm.methods.model_stock(torch.zeros(shape), experts, filter_wise=True)
            assert near(found.reshape(2, 2), [0.6, 0.3], [0, 0])

    def test_norm_floor(self) -> None:
        """τ = [0.1, 0] twice: ⟨τ, τ⟩ = 0.01 over max(0.01, 1): c = 0.01, s = 0.02/1.01."""
        found = gm.methods.model_stock(vector(0, 0), [vector(0.1, 0)] * 2, norm_floor=1)
        assert near(found, 0.1 * 0.02 / 1.01, 0)

    def test_opposite_unclamped(self) -> None:
        """c = −1 makes the denominator zero: the base, not infinity."""
        found = gm.methods.model_stock(vector(1, 1), [vector(2, 1), vector(0, 1)], clamp_negative=False)
        assert near(found, 1, 1)


class TestNearSwap:
    """a + w(b − a), w = min(1, t/max(|b − a|, 10⁻⁶))."""

    def test_clip(self) -> None:
        """Differences 0.05, −0.3, 0.1 and 0 are cut to ±0.1."""
        found = gm.methods.nearswap(vector(0, 0, 0, 0), [vector(0.05, -0.3, 0.1, 0)], t=0.1)
        assert near(found, 0.05, -0.1, 0.1, 0)

    def test_t_zero_is_the_base(self) -> None:
        """No move at all."""
        assert torch.equal(gm.methods.nearswap(vector(1, 1 / 3), [vector(2, 3)], t=0), vector(1, 1 / 3))

    def test_below_the_floor(self) -> None:
        """t = 5·10⁻⁷ and a difference of 2·10⁻⁷: w = 5·10⁻⁷/10⁻⁶ = ½."""
        assert near(gm.methods.nearswap(vector(0), [vector(2e-7)], t=5e-7) * 1e7, 1)


class TestTies:
    """Trim, elect, merge."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("weight", [[0.1, 0.2, -0.3], [0.7, 0.2, -0.9], [1.0, 2.0, -3.0]])
    def test_weights_that_cancel(self, weight: list[float], dtype: torch.dtype) -> None:
        """0.1 + 0.2 − 0.3 is 6·10⁻¹⁷ in binary: nothing is divided by that, as nothing is by 1 + 2 − 3. The terms agree."""
        experts = [torch.tensor([x]).to(dtype) for x in (0.5, 0.25, -1.0)]
        exact = sum(w * x.double() for w, x in zip(weight, experts, strict=True))
        found = gm.methods.ties(torch.zeros(1, dtype=dtype), experts, weight=weight)
        assert torch.equal(found, exact.to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_votes_below_the_normal_numbers(self, dtype: torch.dtype) -> None:
        """They have a sign as all others."""
        x = torch.tensor([-1e-39, 1e-39]).to(dtype)
        assert torch.equal(gm.methods.ties(torch.zeros(2, dtype=dtype), [x], weight=1.0), x)

    def test_trim(self) -> None:
        """The ⌊½·4⌋ largest of |4, −3, 2, 1|."""
        x = vector(4, -3, 2, 1)
        assert near(gm.methods.ties(zero(x), [x], weight=1, density=0.5), 4, -3, 0, 0)

    @pytest.mark.parametrize(("compat", "number"), [("", 29), ("compat: mergekit\n", 28)])
    @pytest.mark.parametrize("method", ["ties", "breadcrumbs", "sce"])
    def test_shares(self, method: str, compat: str, number: int) -> None:
        """0.29 of 100 elements; mergekit has int(28.999999999999996)."""
        x, y = (torch.arange(1.0, 101.0) * factor for factor in (1.0, 1.5))
        share = "select_topk: 0.29" if method == "sce" else "weight: 1, density: 0.29"
        text = f"merge_method: {method}\nbase_model: b\nmodels: [{{model: x}}, {{model: y}}]\nparameters: {{{share}}}\n{compat}"
        merged = gm.merge_state_dicts(text, {"b": {"w": torch.zeros(100)}, "x": {"w": x}, "y": {"w": y}})
        assert int(merged["w"].count_nonzero()) == number

    def test_equal_magnitudes(self) -> None:
        """Of four magnitudes of 1 the two with the lowest index stay."""
        x = vector(1, -1, 1, 1)
        assert near(gm.methods.ties(zero(x), [x], weight=1, density=0.5), 1, -1, 0, 0)

    def test_density_as_a_user_means_it(self) -> None:
        """0.29·100 is 28.999999999999996 in binary fractions: 29 stay. At least one stays of three at 0.1."""
        x = torch.arange(1.0, 101.0, dtype=torch.float64)
        assert int((gm.methods.ties(zero(x), [x], weight=1, density=0.29) != 0).sum()) == 29
        assert near(gm.methods.ties(vector(0, 0, 0), [vector(1, 3, 2)], weight=1, density=0.1), 0, 3, 0)

    def test_elect_and_mean(self) -> None:
        """3 − 1 = 2 elects +, and only 3 agrees; −2 − 4 elects −, mean −3; zeros do not count: 5/1."""
        a, b = vector(3, -2, 5), vector(-1, -4, 0)
        assert near(gm.methods.ties(zero(a), [a, b], weight=1), 3, -3, 5)

    def test_weights(self) -> None:
        """w = (1, 3): 3 − 3 = 0 elects +: 3/1; −2 − 12 elects −: −14/4 = −3.5. As a sum: 3 and −14."""
        a, b = vector(3, -2), vector(-1, -4)
        assert near(gm.methods.ties(zero(a), [a, b], weight=[1, 3]), 3, -3.5)
        assert near(gm.methods.ties(zero(a), [a, b], weight=[1, 3], normalize=False), 3, -14)

    def test_negative_weight(self) -> None:
        """w = (2, −1) makes [6, −4] and [1, 4]: 7/(2 − 1) = 7; −4 + 4 = 0 elects +: 4/(−1) = −4."""
        a, b = vector(3, -2), vector(-1, -4)
        assert near(gm.methods.ties(zero(a), [a, b], weight=[2, -1]), 7, -4)

    def test_agreeing_weights_that_cancel(self) -> None:
        """w = (1, −1) makes [3] and [1]: 4 over 1 − 1 = 0 is left undivided."""
        assert near(gm.methods.ties(vector(0), [vector(3), vector(-1)], weight=[1, -1]), 4)

    def test_lambda_and_base(self) -> None:
        """On [1, 1]: 1 + ½·3 and 1 − ½·3."""
        found = gm.methods.ties(vector(1, 1), [vector(4, -1), vector(0, -3)], weight=1, lambda_=0.5)
        assert near(found, 2.5, -0.5)

    def test_rescale(self) -> None:
        """[4, −3, 2, 1] at ½ keeps [4, −3]: divided by ½, or times ‖·‖₁ 10/7."""
        x = vector(4, -3, 2, 1)
        doubled = gm.methods.ties(zero(x), [x], weight=1, density=0.5, rescale=True)
        assert near(doubled, 8, -6, 0, 0)
        l1 = gm.methods.ties(zero(x), [x], weight=1, density=0.5, rescale=True, rescale_norm="l1")
        assert near(l1, 40 / 7, -30 / 7, 0, 0)

    def test_a_density_for_each_model(self) -> None:
        """1 for the first, ⅓ for the second: [1, 1, 1] and [0, 9, 0]; mean of 1 and 9."""
        a, b = vector(1, 1, 1), vector(2, 9, 3)
        assert near(gm.methods.ties(zero(a), [a, b], weight=1, density=[1, 1 / 3]), 1, 5, 1)


class TestDare:
    """Survivors are τ/p."""

    def test_survivors(self) -> None:
        """Each element of [1 … 64] is 0 or four times itself at density ¼, about 16 of them the latter; not rescaled: once."""
        x = torch.arange(1.0, 65.0, dtype=torch.float64)
        found = gm.methods.dare_linear(zero(x), [x], weight=1, density=0.25)
        kept = found != 0
        assert 4 <= int(kept.sum()) <= 32
        assert torch.equal(found[kept], 4 * x[kept])
        plain = gm.methods.dare_linear(zero(x), [x], weight=1, density=0.25, rescale=False)
        assert torch.equal(plain, x * kept)

    def test_l1(self) -> None:
        """The survivors are multiplied by ‖τ‖₁ over theirs: the L1 norm stays."""
        x = torch.arange(1.0, 65.0, dtype=torch.float64)
        found = gm.methods.dare_linear(zero(x), [x], weight=1, density=0.25, rescale_norm="l1")
        short = gm.methods.dare_linear(zero(x), [x], weight=1, density=0.25, rescale="l1")
        assert torch.equal(short, found)
        with pytest.raises(UsageError, match="rescale is l1, but rescale_norm is inverse"):
            gm.methods.dare_linear(zero(x), [x], weight=1, density=0.25, rescale="l1", rescale_norm="inverse")
        kept = found != 0
        assert near(found[kept] / x[kept], *[2080 / float(x[kept].sum())] * int(kept.sum()))

    def test_full_density_is_task_arithmetic_or_an_election(self) -> None:
        """Density 1 drops nothing: 3 − 1 and −2 − 4; with signs elected 3 and −6."""
        a, b = vector(3, -2), vector(-1, -4)
        assert near(gm.methods.dare_linear(zero(a), [a, b], weight=1), 2, -6)
        assert near(gm.methods.dare_ties(zero(a), [a, b], weight=1), 3, -6)

    def test_normalize_and_lambda(self) -> None:
        """w = (1, 3): (3 − 3)/4 and (−2 − 12)/4, times 2."""
        a, b = vector(3, -2), vector(-1, -4)
        assert near(gm.methods.dare_linear(zero(a), [a, b], weight=[1, 3], normalize=True, lambda_=2), 0, -7)


class TestChatVector:
    def test_literal(self) -> None:
        """The first model plus λ times what the second changed."""
        found = gm.methods.chat_vector(vector(1, 1), [vector(2, 1), vector(1, 3)], lambda_=0.5)
        assert near(found, 2, 2)

    def test_disjoint_changes_are_both_kept(self) -> None:
        found = gm.methods.chat_vector(vector(1, 1, 1), [vector(5, 1, 1), vector(1, 1, -2)])
        assert near(found, 5, 1, -2)

    def test_nothing_added(self) -> None:
        """λ = 0 is the first model, bit for bit."""
        first = vector(0.1, 0.7)
        assert torch.equal(gm.methods.chat_vector(vector(3, 4), [first, vector(9, 9)], lambda_=0), first)


class TestDella:
    """Keep probabilities density − ε … density + ε along the ranks of a row."""

    def test_probabilities(self) -> None:
        """|3|, |−1|, |2| have ranks 2, 0, 1: ½ + 0.2, ½ − 0.2, ½. Equal ones rank by index. A lone one has ½."""
        step = MagPrune((0.5,), (0.2,))
        assert near(step.probabilities(vector([3, -1, 2], [1, -1, 1]), 0), [0.7, 0.3, 0.5], [0.3, 0.5, 0.7])
        assert near(step.probabilities(vector([3], [1]), 0), [0.5], [0.5])

    def test_survivors_are_divided_by_their_own_probability(self) -> None:
        """In rows of [3, −1, 2] what survives is 3/0.7, −1/0.3 or 2/0.5; each does so in some of 64 rows."""
        rows = vector([3, -1, 2]).repeat(64, 1)
        found = gm.methods.della_linear(
            torch.zeros_like(rows), [rows], weight=1, density=0.5, epsilon=0.2, normalize=False
        )
        for column, value in enumerate((3 / 0.7, -1 / 0.3, 4.0)):
            values = sorted(set(found[:, column].tolist()), key=abs)
            assert values == pytest.approx([0.0, value], rel=1e-12)

    def test_full_density(self) -> None:
        """Nothing is dropped: mean of what agrees, 3 and −3; linear: (3 − 1)/2 when normalised."""
        a, b = vector(3, -2), vector(-1, -4)
        assert near(gm.methods.della(zero(a), [a, b], weight=1), 3, -3)
        assert near(gm.methods.della_linear(zero(a), [a, b], weight=1, normalize=True), 1, -3)

    def test_window_must_fit(self) -> None:
        """0.9 + 0.15 is no probability."""
        with pytest.raises(UsageError, match="density ± epsilon"):
            gm.methods.della(vector(0), [vector(1)], weight=1, density=0.9)


class TestBreadcrumbs:
    """Outliers and small change off."""

    def test_both_ends(self) -> None:
        """Of 1 … 10 with γ = 0.1 the 10 goes, and of the rest the ⌊½·10⌋ largest stay: 9, 8, 7, 6, 5."""
        x = vector(1, -2, 3, -4, 5, -6, 7, -8, 9, -10)
        found = gm.methods.breadcrumbs(zero(x), [x], weight=1, density=0.5, gamma=0.1)
        assert near(found, 0, 0, 0, 0, 5, -6, 7, -8, 9, 0)

    def test_small_tensors_keep_their_largest(self) -> None:
        """⌊0.01·4⌋ = 0 outliers: the two largest stay (where mergekit would drop everything)."""
        x = vector(1, -2, 3, -4)
        assert near(gm.methods.breadcrumbs(zero(x), [x], weight=1, density=0.5), 0, 0, 3, -4)

    def test_equal_magnitudes(self) -> None:
        """γ = ¼ takes the first of four ones, density ½ keeps the next two."""
        x = vector(1, 1, -1, 1)
        assert near(gm.methods.breadcrumbs(zero(x), [x], weight=1, density=0.5, gamma=0.25), 0, 1, -1, 0)

    def test_rows(self) -> None:
        """Of each row of four one outlier goes and one element stays; of equal ones the first go first."""
        x = vector(1, -2, 3, -4, 7, 7, 7, 1).view(2, 4)
        found = gm.methods.breadcrumbs(zero(x), [x], weight=1, density=0.25, gamma=0.25, scope="row")
        assert near(found.view(-1), 0, 0, 3, 0, 0, 7, 0, 0)

    def test_more_than_there_is(self) -> None:
        """γ = 0.3 and density 0.9 of ten: 3 go, the other 7 stay; `outliers_yield`: 9 must stay, so one goes."""
        x = vector(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
        found = gm.methods.breadcrumbs(zero(x), [x], weight=1, density=0.9, gamma=0.3)
        assert near(found, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0)
        found = gm.methods.breadcrumbs(zero(x), [x], weight=1, density=0.9, gamma=0.3, outliers_yield=True)
        assert near(found, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0)

    def test_ties(self) -> None:
        """γ = ⅓ leaves [0, 2, 1] and [3, 0, −4]; 1 − 4 elects −: [3, 2, −4]; linear: [3, 2, −3]."""
        a, b = vector(9, 2, 1), vector(3, -8, -4)
        settings = {"weight": 1, "gamma": 0.34, "density": 2 / 3}
        assert near(gm.methods.breadcrumbs_ties(zero(a), [a, b], **settings), 3, 2, -4)
        assert near(gm.methods.breadcrumbs(zero(a), [a, b], **settings), 3, 2, -3)


class TestSce:
    """Select by variance, calculate by energy, erase minority signs."""

    A, B = vector(1, 2, 0, 4), vector(3, -2, 0, 4)

    def test_everything(self) -> None:
        """Energies 1 + 4 + 16 = 21 and 9 + 4 + 16 = 29: w = 0.42, 0.58. 0.42·1 + 0.58·3 = 2.16; 2 − 2 = 0 elects +: 2; 0; 4."""
        assert near(gm.methods.sce(vector(0, 0, 0, 0), [self.A, self.B]), 2.16, 2, 0, 4)

    def test_selection(self) -> None:
        """Variances 1, 4, 0, 0: two are not zero, ⌊½·2⌋ = 1 is selected, the second position; energies 4 and 4; 2 agrees."""
        assert near(gm.methods.sce(vector(0, 0, 0, 0), [self.A, self.B], select_topk=0.5), 0, 2, 0, 0)

    def test_selection_for_weights_only(self) -> None:
        """w = ½, ½ from the second position, used on all: ½ + 1.5 = 2; 2; 0; 4."""
        found = gm.methods.sce(vector(0, 0, 0, 0), [self.A, self.B], select_topk=0.5, select_only_for_weights=True)
        assert near(found, 2, 2, 0, 4)

    def test_nothing_selected(self) -> None:
        """topk = 0, and topk < 1 of identical experts (three of them: 0.1 + 0.1 + 0.1 is not 0.3), give the base."""
        assert near(gm.methods.sce(vector(1, 1, 1, 1), [self.A, self.B], select_topk=0), 1, 1, 1, 1)
        same = vector(0.1, 0.7, 1 / 3, 1e-3)
        assert torch.equal(gm.methods.sce(vector(0, 0, 0, 0), [same] * 3, select_topk=0.9), vector(0, 0, 0, 0))

    def test_equal_variances(self) -> None:
        """All four variances are equal: two are selected, the first ones, in whatever order the experts come."""
        experts = [vector(0.5, 1.5, -0.25, 1), vector(0.25, 1.25, 0, 0.75), vector(0, 1, 0.25, 0.5)]
        for order in ((0, 1, 2), (1, 2, 0), (2, 1, 0)):
            found = gm.methods.sce(vector(0, 0, 0, 0), [experts[i] for i in order], select_topk=0.5)
            assert (found != 0).tolist() == [True, True, False, False]

    def test_floors(self) -> None:
        """Energies 0.05 and 0.13 make 0.09 an element: below 0.1, so w = ½, ½. On one agreeing element the divisor
        is w₁ = 0.42, or 0.6 by its floor: 2·0.42/0.6."""
        a, b = vector(0.1, 0.2), vector(0.3, 0.2)
        assert near(gm.methods.sce(vector(0, 0), [a, b], energy_floor=0.1), 0.2, 0.2)
        assert near(gm.methods.sce(vector(0, 0), [a, b]), 0.1 * 5 / 18 + 0.3 * 13 / 18, 0.2)
        found = gm.methods.sce(vector(0, 0, 0, 0), [self.A, self.B], divisor_floor=0.6)
        assert near(found, 2.16, 1.4, 0, 4)


class TestArceeFusion:
    """Δ where its importance reaches median + 1.5·IQR."""

    def test_one_row(self) -> None:
        """In one row the importance is |Δ| times one number. |Δ| = 1, 2, 4: the quartiles are elements ⌊q·2⌋ = 0, 1, 1,
        the threshold 2 + 1.5·(2 − 1) = 3.5: only 4 is taken over."""
        assert near(gm.methods.arcee_fusion(vector(0, 0, 0), [vector(-1, 2, 4)]), 0, 0, 4)

    def test_five(self) -> None:
        """|Δ| = 5, 1, 2, 3, 9: quartiles 2, 3, 5, threshold 3 + 1.5·3 = 7.5."""
        assert near(gm.methods.arcee_fusion(vector(0, 0, 0, 0, 0), [vector(5, 1, 2, 3, 9)]), 0, 0, 0, 0, 9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rows_of_one_element(self, dtype: torch.dtype) -> None:
        """The softmax of one number is 1 in both models: nothing stands out, and 0 ≥ 0 takes all."""
        base = torch.linspace(-1, 1, 900).view(30, 30, 1, 1).to(dtype)
        other = (base * 1.01 + 0.003).to(dtype)
        assert torch.equal(gm.methods.arcee_fusion(base, [other]), other)

    def test_rows_have_divergences_of_their_own(self) -> None:
        """Rows [0, ln 3] against [0, 0]: p = ¼, ¾ and q = ½: KL = ¼ ln ½ + ¾ ln 1.5 = 0.131; times ln 3: 0.144.
        Row [5, 5]: both softmax alike, KL 0. Importances 0, 0, 0, 0.144: quartiles 0, 0, 0 (⌊¾·3⌋ = 2), threshold 0, so
        everything is taken over; and with two more rows [0, 0.1] (importances about 10⁻⁴) only what reaches theirs."""
        other = vector([0, math.log(3)], [5, 5])
        assert torch.equal(gm.methods.arcee_fusion(torch.zeros_like(other), [other]), other)
        # 0 · 4, 0 · 2, x, x, 0.144 sorted: elements ⌊q·7⌋ = 1, 3, 5: 0, 0, x; the threshold is 1.5x.
        other = vector([0, math.log(3)], [5, 5], [0, 0.1], [0, 0.1])
        expected = vector([0, math.log(3)], [0, 0], [0, 0], [0, 0])
        assert torch.equal(gm.methods.arcee_fusion(torch.zeros_like(other), [other]), expected)


class TestRam:
    """Changes of one expert whole, of several averaged."""

    def test_ram(self) -> None:
        """1 is the first expert's alone; (2 + 4)/2; nobody changed the last."""
        assert near(gm.methods.ram(vector(0, 0, 0), [vector(1, 2, 0), vector(0, 4, 0)]), 1, 3, 0)

    def test_epsilon_is_exclusive(self) -> None:
        """ε = 1: a change of 1 counts as none, so [1 + 4]/1 is 4."""
        assert near(gm.methods.ram(vector(0, 0), [vector(1, 1), vector(0, 4)], epsilon=1), 0, 4)

    def test_ramplus(self) -> None:
        """First expert: 3 positions of its own, 1 shared: ⅓, cut to α = 0.2: 1 + 0.1·0.2. r = 0.3, α = 0.5: 1 + 0.3/3."""
        experts = [vector(1, 2, 3, 4), vector(0, 4, 0, 0)]
        assert near(gm.methods.ramplus_tl(vector(0, 0, 0, 0), experts), 1.02, 3, 3.06, 4.08)
        assert near(gm.methods.ramplus_tl(vector(0, 0, 0, 0), experts, r=0.3, alpha=0.5), 1.1, 3, 3.3, 4.4)


class TestPassthrough:
    """One model."""

    def test_scale(self) -> None:
        """As it is, or times two."""
        assert torch.equal(gm.methods.passthrough([vector(1, 1 / 3)]), vector(1, 1 / 3))
        assert near(gm.methods.passthrough([vector(1, 3)], scale=2), 2, 6)


class TestCalls:
    """Methods as functions."""

    def test_aliases(self) -> None:
        """`average` is `linear`."""
        assert near(gm.methods.average([vector(1), vector(3)]), 2)

    def test_state_dicts(self) -> None:
        """Mappings give a mapping; integer tensors are copied from the first; the common dtype is the widest."""
        a = {"w": vector(1, 3), "step": torch.tensor([7])}
        b = {"w": torch.tensor([3.0, 5.0]), "step": torch.tensor([8])}
        merged = gm.methods.linear([a, b])
        assert near(merged["w"], 2, 4)
        assert merged["step"].tolist() == [7]

    def test_wrong_calls(self) -> None:
        """Each has its own message."""
        a, b = vector(1, 2), vector(3, 4)
        with pytest.raises(UsageError, match="density"):
            gm.methods.ties(a, [b], weight=1, densty=0.5)
        with pytest.raises(UsageError, match="needs the parameter 'weight'"):
            gm.methods.ties(a, [b])
        with pytest.raises(UsageError, match=r"\(0, 1\], not 0"):
            gm.methods.ties(a, [b], weight=1, density=0)
        with pytest.raises(UsageError, match=r"\(0, 1\], not 1.5"):
            gm.methods.ties(a, [b], weight=1, density=1.5)
        with pytest.raises(UsageError, match="2 values for 1 models"):
            gm.methods.ties(a, [b], weight=[1, 2])
        with pytest.raises(UsageError, match="exactly 2 models"):
            gm.methods.nuslerp([a, b, a], weight=1)
        with pytest.raises(UsageError, match="call ties"):
            gm.methods.ties([a, b], weight=1)
        with pytest.raises(UsageError, match="knows no base"):
            gm.methods.linear([a, b], base=a)
        with pytest.raises(UsageError, match="seed must be a whole number of at least 0, not -1"):
            gm.methods.dare_linear(a, [b], weight=1, density=0.5, seed=-1)
        with pytest.raises(UsageError, match=r"steps must lie in \[0, 100000\]"):
            gm.methods.wudi(a, [b], steps=10**9)
        with pytest.raises(UsageError, match="tile must be"):
            gm.methods.linear([a, b], tile=0)
        with pytest.raises(UsageError, match="of model 1 is on the meta device"):
            gm.methods.linear([a, b.to("meta")])
        with pytest.raises(UsageError, match=r"w of model 0 is of layout torch\.sparse_coo"):
            gm.methods.linear([{"w": a.to_sparse()}, {"w": b}])
        with pytest.raises(AttributeError, match="no method 'tise'"):
            _ = gm.methods.tise

    def test_models_that_do_not_fit(self) -> None:
        """Shapes and names must be the same."""
        with pytest.raises(IncompatibleModels, match="shapes"):
            gm.methods.linear([vector(1, 2), vector(1)])
        with pytest.raises(IncompatibleModels, match="'b'"):
            gm.methods.linear([{"a": vector(1)}, {"a": vector(1), "b": vector(2)}])

    def test_a_result_that_the_dtype_does_not_hold(self) -> None:
        """Is refused, as by the engine."""
        a, b = torch.tensor([1.0, 2.0]).half(), torch.tensor([1.0, 3.0]).half()
        with pytest.raises(OutOfRange, match="beyond what float16 holds"):
            gm.methods.task_arithmetic({"w": a}, [{"w": b}], weight=1e5)
        assert gm.methods.task_arithmetic(a, [b], weight=1e5, dtype=torch.bfloat16).isfinite().all()

    def test_nan_names_model_and_tensor(self) -> None:
        """The second model's `w`."""
        with pytest.raises(NotFiniteError, match="model 1: w"):
            gm.methods.linear([{"w": vector(1)}, {"w": vector(math.nan)}])
