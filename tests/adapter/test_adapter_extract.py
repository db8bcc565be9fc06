"""Extraction: base + extract(base, tuned) is tuned, up to an error that is measured and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import PREFIX, close, factors, llama, merged, write_adapter
from safetensors.torch import load_file, save_file

from geomerge.adapter.extract import extract
from geomerge.errors import IncompatibleModels, NotFiniteError, UsageError

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tune(base: Path, folder: Path, *names: str, size: float = 0.01) -> Path:
    """A copy of a model with noise on some tensors (all floats when none are named)."""
    generator = torch.Generator().manual_seed(4)
    tensors = weights(base)
    for name in names or tuple(tensors):
        noise = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
        tensors[name] = (tensors[name].double() + size * noise).to(tensors[name].dtype)
    return write(base, folder, tensors)


def write(base: Path, folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    return folder


def test_full_rank_gives_the_fine_tune_back(base: Path, tmp_path: Path) -> None:
    """Linear layers at full rank, norms, embedding and head whole: nothing is lost."""
    tuned = tune(base, tmp_path / "tuned")
    report = extract(base, tuned, tmp_path / "out", rank=16, dtype="float64")
    close(merged(f"{base}+{tmp_path / 'out'}"), weights(tuned), 1e-10)
    close(merged(tmp_path / "out"), weights(tuned), 1e-10)  # the adapter names its base
    assert report.relative < 1e-12
    assert {n.rpartition(".")[0] for n in report.whole} >= {"model.embed_tokens", "lm_head", "model.norm"}
    assert not any("proj" in n for n in report.whole)


def test_errors_are_those_of_the_best_approximation(base: Path, tmp_path: Path) -> None:
    """Layer by layer and in all; what is read back has just this error."""
    tuned = tune(base, tmp_path / "tuned", f"{Q}.weight", f"{UP}.weight")
    report = extract(base, tuned, tmp_path / "out", rank=3, dtype="float64")
    found, one, two = merged(f"{base}+{tmp_path / 'out'}"), weights(base), weights(tuned)
    assert [each.module for each in report.layers] == [Q, UP]
    squares = 0.0
    for each in report.layers:
        name = f"{each.module}.weight"
        values = torch.linalg.svdvals(two[name] - one[name])
        assert each.error == pytest.approx(values[3:].norm().item())
        assert (found[name] - two[name]).norm().item() == pytest.approx(each.error)
        squares += each.error**2
    assert report.error == pytest.approx(squares**0.5)
    assert json.loads((tmp_path / "out" / "geomerge.json").read_text())["bytes"] == report.nbytes > 0


def test_energy(base: Path, tmp_path: Path) -> None:
    """Each layer gets the rank that it needs; a low-rank change is found as what it is."""
    adapter = write_adapter(
        tmp_path / "a",
        {**factors(Q, 16, 16, 1, 1), **factors(UP, 24, 16, 3, 2)},
        rank_pattern={"up_proj": 3, "q_proj": 1},
        alpha_pattern={"up_proj": 5},
    )
    report = extract(base, f"{base}+{adapter}", tmp_path / "out", energy=1 - 1e-12, dtype="float64")
    assert {each.module: each.rank for each in report.layers} == {Q: 1, UP: 3}
    close(merged(f"{base}+{tmp_path / 'out'}"), merged(f"{base}+{adapter}"), 1e-9)
    some = extract(base, f"{base}+{adapter}", tmp_path / "some", energy=1e-3)
    assert {each.rank for each in some.layers} == {1}


def test_equal_tensors_are_left_alone(base: Path, tmp_path: Path) -> None:
    """One changed layer gives an adapter of one layer."""
    extract(base, tune(base, tmp_path / "tuned", f"{Q}.weight"), tmp_path / "out", rank=2)
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == {
        f"{PREFIX}{Q}.lora_{side}.weight" for side in "AB"
    }


@pytest.mark.parametrize("rest", ["save", "drop", "refuse"])
def test_the_rest(base: Path, tmp_path: Path, rest: str) -> None:
    """A changed norm is saved, dropped with a word, or refused."""
    tuned = tune(base, tmp_path / "tuned", f"{Q}.weight", "model.norm.weight")
    if rest == "refuse":
        with pytest.raises(IncompatibleModels, match=r"model\.norm\.weight changed and has no low-rank form"):
            extract(base, tuned, tmp_path / "out", rank=2, rest="refuse")
        assert not (tmp_path / "out").exists()
        return
    report = extract(base, tuned, tmp_path / "out", rank=2, rest=rest)  # type: ignore[arg-type]
    kept = rest == "save"
    assert report.whole == (("model.norm.weight",) if kept else ())
    assert dict(report.left_out) == ({} if kept else {"model.norm.weight": "no low-rank form"})
    found = merged(f"{base}+{tmp_path / 'out'}")["model.norm.weight"]
    assert torch.equal(found, weights(tuned if kept else base)["model.norm.weight"])


def test_a_tied_embedding_stays_tied(tied: Path, tmp_path: Path) -> None:
    """The one matrix changes for both of its names."""
    tuned = tune(tied, tmp_path / "tuned", "model.embed_tokens.weight", f"{Q}.weight")
    extract(tied, tuned, tmp_path / "out", rank=16, dtype="float64")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    close(merged(f"{tied}+{tmp_path / 'out'}"), weights(tuned), 1e-10)
    _peft_agrees(tied, tmp_path / "out", {"lm_head.weight": weights(tuned)["model.embed_tokens.weight"]})


def test_an_untied_head_over_a_tied_base(tied: Path, tmp_path: Path) -> None:
    """The fine-tune stores a head of its own: the adapter holds it, and base+adapter has both."""
    tensors = weights(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    tuned = write(tied, tmp_path / "tuned", tensors, tie_word_embeddings=False)
    extract(tied, tuned, tmp_path / "out", rank=2)
    close(merged(f"{tied}+{tmp_path / 'out'}"), tensors)


def test_a_larger_vocabulary(tied: Path, tmp_path: Path) -> None:
    """The whole embedding, the tokenizer beside it, and a note for PEFT's users."""
    tensors = weights(tied)
    tensors["model.embed_tokens.weight"] = torch.ones(44, 16, dtype=torch.float64)
    tuned = write(tied, tmp_path / "tuned", tensors, vocab_size=44)
    (tuned / "tokenizer_config.json").write_text("{}")
    report = extract(tied, tuned, tmp_path / "out", rank=2)
    assert "no linear layer changed" in report.notes[0]
    assert "another number of rows" in report.notes[1]
    close(merged(f"{tied}+{tmp_path / 'out'}"), tensors)


