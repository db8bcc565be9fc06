"""A planted rotation: what plain SLERP destroys, the residual alignment restores; and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import rotate, rotation
from transformers import AutoModelForCausalLM

import geomerge as gm
import tiny
from geomerge.engine.plan import Plan
from geomerge.engine.planner import make_plan
from geomerge.engine.run import run_in_memory, run_plan
from geomerge.lab.suite import Suite, load_suite
from geomerge.recipe import loads

TASKS = ("choice", "recall")


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite("skills")


@pytest.fixture(scope="module")
def rotated(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recall expert in another basis."""
    return rotate(Path(suite.experts["recall"]), tmp_path_factory.mktemp("rotated") / "recall")


def recipe(a: Path | str, b: Path | str, more: str = "", t: float = 0.5) -> str:
    return (
        f"merge_method: slerp\nbase_model: {a}\nmodels:\n- model: {a}\n- model: {b}\n"
        f"parameters: {{t: {t}}}\ndtype: float32\n{more}\n"
    )


def logits(folder: Path | str) -> torch.Tensor:
    """A model's logits on fixed tokens."""
    module = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    tokens = torch.arange(48).view(3, 16) % module.config.vocab_size
    with torch.no_grad():
        found: torch.Tensor = module(tokens).logits
    return found


def scores(suite: Suite, folder: Path) -> float:
    """Mean accuracy on the parents' two tasks, 300 test samples each."""
    module = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    tasks = suite.tasks()
    return sum(float(tasks[t].correct(module, "test")[:300].mean()) for t in TASKS) / len(TASKS)


def test_planted_model_is_the_same_function(suite: Suite, rotated: Path) -> None:
    """The experiment's premise: rotating changes no logit."""
    a, b = logits(suite.experts["recall"]), logits(rotated)
    assert float((a - b).abs().max()) < 1e-4 * float(a.abs().max())


def test_alignment_restores_the_merge(suite: Suite, rotated: Path, tmp_path: Path) -> None:
    """Plain SLERP of a rotated parent scores little; with `align: residual` it is the unrotated merge's score."""
    choice = suite.experts["choice"]
    made = {
        "unrotated": recipe(choice, suite.experts["recall"]),
        "plain": recipe(choice, rotated),
        "aligned": recipe(choice, rotated, "align: residual"),
    }
    found = {}
    for name, text in made.items():
        gm.merge(text, tmp_path / name)
        found[name] = scores(suite, tmp_path / name)
    assert abs(found["aligned"] - found["unrotated"]) < 0.04
    assert found["plain"] < 0.5 * found["unrotated"]
    (fact,) = tiny.manifest(tmp_path / "aligned")["alignment"]
    assert fact["kept"]
    assert fact["scope"] == "residual"
    assert fact["omega_bar"]["after"] < 0.3 * fact["omega_bar"]["before"]


def test_rotated_parent_alone_keeps_its_logits(suite: Suite, rotated: Path, tmp_path: Path) -> None:
    """At t = 1 the output is the rotated parent in the other's basis: the same function to 1e-4."""
    gm.merge(recipe(suite.experts["choice"], rotated, "align: residual", t=1.0), tmp_path / "out")
    a, b = logits(rotated), logits(tmp_path / "out")
    assert float((a - b).abs().max()) < 1e-4 * float(a.abs().max())
    assert tiny.config(tmp_path / "out")["tie_word_embeddings"] is False


def test_fixed_parent_alone_keeps_its_logits(suite: Suite, rotated: Path, tmp_path: Path) -> None:
    """At t = 0 its gains are folded and its head is untied; the function is the same."""
    choice = suite.experts["choice"]
    gm.merge(recipe(choice, rotated, "align: residual", t=0.0), tmp_path / "out")
    a, b = logits(choice), logits(tmp_path / "out")
    assert float((a - b).abs().max()) < 1e-4 * float(a.abs().max())


def test_embedding_scope_rotates_the_embedding_alone(suite: Suite, rotated: Path, tmp_path: Path) -> None:
    """All other tensors are the plain merge's; the note says what that does to the function."""
    choice = suite.experts["choice"]
    for name, more in (("plain", ""), ("embedding", "align: embedding")):
        gm.merge(recipe(choice, rotated, more), tmp_path / name)
    plain, aligned = tiny.read(tmp_path / "plain"), tiny.read(tmp_path / "embedding")
    assert [n for n in plain if not torch.equal(plain[n], aligned[n])] == ["model.embed_tokens.weight"]
    assert any("changes what the model computes" in note for note in tiny.manifest(tmp_path / "embedding")["notes"])


