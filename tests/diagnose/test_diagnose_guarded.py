"""Guardrails within `merge`: what `warn`, `enforce` and `off` make of a recipe, and what the manifest says."""

from __future__ import annotations

from pathlib import Path

import pytest

import geomerge as gm
import tiny
import token_samples as samples

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model, its fine-tune and a stranger."""
    made = tiny.llama(tmp_path / "a", 1, **SIZES)
    tiny.llama(tmp_path / "tuned", 2, like=made, step=0.1, **SIZES)
    tiny.llama(tmp_path / "stranger", 3, **SIZES)
    return tmp_path


def recipe(root: Path, b: str, more: str = "", method: str = "slerp") -> str:
    return (
        f"merge_method: {method}\nbase_model: {root}/a\nmodels: [{{model: {root}/a}}, {{model: {root}/{b}}}]\n"
        f"schedule: H65\n{more}\n"
    )


def ts(plan: gm.engine.plan.Plan) -> set[float]:  # type: ignore[name-defined]
    return {round(n.method.t, 9) for n in plan.output_nodes()}


def test_warns_by_default(root: Path, tmp_path: Path) -> None:
    """The plan is what it was; the notes and the manifest say what was found."""
    gm.merge(recipe(root, "stranger"), tmp_path / "out")
    manifest = tiny.manifest(tmp_path / "out")
    assert manifest["guardrails"]["policy"] == "warn"
    assert manifest["guardrails"]["verdict"] == "divergent"
    assert manifest["guardrails"]["action"] is None
    assert manifest["guardrails"]["omega_bar"] > 0.5
    assert any("stand far apart" in note for note in manifest["notes"])
    off = gm.merge_state_dicts(recipe(root, "stranger", "guardrails: off"))
    assert tiny.same(tiny.read(tmp_path / "out"), off)


def test_enforced_on_strangers(root: Path, tmp_path: Path) -> None:
    """One coefficient everywhere: the mean of the schedule's over the elements; the bytes are those of that global SLERP."""
    enforced = gm.plan(recipe(root, "stranger", "guardrails: enforce"))
    scheduled = gm.plan(recipe(root, "stranger", "guardrails: off"))
    assert len(ts(scheduled)) > 1
    (t,) = ts(enforced)
    nodes = list(scheduled.output_nodes())
    mean = sum(n.method.t * n.numel for n in nodes) / sum(n.numel for n in nodes)  # type: ignore[union-attr]
    assert t == pytest.approx(mean, abs=1e-9)
    gm.merge(enforced, tmp_path / "out")
    plain = recipe(root, "stranger", f"parameters: {{t: {mean!r}}}\nguardrails: off").replace("schedule: H65\n", "")
    assert tiny.same(tiny.read(tmp_path / "out"), gm.merge_state_dicts(plain))
    found = tiny.manifest(tmp_path / "out")["guardrails"]
    assert (found["policy"], found["verdict"]) == ("enforce", "divergent")
    assert "one coefficient everywhere" in found["action"]


def test_small_models(root: Path) -> None:
    """Guardrail (iii): a schedule below 1B parameters."""
    assert len(ts(gm.plan(recipe(root, "tuned")))) > 1
    plan = gm.plan(recipe(root, "tuned", "guardrails: enforce"))
    assert len(ts(plan)) == 1
    assert plan.guardrails["verdict"] == "small"


@pytest.mark.parametrize("policy", ["warn", "enforce", "off"])
def test_fine(root: Path, policy: str) -> None:
    """One coefficient over a fine-tune: nothing to say, nothing changed."""
    text = recipe(root, "tuned", f"parameters: {{t: 0.4}}\nguardrails: {policy}").replace("schedule: H65\n", "")
    plan = gm.plan(text)
    assert ts(plan) == {0.4}
    assert not plan.notes
    assert plan.guardrails.get("verdict") == (None if policy == "off" else "fine")


def test_not_asked_of_other_methods(root: Path) -> None:
    """Task arithmetic is no walk on the sphere."""
    text = (
        f"merge_method: task_arithmetic\nbase_model: {root}/a\n"
        f"models: [{{model: {root}/stranger, parameters: {{weight: 0.5}}}}]\n"
    )
    assert gm.plan(text).guardrails == {}


def test_saved_with_the_plan(root: Path, tmp_path: Path) -> None:
    plan = gm.plan(recipe(root, "stranger"))
    plan.save(tmp_path / "plan.json")
    assert type(plan).load(tmp_path / "plan.json").guardrails == plan.guardrails


def test_different_vocabularies_are_aligned(tmp_path: Path) -> None:
    """Guardrail (ii) enforced: the embeddings are turned onto each other on the shared tokens before they are merged."""
    end = samples.special("<|end|>")
    tokenizers = {
        "a": samples.bpe(samples.ENGLISH, 300, end),
        "b": samples.bpe(samples.GERMAN, 340, end),
    }
    first = None
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        rows = len(tokenizer.get_vocab(with_added_tokens=True))
        changes = {"vocab_size": rows, "num_hidden_layers": 2}
        if first is None:
            first = tiny.llama(tmp_path / name, seed, **changes)
        else:
            like = {n: w for n, w in first.items() if "embed" not in n and "lm_head" not in n}
            like |= {n: first[n][torch_rows(rows, first[n].shape[0])] for n in first if n not in like}
            tiny.llama(tmp_path / name, seed, like=like, step=0.05, **changes)
        samples.save(tmp_path / name, tokenizer, eos_token="<|end|>")
    text = (
        f"merge_method: slerp\nbase_model: {tmp_path}/a\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\n"
        "parameters: {t: 0.5}\ntokens: union\n"
    )
    plan = gm.plan(text)
    assert plan.guardrails["verdict"] == "vocabulary"
    assert any("align" in note for note in plan.notes)
    enforced = gm.plan(text + "guardrails: enforce\n")
    assert enforced.guardrails["action"] == "the embeddings are aligned on the shared tokens first"
    assert enforced.alignment[0]["scope"] == "embedding"


def torch_rows(rows: int, have: int) -> list[int]:
    return [i % have for i in range(rows)]
