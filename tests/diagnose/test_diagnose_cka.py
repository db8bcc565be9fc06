"""CKA: against the plain formula, its invariances, streamed sums, and hidden states of real (tiny) models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diagnose_samples import rotated, vocabulary

from cli_samples import Program
from geomerge.diagnose import Thresholds, diagnose
from geomerge.diagnose.cka import Moments, layer_similarity, read_probe
from geomerge.diagnose.rotation import debiased_cka
from geomerge.errors import ModelError, UsageError

WORDS = ["[UNK]", *(f"word{i}" for i in range(39))]
TEXTS = [" ".join(f"word{(7 * i + j * j) % 39}" for j in range(9)) for i in range(12)]


def naive(x: np.ndarray, y: np.ndarray) -> float:
    """CKA as HSIC of the linear kernels, from the n×n matrices."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return float(np.trace(k @ m) / math.sqrt(np.trace(k @ k) * np.trace(m @ m)))


def streamed(x: np.ndarray, y: np.ndarray, pieces: int = 4) -> float:
    """CKA from sums over pieces of the samples."""
    moments = Moments()
    for a, b in zip(np.array_split(x, pieces), np.array_split(y, pieces), strict=True):
        moments.add(torch.from_numpy(a), torch.from_numpy(b))
    return moments.cka()


def test_against_naive_formula() -> None:
    """Sums of products give what the kernels give, however the samples are cut, with large common offsets, too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 7)) + 1e4
    y = np.tanh(x[:, :5] - 1e4) + 0.3 * rng.normal(size=(60, 5))
    assert streamed(x, y) == pytest.approx(naive(x, y), rel=1e-6)
    assert streamed(x, y, 1) == pytest.approx(streamed(x, y, 60), rel=1e-9)
    assert 0.1 < streamed(x, y) < 0.99


def test_invariances() -> None:
    """Rotation, scale and offset of either side change nothing; another matrix does."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 6))
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert streamed(x, 3 * x @ q + 5) == pytest.approx(1)
    assert streamed(x, y @ q) == pytest.approx(streamed(x, y))
    assert streamed(x, y) < 0.5
    assert math.isnan(streamed(x, np.ones((50, 2))))


def test_debiased_cka() -> None:
    """Few samples of many features: the plain CKA of independent data is large, the debiased one about 0."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(64, 256)), rng.normal(size=(64, 256))
    assert naive(x, y) > 0.7
    assert abs(debiased_cka(x @ x.T, y @ y.T)) < 0.1
    q, _ = np.linalg.qr(rng.normal(size=(256, 256)))
    assert debiased_cka(x @ x.T, (x @ q) @ (x @ q).T) == pytest.approx(1)


def test_probe_files(tmp_path: Path) -> None:
    """Lines or paragraphs; empty files and other encodings are refused."""
    path = tmp_path / "probe.txt"
    path.write_text("one\n\n two \nthree", encoding="utf-8")
    assert read_probe(path) == ["one", " two \nthree"]
    path.write_text("one\ntwo\n")
    assert read_probe(path) == ["one", "two"]
    for content, said in (
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"one", "only one"),
        (b"caf\xe9\nx", "not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=said):
            read_probe(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_probe(tmp_path / "none.txt")
    built_in = read_probe()
    assert len(built_in) >= 24
    assert all(built_in)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of transformers, a fine-tune, a rotation of it, and a stranger, each with a tokenizer."""
    import transformers

    root = tmp_path_factory.mktemp("cka")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    a = transformers.LlamaForCausalLM(config)
    stranger = transformers.LlamaForCausalLM(config)
    states = {n: {k: t.clone() for k, t in m.state_dict().items()} for n, m in (("a", a), ("stranger", stranger))}
    noise = torch.Generator().manual_seed(1)
    states["near"] = {n: t + 0.02 * torch.randn(t.shape, generator=noise) for n, t in states["a"].items()}
    states["rotated"] = rotated(states["a"])
    for name, state in states.items():
        a.load_state_dict(state)
        a.save_pretrained(root / name)
        vocabulary(root / name, WORDS)
    return root