def test_a_rotation_that_does_not_help_is_left_out(tmp_path: Path) -> None:
    """Where only the embeddings were rotated, turning them back would part all the rest: left out, and said."""
    a, b = tmp_path / "a", tmp_path / "b"
    made = tiny.llama(a, 1, hidden_size=32, vocab_size=90)
    turned = {n: w.double() @ rotation(32) if n == "model.embed_tokens.weight" else w.double() for n, w in made.items()}
    tiny.save(
        b, {n: w.float().contiguous() for n, w in turned.items()}, tiny.LLAMA | {"hidden_size": 32, "vocab_size": 90}
    )
    with_, without = gm.plan(recipe(a, b, "align: residual")), gm.plan(recipe(a, b))
    assert not with_.transforms
    assert any("would not fall" in note for note in with_.notes)
    assert with_.nodes == without.nodes
    assert with_.alignment[0]["kept"] is False


class TestBits:
    """The same bits whatever the tile, the threads, and for a saved plan."""

    @pytest.fixture
    def plan(self, tmp_path: Path) -> Plan:
        made = tiny.llama(tmp_path / "a", 1, hidden_size=32, vocab_size=90)
        tiny.llama(tmp_path / "tuned", 2, like=made, step=0.05, hidden_size=32, vocab_size=90)
        rotate(tmp_path / "tuned", tmp_path / "b", 3)
        return gm.plan(recipe(tmp_path / "a", tmp_path / "b", "align: residual"))

    def test_tiles_and_threads(self, plan: Plan) -> None:
        assert plan.transforms
        whole = run_in_memory(plan, threads=1)
        for tile, threads in ((64, 2), (1 << 20, 1), (8192, 2)):
            assert tiny.same(whole, run_in_memory(plan, tile=tile, threads=threads))

    def test_saved_plan(self, plan: Plan, tmp_path: Path) -> None:
        """A plan that comes back from its file finds the same rotation again."""
        plan.save(tmp_path / "plan.json")
        again = Plan.load(tmp_path / "plan.json")
        assert again.hash == plan.hash
        run_plan(plan, tmp_path / "one")
        run_plan(again, tmp_path / "two")
        assert tiny.same(tiny.read(tmp_path / "one"), tiny.read(tmp_path / "two"))


@pytest.mark.parametrize("kind", ["mixtral", "gemma", "qwen3"])
def test_other_decoders(kind: str, tmp_path: Path) -> None:
    """Experts, norms that multiply by 1 + w, norms of queries and keys: the merge with a rotated copy is the model."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 120, "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "mixtral":
        sizes |= {"num_local_experts": 3}
    if kind in ("gemma", "qwen3"):
        sizes |= {"head_dim": 8}
    module = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    module.save_pretrained(tmp_path / "a")
    rotate(tmp_path / "a", tmp_path / "b", offset=1.0 if kind == "gemma" else 0.0)
    gm.merge(recipe(tmp_path / "a", tmp_path / "b", "align: residual"), tmp_path / "out")
    a, out = logits(tmp_path / "a"), logits(tmp_path / "out")
    assert float((a - out).abs().max()) < 1e-4 * float(a.abs().max())


class TestRefused:
    """What cannot be aligned is refused before a byte is written."""

    def refused(self, text: str, error: type[Exception], says: str, out: Path) -> None:
        with pytest.raises(error, match=says):
            gm.merge(text, out)
        assert not out.exists()

    def test_layer_norm(self, tmp_path: Path) -> None:
        import transformers

        small = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16)
        for name in "ab":
            AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / name)
        text = recipe(tmp_path / "a", tmp_path / "b", "align: residual")
        self.refused(text, gm.IncompatibleModels, "LayerNorm subtracts the mean", tmp_path / "out")

    def test_post_norms(self, tmp_path: Path) -> None:
        for name in "ab":
            tiny.llama(tmp_path / name, 1, model_type="gemma2")
        text = recipe(tmp_path / "a", tmp_path / "b", "align: residual")
        self.refused(text, gm.IncompatibleModels, "no rotation of the stream", tmp_path / "out")

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            ("align: {scope: residual, to: ./elsewhere}", "elsewhere"),
            ("align: {scope: residuals}", "did you mean 'residual'"),
            ("align: {scope: residual, wait: 1}", "wait"),
            ("align: {using: tokens}", "scope"),
            ("align: residual\nstatistics: [{a}]", "exclude each other"),
        ],
    )
    def test_wrong_words(self, tmp_path: Path, more: str, says: str) -> None:
        for seed, name in enumerate("ab"):
            tiny.llama(tmp_path / name, seed)
        with pytest.raises(gm.GeomergeError, match=says):
            gm.merge(recipe(tmp_path / "a", tmp_path / "b", more.replace("{a}", f"{tmp_path}/a")), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_live_merges_align(suite: Suite, rotated: Path) -> None:
    """A candidate in memory is aligned as the merge on disk is."""
    text = recipe(suite.experts["choice"], rotated, "align: residual")
    plan, opened = make_plan(loads(text))
    made = run_in_memory(plan, opened)
    assert "lm_head.weight" in made
    assert tiny.same(made, gm.merge_state_dicts(text))
