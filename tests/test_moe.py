"""Mixtures of experts: loaded and run by transformers, compared with the dense models they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import geomerge as gm
import tiny
import token_samples as samples
from geomerge.cli.app import main
from geomerge.moe.build import plan_moe
from geomerge.moe.router import alike, random_gates

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
DENSE = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral in a window": ("MistralConfig", {"sliding_window": 3, "head_dim": 16}),
    "llama of its own": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
    ),
}
OUTPUTS = [
    # dense type, architecture asked for, whether there is a shared expert, the model type that comes out
    ("llama", "", False, "mixtral"),
    ("mistral", "", False, "mixtral"),
    ("llama", "", True, "glm4_moe"),
    ("qwen2", "deepseek", True, "glm4_moe"),
    ("qwen2", "", False, "qwen2_moe"),
    ("qwen2", "qwen2_moe", True, "qwen2_moe"),
    ("llama", "qwen2_moe", True, "qwen2_moe"),
    ("qwen3", "", False, "qwen3_moe"),
    ("mistral in a window", "", False, "mixtral"),
    ("llama of its own", "", False, "mixtral"),
    ("llama of its own", "", True, "glm4_moe"),
    ("llama of its own", "qwen2_moe", True, "qwen2_moe"),
]


def dense(folder: Path, kind: str, seed: int, **changes: Any) -> Any:
    """A tiny dense model of transformers, saved with a tokenizer."""
    import transformers

    name, own = DENSE[kind]
    usual: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    config = getattr(transformers, name)(**{**usual, **own, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    samples.save(folder, samples.bpe(samples.ENGLISH, 290, samples.special("<s>")), bos_token="<s>")
    return model


def load(folder: Path) -> Any:
    """The output as transformers reads it; nothing may be missing or left over."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def config(root: Path, names: str, base: str = "a", **more: Any) -> str:
    """A configuration with random gates, unless `more` says otherwise."""
    listed = [{"source_model": str(root / name), "positive_prompts": [f"a text for {name}"]} for name in names.split()]
    said: dict[str, Any] = {"base_model": str(root / base), "gate_mode": "random", "experts": listed} | more
    return json.dumps(said, indent=1)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """Of a fixed text."""
    return torch.as_tensor(model(IDS).logits)


@pytest.mark.parametrize(("kind", "architecture", "shared", "expected"), OUTPUTS)
def test_identical_experts_are_the_dense_model(
    kind: str, architecture: str, shared: bool, expected: str, tmp_path: Path
) -> None:
    """Four copies of one model route to the same place: the dense logits. A shared expert scaled by 0 adds nothing."""
    model = dense(tmp_path / "a", kind, 1)
    more: dict[str, Any] = {"architecture": architecture} if architecture else {}
    if shared:
        more["shared_experts"] = [{"source_model": str(tmp_path / "a"), "residual_scale": 0}]
    gm.moe(config(tmp_path, "a a a a", **more), tmp_path / "out")
    made = load(tmp_path / "out")
    assert made.config.model_type == expected
    assert torch.allclose(logits(made), logits(model), rtol=1e-4, atol=1e-5)
    out = made.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(out, model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))


@torch.inference_mode()
def mixed(model: Any, experts: list[Any], gates: np.ndarray, score: str, shared: tuple[Any, float] | None) -> Any:
    """The dense model with its feed-forward layers replaced by a slow mixture over those of the experts, top 2."""

    def forward(block: int) -> Any:
        def mixture(x: torch.Tensor) -> torch.Tensor:
            scores = x[0].double() @ torch.from_numpy(gates[block]).T
            chances = scores.softmax(-1) if score == "softmax" else scores.sigmoid()
            out = torch.zeros_like(x)
            for token in range(x.shape[1]):
                best = chances[token].argsort(descending=True)[:2]
                share = chances[token][best] / chances[token][best].sum()
                for weight, expert in zip(share, best, strict=True):
                    out[0, token] += float(weight) * experts[expert].model.layers[block].mlp(x[:, token])[0]
                if shared is not None:
                    out[0, token] += shared[1] * shared[0].model.layers[block].mlp(x[:, token])[0]
            return out

        return mixture

    before = [layer.mlp.forward for layer in model.model.layers]
    frozen = [[layer.mlp.forward for layer in e.model.layers] for e in experts]
    assert len(frozen) == len(experts)
    for block, layer in enumerate(model.model.layers):
        layer.mlp.forward = forward(block)
    try:
        return logits(model)
    finally:
        for layer, own in zip(model.model.layers, before, strict=True):
            layer.mlp.forward = own


