"""Matrix methods in the engine: what is a matrix, the rest rule, whole tensors once each, the same bits whoever computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import geomerge as gm
import tiny
from geomerge import anatomy
from geomerge.cli.app import main
from geomerge.engine import estimate as estimates
from geomerge.engine import execute, live
from geomerge.engine.estimate import estimate
from geomerge.engine.matrices import weighs, whole_matrices
from geomerge.engine.planner import make_plan
from geomerge.engine.run import run_in_memory
from geomerge.errors import NotFiniteError, RunError
from geomerge.methods import tile
from geomerge.methods.matrix.tsvm import TsvMerge

TSVM = "merge_method: tsvm\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tiny.Tensors]:
    """Models base, a, b, c in the working directory, wide enough for several segments and tiles of each matrix."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tile, "SEGMENT", 1 << 13)
    return tiny.family(tmp_path, hidden_size=96, intermediate_size=176)


def merged(recipe: str, **options: Any) -> dict[str, Tensor]:
    """The output in memory."""
    plan, inputs = make_plan(gm.load_recipe(recipe))
    return run_in_memory(plan, inputs=inputs, **options)


def node(recipe: str, name: str) -> Any:
    """One node of the plan."""
    return next(n for n in gm.plan(recipe).output_nodes() if n.name == name)


def by_hand(family: dict[str, tiny.Tensors], name: str, factor: float = 1.0) -> Tensor:
    """TSV-Merge of one tensor of base, a and b without the engine."""
    base = family["base"][name].double()
    taus = torch.stack([family[m][name].double() - base for m in "ab"])
    return (base + factor * TsvMerge().merge(taus)).float()


# -- which tensors ---------------------------------------------------------------------------------------------------


def test_matrices_and_the_rest(family: dict[str, tiny.Tensors]) -> None:
    """Projections are merged as matrices; norms, embeddings and the head get the mean of the task vectors."""
    found = merged(TSVM)
    for name in (Q, DOWN):
        assert node(TSVM, name).rule == "merge"
        assert torch.allclose(found[name], by_hand(family, name), rtol=3e-7, atol=0)
    for name in (NORM, EMBED, HEAD):
        made = node(TSVM, name)
        assert (made.method.name, made.rule) == ("task_arithmetic", "rest: mean")
        assert made.method.weight == (0.5, 0.5)
        expected = (family["a"][name].double() + family["b"][name].double()) / 2
        assert torch.allclose(found[name], expected.float(), rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("rest", "weight"), [("sum", (0.8, 0.8)), ("scaled_sum", (0.8 / 2**0.5,) * 2), ("mean", (0.4, 0.4))]
)
def test_rest_rules(rest: str, weight: tuple[float, ...], family: dict[str, tiny.Tensors]) -> None:
    """Each rule's factor is multiplied by λ."""
    made = node(TSVM + f"parameters: {{rest: {rest}, lambda: 0.8}}\n", NORM)
    assert made.method.weight == pytest.approx(weight)


def test_rest_base_keeps_the_bits(family: dict[str, tiny.Tensors]) -> None:
    """`rest: base` reads the base alone."""
    recipe = TSVM + "parameters: {rest: base}\n"
    assert len(node(recipe, EMBED).operands) == 1
    assert torch.equal(merged(recipe)[EMBED], family["base"][EMBED])


