"""GGUF files written by the gguf package: names, order of rows, blocks, configs, damage."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import coded_samples as samples
import geomerge as gm
import tiny
from geomerge.checkpoint.coded.base import Parts
from geomerge.checkpoint.gguf.blocks import TYPES
from geomerge.checkpoint.gguf.names import ARCHITECTURES, model_name
from geomerge.checkpoint.reader import open_checkpoint
from geomerge.cli.app import main

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
CONFIG: dict[str, Any] = tiny.LLAMA | SIZES | {"num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """How llama.cpp's converter stores the rows of a Llama's q and k projections."""
    shape = weight.shape
    halves = weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(shape))


def blocks(kind: Any, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random blocks of a type; their float16 scales are made finite."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (*shape[:-1], shape[-1] // elements, nbytes), dtype=np.uint8)
    places = {Type.Q6_K: [208], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q4_1: [0, 2], Type.Q5_1: [0, 2]}.get(
        kind, [0]
    )
    for at in places:
        scale = generator.normal(size=raw.shape[:-1]).astype(np.float16)
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def write(
    path: Path,
    tensors: dict[str, Tensor],
    kind: Any,
    *,
    architecture: str = "llama",
    config: dict[str, Any] = CONFIG,
    extra: dict[str, np.ndarray] | None = None,
) -> tiny.Tensors:
    """Write a model with its matrices in one type; returns what it stands for, decoded by the gguf package, in float64.

    Names are mapped by the package's own table; types that it cannot quantise to get random blocks.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    table = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    decoded = {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        values = tensor.float().numpy()
        stored_as = kind if values.ndim > 1 else Type.F32
        try:
            raw = gguf.quantize(values, stored_as)
        except NotImplementedError:
            raw = blocks(stored_as, values.shape, seed)
        meaning = gguf.dequantize(raw, stored_as).reshape(values.shape)
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if architecture == "llama" and f"{part}." in name:
                raw = permute(raw, config[heads])
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{table.get_name(stem)}.{suffix}", raw, raw_dtype=stored_as)
        decoded[name] = torch.from_numpy(np.array(meaning, dtype=np.float64))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def llama(seed: int = 1, **changes: Any) -> tiny.Tensors:
    return tiny.random_tensors(tiny.llama_shapes(CONFIG | changes), seed)


class Held:
    """Parts in memory."""

    def __init__(self, raw: np.ndarray) -> None:
        self.raw = torch.from_numpy(np.ascontiguousarray(raw)).reshape(-1)

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        return self.raw[start:stop]

    def whole(self, name: str) -> Tensor:
        raise AssertionError("blocks are read piece by piece")


@pytest.mark.parametrize("number", [n for n, t in TYPES.items() if t.decode], ids=lambda n: TYPES[n].name)
def test_blocks(number: int) -> None:
    """Every bit pattern of a block means what the gguf package says, which rounds sums to float32 and we do not."""
    from geomerge.checkpoint.gguf.blocks import BlockCoded

    block = TYPES[number]
    assert (block.elements, block.nbytes) == gguf.GGML_QUANT_SIZES[Type(number)]
    assert block.name == Type(number).name.lower().replace("k", "K")
    raw = blocks(Type(number), (6, 512), 0)
    parts: Parts = Held(raw)
    coded = BlockCoded("w", "F16", (6, 512), block)
    found = coded.decode(parts, 0, 6 * 512).double()
    expected = torch.from_numpy(gguf.dequantize(raw, Type(number)))
    assert torch.equal(found.float().view(6, 512), expected)
    assert torch.equal(coded.decode(parts, 700, 1900).double(), found[700:1900])