def test_hidden_states(models: Path) -> None:
    """A rotated copy is the same model, a fine-tune nearly, a stranger not; token by token."""
    folders = {n: models / n for n in ("a", "near", "rotated", "stranger")}
    found = layer_similarity(folders, TEXTS)
    near, turned, other = found[0, 1], found[0, 2], found[0, 3]
    assert turned.values == pytest.approx([1.0] * 4, abs=1e-5)
    assert turned.layers == (0, 1, 2, 3)
    assert (near.unit, near.samples) == ("tokens", 12 * 9)
    assert other.mean < near.mean < 1


def test_hidden_states_against_naive(models: Path) -> None:
    """The last layer's CKA is the formula's on states that transformers gives."""
    import transformers

    states = []
    for name in ("a", "stranger"):
        module = transformers.AutoModel.from_pretrained(models / name, local_files_only=True)
        ids = [[WORDS.index(w) for w in text.split()] for text in TEXTS]
        with torch.no_grad():
            states.append(module(input_ids=torch.tensor(ids), output_hidden_states=True).hidden_states[2])
    x, y = (s.reshape(-1, 16).double().numpy() for s in states)
    found = layer_similarity({n: models / n for n in ("a", "stranger")}, TEXTS)[0, 1]
    assert found.values[2] == pytest.approx(naive(x, y), rel=1e-5)


def test_other_tokenizers_compare_texts(models: Path, tmp_path: Path) -> None:
    """Where texts are cut differently, a sample is a text."""
    import shutil

    shutil.copytree(models / "near", tmp_path / "other")
    vocabulary(tmp_path / "other", WORDS)
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    prepend = '"normalizer": {"type": "Prepend", "prepend": "word1 "}'
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"normalizer": null', prepend))
    found = layer_similarity({"a": models / "a", "other": tmp_path / "other"}, TEXTS)[0, 1]
    assert (found.unit, found.samples) == ("texts", 12)


def test_diagnosis_with_cka(models: Path) -> None:
    """With a probe the pair has layers, Ā can be their mean, and the random state is left alone."""
    before = torch.random.get_rng_state()
    found = diagnose(models / "a", models / "near", cka=True, thresholds=Thresholds(similarity="cka"))
    assert torch.equal(before, torch.random.get_rng_state())
    pair = found.pairs[0]
    assert pair.cka is not None
    assert pair.score.similarity == pair.cka.mean
    with pytest.raises(UsageError, match="needs hidden states"):
        diagnose(models / "a", models / "near", thresholds=Thresholds(similarity="cka"))


def test_rotation_is_recognised(models: Path) -> None:
    """A rotated parent is to be aligned in its residual basis, a stranger not to be merged."""
    turned, other = (diagnose(models / "a", models / n) for n in ("rotated", "stranger"))
    assert turned.pairs[0].likeness == pytest.approx(1)
    assert (turned.decision.mode, turned.decision.scope) == ("align_then_merge", "residual")
    assert "align: {scope: residual}" in turned.recipe()
    likeness = other.pairs[0].likeness
    assert likeness is not None
    assert likeness < 0.3
    assert other.decision.mode == "do_not_merge"
    with pytest.raises(UsageError, match="not to merge"):
        other.recipe()


def test_models_without_tokenizer(models: Path, tmp_path: Path) -> None:
    """CKA needs texts cut into tokens."""
    import shutil

    shutil.copytree(models / "a", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        diagnose(models / "near", tmp_path / "bare", cka=True)


def test_verb_with_probe(models: Path, tmp_path: Path, program: Program) -> None:
    """The user's own texts; the page and the JSON tell the layers."""
    (tmp_path / "probe.txt").write_text("\n".join(TEXTS))
    ran = program("diagnose", models / "a", models / "near", "--probe", tmp_path / "probe.txt")
    assert ran.code == 0
    assert "4 layers, 108 tokens" in ran.out
    said = json.loads(
        program("diagnose", models / "a", models / "near", "--probe", tmp_path / "probe.txt", "--json").out
    )
    assert len(said["pairs"][0]["cka"]["values"]) == 4