def test_the_recipe_may_say_what_is_a_matrix(family: dict[str, tiny.Tensors]) -> None:
    """`matrix: true` takes in the head; `matrix: false` leaves a projection to the rest; vectors never are matrices."""
    recipe = TSVM + "parameters:\n  matrix: [{filter: lm_head, value: true}, {filter: q_proj, value: false}]\n"
    assert node(recipe, HEAD).method.name == "tsvm"
    assert node(recipe, Q).rule == "rest: mean"
    assert node(TSVM + "parameters: {matrix: true}\n", NORM).rule == "rest: mean"
    assert torch.allclose(merged(recipe)[HEAD], by_hand(family, HEAD), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.weight", (32, 32), True),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), False),
        ("model.layers.0.mlp.gate.weight", (8, 32), True),
        ("model.layers.0.mixer.A_log", (64, 16), False),
        ("visual_projection.weight", (32, 64), True),
        ("text_projection.weight", (32, 32), False),
        ("classifier.weight", (10, 32), False),
        ("conv1.weight", (32, 3, 4, 4), False),
        ("model.layers.0.mlp.experts.0.w1.weight", (64, 32), True),
        ("model.layers.0.mlp.down_proj.weight", (0, 32), False),
    ],
)
def test_by_role_and_name(name: str, shape: tuple[int, ...], expected: bool) -> None:
    """Routers and experts are matrices; tables, heads and convolutions are not."""
    part = anatomy.read({name: shape}, None).parts[name]
    assert weighs(TsvMerge(), part, shape) is expected


def test_the_plan_says_the_rule(family: dict[str, tiny.Tensors], capsys: pytest.CaptureFixture[str]) -> None:
    """In the table, in the list of all tensors, and as JSON."""
    Path("r.yml").write_text(TSVM)
    assert main(["plan", "r.yml"]) == 0
    out = capsys.readouterr().out
    assert "rest: mean: task_arithmetic(weight=0.5)" in out
    assert main(["plan", "r.yml", "--all"]) == 0
    out = capsys.readouterr().out
    assert "rest: mean: task_arithmetic" in out.replace("\n", "")


# -- how it is computed ----------------------------------------------------------------------------------------------


