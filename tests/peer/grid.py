"""The parameter grid of every method, on the one-layer ``s_*`` models (and their bfloat16 copies ``h_*``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes import Case, Grid

Models = Mapping[str, Mapping[str, Any]]


def weighted(**weights: float) -> dict[str, dict[str, Any]]:
    """``weighted(s_a=1, s_b=0.3)``: models with only a weight."""
    return {name: {"weight": weight} for name, weight in weights.items()}


def pruned(density: float, weights: Models, **more: Any) -> dict[str, dict[str, Any]]:
    """The same models, each with the same density (and whatever else is given)."""
    return {name: {**own, "density": density, **more} for name, own in weights.items()}


TWO = weighted(s_a=1.0, s_b=0.5)
EQUAL = weighted(s_a=1.0, s_b=1.0)
THREE = weighted(s_a=0.5, s_b=1.0, s_c=0.3)


def linear() -> list[Case]:
    """Weighted averages."""
    grid = Grid("linear")
    grid.add("equal", EQUAL)
    grid.add("one_model", weighted(s_a=0.7))
    grid.add("one_model_unnormalized", weighted(s_a=0.7), normalize=False)
    grid.add("three", weighted(s_a=1.0, s_b=0.3, s_c=0.5))
    grid.add("three_unnormalized", weighted(s_a=1.0, s_b=0.3, s_c=0.5), normalize=False)
    grid.add("negative", weighted(s_a=1.0, s_b=-0.4))
    grid.add("negative_unnormalized", weighted(s_a=1.0, s_b=-0.4), normalize=False)
    grid.add("zero_weight", weighted(s_a=0.0, s_b=1.0))
    grid.add("almost_zero_sum", weighted(s_a=1.0, s_b=-0.875), notes="divides by 0.125")
    grid.add("zero_sum_unnormalized", weighted(s_a=1.0, s_b=-1.0), normalize=False)
    grid.add("base_listed", weighted(s_base=1.0, s_a=0.5), base="s_base")
    grid.add(
        "base_unlisted",
        weighted(s_a=1.0),
        base="s_base",
        weight=0.25,
        notes="the unlisted base becomes the last input and takes the global weight",
    )
    grid.add("global_weight", ["s_a", "s_b", "s_c"], weight=0.4, normalize=False)
    grid.add("bfloat16", weighted(h_a=1.0, h_b=0.3))
    grid.add("dtype_bfloat16", weighted(s_a=1.0, s_b=0.3), dtype="bfloat16")
    grid.add("dtype_float16", weighted(s_a=1.0, s_b=0.3), dtype="float16")
    grid.add("dtype_float32_of_bfloat16", weighted(h_a=1.0, h_b=0.3), dtype="float32")
    grid.add("out_dtype_bfloat16", weighted(s_a=1.0, s_b=0.3), out_dtype="bfloat16")
    grid.add("mixed_dtypes", weighted(h_a=1.0, s_b=0.3), notes="bfloat16 beside float32 without dtype: promoted")
    return grid.cases


def slerp() -> list[Case]:
    """Two models; tensors nearly parallel (linear then), at an angle, antipodal and zero."""
    grid = Grid("slerp")
    for other in ("s_a", "s_c", "s_far"):
        for t in (0.0, 0.3, 0.5, 1.0):
            grid.add(f"{other}_t{t:g}", ["s_base", other], base="s_base", t=t)
    for t in (-0.3, 1.4):
        grid.add(f"extrapolated_t{t:g}", ["s_base", "s_far"], base="s_base", t=t)
        grid.add(f"extrapolated_close_t{t:g}", ["s_base", "s_a"], base="s_base", t=t)
    grid.add("turned", ["s_base", "s_turned"], base="s_base", t=0.3, notes="an antipodal, a zero and a parallel tensor")
    grid.add("base_second", ["s_a", "s_base"], base="s_base", t=0.3, notes="t runs from the base, whatever the order")
    grid.add("base_unlisted", ["s_a"], base="s_base", t=0.3)
    grid.add("bfloat16", ["h_base", "h_a"], base="h_base", t=0.3)
    return grid.cases


def nuslerp() -> list[Case]:
    """Normalised weights; whole tensors, rows or columns; of weights or of task vectors."""
    grid = Grid("nuslerp")
    pairs = {"near": weighted(s_a=1.0, s_b=0.4), "far": weighted(s_a=1.0, s_far=0.4)}
    for kind, pair in pairs.items():
        for base in (None, "s_base"):
            for how, options in {
                "flat": {},
                "rows": {"nuslerp_flatten": False},
                "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
                "flat_row_wise": {"nuslerp_row_wise": True},
            }.items():
                if how == "flat_row_wise" and kind == "near":
                    continue
                grid.add(f"{kind}_{how}{'_base' if base else ''}", pair, base=base, **options)
    grid.add("base_listed", weighted(s_base=1.0, s_a=1.0, s_b=0.4), base="s_base")
    for first, second in ((0.0, 1.0), (1.0, 0.0), (-0.5, 1.0), (1.0, -1.0), (0.6, 0.2), (6.0, 2.0)):
        grid.add(f"weights_{first:g}_{second:g}", weighted(s_a=first, s_far=second))
        grid.add(f"weights_{first:g}_{second:g}_base", weighted(s_a=first, s_b=second), base="s_base")
    grid.add("turned", weighted(s_base=1.0, s_turned=0.5), notes="an antipodal, a zero and a parallel tensor")
    return grid.cases


def multislerp() -> list[Case]:
    """Several models on the sphere."""
    grid = Grid("multislerp")
    trios = {"near": THREE, "far": weighted(s_a=0.5, s_b=1.0, s_far=0.3)}
    for kind, trio in trios.items():
        for base in (None, "s_base"):
            name = f"{kind}{'_base' if base else ''}"
            grid.add(name, trio, base=base)
            grid.add(f"{name}_raw_weights", trio, base=base, normalize_weights=False)
            grid.add(f"{name}_eps", trio, base=base, eps=1e-3 if base is None else 1e-5)
    grid.add("two", TWO)
    grid.add("two_base", TWO, base="s_base")
    grid.add("one", weighted(s_a=0.3))
    grid.add("one_base", weighted(s_a=0.3), base="s_base")
    grid.add("negative", weighted(s_a=1.0, s_b=-0.4, s_c=0.7))
    grid.add("negative_base", weighted(s_a=1.0, s_b=-0.4, s_c=0.7), base="s_base")
    grid.add("zero_weight", weighted(s_a=1.0, s_b=0.0))
    grid.add("antipodal", weighted(s_base=1.0, s_turned=1.0), notes="two opposite inputs: the weighted sum")
    return grid.cases


def karcher() -> list[Case]:
    """The Riemannian mean of directions."""
    grid = Grid("karcher")
    grid.add("two", ["s_a", "s_b"])
    grid.add("three", ["s_a", "s_b", "s_c"])
    grid.add("base_counts", ["s_a", "s_b"], base="s_base", notes="a base is one more input")
    grid.add("one", ["s_a"])
    for iterations in (1, 2, 50):
        grid.add(f"far_max_iter{iterations}", ["s_a", "s_b", "s_far"], max_iter=iterations)
    for tolerance in (1e-1, 1e-2, 1e-7):
        grid.add(f"far_tol{tolerance:g}", ["s_a", "s_b", "s_far"], max_iter=20, tol=tolerance)
    return grid.cases


def task_arithmetic() -> list[Case]:
    """Sums of task vectors."""
    grid = Grid("task_arithmetic")
    grid.add("two", TWO, base="s_base")
    grid.add("three", THREE, base="s_base")
    grid.add("one", weighted(s_a=0.7), base="s_base")
    grid.add("base_listed", {"s_base": {}, **TWO}, base="s_base")
    grid.add("base_listed_last_weighted", weighted(s_a=1.0, s_b=0.5, s_base=3.0), base="s_base")
    grid.add("normalized", TWO, base="s_base", normalize=True)
    grid.add("normalized_negative", weighted(s_a=1.0, s_b=-0.4), base="s_base", normalize=True)
    grid.add("normalized_zero_sum", weighted(s_a=1.0, s_b=-1.0), base="s_base", normalize=True, notes="divisor 1")
    grid.add("normalized_tiny_sum", weighted(s_a=1.0, s_b=-0.875), base="s_base", normalize=True)
    for scale in (-1.0, 0.0, 0.5, 2.0):
        grid.add(f"lambda{scale:g}", TWO, base="s_base", lambda_=scale)
    grid.add("negative", weighted(s_a=1.0, s_b=-0.4), base="s_base")
    grid.add("all_negative", weighted(s_a=-0.6, s_b=-0.4), base="s_base")
    grid.add("zero_weight", weighted(s_a=0.0, s_b=1.0), base="s_base")
    grid.add("density_ignored", pruned(0.3, TWO), base="s_base", rescale=True, int8_mask=True)
    grid.add("bfloat16", weighted(h_a=1.0, h_b=0.5), base="h_base")
    grid.add("dtype_float32_of_bfloat16", weighted(h_a=1.0, h_b=0.5), base="h_base", dtype="float32")
    return grid.cases


def consensus_weights() -> dict[str, Models]:
    """Weights that try every branch of sign election and of the divisor."""
    return {
        "equal": EQUAL,
        "three": THREE,
        "one": weighted(s_a=0.7),
        "negative": weighted(s_a=1.0, s_b=-0.4),
        "opposite": weighted(s_a=1.0, s_b=-1.0),
        "all_negative": weighted(s_a=-0.6, s_b=-0.4),
        "zero_weight": weighted(s_a=0.0, s_b=1.0),
    }


def ties() -> list[Case]:
    """Trim by magnitude, elect signs, sum."""
    grid = Grid("ties")
    for density in (0.0, 0.1, 0.3, 0.5, 0.57, 0.9, 0.999, 1.0):
        grid.add(f"density{density:g}", pruned(density, TWO), base="s_base")
        grid.add(f"density{density:g}_rescale", pruned(density, TWO), base="s_base", rescale=True)
    grid.add("defaults", TWO, base="s_base")
    for name, models in consensus_weights().items():
        grid.add(f"{name}", pruned(0.5, models), base="s_base")
        grid.add(f"{name}_unnormalized", pruned(0.5, models), base="s_base", normalize=False)
        grid.add(f"{name}_dense", models, base="s_base")
    for scale in (-1.0, 0.3, 2.0):
        grid.add(f"lambda{scale:g}", pruned(0.5, TWO), base="s_base", lambda_=scale)
    mixed = {"s_a": {"weight": 1.0, "density": 0.2}, "s_b": {"weight": 0.5, "density": 0.8}, "s_c": {"weight": 2.0}}
    grid.add("own_densities", mixed, base="s_base")
    grid.add("global_density", TWO, base="s_base", density=0.4)
    grid.add("int8_mask", pruned(0.5, TWO), base="s_base", int8_mask=True)
    grid.add("everything", mixed, base="s_base", normalize=False, rescale=True, lambda_=0.6, int8_mask=True)
    for density in (0.1, 0.3, 0.5, 0.7):
        grid.add(
            f"equal_magnitudes_density{density:g}",
            pruned(density, weighted(s_even_a=1.0)),
            base="s_base",
            marks=("equal_magnitudes",),
        )
    grid.add("equal_magnitudes_dense", weighted(s_even_a=1.0, s_even_b=1.0), base="s_base", notes="many sign ties")
    grid.add("bfloat16", pruned(0.5, weighted(h_a=1.0, h_b=0.5)), base="h_base")
    grid.add("dtype_float32_of_bfloat16", pruned(0.5, weighted(h_a=1.0, h_b=0.5)), base="h_base", dtype="float32")
    grid.add("far", pruned(0.5, weighted(s_a=1.0, s_far=0.5)), base="s_base")
    return grid.cases


def breadcrumbs() -> list[Case]:
    """Trim the smallest and the largest; with and without sign election."""
    cases: list[Case] = []
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        grid = Grid(method)
        grid.add("defaults", TWO, base="s_base", notes="density 1: nothing is trimmed, whatever gamma")
        for density in (0.1, 0.3, 0.5, 0.9, 0.98, 1.0):
            for gamma in (0.0, 0.01, 0.1, 0.5):
                grid.add(f"density{density:g}_gamma{gamma:g}", pruned(density, TWO, gamma=gamma), base="s_base")
        grid.add("density0", pruned(0.0, TWO), base="s_base")
        grid.add("gamma_default", pruned(0.6, THREE), base="s_base")
        options = {"normalize": True, "rescale": True}
        for name, models in consensus_weights().items():
            grid.add(f"{name}", pruned(0.6, models, gamma=0.1), base="s_base")
            grid.add(f"{name}_normalized_rescaled", pruned(0.6, models, gamma=0.1), base="s_base", **options)
        grid.add("lambda", pruned(0.6, TWO, gamma=0.1), base="s_base", lambda_=-0.5)
        even = pruned(0.5, weighted(s_even_a=1.0), gamma=0.2)
        grid.add("equal_magnitudes", even, base="s_base", marks=("equal_magnitudes",))
        cases += grid.cases
    return cases


def dense_random() -> list[Case]:
    """DARE and DELLA at density 1, where nothing is drawn."""
    cases: list[Case] = []
    for method in ("dare_linear", "dare_ties", "della", "della_linear"):
        grid = Grid(method)
        grid.add("defaults", TWO, base="s_base")
        for name, models in consensus_weights().items():
            grid.add(name, pruned(1.0, models), base="s_base")
            grid.add(f"{name}_flipped", models, base="s_base", normalize=method != "della", rescale=False)
        grid.add("lambda", THREE, base="s_base", lambda_=0.4, int8_mask=True)
        grid.add("density0", pruned(0.0, TWO), base="s_base")
        cases += grid.cases
    return cases


def model_stock() -> list[Case]:
    """Interpolation by the angle between task vectors."""
    grid = Grid("model_stock")
    for name, models in {"two": ["s_a", "s_b"], "three": ["s_a", "s_b", "s_c"], "far": ["s_a", "s_far"]}.items():
        grid.add(name, models, base="s_base")
        grid.add(f"{name}_filter_wise", models, base="s_base", filter_wise=True)
    grid.add("base_listed_first", ["s_base", "s_a", "s_b"], base="s_base")
    grid.add("base_listed_last", ["s_a", "s_b", "s_base"], base="s_base")
    grid.add("even", ["s_even_a", "s_even_b"], base="s_base", notes="near-orthogonal, negative cosines")
    grid.add("even_filter_wise", ["s_even_a", "s_even_b"], base="s_base", filter_wise=True)
    grid.add("bfloat16", ["h_a", "h_b"], base="h_base")
    return grid.cases


def others() -> list[Case]:
    """nearswap, sce, arcee_fusion, ram, ramplus_tl, passthrough."""
    near = Grid("nearswap")
    for t in (0.0, 1e-4, 1e-3, 1e-2, 0.3, 0.5, 1.0):
        near.add(f"t{t:g}", ["s_base", "s_a"], base="s_base", t=t)
    near.add("far", ["s_base", "s_far"], base="s_base", t=0.05)
    near.add("base_second", ["s_a", "s_base"], base="s_base", t=1e-3)
    near.add("negative_t", ["s_base", "s_a"], base="s_base", t=-0.01)
    near.add("base_unlisted", ["s_b"], base="s_base", t=1e-3)

    sce = Grid("sce")
    for select in (0.01, 0.1, 0.3, 0.5, 0.9, 1.0):
        sce.add(f"select{select:g}", ["s_a", "s_b"], base="s_base", select_topk=select)
        sce.add(f"three_select{select:g}", ["s_a", "s_b", "s_c"], base="s_base", select_topk=select)
    sce.add("select0", ["s_a", "s_b"], base="s_base", select_topk=0.0)
    sce.add("one", ["s_a"], base="s_base")
    sce.add("one_select0.5", ["s_a"], base="s_base", select_topk=0.5)
    sce.add("int8_mask", ["s_a", "s_b"], base="s_base", select_topk=0.5, int8_mask=True)
    even = ["s_even_a", "s_even_b"]
    sce.add("equal_variances", even, base="s_base", select_topk=0.4, marks=("equal_magnitudes",))
    sce.add("base_listed", ["s_base", "s_a", "s_b"], base="s_base")
    sce.add("far", ["s_a", "s_far"], base="s_base", select_topk=0.5)

    fusion = Grid("arcee_fusion")
    for other in ("s_far", "s_a", "s_b", "s_c", "s_even_a"):
        # With small deltas the divergence of the softmaxes is about as large as its float32 rounding errors.
        noisy = other in {"s_b", "s_c", "s_even_a"}
        fusion.add(other, ["s_base", other], base="s_base", marks=("float32_noise",) if noisy else ())
    fusion.add("base_second", ["s_a", "s_base"], base="s_base")
    fusion.add("bfloat16", ["h_base", "h_a"], base="h_base", notes="the peer writes float32 whatever the dtype")

    ram = Grid("ram")
    ramplus = Grid("ramplus_tl")
    for models in (["s_a"], ["s_a", "s_b"], ["s_a", "s_b", "s_c"]):
        for epsilon in (0.0, 1e-5, 1e-3, 1e-2):
            ram.add(f"{len(models)}_epsilon{epsilon:g}", models, base="s_base", epsilon=epsilon)
            if epsilon == 0.0:
                continue  # no model may be active anywhere: 0/0
            ramplus.add(f"{len(models)}_epsilon{epsilon:g}", models, base="s_base", epsilon=epsilon)
    ram.add("defaults", ["s_a", "s_b"], base="s_base")
    ram.add("base_listed", ["s_base", "s_a", "s_b"], base="s_base")
    ramplus.add("defaults", ["s_a", "s_b"], base="s_base")
    for r, alpha in ((0.0, 0.2), (1.0, 0.2), (0.5, 10.0), (0.5, 1.0), (-0.3, 0.5)):
        ramplus.add(f"r{r:g}_alpha{alpha:g}", ["s_a", "s_b", "s_c"], base="s_base", r=r, alpha=alpha, epsilon=2e-3)

    through = Grid("passthrough")
    through.add("copy", ["s_a"])
    for scale in (0.5, -1.0, 0.0, 2.0):
        through.add(f"scale{scale:g}", {"s_a": {"scale": scale}})
    through.add("global_scale", ["s_a"], scale=0.25)
    through.add("bfloat16", {"h_a": {"scale": 0.3}})
    through.add("out_dtype_float16", {"s_a": {"scale": 0.3}}, out_dtype="float16")
    scale = [{"filter": "q_proj", "value": [0.5, 0.7]}, {"filter": "norm", "value": 2.0}, {"value": 1.0}]
    through.add("filtered_scale", {"s_a": {"scale": scale}})
    return near.cases + sce.cases + fusion.cases + ram.cases + ramplus.cases + through.cases


def cases() -> list[Case]:
    """All grids."""
    spans = (linear, slerp, nuslerp, multislerp, karcher, task_arithmetic, model_stock)
    makers = (*spans, ties, breadcrumbs, dense_random, others)
    return [case for maker in makers for case in maker()]


def random_cases() -> list[Case]:
    """DARE and DELLA below density 1, on the wide ``w_*`` models: many elements, judged by statistics."""
    one, two = weighted(w_a=1.0), weighted(w_a=1.0, w_b=0.5)
    result: list[Case] = []
    for method in ("dare_linear", "dare_ties"):
        grid = Grid(method)
        for density in (0.1, 0.3, 0.5, 0.9):
            grid.add(f"random_one_density{density:g}", pruned(density, one), base="w_base", exact=False)
        grid.add("random_one_density0.3_raw", pruned(0.3, one), base="w_base", exact=False, rescale=False)
        grid.add("random_two_density0.5", pruned(0.5, two), base="w_base", exact=False)
        grid.add("random_two_density0.5_normalized", pruned(0.5, two), base="w_base", exact=False, normalize=True)
        result += grid.cases
    for method in ("della", "della_linear"):
        grid = Grid(method)
        for density, epsilon in ((0.3, 0.15), (0.5, 0.15), (0.5, 0.4), (0.5, 0.0), (0.8, 0.1)):
            what = f"random_one_density{density:g}_epsilon{epsilon:g}"
            grid.add(what, pruned(density, one, epsilon=epsilon), base="w_base", exact=False)
        grid.add("random_one_raw", pruned(0.5, one), base="w_base", exact=False, rescale=False)
        grid.add("random_two_density0.5", pruned(0.5, two), base="w_base", exact=False)
        grid.add(
            "random_two_density0.5_flipped", pruned(0.5, two), base="w_base", exact=False, normalize=method != "della"
        )
        result += grid.cases
    return result