def test_conv1d(tmp_path: Path) -> None:
    """GPT-2's transposed layers, their biases, and LayerNorms whose gain and bias go together."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16)
    GPT2LMHeadModel(config).double().save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    attention, mlp = "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"
    changed = (f"{attention}.weight", f"{attention}.bias", f"{mlp}.weight", "transformer.h.0.ln_1.bias")
    tuned = tune(base, tmp_path / "tuned", *changed)
    report = extract(base, tuned, tmp_path / "out", rank=16, dtype="float64")
    assert {each.module: each.shape for each in report.layers} == {attention: (48, 16), mlp: (16, 64)}
    assert set(report.whole) == {f"{attention}.bias", "transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias"}
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["fan_in_fan_out"], said["bias"], said["modules_to_save"]) == (True, "all", ["transformer.h.0.ln_1"])
    close(merged(f"{base}+{tmp_path / 'out'}"), weights(tuned), 1e-10)
    _peft_agrees(base, tmp_path / "out")


def test_peft_reads_it(base: Path, tmp_path: Path) -> None:
    """PEFT's own load and merge of a whole extraction gives the same model."""
    extract(base, tune(base, tmp_path / "tuned"), tmp_path / "out", energy=0.9, dtype="float64")
    _peft_agrees(base, tmp_path / "out")
    from peft import AutoPeftModelForCausalLM

    # It takes the task's name for the class that loads the base.
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").active_adapter == "default"


def _peft_agrees(base: Path, adapter: Path, more: dict[str, torch.Tensor] | None = None) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: it would have to load this adapter")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    found = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for name, value in (merged(f"{base}+{adapter}") | (more or {})).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_prefix(tmp_path: Path) -> None:
    """Names on disk without the component that they have in memory; geomerge reads either."""
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        save_file({"h.0.fc.weight": torch.full((4, 3), value)}, tmp_path / f"{name}.safetensors")
    base, tuned = (tmp_path / f"{n}.safetensors" for n in ("base", "tuned"))
    extract(base, tuned, tmp_path / "out", rank=1, prefix="transformer.")
    assert f"{PREFIX}transformer.h.0.fc.lora_A.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")
    close(merged(f"{base}+{tmp_path / 'out'}"), {"h.0.fc.weight": torch.ones(4, 3, dtype=torch.float64)}, 1e-6)


def test_bfloat16(tmp_path: Path) -> None:
    """The difference of two bfloat16 models is taken exactly; rounding back gives the fine-tune's very bits."""
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    tuned = tune(base, tmp_path / "tuned", f"{Q}.weight")
    extract(base, tuned, tmp_path / "out", rank=16)
    found = merged(f"{base}+{tmp_path / 'out'}", "bfloat16")[f"{Q}.weight"]
    assert torch.equal(found, weights(tuned)[f"{Q}.weight"])


def test_threads_do_not_change_a_bit(base: Path, tmp_path: Path) -> None:
    """One thread or three."""
    tuned = tune(base, tmp_path / "tuned")
    for threads in (1, 3):
        extract(base, tuned, tmp_path / str(threads), rank=2, threads=threads)
    one, three = ((tmp_path / str(t) / "adapter_model.safetensors").read_bytes() for t in (1, 3))
    assert one == three


def test_refusals(base: Path, tied: Path, tmp_path: Path) -> None:
    """Neither rank nor energy, nothing to extract, other shapes, another architecture, NaN, an output in an input."""
    tuned = tune(base, tmp_path / "tuned", f"{Q}.weight")
    with pytest.raises(UsageError, match="neither a rank nor an energy"):
        extract(base, tuned, tmp_path / "out")
    with pytest.raises(UsageError, match="rest is 'keep'"):
        extract(base, tuned, tmp_path / "out", rank=1, rest="keep")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the same model"):
        extract(base, base, tmp_path / "out", rank=1)
    with pytest.raises(IncompatibleModels, match="nothing to extract"):
        extract(base, write(base, tmp_path / "copy", weights(base)), tmp_path / "out", rank=1)
    other = weights(base)
    other[f"{Q}.weight"] = torch.ones(16, 8)
    with pytest.raises(IncompatibleModels, match=r"shapes of .*q_proj"):
        extract(base, write(base, tmp_path / "other", other), tmp_path / "out", rank=1)
    del other[f"{Q}.weight"]
    with pytest.raises(IncompatibleModels, match=r"fewer has no .*q_proj"):
        extract(base, write(base, tmp_path / "fewer", other), tmp_path / "out", rank=1)
    bad = weights(tuned)
    bad[f"{UP}.weight"][0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match="up_proj"):
        extract(base, write(base, tmp_path / "bad", bad), tmp_path / "out", rank=1)
    with pytest.raises(UsageError, match="lies inside the input"):
        extract(base, tuned, tuned / "adapter", rank=1)
    assert not (tmp_path / "out").exists()
