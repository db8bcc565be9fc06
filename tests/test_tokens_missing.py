"""`tokens: {missing: …}`: what a model gets for a token that it lacks; tokenizers transplanted whole; `geomerge tokens`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

import geomerge as gm
import tiny
import token_samples as samples
from align.test_pursuit import slow
from geomerge.cli.app import main
from geomerge.engine.planner import make_plan
from geomerge.engine.run import run_in_memory

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXTS = [*samples.ENGLISH[:2], *samples.GERMAN[:2], *samples.SCRIPTS]


def parent(folder: Path, tokenizer: Tokenizer, seed: int, *, width: int = 16, **changes: Any) -> dict[str, Any]:
    """A tiny Llama with a tokenizer; its tensors and its ids."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    config = {"vocab_size": len(ids), "num_hidden_layers": 1, "hidden_size": width} | changes
    tensors = tiny.llama(folder, seed, **config)
    samples.save(folder, tokenizer)
    return {"ids": ids, "tensors": tensors}


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """A and B of equal width, whose vocabularies overlap."""
    end, user = samples.special("<|end|>"), samples.special("<|user|>")
    return {
        "a": parent(tmp_path / "a", samples.bpe(samples.ENGLISH, 300, end), 1),
        "b": parent(tmp_path / "b", samples.bpe(samples.GERMAN, 310, user, end), 2),
    }


def merged(root: Path, policy: str, models: str = "a b", **more: Any) -> dict[str, torch.Tensor]:
    """The mean of some models under a policy, in memory."""
    listed = [{"model": f"{root}/{name}", "parameters": {"weight": 1}} for name in models.split()]
    text = json.dumps({"merge_method": "linear", "models": listed, "tokens": "POLICY", **more}, indent=1)
    return gm.merge_state_dicts(text.replace('"POLICY"', policy))


def rows(side: dict[str, Any], tokens: list[str], name: str = EMBED) -> np.ndarray:
    """A parent's rows of some tokens."""
    return np.asarray(side["tensors"][name].double()[[side["ids"][t] for t in tokens]])