@pytest.mark.parametrize(
    ("kind", "architecture", "score", "share"),
    [
        ("llama", "mixtral", "softmax", None),
        ("llama", "deepseek", "sigmoid", 0.75),
        ("qwen2", "qwen2_moe", "softmax", 0.5 * 0.75),
        ("qwen3", "qwen3_moe", "softmax", None),
    ],
)
def test_different_experts_are_mixed_by_the_router(
    kind: str, architecture: str, score: str, share: float | None, tmp_path: Path
) -> None:
    """Three experts and a base: the logits of a slow mixture. The shared expert's zero gate lets half of it through."""
    names = ["base", "x", "y", "z"]
    models = {name: dense(tmp_path / name, kind, seed) for seed, name in enumerate(names)}
    shared = [{"source_model": str(tmp_path / "base"), "residual_scale": 0.75}]
    more = {} if share is None else {"shared_experts": shared}
    text = config(tmp_path, "x y z", "base", architecture=architecture, seed=5, **more)
    gm.moe(text, tmp_path / "out")
    gates = random_gates("random", 2, 3, 32, 5).astype(np.float32).astype(np.float64)
    other = dense(tmp_path / "again", kind, 0)  # the base once more: its layers are replaced
    beside = None if share is None else (models["base"], share)
    expected = mixed(other, [models[n] for n in "xyz"], gates, score, beside)
    assert torch.allclose(logits(load(tmp_path / "out")), expected, rtol=1e-3, atol=1e-4)


def test_copies_are_the_experts_bytes(tmp_path: Path) -> None:
    """Every tensor is the parent's, bit for bit; everything unused is accounted for."""
    for seed, name in enumerate(("a", "b")):
        tiny.llama(tmp_path / name, seed)
    text = config(tmp_path, "b a")
    gm.moe(text, tmp_path / "out", threads=2)
    made, a, b = (tiny.read(tmp_path / name) for name in ("out", "a", "b"))
    for block in range(3):
        for number, parent in enumerate((b, a)):
            for theirs, ours in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                stored = made[f"model.layers.{block}.block_sparse_moe.experts.{number}.{ours}.weight"]
                assert torch.equal(stored, parent[f"model.layers.{block}.mlp.{theirs}.weight"])
        name = f"model.layers.{block}.self_attn.q_proj.weight"
        assert torch.equal(made[name], a[name])
    left = tiny.manifest(tmp_path / "out")["left_out"]
    assert set(left) == {f"{tmp_path}/b: {n}" for n in b if ".mlp." not in n}
    assert (tmp_path / "out" / "geomerge.yml").read_text() == text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Mixture of experts" in card
    assert "geomerge moe recipe.yml output" in card
    assert "| a | base |" in card
    assert "gates" not in card.split("## Recipe")[0]
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 0


def test_what_a_config_leaves_out_keeps_its_meaning(tmp_path: Path) -> None:
    """A short config means Llama's defaults, where Mixtral has others."""
    model = dense(tmp_path / "a", "llama", 1, num_key_value_heads=4, max_position_embeddings=2048)
    said = tiny.config(tmp_path / "a")
    for key in ("rms_norm_eps", "hidden_act", "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"):
        del said[key]
    (tmp_path / "a" / "config.json").write_text(json.dumps(said))
    gm.moe(config(tmp_path, "a a"), tmp_path / "out")
    made = load(tmp_path / "out")
    assert (made.config.rms_norm_eps, made.config.num_key_value_heads) == (1e-6, 4)
    assert torch.allclose(logits(made), logits(model), rtol=1e-4, atol=1e-5)


def test_dtype_and_scale(tmp_path: Path) -> None:
    """`dtype` converts everything but the config's other words; `residual_scale` multiplies down_proj before rounding."""
    tiny.llama(tmp_path / "a", 1)
    listed = [{"source_model": str(tmp_path / "a"), "residual_scale": s} for s in (0.3, 1.0)]
    gm.moe(
        json.dumps(
            {"base_model": str(tmp_path / "a"), "gate_mode": "random", "experts": listed, "dtype": "bfloat16"}, indent=1
        ),
        tmp_path / "out",
    )
    made, a = tiny.read(tmp_path / "out"), tiny.read(tmp_path / "a")
    assert {t.dtype for t in made.values()} == {torch.bfloat16}
    assert tiny.config(tmp_path / "out")["dtype"] == "bfloat16"
    down = "model.layers.1.mlp.down_proj.weight"
    expert = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    assert torch.equal(made[expert.format(0)], (a[down].double() * 0.3).bfloat16())
    assert torch.equal(made[expert.format(1)], a[down].bfloat16())