def test_types_without_a_decoder_are_known_by_their_sizes() -> None:
    """Sizes and names are the package's."""
    for number, block in TYPES.items():
        assert (block.elements, block.nbytes) == gguf.GGML_QUANT_SIZES[Type(number)]
        assert block.name.lower() == Type(number).name.lower()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_models(kind: str, tmp_path: Path) -> None:
    """A model is read under Hugging Face's names, rows in their order, wherever tensors are cut."""
    expected = write(tmp_path / "m.gguf", llama(), Type[kind])
    for piece in (None, 37, 1000):
        found = samples.decoded(tmp_path / "m.gguf", piece)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor.float(), expected[name].float()), name


def test_k_types_in_a_model(tmp_path: Path) -> None:
    """Blocks of 256, permuted heads."""
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128, "num_hidden_layers": 1}
    expected = write(tmp_path / "m.gguf", tiny.random_tensors(tiny.llama_shapes(config), 1), Type.Q4_K, config=config)
    found = samples.decoded(tmp_path / "m.gguf", 10_000)
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)


def test_merge_with_a_model_in_safetensors(tmp_path: Path) -> None:
    """A GGUF parent and a plain one; and a GGUF parent that gives the output its config: 16 bit, without codes."""
    config = CONFIG | {"dtype": "float16"}
    plain = {name: t.half() for name, t in llama(2).items()}
    tiny.save(tmp_path / "b", plain, config)
    decoded = write(tmp_path / "a.gguf", llama(1), Type.Q8_0)
    entry = "- {{model: {}, parameters: {{weight: 0.5}}}}\n"
    recipe = "merge_method: linear\nmodels:\n" + 2 * entry
    for order in (("b", "a.gguf"), ("a.gguf", "b")):
        out = tmp_path / f"out-{order[0]}"
        gm.merge(recipe.format(*(tmp_path / name for name in order)), out)
        for name, tensor in tiny.read(out).items():
            assert torch.equal(tensor, ((decoded[name] + plain[name].double()) / 2).half()), name
        said = tiny.config(out)
        kept = {
            k: said[k]
            for k in (*SIZES, "num_hidden_layers", "vocab_size", "rms_norm_eps", "rope_theta", "eos_token_id")
        }
        assert kept == {k: config[k] for k in kept}
        assert said["architectures"] == ["LlamaForCausalLM"]
        assert said["dtype"] == "float16"


def test_tied_heads(tmp_path: Path) -> None:
    """A file without an output matrix ties its head."""
    write(tmp_path / "m.gguf", llama(tie_word_embeddings=True), Type.F16)
    with open_checkpoint(str(tmp_path / "m.gguf")) as checkpoint:
        assert checkpoint.config is not None
        assert checkpoint.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen(architecture: str, tmp_path: Path) -> None:
    """Qwen's rows are in their own order; biases and norms of heads have their names."""
    tensors = llama()
    for i in range(2):
        attention = f"model.layers.{i}.self_attn"
        if architecture == "qwen2":
            tensors |= {
                f"{attention}.{n}_proj.bias": torch.randn(tensors[f"{attention}.{n}_proj.weight"].shape[0])
                for n in "qkv"
            }
        else:
            tensors |= {f"{attention}.{n}_norm.weight": torch.randn(16) for n in "qk"}
    expected = write(tmp_path / "m.gguf", tensors, Type.Q8_0, architecture=architecture)
    found = samples.decoded(tmp_path / "m.gguf", 100)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_biases_of_a_llama_are_reordered(tmp_path: Path) -> None:
    """As their matrices are."""
    tensors = llama() | {"model.layers.0.self_attn.q_proj.bias": torch.randn(32)}
    expected = write(tmp_path / "m.gguf", tensors, Type.F16)
    for piece in (None, 5):
        found = samples.decoded(tmp_path / "m.gguf", piece)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_names(architecture: str) -> None:
    """Names are the inverse of the gguf package's table."""
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    table = gguf.get_tensor_name_map(number, 2)
    outer, inner = ["token_embd", "output_norm", "output"], ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"]
    inner += ["ffn_norm", "ffn_gate", "ffn_up", "ffn_down"] + (
        ["attn_q_norm", "attn_k_norm"] if architecture == "qwen3" else []
    )
    for stored in [f"{n}.weight" for n in outer] + [f"blk.1.{n}.weight" for n in inner]:
        name = model_name(stored)
        assert name is not None
        assert f"{table.get_name(name.removesuffix('.weight'))}.weight" == stored


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    """Names, order of rows and numbers are those that transformers finds in the file."""
    from transformers import AutoModelForCausalLM

    expected = write(tmp_path / "m.gguf", llama(), Type.Q8_0)
    module = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    state = module.state_dict()
    for name, tensor in samples.decoded(tmp_path / "m.gguf").items():
        assert torch.equal(state[name].double(), tensor), name
    assert expected.keys() == set(samples.decoded(tmp_path / "m.gguf"))
    # The config that was made of the metadata makes the same model: the same answer, bit for bit.
    gm.merge(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/m.gguf}}]\ndtype: float32\n", tmp_path / "out")
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        assert torch.equal(ours, module(ids).logits)


