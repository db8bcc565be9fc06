"""Parents with different vocabularies: refused without a policy, re-indexed by one; against a slow reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import geomerge as gm
import tiny
import token_samples as samples
from geomerge.engine.planner import make_plan
from geomerge.engine.run import run_in_memory

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Parent:
    """A model with a tokenizer of its own."""

    name: str
    ids: Mapping[str, int]
    tensors: tiny.Tensors


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, Parent]:
    """`base` and `a` share most tokens under the same ids, `a` has two more; `b`'s tokens are others and padded."""
    end, user = samples.special("<|end|>"), samples.special("<|user|>")
    tokenizers = {
        "base": samples.bpe(samples.ENGLISH, 290, end),
        "a": samples.bpe(samples.ENGLISH, 290, end, user, samples.special("<|extra|>")),
        "b": samples.bpe(samples.ENGLISH + samples.GERMAN, 310, user, end),
    }
    made = {}
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        ids = tokenizer.get_vocab(with_added_tokens=True)
        rows = len(ids) + (5 if name == "b" else 0)
        tensors = tiny.llama(tmp_path / name, seed, vocab_size=rows, num_hidden_layers=1)
        samples.save(tmp_path / name, tokenizer, eos_token="<|end|>")
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"temperature": seed}))
        made[name] = Parent(name, ids, tensors)
    return made


def recipe(root: Path, names: str, more: str, *, base: str = "", method: str = "linear") -> str:
    """A recipe over the named models, each with another weight."""
    text = f"merge_method: {method}\n" + (f"base_model: {root}/{base}\n" if base else "") + "models:\n"
    for k, name in enumerate(names.split()):
        expert = method != "slerp" and (method == "linear" or name != base)
        weight = f", parameters: {{weight: {k + 1}}}" if expert else ""
        text += f"- {{model: {root}/{name}{weight}}}\n"
    return text + more


def reindexed(
    parents: Sequence[Parent],
    names: Sequence[str],
    ids: Mapping[str, int],
    size: int,
    base: int | None = None,
    rules: Mapping[str, torch.Tensor] | None = None,
    forced: Sequence[str] = (),
) -> list[torch.Tensor]:
    """Every parent's matrix in the output's order, worked out one token after the other; `names` says which matrix."""
    matrices = [p.tensors[n].double() for p, n in zip(parents, names, strict=True)]
    made = []
    for k, parent in enumerate(parents):
        out = torch.full((size, matrices[k].shape[1]), torch.nan, dtype=torch.float64)
        for token, row in ids.items():
            owners = [j for j, p in enumerate(parents) if p.ids.get(token, len(matrices[j])) < len(matrices[j])]
            if token in parent.ids and k in owners and token not in forced:
                out[row] = matrices[k][parent.ids[token]]
            elif rules and token in rules:
                out[row] = rules[token]
            elif base in owners:
                out[row] = matrices[base][parents[base].ids[token]]
            else:
                out[row] = sum(matrices[j][parents[j].ids[token]] for j in owners) / len(owners)
        missing = out.isnan().any(1)
        out[missing] = out[~missing].mean(0)
        made.append(out)
    return made


