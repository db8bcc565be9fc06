"""GGUF files that geomerge writes: read by the gguf package, by transformers, and by geomerge itself."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

import coded_samples
import geomerge as gm
import tiny
import token_samples as samples
from geomerge.cli.app import main
from geomerge.export.families import FAMILIES, llama3_factors
from geomerge.export.sentencepiece import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_sentencepiece
from geomerge.export.vocabulary import _SPLITS
from test_gguf import permute

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: geomerge[quant]")

TEXTS = ["The cat sat on the mat.", "two  spaces, 1234 and Größe 你好 🙂", "it's\n\nA cold morning"]
QWEN2 = next(k for k, v in _SPLITS.items() if v[0] == "qwen2")
LLAMA3 = next(k for k, v in _SPLITS.items() if v[1] == "llama-bpe")


def byte_level(split: str | None = QWEN2, *, ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE with a chat model's special tokens, cut up by an expression as Llama 3 and Qwen do."""
    made = samples.bpe(samples.ENGLISH + samples.GERMAN, 340)
    if split is not None:
        parts = [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.model.ignore_merges = ignore_merges
    made.add_special_tokens([samples.special("<|start|>"), samples.special("<|end|>")])
    return made


def sentencepiece(*, prefix: bool = True, user: tuple[str, ...] = ()) -> Tokenizer:
    """BPE that falls back to bytes, as the fast tokenizers of Llama 2, Mistral and Gemma are."""
    from tokenizers import trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never")
    trained.train_from_iterator(samples.ENGLISH, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token, _ in sorted(learned["vocab"].items(), key=lambda item: item[1])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in learned["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([samples.special(token) for token in ("<unk>", "<s>", "</s>")])
    made.add_tokens(list(user))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return made


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 352,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4},
    # Sizes that transformers takes defaults for, whatever a file says: of Qwen's experts and heads, of Gemma's queries' scale.
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 768, "norm_topk_prob": True},
    "gemma2": {"head_dim": 256},
    "gemma3_text": {"head_dim": 256, "num_hidden_layers": 6},
}
SPM = ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3")
READ_BY_TRANSFORMERS = {"gemma": False, "mixtral": False}
"""transformers 5 reads Mixtral's and the first Gemma's files not at all, or into a model of another class."""


def model(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model with norms that differ from their start values, and a tokenizer; saved as transformers does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(SIZES | CHANGES.get(kind, {}) | changes))
    made = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(torch.randn(value.shape) * (0.3 if value.ndim == 1 else 0.1) + ("norm" in name))
    made.save_pretrained(folder)
    gemma = kind.startswith("gemma")
    tokenizer = sentencepiece(prefix=not gemma) if kind in SPM else byte_level()
    special = ("<s>", "</s>") if kind in SPM else ("<|start|>", "<|end|>")
    words = {"bos_token": special[0], "eos_token": special[1], "chat_template": "{{ messages[0].content }}"}
    samples.save(folder, tokenizer, **words)
    return made


def fields(path: Path) -> dict[str, Any]:
    """A file's metadata."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, Tensor]:
    """A file's tensors, decoded by the gguf package."""
    return {
        t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type)).reshape(tuple(t.shape)[::-1]))
        for t in gguf.GGUFReader(path).tensors
    }