def test_experts_take_the_bases_dtype(tmp_path: Path) -> None:
    """An expert in another dtype is converted, because the experts of a block become one tensor."""
    tiny.llama(tmp_path / "a", 1, dtype=torch.bfloat16)
    b = tiny.llama(tmp_path / "b", 2)
    gm.moe(config(tmp_path, "a b"), tmp_path / "out")
    made = tiny.read(tmp_path / "out")
    assert {t.dtype for t in made.values()} == {torch.bfloat16}
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    assert torch.equal(made[name], b["model.layers.0.mlp.up_proj.weight"].bfloat16())
    load(tmp_path / "out")


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "mlp_input", "cheap_embed"])
def test_gates_from_prompts(mode: str, tmp_path: Path) -> None:
    """The gates of two experts with several prompts, positive and negative, computed by hand from the base's states."""
    import transformers

    model = dense(tmp_path / "a", "llama", 1)
    prompts = {0: (["The cat sat", "cold morning"], []), 1: (["Die Katze"], ["in the old town"])}
    listed = [
        {"source_model": str(tmp_path / "a"), "positive_prompts": p, "negative_prompts": n} for p, n in prompts.values()
    ]
    text = json.dumps({"base_model": str(tmp_path / "a"), "gate_mode": mode, "experts": listed}, indent=1)
    gm.moe(text, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")

    def state(prompt: str, block: int) -> np.ndarray:
        ids = torch.tensor([tokenizer("<s>" + prompt, add_special_tokens=False).input_ids])
        with torch.inference_mode():
            found = model.model(ids, output_hidden_states=True).hidden_states[block][0].double()
            if mode == "mlp_input":
                seen: list[torch.Tensor] = []
                layer = model.model.layers[block].post_attention_layernorm
                hook = layer.register_forward_hook(lambda *got: seen.append(got[2][0]))
                model.model(ids)
                hook.remove()
                found = seen[0].double()
            embedded = model.model.embed_tokens(ids)[0].double()
        if mode == "cheap_embed":
            return np.asarray(embedded.sum(0))
        return np.asarray(found[-1] if mode == "hidden" else found.mean(0))

    def together(texts: list[str], block: int) -> np.ndarray:
        total = np.mean([state(t, block) for t in texts], axis=0)
        return total / np.linalg.norm(total) if mode == "cheap_embed" else total

    made = tiny.read(tmp_path / "out")
    for block in range(2):
        gate = made[f"model.layers.{block}.block_sparse_moe.gate.weight"]
        for number, (positive, negative) in prompts.items():
            expected = together(positive, block) - (together(negative, block) if negative else 0)
            expected = expected / np.linalg.norm(expected)
            np.testing.assert_allclose(gate[number].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_gated_shared_expert(tmp_path: Path) -> None:
    """Prompts for the shared expert make its gate, and choose the architecture that has one."""
    dense(tmp_path / "a", "qwen2", 1)
    shared = [{"source_model": str(tmp_path / "a"), "positive_prompts": ["The cat"]}]
    gm.moe(config(tmp_path, "a a", gate_mode="cheap_embed", shared_experts=shared), tmp_path / "out")
    made = tiny.read(tmp_path / "out")
    gate = made["model.layers.0.mlp.shared_expert_gate.weight"]
    assert gate.shape == (1, 32)
    assert float(gate.norm()) == pytest.approx(1, rel=1e-5)
    load(tmp_path / "out")


def test_random_gates_are_seeded_and_alike_ones_are_noted(tmp_path: Path) -> None:
    """The same seed gives the same bytes, another one others; equal prompts give a note."""
    tiny.llama(tmp_path / "a", 1)
    runs = [(0, "x"), (0, "y"), (1, "z")]
    for seed, name in runs:
        gm.moe(config(tmp_path, "a a", seed=seed), tmp_path / name)
    x, y, z = (tiny.read(tmp_path / name) for _, name in runs)
    assert tiny.same(x, y)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert not torch.equal(x[router], z[router])
    uniform = random_gates("uniform_random", 3, 4, 64, 0)
    assert np.abs(uniform).max() <= 1 / 8
    assert alike(np.array([[[1.0, 0], [2, 0], [0, 1]], [[1, 0], [0, 1], [1, 1]]])) == [(0, 1, 1)]
    samples.save(tmp_path / "a", samples.bpe(samples.ENGLISH, 290))
    tiny.llama(tmp_path / "a", 1, vocab_size=300)
    plan, opened = plan_moe(
        config(tmp_path, "a a", gate_mode="cheap_embed")
        .replace("a text for a", "cat", 1)
        .replace("a text for a", "cat")
    )
    for checkpoint in opened:
        checkpoint.close()
    assert any("point the same way in 3 of 3" in note for note in plan.notes)


def test_an_interrupted_run_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    """Killed in the middle, the same command goes on."""
    for seed, name in enumerate(("a", "b")):
        tiny.llama(tmp_path / name, seed, hidden_size=96, intermediate_size=512)
    text = config(tmp_path, "a b")

    class Stop:
        def start(self, total: int, done: int) -> None: ...

        def advance(self, nbytes: int) -> None:
            self.left = getattr(self, "left", 3_000_000) - nbytes
            if self.left < 0:
                raise KeyboardInterrupt

        def finish(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        gm.moe(text, tmp_path / "out", progress=Stop(), threads=1)
    report = gm.moe(text, tmp_path / "out", resume=True)
    gm.moe(text, tmp_path / "whole")
    assert tiny.same(tiny.read(tmp_path / "out"), tiny.read(tmp_path / "whole"))
    assert report.resumed > 0


REFUSALS = [
    ({"experts_per_token": 3}, "experts_per_token is 3, but there are 2 experts"),
    ({"gate_mode": "hiden"}, "unknown gate_mode"),
    ({"architecture": "qwen3_moe"}, "its dense models are qwen3"),
    ({"architecture": "mixtral", "shared_experts": [{"source_model": "A"}]}, "no shared experts"),
    ({"architecture": "deepseek"}, "needs a shared expert"),
    ({"shared_experts": [{"source_model": "A"}, {"source_model": "A"}]}, "no architecture can hold"),
    ({"experts": [{"source_model": "A"}], "gate_mode": "hidden"}, "has no positive_prompts"),
    ({"experts": [{"source_model": "A", "noise_scale": 0.1}]}, "noise_scale is not supported"),
    ({"noise_scale": 0.1}, "noise_scale is not supported"),
    ({"experts": [{"source_model": "A", "prompts": []}]}, "no key 'prompts'"),
    ({"experts": []}, "must be a list of experts"),
    ({"experts": [{"source_model": "WIDE"}]}, "intermediate_size differs"),
    ({"experts": [{"source_model": "DEEP"}]}, "num_hidden_layers differs"),
    ({"experts": [{"source_model": "QWEN"}]}, "not of one architecture"),
    ({"experts": [{"source_model": "BIAS"}]}, "gate_proj.bias"),
    ({"base_model": "WINDOW", "experts": [{"source_model": "WINDOW"}], "architecture": "qwen2_moe"}, "sliding window"),
    ({"base_model": "QK", "architecture": "mixtral"}, "no place for the base's .*q_norm"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before a byte is written, saying what is wrong."""
    a = tiny.llama(tmp_path / "a", 1)
    tiny.llama(tmp_path / "wide", 1, intermediate_size=32)
    tiny.llama(tmp_path / "deep", 1, num_hidden_layers=4)
    tiny.llama(tmp_path / "qwen", 1, model_type="qwen2")
    tiny.llama(tmp_path / "window", 1, model_type="mistral", sliding_window=16)
    tiny.save(tmp_path / "bias", a | {"model.layers.0.mlp.gate_proj.bias": torch.ones(24)}, tiny.LLAMA)
    tiny.save(tmp_path / "qk", a | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, tiny.LLAMA)
    text = config(tmp_path, "a a", **changes)
    for name in ("A", "WIDE", "DEEP", "QWEN", "BIAS", "WINDOW", "QK"):
        text = text.replace(f'"{name}"', f'"{tmp_path}/{name.lower()}"')
    with pytest.raises(gm.GeomergeError, match=message):
        gm.moe(text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_before_the_base_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output that is there; a device that is not. Of transformers' bars nothing is seen."""
    dense(tmp_path / "a", "llama", 1)
    experts = [{"source_model": str(tmp_path / "a"), "positive_prompts": [text]} for text in ("sums", "poems")]
    said = {"base_model": str(tmp_path / "a"), "gate_mode": "hidden", "experts": experts}
    (tmp_path / "moe.yml").write_text(json.dumps(said, indent=1))
    words = ["moe", str(tmp_path / "moe.yml"), str(tmp_path / "out"), "--quiet"]
    capsys.readouterr()
    assert main([*words, "--device", "bananas"]) == 2
    assert "the device 'bananas' cannot be used" in capsys.readouterr().err
    assert main(words) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("geomerge.moe.build.prompt_gates", lambda *args, **options: 1 / 0)
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`geomerge moe` writes the model and says so; a wrong file's line is named."""
    tiny.llama(tmp_path / "a", 1)
    (tmp_path / "moe.yml").write_text(config(tmp_path, "a a"))
    assert main(["moe", str(tmp_path / "moe.yml"), str(tmp_path / "out"), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == len(tiny.read(tmp_path / "out"))
    (tmp_path / "bad.yml").write_text("base_model: a\nexperts:\n- source_modle: b\n")
    assert main(["moe", str(tmp_path / "bad.yml"), str(tmp_path / "no")]) == 2
    assert "bad.yml:3" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "moe.yml"), str(tmp_path / "no")]) == 2
    assert "`geomerge moe CONFIG OUT` builds it" in capsys.readouterr().err