def test_the_same_bits_whoever_computes(family: dict[str, tiny.Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of threads, any tile, room for one matrix at a time only, and with torch's own threads on."""
    first = merged(TSVM, threads=1)
    for options in ({"threads": 3}, {"threads": 2, "tile": 1 << 13}, {"threads": 1, "tile": 1 << 20}):
        assert tiny.same(merged(TSVM, **options), first)
    monkeypatch.setattr(execute, "ROOM", 1)
    assert tiny.same(merged(TSVM, threads=3), first)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        direct = gm.methods.tsvm(family["base"][Q], [family["a"][Q], family["b"][Q]])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(direct, first[Q])


def test_each_matrix_is_computed_once(family: dict[str, tiny.Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many segments it has and threads there are."""
    shapes = []
    merge = TsvMerge.merge
    monkeypatch.setattr(TsvMerge, "merge", lambda self, deltas: shapes.append(deltas.shape) or merge(self, deltas))
    merged(TSVM, threads=3)
    nodes = [n for n in gm.plan(TSVM).output_nodes() if n.method.name == "tsvm"]
    assert len(nodes) == 21
    assert sorted(shapes) == sorted((2, *n.shape) for n in nodes)


def test_a_step_scales_the_task_vector(family: dict[str, tiny.Tensors]) -> None:
    """θ₀ + s·λ·g."""
    found = merged(TSVM + "parameters: {lambda: 0.5}\nsteps: [{scale: 0.6}]\n")
    assert torch.allclose(found[Q], by_hand(family, Q, 0.3), rtol=3e-7, atol=0)


def test_a_stage_of_matrices(family: dict[str, tiny.Tensors]) -> None:
    """A later recipe merges what an earlier one made, as if it had been written in between."""
    slim = "merge_method: svd_compress\nbase_model: base\nmodels: [{model: a}]\nparameters: {rank: 3}\ndtype: float32\n"
    ties = "merge_method: ties\nbase_model: base\nmodels: [{model: SLIM}, {model: b}]\nparameters: {weight: 1, density: 0.3}\n"
    together = f"name: slim\n{slim}---\n{ties.replace('SLIM', 'slim')}"
    gm.merge(slim, "slim-model")
    assert tiny.same(merged(together, threads=2), merged(ties.replace("SLIM", "slim-model"), threads=2))
    compressed = tiny.read(Path("slim-model"))[Q].double() - family["base"][Q].double()
    strengths = torch.linalg.svdvals(compressed)
    assert float(strengths[3]) < 1e-4 * float(strengths[2])
    plan, inputs = make_plan(gm.load_recipe(together))
    last = next(n for n in plan.output_nodes() if n.name == Q)
    assert whole_matrices(plan, last) == 8 * last.numel * (2 + 14)
    assert estimate(plan, inputs).memory > whole_matrices(plan, last)


@pytest.mark.parametrize("method", ["knots", "iso_c"])
def test_a_stage_that_is_computed_while_a_tile_is_read(method: str, family: dict[str, tiny.Tensors]) -> None:
    """A matrix method may use tiles itself: they are not those of the merge that waits for it."""
    first = f"merge_method: {method}\nbase_model: base\nmodels: [{{model: a}}, {{model: b}}]\ndtype: float32\n"
    first += "parameters: {full_weights: true}\n" if method == "knots" else ""
    second = "merge_method: linear\nmodels: [{model: c}, {model: STAGE}, {model: a}]\nparameters: {weight: 1}\n"
    gm.merge(first, "stage-model")
    together = f"name: stage\n{first}---\n{second.replace('STAGE', 'stage')}"
    assert tiny.same(merged(together), merged(second.replace("STAGE", "stage-model")))


def test_resume(family: dict[str, tiny.Tensors]) -> None:
    """Stopped in the middle and continued: the same bytes."""
    gm.merge(TSVM, "whole", threads=1)
    with pytest.raises(KeyboardInterrupt):
        gm.merge(TSVM, "out", threads=1, progress=tiny.Interrupt(0.5))
    report = gm.merge(TSVM, "out", threads=2, resume=True)
    assert report.resumed > 0
    assert tiny.same(tiny.read(Path("out")), tiny.read(Path("whole")))


def test_without_a_base(family: dict[str, tiny.Tensors]) -> None:
    """LoRE gets the weights themselves; what is no matrix is averaged."""
    recipe = "merge_method: lore\nmodels: [{model: a}, {model: b}]\nparameters: {mu: 0.1}\n"
    found = merged(recipe)
    assert node(recipe, NORM).method.name == "linear"
    assert torch.equal(found[Q], gm.methods.lore([family["a"][Q], family["b"][Q]], mu=0.1))
    mean = (family["a"][NORM].double() + family["b"][NORM].double()) / 2
    assert torch.allclose(found[NORM], mean.float(), rtol=2e-7, atol=1e-7)


def test_a_live_module_needs_a_place_for_the_rest(family: dict[str, tiny.Tensors]) -> None:
    """The rest rule is a merge like any other, unlike a buffer that is copied."""
    assert all(map(live._needed, gm.plan(TSVM).output_nodes()))


def test_nan_is_refused(family: dict[str, tiny.Tensors]) -> None:
    """Model and tensor are named, and no output stays."""
    damaged = {**family["b"], Q: family["b"][Q].clone()}
    damaged[Q][3, 5] = float("nan")
    tiny.save(Path("b"), damaged, tiny.config(Path("b")))
    with pytest.raises(NotFiniteError, match="NaN") as caught:
        gm.merge(TSVM, "out")
    assert caught.value.where == f"b: {Q}"
    assert not Path("out").exists()


def test_a_result_that_is_not_finite(family: dict[str, tiny.Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    """A method's own failure is an error that names the tensor, never a file with NaN."""
    monkeypatch.setattr(TsvMerge, "merge", lambda self, deltas: deltas[0] * float("nan"))
    monkeypatch.setattr(execute, "ROOM", 1)  # the others wait for the one that fails
    with pytest.raises(RunError, match="tsvm") as caught:
        merged(TSVM, threads=3)
    assert "proj" in str(caught.value.where)


def test_the_estimate_counts_whole_matrices(family: dict[str, tiny.Tensors]) -> None:
    """The two largest side by side for two threads, but no more than the room."""
    plan, inputs = make_plan(gm.load_recipe(TSVM))
    largest = 8 * 96 * 176 * (3 + TsvMerge().workspace(3))
    one, two = estimate(plan, inputs, threads=1), estimate(plan, inputs, threads=2)
    assert largest < one.memory
    assert largest < two.memory - one.memory
    assert one.seconds > 0


class TestWhatIsTried:
    @pytest.fixture
    def tried(self, family: dict[str, tiny.Tensors], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
        """The shapes of the matrices that are merged."""
        shapes: list[tuple[int, ...]] = []
        merge = TsvMerge.merge
        monkeypatch.setattr(estimates, "_SIDES", (12, 24, 24))
        monkeypatch.setattr(
            TsvMerge, "merge", lambda self, deltas: shapes.append(tuple(deltas.shape[1:])) or merge(self, deltas)
        )
        return shapes

    def test_each_shape_in_its_proportions(self, tried: list[tuple[int, ...]]) -> None:
        """Pieces of growing size of one matrix of each shape; all shapes are in the estimate with their own rates."""
        plan, inputs = make_plan(gm.load_recipe(TSVM))
        whole = {n.shape for n in plan.output_nodes() if n.method.name == "tsvm"}
        assert estimate(plan, inputs, threads=1).seconds > 0
        wanted = []
        for rows, columns in whole:
            for side in (12, 24, 24):
                share = min(side / min(rows, columns), 1)
                wanted.append((round(rows * share), round(columns * share)))
        assert sorted(tried) == sorted(wanted)
        assert len(whole) > 2

    def test_a_piece_has_an_end(self) -> None:
        """Of a very long matrix it is no longer than 4,096, whatever its shorter side is."""
        assert estimates._corner_of((896, 4864), 256) == (256, 1390)
        assert estimates._corner_of((8192, 300_000), 256) == (256, 4096)
        assert estimates._corner_of((100_000, 32), 256) == (4096, 32)

    def test_no_larger_piece_of_what_is_slow(
        self, tried: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second piece takes too long for a third."""
        monkeypatch.setattr(estimates, "_LONG", 0.0)
        plan, inputs = make_plan(gm.load_recipe(TSVM))
        estimate(plan, inputs, threads=1)
        assert len(tried) == 2 * len({n.shape for n in plan.output_nodes() if n.method.name == "tsvm"})

    def test_shapes_that_were_not_tried(self, tried: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
        """They are taken to cost what the others do for their operations."""
        monkeypatch.setattr(estimates, "_SHAPES_SAMPLED", 1)
        plan, inputs = make_plan(gm.load_recipe(TSVM))
        assert estimate(plan, inputs, threads=1).seconds > 0
        assert len(tried) == 3
        node = next(n for n in plan.output_nodes() if n.name == Q)
        assert estimates._rate(node, {("tsvm", (5, 7)): [2.0, 8.0], ("tsvm", ()): [9.0, 1.0]}) == (2.0, 8.0)
        assert estimates._rate(node, {("tsvm", node.shape): [1.0, 2.0], ("tsvm", (5, 7)): [2.0, 8.0]}) == (1.0, 2.0)
        assert estimates._rate(node, {("iso_c", node.shape): [1.0, 2.0]}) is None

    def test_progress(self, tried: list[tuple[int, ...]]) -> None:
        """Of each tensor that is tried, and only where matrices are."""
        told: list[tuple[str, int]] = []

        class Told:
            def start(self, total: int, done: int) -> None:
                told.append(("start", total))

            def advance(self, nbytes: int) -> None:
                told.append(("advance", nbytes))

            def finish(self) -> None:
                told.append(("finish", 0))

        estimate(*make_plan(gm.load_recipe(TSVM)), progress=Told())
        assert told[0] == ("start", len(told) - 1)
        assert set(told[1:]) == {("advance", 1)}
        assert len(told) > 1 + len(set(tried)) // 2
        told.clear()
        estimate(
            *make_plan(gm.load_recipe(TSVM.replace("tsvm", "task_arithmetic") + "parameters: {weight: 1}\n")),
            progress=Told(),
        )
        assert not told