def check_by_hand(kind: str, original: tiny.Tensors, found: tiny.Tensors) -> None:
    """The file's tensors under the package's names: projections permuted, experts stacked, norms plus one."""
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == FAMILIES[kind].architecture)
    table = gguf.get_tensor_name_map(number, 2)
    left = set(found)
    for name, tensor in original.items():
        stem, expert, tail = name.partition(".experts.")
        index, _, part = tail.partition(".")
        plain = f"{stem}.experts.{part}" if expert else name
        theirs = f"{table.get_name(plain.removesuffix('.weight'))}.weight"
        stored = found[theirs][int(index)] if expert else found[theirs]
        if "q_proj" in name or "k_proj" in name:
            heads = SIZES["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            expected = torch.from_numpy(permute(tensor.numpy(), heads)) if kind == "mixtral" else tensor
        else:
            expected = (tensor.double() + 1).float() if kind == "gemma" and "norm" in name else tensor
        assert torch.equal(stored, expected), name
        left.discard(theirs)
    assert not left


@pytest.mark.parametrize("kind", [k for k in FAMILIES if k != "gemma3"])
def test_transformers_reads_the_same_model(kind: str, tmp_path: Path) -> None:
    """A float32 file gives the original's logits and token ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = model(tmp_path / "m", kind)
    made = gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert made.kind == "f32"
    assert made.notes == ()
    assert made.nbytes == (tmp_path / "m.gguf").stat().st_size
    assert made.architecture == FAMILIES[kind].architecture == fields(tmp_path / "m.gguf")["general.architecture"]
    own = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    if READ_BY_TRANSFORMERS.get(kind, True):
        found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        ids = torch.arange(3, 40).view(1, -1)
        with torch.no_grad():
            torch.testing.assert_close(found(ids).logits, original(ids).logits, atol=2e-5, rtol=2e-5)
        for text in TEXTS:
            assert tokenizer.encode(text) == own.encode(text).ids, text
        assert tokenizer.chat_template == "{{ messages[0].content }}"
    else:
        check_by_hand(kind, tiny.read(tmp_path / "m"), tensors(tmp_path / "m.gguf"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_geomerge_reads_what_it_wrote(kind: str, dtype: str, tmp_path: Path) -> None:
    """Every weight comes back: the rows of a Llama's projections in the model's order."""
    model(tmp_path / "m", kind, **({"attention_bias": True} if kind == "llama" else {}))
    gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf", kind=dtype)
    found = coded_samples.decoded(tmp_path / "m.gguf")
    original = tiny.read(tmp_path / "m")
    assert found.keys() == original.keys()
    short = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    for name, tensor in original.items():
        rounded = tensor.to(short) if tensor.ndim > 1 and "norm" not in name else tensor
        assert torch.equal(found[name], rounded.double()), name


def test_q8_0_is_as_the_package_quantises(tmp_path: Path) -> None:
    """Matrices in blocks, within half a step of each block; vectors and rows of no whole blocks otherwise."""
    model(tmp_path / "m", "qwen2", intermediate_size=90)
    made = gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf", kind="q8_0", threads=2)
    assert any("no whole blocks" in note for note in made.notes)
    original = tiny.read(tmp_path / "m")["model.layers.0.mlp.up_proj.weight"]
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == types["blk.0.attn_q.bias"] == "F32"
    found = tensors(tmp_path / "m.gguf")["blk.0.ffn_up.weight"]
    expected = gguf.dequantize(
        gguf.quantize(original.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    )
    assert torch.equal(found, torch.from_numpy(expected))
    # Half a step, and what rounding the scale to float16 moves 127 steps.
    step = original.view(-1, 32).abs().amax(1, keepdim=True) / 127
    assert bool(((found - original).view(-1, 32).abs() <= 0.57 * step).all())
    assert fields(tmp_path / "m.gguf")["general.file_type"] == 7


def test_the_model_s_own_type(tmp_path: Path) -> None:
    """Nothing is lost unless another type is asked for."""
    model(tmp_path / "m", "llama", torch.bfloat16)
    assert gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf").kind == "bf16"
    for name, tensor in tiny.read(tmp_path / "m").items():
        assert torch.equal(coded_samples.decoded(tmp_path / "m.gguf")[name], tensor.double()), name


def test_the_same_bytes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file does not depend on threads or on the size of a piece."""
    model(tmp_path / "m", "mixtral")
    for kind in ("f16", "q8_0"):
        gm.export_gguf(tmp_path / "m", tmp_path / "a.gguf", kind=kind, threads=1, force=True)
        monkeypatch.setattr("geomerge.export.write._PIECE", 100)
        gm.export_gguf(tmp_path / "m", tmp_path / "b.gguf", kind=kind, threads=3, force=True)
        monkeypatch.undo()
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    # Experts lie one after the other.
    original = tiny.read(tmp_path / "m")
    found = tensors(tmp_path / "a.gguf")
    stacked = torch.stack([original[f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight"] for i in range(4)])
    assert found["blk.1.ffn_down_exps.weight"].shape == stacked.shape
    torch.testing.assert_close(found["blk.1.ffn_down_exps.weight"], stacked, atol=0.005, rtol=0)
    assert torch.equal(found["blk.1.ffn_gate_inp.weight"], original["model.layers.1.block_sparse_moe.gate.weight"])


class TestMetadata:
    def test_llama(self, tmp_path: Path) -> None:
        """The keys that llama.cpp needs, and the factors of Llama 3's rotary frequencies."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
        made = model(tmp_path / "m", "llama", rope_parameters=rope, rms_norm_eps=1e-5, head_dim=64)
        gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")
        found = fields(tmp_path / "m.gguf")
        expected = {
            "block_count": 2,
            "context_length": 64,
            "embedding_length": 64,
            "feed_forward_length": 96,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.key_length": 64,
            "rope.dimension_count": 64,
            "rope.freq_base": 5e5,
            "vocab_size": 352,
        }
        assert {key: found[f"llama.{key}"] for key in expected} == expected
        assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
        plain = 5e5 ** (-torch.arange(0, 64, 2).double() / 64)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](made.config, torch.device("cpu"))
        factors = tensors(tmp_path / "m.gguf")["rope_freqs.weight"]
        torch.testing.assert_close(plain / factors.double(), scaled.double(), rtol=1e-6, atol=0)
        assert factors[0] == 1
        assert factors[-1] == 8
        with pytest.raises(KeyError):
            llama3_factors(1e4, 64, {"factor": 2.0}, 32)

    def test_gemma(self, tmp_path: Path) -> None:
        """Soft caps, windows, both frequencies; norms are stored as what they multiply by."""
        model(tmp_path / "m", "gemma2")
        gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf", kind="f16")
        found = fields(tmp_path / "m.gguf")
        assert found["gemma2.attn_logit_softcapping"] == 50
        assert found["gemma2.final_logit_softcapping"] == 30
        assert found["gemma2.attention.sliding_window"] == 4096
        stored, original = tensors(tmp_path / "m.gguf"), tiny.read(tmp_path / "m")
        norm = original["model.layers.0.pre_feedforward_layernorm.weight"]
        assert torch.equal(stored["blk.0.ffn_norm.weight"], (norm.double() + 1).float())
        assert "output.weight" not in stored
        model(tmp_path / "g3", "gemma3_text")
        gm.export_gguf(tmp_path / "g3", tmp_path / "g3.gguf")
        found = fields(tmp_path / "g3.gguf")
        assert (found["gemma3.rope.freq_base"], found["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)

    def test_the_language_part_of_a_vision_model(self, tmp_path: Path) -> None:
        """Gemma 3 with eyes: the text model, by the nested config, with a note."""
        model(tmp_path / "m", "gemma3_text")
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        weights = tiny.read(tmp_path / "m")
        prefixed = {f"language_model.{name}": value for name, value in weights.items()}
        prefixed["vision_tower.patch.weight"] = torch.ones(4, 4)
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            assert config[key] is not None
        outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
        (tmp_path / "v").mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "v" / file).write_bytes((tmp_path / "m" / file).read_bytes())
        tiny.save(tmp_path / "v", prefixed, outer)
        gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")
        made = gm.export_gguf(tmp_path / "v", tmp_path / "v.gguf")
        assert any("1 tensors of the vision part" in note for note in made.notes)
        one, other = tensors(tmp_path / "m.gguf"), tensors(tmp_path / "v.gguf")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_long_context_of_phi3_and_yarn_of_qwen(self, tmp_path: Path) -> None:
        """Both lists of factors and the factor of the attention; yarn's factor and context."""
        short, long = [1.0 + i / 10 for i in range(8)], [2.0 + i for i in range(8)]
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long}
        rope["original_max_position_embeddings"] = 16
        model(tmp_path / "m", "phi3", rope_parameters=rope, original_max_position_embeddings=16)
        gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")
        found, stored = fields(tmp_path / "m.gguf"), tensors(tmp_path / "m.gguf")
        assert stored["rope_factors_long.weight"].tolist() == long
        torch.testing.assert_close(stored["rope_factors_short.weight"], torch.tensor(short))
        assert found["phi3.rope.scaling.original_context_length"] == 16
        assert found["phi3.rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
        yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
        model(tmp_path / "q", "qwen2", rope_parameters=yarn)
        gm.export_gguf(tmp_path / "q", tmp_path / "q.gguf")
        found = fields(tmp_path / "q.gguf")
        keys = ("type", "factor", "original_context_length")
        assert [found[f"qwen2.rope.scaling.{key}"] for key in keys] == ["yarn", 4.0, 16]


class TestTokenizers:
    @pytest.mark.parametrize(
        ("split", "ignore", "name"),
        [(QWEN2, False, "qwen2"), (LLAMA3, True, "llama-bpe"), (LLAMA3, False, "dbrx"), (None, False, "gpt-2")],
    )
    def test_byte_level(self, split: str | None, ignore: bool, name: str, tmp_path: Path) -> None:
        """Tokens in their byte alphabet, merges in order, special tokens; rows without a token are unused."""
        model(tmp_path / "m", "qwen2")
        tokenizer = byte_level(split, ignore_merges=ignore)
        tokenizer.add_tokens(["<tool>"])
        samples.save(tmp_path / "m", tokenizer, bos_token="<|start|>", eos_token={"content": "<|end|>"})
        gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")
        found = fields(tmp_path / "m.gguf")
        assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", name)
        ids = tokenizer.get_vocab()
        tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
        assert {token: i for i, token in enumerate(tokens) if i < len(ids)} == ids
        assert tokens[len(ids) :] == [f"[PAD{i}]" for i in range(len(ids), 352)]
        assert types[ids["Ġ"]] == NORMAL
        assert types[ids["<|end|>"]] == CONTROL
        assert types[ids["<tool>"]] == USER_DEFINED
        assert types[-1] == UNUSED
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
        assert found["tokenizer.ggml.eos_token_id"] == ids["<|end|>"]
        assert found["tokenizer.ggml.add_bos_token"] is False  # llama.cpp would add one to llama-bpe

    def test_scores_say_the_merges(self, tmp_path: Path) -> None:
        """Joining the pair with the best score, leftmost first, as llama.cpp does, gives the tokenizer's ids."""
        model(tmp_path / "m", "llama")
        tokenizer = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
        gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")
        found = fields(tmp_path / "m.gguf")
        scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]))
        ids = tokenizer.get_vocab()
        for text in TEXTS:
            parts = list("▁" + text.replace(" ", "▁"))
            while True:
                joined = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
                if not joined:
                    break
                at = -max(joined)[1]
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            pieces = [p if p in ids else None for p in parts]
            spelled = [
                i for p, t in zip(pieces, parts) for i in ([ids[p]] if p else [ids[f"<0x{b:02X}>"] for b in t.encode()])
            ]
            assert spelled == tokenizer.encode(text, add_special_tokens=False).ids, text
        assert found["tokenizer.ggml.token_type"][0] == UNKNOWN
        assert found["tokenizer.ggml.add_bos_token"] is True
        assert found["tokenizer.ggml.add_space_prefix"] is True
        assert found["tokenizer.chat_template"] == "{{ messages[0].content }}"

    def test_sentencepiece_file(self, tmp_path: Path) -> None:
        """A tokenizer.model alone: its pieces, scores and types; added tokens behind it."""

        def field(number: int, wire: int, data: bytes) -> bytes:
            return bytes([number << 3 | wire]) + (bytes([len(data)]) if wire == 2 else b"") + data

        pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("▁a", -1.5, 1), ("▁▁", -2.0, 4), ("<0x41>", 0.0, 6)]
        data = b"".join(
            field(
                1,
                2,
                field(1, 2, t.encode())
                + field(2, 5, struct.pack("<f", s))
                + (field(3, 0, bytes([k])) if k > 1 else b""),
            )
            for t, s, k in pieces
        )
        data += field(2, 2, field(3, 0, b"\x02")) + field(3, 2, field(3, 0, b"\x00") + field(4, 0, b"\x00"))
        model(tmp_path / "m", "llama")
        (tmp_path / "m" / "tokenizer.json").unlink()
        (tmp_path / "m" / "tokenizer.model").write_bytes(data)
        (tmp_path / "m" / "added_tokens.json").write_text('{"<x>": 5}')
        read = read_sentencepiece(tmp_path / "m" / "tokenizer.model")
        assert read.pieces == tuple(pieces)
        assert (read.bpe, read.dummy_prefix, read.remove_extra_whitespaces) == (True, False, False)
        gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")
        found = fields(tmp_path / "m.gguf")
        assert found["tokenizer.ggml.tokens"][:7] == ["<unk>", "<s>", "▁a", "  ", "<0x41>", "<x>", "[PAD6]"]
        assert found["tokenizer.ggml.token_type"][:7] == [2, 3, 1, 4, 6, 4, 5]
        assert found["tokenizer.ggml.scores"][:6] == [0, 0, -1.5, -2, 0, -1000]
        assert found["tokenizer.ggml.add_space_prefix"] is False
        for cut in range(1, len(data) - 1):
            (tmp_path / "cut.model").write_bytes(data[:cut])
            with contextlib.suppress(gm.DamagedCheckpoint):
                assert len(read_sentencepiece(tmp_path / "cut.model").pieces) <= 5

    def test_refused(self, tmp_path: Path) -> None:
        """No tokenizer, one of another kind, or an expression without a name; options help."""
        model(tmp_path / "m", "qwen2")
        out = tmp_path / "m.gguf"
        samples.save(tmp_path / "m", samples.unigram(samples.ENGLISH, 60))
        with pytest.raises(gm.ModelError, match="Unigram"):
            gm.export_gguf(tmp_path / "m", out)
        samples.save(tmp_path / "other", byte_level(r"\w+|\W+"))
        with pytest.raises(gm.ModelError, match="--pre-tokenizer"):
            gm.export_gguf(tmp_path / "m", out, tokenizer=tmp_path / "other")
        made = gm.export_gguf(tmp_path / "m", out, tokenizer=tmp_path / "other", pre_tokenizer="gpt-22")
        assert any("'gpt-22' is no name" in note and "did you mean 'gpt-2'" in note for note in made.notes)
        assert any("of the model's" in note and "another id, or none" in note for note in made.notes)
        made = gm.export_gguf(tmp_path / "m", out, tokenizer=tmp_path / "other", pre_tokenizer="mine", force=True)
        assert fields(out)["tokenizer.ggml.pre"] == "mine"
        (tmp_path / "m" / "tokenizer.json").write_text("{")  # which may be why another one is named
        gm.export_gguf(tmp_path / "m", out, tokenizer=tmp_path / "other", pre_tokenizer="mine", force=True)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "m" / file).unlink()
        with pytest.raises(gm.ModelError, match="no tokenizer"):
            gm.export_gguf(tmp_path / "m", out, force=True)