def test_split_models_and_directories(tmp_path: Path) -> None:
    """All parts of a split model are read, by the name of one or of the directory; a missing part is named."""
    tensors = llama()
    names = list(tensors)
    first = write(tmp_path / "m-00001-of-00002.gguf", {n: tensors[n] for n in names[:9]}, Type.Q8_0)
    second = write(tmp_path / "m-00002-of-00002.gguf", {n: tensors[n] for n in names[9:]}, Type.Q8_0)
    for place in (tmp_path, tmp_path / "m-00001-of-00002.gguf"):
        found = samples.decoded(place)
        assert all(torch.equal(found[name], tensor) for name, tensor in (first | second).items())
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "other.gguf")
    with pytest.raises(gm.ModelError, match="several models"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(gm.DamagedCheckpoint, match="m-00002-of-00002"):
        open_checkpoint(str(tmp_path / "m-00001-of-00002.gguf"))


def test_rotary_factors_are_told(tmp_path: Path) -> None:
    """Llama 3's factors are no tensor of the model; the plan says that the config lacks them."""
    write(tmp_path / "m.gguf", llama(), Type.F16, extra={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    plan = gm.plan(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/m.gguf}}]\n")
    assert any("rope_scaling" in note for note in plan.notes)
    assert not any("rope_freqs" in node.name for node in plan.output_nodes())


class TestRefusals:
    def test_every_truncation(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Cut anywhere, a file is refused as damaged: exit code 3."""
        write(tmp_path / "m.gguf", llama(), Type.Q8_0)
        whole = (tmp_path / "m.gguf").read_bytes()
        for size in [*range(0, 4000, 61), len(whole) // 2, len(whole) - 40]:
            (tmp_path / "cut.gguf").write_bytes(whole[:size])
            with pytest.raises(gm.DamagedCheckpoint):
                open_checkpoint(str(tmp_path / "cut.gguf"))
        assert main(["inspect", str(tmp_path / "cut.gguf")]) == 3
        assert "cut.gguf" in capsys.readouterr().err

    def test_every_flipped_byte_of_the_header(self, tmp_path: Path) -> None:
        """Whatever a header says, it is read or refused; nothing else happens, and nothing huge is allocated."""
        write(tmp_path / "m.gguf", llama(num_hidden_layers=1), Type.F16, config=CONFIG | {"num_hidden_layers": 1})
        whole = bytearray((tmp_path / "m.gguf").read_bytes())
        refused = 0
        for at in range(0, 2500, 7):
            changed = whole.copy()
            changed[at] ^= 0xFF
            (tmp_path / "bad.gguf").write_bytes(changed)
            try:
                open_checkpoint(str(tmp_path / "bad.gguf")).close()
            except gm.ModelError:
                refused += 1
        assert refused > 50

    @pytest.mark.parametrize("architecture", ["llama", 7, True, "x" * 1000])
    @pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "token_embd.weight", "blk.0.attn_q.bias"])
    def test_tensors_without_dimensions(self, architecture: object, name: str, tmp_path: Path) -> None:
        """A scalar in a matrix's place, metadata of another type: damage, or a model that fits nothing; never a crash."""

        def text(value: str) -> bytes:
            return struct.pack("<Q", len(value)) + value.encode()

        kinds = {str: (8, text), int: (4, lambda v: struct.pack("<I", v)), bool: (7, lambda v: struct.pack("<?", v))}
        kind, pack = kinds[type(architecture)]
        raw = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
        raw += text("general.architecture") + struct.pack("<I", kind) + pack(architecture)  # type: ignore[operator]
        raw += text("llama.attention.head_count") + struct.pack("<II", 4, 2)
        raw += text(name) + struct.pack("<IIQ", 0, 0, 0)
        (tmp_path / "m.gguf").write_bytes(raw + bytes(-len(raw) % 32) + bytes(4))
        try:
            open_checkpoint(str(tmp_path / "m.gguf")).close()
            assert (architecture, name) == ("llama", "token_embd.weight")
        except gm.ModelError:
            pass

    @pytest.mark.parametrize("case", ["architecture", "type", "tensor", "version", "heads"])
    def test_what_cannot_be_read(self, case: str, tmp_path: Path) -> None:
        """Other architectures, types and tensors are named."""
        path = tmp_path / "m.gguf"
        if case == "architecture":
            write(path, {"model.embed_tokens.weight": torch.ones(4, 32)}, Type.F16, architecture="gemma2")
            match = "gemma2"
        elif case == "type":
            config = CONFIG | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128}
            write(path, tiny.random_tensors(tiny.llama_shapes(config), 1), Type.IQ4_XS, config=config)
            match = "iq4_xs"
        elif case == "tensor":
            write(path, llama(), Type.F16, extra={"blk.0.ffn_gate_exps.weight": np.ones((4, 4), dtype=np.float32)})
            match = "ffn_gate_exps"
        elif case == "version":
            path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
            match = "version 1"
        else:
            write(path, llama(), Type.F16)
            raw = path.read_bytes()
            at = raw.index(b"llama.attention.head_count") + len(b"llama.attention.head_count") + 4
            path.write_bytes(raw[:at] + struct.pack("<I", 3) + raw[at + 4 :])
            match = "one of 3 heads"
        with pytest.raises(gm.ModelError, match=match):
            gm.plan(f"merge_method: passthrough\nmodels: [{{model: {path}}}]\n")


def test_in_memory(tmp_path: Path) -> None:
    """A live merge holds a model as it is stored, and decodes it all the same."""
    from geomerge.checkpoint.reader import resident
    from geomerge.engine.stored import stored_source

    expected = write(tmp_path / "m.gguf", llama(), Type.Q8_0)
    held = resident(open_checkpoint(str(tmp_path / "m.gguf")))
    assert not held.files
    name = "model.layers.1.self_attn.q_proj.weight"
    found = torch.empty(expected[name].numel(), dtype=torch.float64)
    stored_source(held, name, name).read(0, found)
    assert torch.equal(found.view(expected[name].shape), expected[name])


def test_the_plan_says_that_codes_are_decoded(tmp_path: Path) -> None:
    """For blocks, not for plain numbers."""
    for kind, noted in (("Q8_0", 1), ("F16", 0)):
        write(tmp_path / f"{kind}.gguf", llama(), Type[kind])
        plan = gm.plan(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/{kind}.gguf}}]\n")
        assert sum("quantised (gguf)" in note for note in plan.notes) == noted


def test_inspect_decodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes are the model's; NaN in a block's scale is found."""
    write(tmp_path / "m.gguf", llama(), Type.Q8_0)
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 0
    text = capsys.readouterr().out
    assert "gguf" in text
    with open_checkpoint(str(tmp_path / "m.gguf")) as checkpoint:
        at = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].offset
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    raw[at : at + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "m.gguf").write_bytes(raw)
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 3
    assert "up_proj" in capsys.readouterr().err