@pytest.mark.parametrize("missing", ["mean", "zero", "average", "copy"])
def test_the_mean_of_two_models_under_each_policy(
    missing: str, pair: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Tokens that only B has: A contributes its own mean, zeros, or B's row."""
    a, b = pair["a"], pair["b"]
    said = f"copy:{tmp_path}/b" if missing == "copy" else missing
    made = merged(tmp_path, f'{{"policy": "union", "missing": "{said}"}}', base_model=f"{tmp_path}/a")
    alone = sorted(b["ids"].keys() - a["ids"].keys(), key=b["ids"].__getitem__)
    assert alone
    gm.merge(
        json.dumps(
            {
                "merge_method": "linear",
                "base_model": f"{tmp_path}/a",
                "models": [{"model": f"{tmp_path}/{n}", "parameters": {"weight": 1}} for n in "ab"],
                "tokens": {"policy": "union", "missing": said},
            },
            indent=1,
        ),
        tmp_path / "out",
    )
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab(with_added_tokens=True)
    for name in (EMBED, HEAD):
        theirs = rows(b, alone, name)
        own = {
            "mean": np.tile(np.asarray(a["tensors"][name].double().mean(0)), (len(alone), 1)),
            "zero": np.zeros_like(theirs),
        }.get(missing, theirs)
        expected = (own + theirs) / 2
        got = made[name][[ids[t] for t in alone]].double()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_average_goes_before_the_base(tmp_path: Path) -> None:
    """A token of the base and of one other: a third model gets the base's row, or with `average` the mean of both."""
    end = samples.special("<|end|>")
    text = samples.ENGLISH
    sides = {
        "a": parent(tmp_path / "a", samples.bpe(text, 270, end), 1),
        "b": parent(tmp_path / "b", samples.bpe(text, 270, end), 2),
        "c": parent(tmp_path / "c", samples.bpe(text, 270), 3),
    }
    default = merged(tmp_path, '{"policy": "union"}', "a b c", base_model=f"{tmp_path}/a")
    average = merged(tmp_path, '{"policy": "union", "missing": "average"}', "a b c", base_model=f"{tmp_path}/a")
    row = sides["a"]["ids"]["<|end|>"]
    x, y = (sides[n]["tensors"][EMBED][row].double() for n in "ab")
    np.testing.assert_allclose(default[EMBED][row].double(), (x + y + x) / 3, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(average[EMBED][row].double(), (x + y + (x + y) / 2) / 3, rtol=1e-5, atol=1e-6)


def by_hand(a: dict[str, Any], b: dict[str, Any], ids: dict[str, int], name: str, k: int) -> np.ndarray:
    """A's matrix in B's vocabulary: rows of shared tokens, and sums found by the slow pursuit in B's matrix."""
    shared = sorted(a["ids"].keys() & b["ids"].keys(), key=ids.__getitem__)
    lacking = sorted(b["ids"].keys() - a["ids"].keys(), key=ids.__getitem__)
    out = np.zeros((len(ids), a["tensors"][name].shape[1]))
    out[[ids[t] for t in shared]] = rows(a, shared, name)
    chosen, coefficients = slow(rows(b, lacking, name), rows(b, shared, name), k)
    own = rows(a, shared, name)
    for token, support, c in zip(lacking, chosen, coefficients, strict=True):
        out[ids[token]] = c @ own[support]
    return out


def test_transplant_equals_the_slow_pursuit(tmp_path: Path) -> None:
    """A and B of different widths: the embedding and the head, each with coefficients found in B's own."""
    end, user = samples.special("<|end|>"), samples.special("<|user|>")
    a = parent(tmp_path / "a", samples.bpe(samples.ENGLISH, 300, end), 1, eos_token_id=299)
    b = parent(tmp_path / "b", samples.bpe(samples.GERMAN, 310, user, end), 2, width=24, eos_token_id=311)
    report = gm.transplant(tmp_path / "a", tmp_path / "b", tmp_path / "out", sparsity=5)
    made = tiny.read(tmp_path / "out")
    for name in (EMBED, HEAD):
        np.testing.assert_allclose(made[name].double(), by_hand(a, b, b["ids"], name, 5), rtol=1e-5, atol=1e-6)
    for name in a["tensors"].keys() - {EMBED, HEAD}:
        assert torch.equal(made[name], a["tensors"][name])
    config = tiny.config(tmp_path / "out")
    assert (config["vocab_size"], config["hidden_size"]) == (len(b["ids"]), 16)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert any("sums of at most 5" in note for note in report.notes)
    left = tiny.manifest(tmp_path / "out")["left_out"]
    assert {key for key in left if key.startswith(f"{tmp_path}/b:")} == {f"{tmp_path}/b: {n}" for n in b["tensors"]}


def test_finding_the_sums_has_a_progress_of_its_own(pair: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """First the rows of all sums, then the output's bytes; each phase ends at its total."""

    class Watched:
        def __init__(self) -> None:
            self.phases: list[list[int]] = []

        def start(self, total: int, done: int) -> None:
            self.phases.append([total, done])

        def advance(self, nbytes: int) -> None:
            self.phases[-1][1] += nbytes

        def finish(self) -> None:
            pass

    watched = Watched()
    report = gm.transplant(tmp_path / "a", tmp_path / "b", tmp_path / "out", sparsity=4, progress=watched)
    (sums, found), (total, written) = watched.phases
    assert found == sums > 0
    assert written == total == report.nbytes


def test_a_rotated_donor_is_undone(tmp_path: Path) -> None:
    """B's embedding is A's, rotated, and tokens that A lacks are sums of three that it has: their rows come back exactly."""
    end = samples.special("<|end|>")
    a = parent(tmp_path / "a", samples.bpe(samples.ENGLISH, 290), 1, width=64)
    tokenizer = samples.bpe(samples.ENGLISH, 290, end, *map(samples.special, ("<x>", "<y>", "<z>")))
    b = parent(tmp_path / "b", tokenizer, 2, width=64)
    generator = np.random.default_rng(0)
    rotation = np.linalg.qr(generator.standard_normal((64, 64)))[0]
    wanted = {}
    for name in (EMBED, HEAD):
        own = a["tensors"][name].double().numpy()
        full = np.zeros((len(b["ids"]), 64))
        for token, row in b["ids"].items():
            if token in a["ids"]:
                full[row] = own[a["ids"][token]]
            else:
                full[row] = generator.uniform(1, 2, 3) @ own[generator.choice(len(own), 3, replace=False)]
        wanted[name] = full
        b["tensors"][name] = torch.from_numpy(full @ rotation).float()
    tiny.save(tmp_path / "b", b["tensors"], tiny.config(tmp_path / "b"))
    gm.transplant(tmp_path / "a", tmp_path / "b", tmp_path / "out", sparsity=8)
    made = tiny.read(tmp_path / "out")
    for name in (EMBED, HEAD):
        np.testing.assert_allclose(made[name], wanted[name], rtol=1e-4, atol=1e-4)


def test_the_same_bits_however_it_is_computed(pair: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Tiles, threads, memory, a saved plan: one result. It may be a parent of other merges, and be padded."""
    text = f"""\
merge_method: linear
base_model: {tmp_path}/a
models: [{{model: {tmp_path}/a, parameters: {{weight: 1}}}}, {{model: {tmp_path}/b, parameters: {{weight: 1}}}}]
tokens: {{policy: union, missing: omp, sparsity: 3, pad_to: 64}}
"""
    made = []
    for options in ({}, {"tile": 7, "threads": 3}):
        plan, inputs = make_plan(gm.load_recipe(text))
        made.append(run_in_memory(plan, inputs, **options))
    assert tiny.same(*made)
    assert made[0][EMBED].shape[0] % 64 == 0
    plan = gm.plan(text)
    plan.save(tmp_path / "plan.json")
    again = type(plan).load(tmp_path / "plan.json")
    assert again.hash == plan.hash
    gm.merge(again, tmp_path / "out")
    assert tiny.same(tiny.read(tmp_path / "out"), made[0])


def test_both_models_of_a_union_get_sums(pair: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Each lacks tokens of the other: each gets sums of its own rows with the other's coefficients."""
    a, b = pair["a"], pair["b"]
    made = merged(tmp_path, '{"policy": "union", "missing": "omp", "sparsity": 4}', base_model=f"{tmp_path}/a")
    plan = gm.plan(
        json.dumps(
            {
                "merge_method": "linear",
                "base_model": f"{tmp_path}/a",
                "models": [{"model": f"{tmp_path}/{n}", "parameters": {"weight": 1}} for n in "ab"],
                "tokens": {"policy": "union", "missing": "omp", "sparsity": 4},
            },
            indent=1,
        )
    )
    ids = json.loads(plan.texts["tokenizer.json"])
    order = {**ids["model"]["vocab"], **{t["content"]: t["id"] for t in ids["added_tokens"]}}
    shared = sorted(a["ids"].keys() & b["ids"].keys(), key=order.__getitem__)
    expected = np.zeros((len(order), 16))
    for one, other in ((a, b), (b, a)):
        own, theirs = rows(one, shared), rows(other, shared)
        for token, row in order.items():
            if token in one["ids"]:
                expected[row] += rows(one, [token])[0] / 2
            else:
                chosen, coefficients = slow(rows(other, [token]), theirs, 4)
                expected[row] += coefficients[0] @ own[chosen[0]] / 2
    np.testing.assert_allclose(made[EMBED].double(), expected, rtol=1e-4, atol=1e-5)


def test_other_alphabets_share_tokens_by_meaning(tmp_path: Path) -> None:
    """From byte-level BPE to a SentencePiece vocabulary: `▁the` is `Ġthe`, and keeps A's row."""
    a = parent(tmp_path / "a", samples.bpe(samples.ENGLISH, 330), 1)
    b = parent(tmp_path / "b", samples.unigram(samples.ENGLISH, 90), 2)
    both = {t: "Ġ" + t[1:] for t in b["ids"] if t.startswith("▁") and "Ġ" + t[1:] in a["ids"] and t.isascii() is False}
    assert len(both) > 3
    gm.transplant(tmp_path / "a", tmp_path / "b", tmp_path / "out", sparsity=4)
    made = tiny.read(tmp_path / "out")[EMBED]
    for theirs, ours in both.items():
        assert torch.equal(made[b["ids"][theirs]], a["tensors"][EMBED][a["ids"][ours]])


def test_tokens_of_one_role_stand_for_each_other(tmp_path: Path) -> None:
    """B ends texts with `</s>`, A with `<|end|>`: A's row for the end is what the output ends with."""
    a = parent(tmp_path / "a", samples.bpe(samples.ENGLISH, 300, samples.special("<|end|>")), 1)
    b = parent(tmp_path / "b", samples.bpe(samples.GERMAN, 300, samples.special("</s>")), 2)
    for name, token in (("a", "<|end|>"), ("b", "</s>")):
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": token}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    gm.transplant(tmp_path / "a", tmp_path / "b", tmp_path / "out", sparsity=4)
    made = tiny.read(tmp_path / "out")
    for name in (EMBED, HEAD):
        assert torch.equal(made[name][b["ids"]["</s>"]], a["tensors"][name][a["ids"]["<|end|>"]])


@pytest.mark.parametrize(("missing", "expected"), [("zero", 0.0), ("mean", None)])
def test_transplant_without_sums(
    missing: str, expected: float | None, pair: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Zeros, or the mean of A's rows that the output has."""
    gm.transplant(tmp_path / "a", tmp_path / "b", tmp_path / "out", missing=missing)
    a, b = pair["a"], pair["b"]
    made = tiny.read(tmp_path / "out")[EMBED]
    shared = sorted(a["ids"].keys() & b["ids"].keys())
    mean = rows(a, shared).mean(axis=0)
    for token in b["ids"].keys() - a["ids"].keys():
        wanted = mean if expected is None else np.zeros(16)
        np.testing.assert_allclose(made[b["ids"][token]].double(), wanted, rtol=1e-4, atol=1e-6)


def test_the_transplanted_model_generates(pair: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """transformers loads it with B's tokenizer; every id has a row."""
    import transformers

    assert main(["transplant", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out"), "-k", "4", "-q"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    given = tokenizer("Die Katze<|user|>", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**given, max_new_tokens=3, pad_token_id=0).shape[1] == given["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ('{"policy": "union", "missing": "nothing"}', "mean, zero, average, omp or copy"),
        ('{"policy": "union", "missing": "copy:elsewhere"}', "elsewhere"),
        ('{"policy": "union", "sparsity": 3}', "'sparsity' is for"),
        ('{"policy": "union", "missing": "omp", "sparsity": 0}', "sparsity"),
    ],
)
def test_wrong_policies_are_refused(policy: str, message: str, pair: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """With what would be right."""
    with pytest.raises(gm.RecipeError, match=message):
        merged(tmp_path, policy)


def test_no_shared_tokens_are_refused(tmp_path: Path) -> None:
    """Sums need something to be made of."""
    one = Tokenizer.from_str(json.dumps(word_level({"x": 0, "y": 1})))
    two = Tokenizer.from_str(json.dumps(word_level({"p": 0, "q": 1})))
    parent(tmp_path / "a", one, 1)
    parent(tmp_path / "b", two, 2)
    with pytest.raises(gm.IncompatibleModels, match="share no token"):
        gm.transplant(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def word_level(vocab: dict[str, int]) -> dict[str, Any]:
    """The least ``tokenizer.json``."""
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": next(iter(vocab))}
    return {"version": "1.0", "added_tokens": [], "model": model}


def test_chat_template_within_tokens(pair: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """It is the recipe's `chat_template`; both at once are refused."""
    listed = [{"model": f"{tmp_path}/{n}", "parameters": {"weight": 1}} for n in "ab"]
    said = {"merge_method": "linear", "models": listed, "tokens": {"policy": "union", "chat_template": "chatml"}}
    gm.merge(json.dumps(said, indent=1), tmp_path / "out")
    assert "<|im_start|>" in (tmp_path / "out" / "chat_template.jinja").read_text()
    with pytest.raises(gm.RecipeError, match="given twice"):
        gm.load_recipe(json.dumps(said | {"chat_template": "auto"}, indent=1))


def sentencepiece_bpe(text: list[str], *added: AddedToken) -> Tokenizer:
    """SentencePiece's BPE with bytes for what it lacks, as Llama 2 and Gemma have it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=first, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens(list(added))
    # The bytes are tokens of the model only: as added tokens they would be matched in texts that say "<0x41>".
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(document))


KINDS = {
    "sentencepiece bpe": sentencepiece_bpe,
    "bpe": lambda text, *added: samples.bpe(text, 300, *added),
    "wordpiece": lambda text, *added: samples.wordpiece(text, 120, *added),
    "unigram": lambda text, *added: samples.unigram(text, 100, *added),
}


@pytest.mark.parametrize("policy", ["base", "union", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_written_tokenizers_agree_in_both_libraries(kind: str, policy: str, tmp_path: Path) -> None:
    """Texts in many scripts get the same ids from `tokenizers` and from AutoTokenizer, each with a row in the embedding."""
    import transformers

    parent(tmp_path / "a", KINDS[kind](samples.ENGLISH, samples.special("<|end|>")), 1)
    parent(tmp_path / "b", KINDS[kind](samples.GERMAN, samples.special("<|im_start|>"), samples.special("<|end|>")), 2)
    said = {
        "merge_method": "linear",
        "base_model": f"{tmp_path}/a",
        "models": [{"model": f"{tmp_path}/{n}", "parameters": {"weight": 1}} for n in "ab"],
        "tokens": {"policy": f"model:{tmp_path}/b" if policy == "model" else policy},
    }
    gm.merge(json.dumps(said, indent=1), tmp_path / "out")
    plain = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto.get_vocab() == plain.get_vocab(with_added_tokens=True)
    size = tiny.read(tmp_path / "out")[EMBED].shape[0]
    source = Tokenizer.from_file(str(tmp_path / ("b" if policy == "model" else "a") / "tokenizer.json"))
    for text in TEXTS:
        ids = plain.encode(text).ids
        assert auto(text).input_ids == ids, text
        assert not ids or max(ids) < size
        if policy != "union":
            assert source.encode(text).ids == ids


def test_the_tokens_verb(pair: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Overlap, specials and every policy's rows, as numbers and as a page."""
    a, b = pair["a"]["ids"], pair["b"]["ids"]
    assert main(["tokens", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [m["tokens"] for m in found["models"]] == [len(a), len(b)]
    (between,) = found["pairs"]
    shared = len(a.keys() & b.keys())
    assert (between["shared"], between["only_first"]) == (shared, len(a) - shared)
    policies = {p["policy"]: p for p in found["policies"]}
    assert policies["union"]["rows"] == len(a.keys() | b.keys())
    assert policies["union"]["models"][f"{tmp_path}/b"]["own"] == len(b)
    assert policies["union"]["models"][f"{tmp_path}/b"]["borrowed"] == len(a) - shared
    assert policies["base"]["rows"] == len(a)
    assert policies["intersection"]["removed"] == len(a) - shared
    assert policies[f"{tmp_path}/b"]["models"][f"{tmp_path}/a"]["own"] == shared
    assert main(["tokens", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    page = capsys.readouterr().out
    assert "union" in page
    assert f"{shared:,} shared" in page
    parent(tmp_path / "w", samples.wordpiece(samples.ENGLISH, 100), 3)
    assert main(["tokens", str(tmp_path / "w"), str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "refused" in next(p for p in found["policies"] if p["policy"] == "intersection")
    assert main(["tokens", str(tmp_path / "a")]) == 2