class TestRefusals:
    def test_models(self, tmp_path: Path) -> None:
        """Other architectures are refused with the names of those that there are; so is what llama.cpp computes otherwise."""
        model(tmp_path / "m", "llama")
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        cases = {
            "gemma2": {"model_type": "gpt2"},
            "activation": {"hidden_act": "relu"},
            "full attention every 2": {
                "model_type": "gemma2",
                "hidden_act": "gelu",
                "layer_types": ["full_attention"] * 2,
            },
            "norm_topk_prob": {"model_type": "qwen3_moe", "norm_topk_prob": False},
            "does not say hidden_size": {"hidden_size": None},
            "rotary scaling 'odd'": {"rope_parameters": {"rope_type": "odd"}},
            "blk.2": {"num_hidden_layers": 3},
            "one of 3 heads": {"num_key_value_heads": 3},
        }
        for match, change in cases.items():
            (tmp_path / "m" / "config.json").write_text(json.dumps(config | change))
            with pytest.raises(gm.ModelError, match=match):
                gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")
            assert list(tmp_path.iterdir()) == [tmp_path / "m"]

    def test_tensors(self, tmp_path: Path) -> None:
        """A tensor without a place, NaN, a number beyond float16: named, and nothing is left."""
        model(tmp_path / "m", "llama")
        config, weights = json.loads((tmp_path / "m" / "config.json").read_text()), tiny.read(tmp_path / "m")
        name = "model.layers.0.mlp.up_proj.weight"
        tiny.save(tmp_path / "m", weights | {"model.layers.0.odd.weight": torch.ones(2, 2)}, config)
        with pytest.raises(gm.ModelError, match="odd"):
            gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")
        for value, kind, match in ((math.nan, "f32", "NaN"), (1e5, "f16", "beyond"), (1e8, "q8_0", "beyond")):
            bad = weights[name].clone()
            bad[3, 4] = value
            tiny.save(tmp_path / "m", weights | {name: bad}, config)
            with pytest.raises(gm.ModelError, match=match) as caught:
                gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf", kind=kind)
            assert name in str(caught.value)
            assert list(tmp_path.iterdir()) == [tmp_path / "m"]

    def test_a_head_that_is_missing(self, tmp_path: Path) -> None:
        """llama.cpp would take the embedding for it; where the two are tied it is right to."""
        model(tmp_path / "m", "llama")
        config, weights = json.loads((tmp_path / "m" / "config.json").read_text()), tiny.read(tmp_path / "m")
        head = weights.pop("lm_head.weight")
        tiny.save(tmp_path / "m", weights, config)
        with pytest.raises(gm.DamagedCheckpoint, match=r"output\.weight"):
            gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")
        for stored in ({}, {"lm_head.weight": head}):
            tiny.save(tmp_path / "m", weights | stored, config | {"tie_word_embeddings": True})
            gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf", force=True)
            assert "output.weight" not in tensors(tmp_path / "m.gguf")

    def test_windows_are_noted(self, tmp_path: Path) -> None:
        """What llama.cpp leaves out of a model."""
        model(tmp_path / "m", "mistral", sliding_window=32)
        assert any("32 tokens back" in n for n in gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf").notes)

    def test_places(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """An existing file is not replaced without --force; the summary and the JSON of the verb."""
        model(tmp_path / "m", "qwen3")
        command = ["export", str(tmp_path / "m"), str(tmp_path / "m.gguf"), "--type", "f16", "-q"]
        assert main(command) == 0
        assert "qwen3" in capsys.readouterr().out
        before = (tmp_path / "m.gguf").read_bytes()
        assert main(command) == 2
        assert "--force" in capsys.readouterr().err
        assert main([*command, "--force", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["type"], told["bytes"], told["notes"]) == ("f16", len(before), [])
        assert (tmp_path / "m.gguf").read_bytes() == before
        assert main(["export", str(tmp_path / "m"), str(tmp_path / "m.bin")]) == 2
        assert main(["export", str(tmp_path / "m"), str(tmp_path / "n.gguf"), "--type", "q4"]) == 2
        assert main(["export", str(tmp_path / "m.gguf"), str(tmp_path / "m.gguf"), "--force"]) == 2

    def test_a_second_run_waits_its_turn(self, tmp_path: Path) -> None:
        """Two runs do not write one file."""
        from geomerge.checkpoint.output_lock import own_lock

        model(tmp_path / "m", "llama")
        assert own_lock(tmp_path / "m.gguf.partial") is not None
        with pytest.raises(gm.UsageError, match="another run"):
            gm.export_gguf(tmp_path / "m", tmp_path / "m.gguf")


def test_places_that_are_wrong_are_found_first(tmp_path: Path) -> None:
    """No directory for the file, or none, or none with a tokenizer, where one is to be taken from."""
    model(tmp_path / "m", "qwen2")
    (tmp_path / "empty").mkdir()
    for out, tokenizer, what in (
        ("gone/x.gguf", None, "gone: there is no such directory"),
        ("x.gguf", "gone", "gone: there is no such directory"),
        ("x.gguf", "empty", "empty: the directory has no tokenizer"),
    ):
        with pytest.raises(gm.UsageError, match=what):
            gm.export_gguf(tmp_path / "m", tmp_path / out, tokenizer=tokenizer and tmp_path / tokenizer)
    assert not (tmp_path / "x.gguf").exists()