def weighted(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """What `recipe`'s weights make of them: (1·x₀ + 2·x₁ + …)/(1 + 2 + …)."""
    total = sum((k + 1) * m for k, m in enumerate(matrices))
    return (total / sum(range(1, len(matrices) + 1))).float()


def output_ids(out: Path) -> dict[str, int]:
    """The output tokenizer's ids, as the `tokenizers` library reads them."""
    found: dict[str, int] = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(with_added_tokens=True)
    return found


def check(out: Path, chosen: Sequence[Parent], base: int | None, **more: Any) -> None:
    """Embedding, head and config of an output against the reference."""
    ids, merged = output_ids(out), tiny.read(out)
    size = tiny.config(out)["vocab_size"]
    for name in (EMBED, HEAD):
        assert merged[name].shape[0] == size
        expected = weighted(reindexed(chosen, [name] * len(chosen), ids, size, base, **more))
        assert torch.allclose(merged[name], expected, rtol=3e-7, atol=1e-9), name


def test_different_rows_are_refused_with_all_that_helps(parents: dict[str, Parent], tmp_path: Path) -> None:
    """Without a policy: the shapes, tokens that differ, and every policy to choose from."""
    with pytest.raises(gm.IncompatibleModels) as caught:
        gm.merge(recipe(tmp_path, "base a", ""), tmp_path / "out")
    text = str(caught.value)
    assert caught.value.exit_code == 3
    for said in ("291", "293", "<|user|>", "<|extra|>", f"{tmp_path}/base", f"{tmp_path}/a"):
        assert said in text, said
    for policy in ("tokenizer_source: base", "tokenizer_source: union", "tokenizer_source: <model>"):
        assert policy in text, policy
    assert not (tmp_path / "out").exists()


def test_equal_rows_of_other_tokens_are_refused(parents: dict[str, Parent], tmp_path: Path) -> None:
    """As many rows, but the same row means another token: averaging them would be silent damage."""
    other = samples.bpe(samples.GERMAN, 290, samples.special("<|end|>"))
    tiny.llama(tmp_path / "other", 9, vocab_size=291, num_hidden_layers=1)
    samples.save(tmp_path / "other", other)
    with pytest.raises(gm.IncompatibleModels, match="same row means different tokens"):
        gm.plan(recipe(tmp_path, "base other", ""))


@pytest.mark.parametrize(
    ("names", "policy", "base", "donor"),
    [
        ("base a", "tokenizer_source: union\n", "", "base"),
        ("base a b", "tokenizer_source: union\n", "", "base"),
        ("a b base", "tokenizer_source: union\n", "base", "base"),
        ("a base b", "tokenizer_source: base\n", "base", "base"),
        ("a base b", "tokenizer_source: {root}/b\n", "base", "b"),
        ("base b", "tokenizer: {{source: union, pad_to_multiple_of: 64}}\n", "", "base"),
    ],
)
def test_policies(names: str, policy: str, base: str, donor: str, parents: dict[str, Parent], tmp_path: Path) -> None:
    """Rows of embedding and head, config and tokenizer files under each policy, for two and three parents."""
    chosen = [parents[n] for n in names.split()]
    base_index = names.split().index(base) if base else None
    gm.merge(recipe(tmp_path, names, policy.format(root=tmp_path), base=base), tmp_path / "out", tile=8192)
    check(tmp_path / "out", chosen, base_index)
    ids = output_ids(tmp_path / "out")
    size = tiny.config(tmp_path / "out")["vocab_size"]
    assert size == (len(ids) if "pad" not in policy else -(-len(ids) // 64) * 64)
    everything = set().union(*(p.ids for p in chosen))
    assert set(ids) == (everything if "union" in policy else set(parents[donor].ids))
    if "union" not in policy:
        assert ids == parents[donor].ids
    else:  # the source's ids stay
        assert {t: ids[t] for t in parents["base"].ids} == parents["base"].ids
    temperature = json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"]
    assert temperature == list(parents).index(base or names.split()[0])


def test_rules_for_single_tokens(parents: dict[str, Parent], tmp_path: Path) -> None:
    """A token's row from a model, from another token, as zeros; forced also on the models that have the token."""
    a, b = parents["a"], parents["b"]
    text = f"""\
tokenizer:
  source: union
  tokens:
    <|user|>: {{source: {tmp_path}/b}}
    <|extra|>: {{source: {{kind: model_token, model: {tmp_path}/b, token: <|end|>}}, force: true}}
    <|end|>: {{source: {{kind: zero}}, force: true}}
    <|new|>: {{source: {{kind: model_token, model: {tmp_path}/a, token_id: 7}}}}
"""
    gm.merge(recipe(tmp_path, "base a b", text), tmp_path / "out")
    ids, merged = output_ids(tmp_path / "out"), tiny.read(tmp_path / "out")
    for name in (EMBED, HEAD):
        rules = {
            "<|user|>": b.tensors[name].double()[b.ids["<|user|>"]],
            "<|extra|>": b.tensors[name].double()[b.ids["<|end|>"]],
            "<|end|>": torch.zeros(16, dtype=torch.float64),
            "<|new|>": a.tensors[name].double()[7],
        }
        expected = weighted(
            reindexed(
                [parents[n] for n in ("base", "a", "b")],
                [name] * 3,
                ids,
                len(merged[name]),
                rules=rules,
                forced=("<|extra|>", "<|end|>"),
            )
        )
        assert torch.allclose(merged[name], expected, rtol=3e-7, atol=1e-9)
        assert not merged[name][ids["<|end|>"]].any()


def test_slerp_over_reordered_rows_in_any_tiles(parents: dict[str, Parent], tmp_path: Path) -> None:
    """A method that measures the re-indexed matrix: against itself on the reference's matrices, in tiles of any size."""
    text = recipe(tmp_path, "b", "tokenizer_source: union\nparameters: {t: 0.3}\n", base="base", method="slerp")
    gm.merge(text, tmp_path / "out")
    merged = tiny.read(tmp_path / "out")
    chosen = [parents["b"], parents["base"]]
    of_b, of_base = reindexed(chosen, [EMBED] * 2, output_ids(tmp_path / "out"), len(merged[EMBED]), base=1)
    expected = gm.methods.slerp(of_base, [of_b], t=0.3).float()
    assert torch.allclose(merged[EMBED], expected, rtol=1e-6, atol=1e-8)
    for tile, threads in ((1, 1), (8192, 3)):
        plan, inputs = make_plan(gm.load_recipe(text))
        assert tiny.same(run_in_memory(plan, inputs, tile=tile, threads=threads), merged)


def test_several_row_tiles(tmp_path: Path) -> None:
    """Wide rows, so that tiles cut through rows and through runs of rows: equal to the reference."""
    end, user = samples.special("<|end|>"), samples.special("<|user|>")
    parents = []
    for name, tokenizer in (
        ("x", samples.bpe(samples.ENGLISH, 280, end)),
        ("y", samples.bpe(samples.GERMAN, 300, user, end)),
    ):
        ids = tokenizer.get_vocab(with_added_tokens=True)
        tensors = tiny.random_tensors({EMBED: (len(ids), 1111)}, len(ids))
        tiny.save(tmp_path / name, tensors, {"model_type": "llama", "num_hidden_layers": 0, "vocab_size": len(ids)})
        samples.save(tmp_path / name, tokenizer)
        parents.append(Parent(name, ids, tensors))
    text = recipe(tmp_path, "x y", "tokenizer: {source: union, pad_to_multiple_of: 128}\n")
    gm.merge(text, tmp_path / "out", tile=8192, threads=2)
    merged = tiny.read(tmp_path / "out")[EMBED]
    expected = weighted(reindexed(parents, [EMBED] * 2, output_ids(tmp_path / "out"), len(merged)))
    assert torch.allclose(merged, expected, rtol=3e-7, atol=1e-9)


def test_tied_and_untied_heads_of_different_vocabularies(parents: dict[str, Parent], tmp_path: Path) -> None:
    """A tied parent's head is its embedding; the rows that it lacks come from the other's *head*."""
    config = tiny.config(tmp_path / "base") | {"tie_word_embeddings": True}
    tied = {n: t for n, t in parents["base"].tensors.items() if n != HEAD}
    tiny.save(tmp_path / "base", tied, config)
    gm.merge(recipe(tmp_path, "base b", "tokenizer_source: union\n"), tmp_path / "out")
    merged, ids = tiny.read(tmp_path / "out"), output_ids(tmp_path / "out")
    assert tiny.config(tmp_path / "out")["tie_word_embeddings"] is False
    chosen = [parents["base"], parents["b"]]
    for name, stored in ((EMBED, [EMBED, EMBED]), (HEAD, [EMBED, HEAD])):
        expected = weighted(reindexed(chosen, stored, ids, len(merged[name])))
        assert torch.allclose(merged[name], expected, rtol=3e-7, atol=1e-9), name


def test_equal_vocabularies_keep_their_padding(parents: dict[str, Parent], tmp_path: Path) -> None:
    """A policy on parents that agree changes nothing: padding rows stay, and the tokenizer is copied byte for byte."""
    other = tiny.llama(tmp_path / "b2", 7, like=parents["b"].tensors, vocab_size=317, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "b2" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    gm.merge(recipe(tmp_path, "b b2", "tokenizer_source: union\n"), tmp_path / "out")
    expected = weighted([parents["b"].tensors[EMBED].double(), other[EMBED].double()])
    assert torch.allclose(tiny.read(tmp_path / "out")[EMBED], expected, rtol=3e-7, atol=1e-9)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_merged_tokenizer_loads_in_transformers(parents: dict[str, Parent], tmp_path: Path) -> None:
    """The output's tokenizer is one for transformers too, and every id has a row."""
    from transformers import AutoTokenizer

    gm.merge(recipe(tmp_path, "base a b", "tokenizer_source: union\n"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == output_ids(tmp_path / "out")
    ids = tokenizer("Die Katze sat <|user|> on<|end|>").input_ids
    assert tokenizer.convert_tokens_to_ids("<|user|>") in ids
    assert max(ids) < tiny.config(tmp_path / "out")["vocab_size"]


def test_special_ids_follow_the_vocabulary(parents: dict[str, Parent], tmp_path: Path) -> None:
    """With another model's tokenizer, the config's and the generation config's token ids name the same tokens as before."""
    end = parents["base"].ids["<|end|>"]
    config = tiny.config(tmp_path / "base") | {"eos_token_id": end, "bos_token_id": None, "pad_token_id": 3}
    tiny.save(tmp_path / "base", parents["base"].tensors, config)
    generation = {"eos_token_id": [end, 4], "temperature": 0.5}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(generation))
    policy = f"tokenizer_source: {tmp_path}/b\n"
    gm.merge(recipe(tmp_path, "a b", policy, base="base"), tmp_path / "out")
    token = {i: t for t, i in parents["base"].ids.items()}
    merged, new = tiny.config(tmp_path / "out"), parents["b"].ids
    assert new["<|end|>"] != end
    assert (merged["eos_token_id"], merged["pad_token_id"]) == (new["<|end|>"], new[token[3]])
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [new["<|end|>"], new[token[4]]], "temperature": 0.5}


@pytest.fixture
def staged(parents: dict[str, Parent], tmp_path: Path) -> Callable[[str, str], tuple[Path, Path]]:
    """Runs two recipes as one pipeline and as two runs; the second names the first's result {mid}."""

    def run(first: str, last: str) -> tuple[Path, Path]:
        gm.merge(f"name: mid\n{first}---\n{last.format(mid='mid', root=tmp_path)}", tmp_path / "once" / "out")
        gm.merge(first, tmp_path / "mid")
        gm.merge(last.format(mid=tmp_path / "mid", root=tmp_path), tmp_path / "twice" / "out")
        return tmp_path / "once" / "out", tmp_path / "twice" / "out"

    return run


LASTS = {
    "no policy": "merge_method: passthrough\nmodels: [{{model: {mid}}}]\nparameters: {{scale: 0.5}}\n",
    "union": (
        "merge_method: linear\nmodels: [{{model: {mid}}}, {{model: {root}/b}}]\nparameters: {{weight: 1}}\n"
        "tokenizer_source: union\n"
    ),
    "chat template": "merge_method: passthrough\nmodels: [{{model: {mid}}}]\nchat_template: chatml\n",
}


@pytest.mark.parametrize("last", LASTS)
def test_a_stage_with_a_vocabulary_of_its_own(
    last: str, staged: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """A stage's merged tokenizer is the stage's: later stages re-index from it, and the output gets it."""
    once, twice = staged(recipe(tmp_path, "base a", "tokenizer_source: union\n"), LASTS[last])
    assert tiny.same(tiny.read(once), tiny.read(twice))
    assert tiny.config(once) == tiny.config(twice)
    assert output_ids(once) == output_ids(twice)
    names = {p.name for p in once.iterdir()}
    assert names == {p.name for p in twice.iterdir()}
    for name in names - {"README.md", "geomerge.json", "geomerge.yml"}:
        assert (once / name).read_bytes() == (twice / name).read_bytes(), name


def test_intersection_writes_a_tokenizer_that_loads(parents: dict[str, Parent], tmp_path: Path) -> None:
    """`tokens: intersection`: tokens that one model lacks are gone from the output's tokenizer; texts still encode."""
    text = recipe(tmp_path, "base a", "tokens: intersection\n", base="a", method="task_arithmetic")
    gm.merge(text, tmp_path / "out")
    made = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = made.get_vocab(with_added_tokens=True)
    assert set(ids) == set(parents["a"].ids) & set(parents["base"].ids)
    assert all(ids[token] == parents["a"].ids[token] for token in ids)
    assert made.decode(made.encode(samples.ENGLISH[0]).ids) == samples.ENGLISH[0]


@pytest.mark.parametrize("policy", ["union", "base"])
def test_tokens_is_tokenizer_source(parents: dict[str, Parent], tmp_path: Path, policy: str) -> None:
    """The same bytes as mergekit's key, and the mapping form pads."""
    made = [
        gm.merge_state_dicts(recipe(tmp_path, "base b", f"{key}: {policy}\n", base="base", method="task_arithmetic"))
        for key in ("tokens", "tokenizer_source")
    ]
    assert tiny.same(*made)
    padded = recipe(
        tmp_path, "base b", f"tokens: {{policy: {policy}, pad_to: 64}}\n", base="base", method="task_arithmetic"
    )
    assert gm.merge_state_dicts(padded)[EMBED].shape[0] % 64 == 0


def test_tokens_excludes_mergekits_keys(parents: dict[str, Parent], tmp_path: Path) -> None:
    with pytest.raises(gm.RecipeError, match="excludes"):
        gm.load_recipe(recipe(tmp_path, "base b", "tokens: union\ntokenizer_source: union\n", base="base"))


def test_chat_vector_keeps_the_rows_of_new_tokens(parents: dict[str, Parent], tmp_path: Path) -> None:
    """The further-trained model extended the vocabulary: its rows of new tokens stay, all others take the vector."""
    made = tiny.llama(
        tmp_path / "chat", 9, like=parents["base"].tensors, vocab_size=len(parents["base"].ids), num_hidden_layers=1
    )
    samples.save(tmp_path / "chat", Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json")), eos_token="<|end|>")
    text = (
        f"merge_method: chat_vector\nbase_model: {tmp_path}/base\n"
        f"models: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/chat}}]\ntokens: {tmp_path}/a\n"
    )
    out = gm.merge_state_dicts(text)
    a, base = parents["a"], parents["base"]
    for token, row in a.ids.items():
        own = a.tensors[EMBED][row].double()
        if token in base.ids:
            own = own + made[EMBED][base.ids[token]].double() - base.tensors[EMBED][base.ids[token]].double()
        torch.testing.assert_close(out[EMBED][row], own.float(), rtol=0, atol=1e-6)
