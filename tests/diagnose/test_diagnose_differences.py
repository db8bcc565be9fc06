"""Differences in words, and models that cannot be compared at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diagnose_samples import reconfigure

import geomerge as gm
import tiny
from geomerge.diagnose import diagnose
from geomerge.diagnose.differences import Difference
from geomerge.errors import IncompatibleModels, UsageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A base and two fine-tunes."""
    tiny.family(tmp_path, "base a b")
    return tmp_path


def unlike(root: Path) -> dict[str, Difference]:
    """The differences by subject."""
    return {d.subject: d for d in diagnose(root / "a", root / "b").pairs[0].differences}


def test_no_difference(root: Path) -> None:
    """Only the missing tokenizers are worth a note."""
    assert set(unlike(root)) == {"tokenizer"}


def test_config_in_words(root: Path) -> None:
    """Rope, epsilon, activation and context are named with both values and what to do."""
    reconfigure(root / "a", rope_theta=10000.0)
    reconfigure(
        root / "b", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, rms_norm_eps=1e-5, hidden_act="gelu",
        max_position_embeddings=128, eos_token_id=2,
    )  # fmt: skip
    found = unlike(root)
    assert found["rope"].what == "the rotary position embeddings differ: base 10000 in a, base 1e+06 in b"
    assert found["rope"].severity == found["hidden_act"].severity == "warning"
    assert "silu in a, gelu in b" in found["hidden_act"].what
    assert "1e-06 in a, 1e-05 in b" in found["norm_eps"].what
    assert found["max_position_embeddings"].severity == found["eos_token_id"].severity == "note"
    assert all(d.advice for d in found.values())


def test_spelling_is_no_difference(root: Path) -> None:
    """Old and new spellings of the same rope, dtype and provenance."""
    reconfigure(root / "a", rope_theta=10000.0, torch_dtype="float32", dtype=None, _name_or_path="x")
    reconfigure(root / "b", rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    assert set(unlike(root)) == {"tokenizer"}


def test_other_heads_block(root: Path) -> None:
    """The same matrices cut into other heads are not merged."""
    reconfigure(root / "b", num_attention_heads=4, head_dim=4)
    found = diagnose(root / "a", root / "b")
    assert found.pairs[0].differences[0].severity == "blocking"
    assert found.decision.mode == "do_not_merge"


def test_dtype_and_ties(root: Path) -> None:
    """Another number format; a head of its own in one of them."""
    tensors = tiny.read(root / "b")
    kept = {n: t.to(torch.bfloat16) for n, t in tensors.items() if n != "lm_head.weight"}
    shutil.rmtree(root / "b")
    tiny.save(root / "b", kept, tiny.LLAMA | {"tie_word_embeddings": True})
    found = unlike(root)
    assert "float32 in a, bfloat16 in b" in found["dtype"].what
    assert found["tied weights"].what == "only b ties its head to its embedding"
    gm.merge(diagnose(root / "a", root / "b").recipe(), root / "out")
    # The head is compared with what the other uses as one.
    assert "lm_head.weight" in {t.name for t in diagnose(root / "a", root / "b").pairs[0].angles.tensors}


def test_lacking_tensors(root: Path) -> None:
    """A tensor that only one has is named, and the recipe copies it."""
    extra = tiny.read(root / "b") | {"value_head.weight": torch.ones(1, 16)}
    tiny.save(root / "b", extra, tiny.LLAMA)
    found = diagnose(root / "a", root / "b")
    assert dict(found.skipped) == {"value_head.weight": ("a",)}
    assert any("a lacks 1 tensor" in d.what for d in found.pairs[0].differences)
    assert "unmatched: copy" in found.recipe()
    gm.merge(found.recipe(), root / "out")
    assert torch.equal(tiny.read(root / "out")["value_head.weight"], torch.ones(1, 16))


def test_different_architectures(root: Path) -> None:
    """Depth, width, names: each a clear error."""
    tiny.llama(root / "deep", 5, num_hidden_layers=4)
    tiny.llama(root / "wide", 5, hidden_size=32)
    tiny.save(root / "other", {"encoder.0.w": torch.ones(3, 3)})
    for name, said in (("deep", "3 blocks"), ("wide", "different shapes"), ("other", "different architectures")):
        with pytest.raises(IncompatibleModels, match=said):
            diagnose(root / "a", root / name)
    config = {"model_type": "mamba", "num_hidden_layers": 5}
    tiny.save(root / "mamba", {f"backbone.layers.{i}.w": torch.ones(3, 3) for i in range(5)}, config)
    with pytest.raises(IncompatibleModels, match=r"llama with 3 blocks.*mamba with 5 blocks") as caught:
        diagnose(root / "a", root / "mamba")
    assert "slices" not in str(caught.value)
    with pytest.raises(IncompatibleModels, match=r"the base deep has 4 blocks"):
        diagnose(root / "a", root / "b", base=root / "deep")


def test_wrong_calls(root: Path) -> None:
    """Fewer than two models, one twice, a base that is a parent, an unknown specialist."""
    with pytest.raises(UsageError, match="at least two"):
        diagnose(root / "a")
    with pytest.raises(UsageError, match="same model"):
        diagnose(root / "a", root / "b" / ".." / "a")
    with pytest.raises(UsageError, match="task vector is zero"):
        diagnose(root / "a", root / "b", base=root / "a")
    with pytest.raises(UsageError, match="none of the models"):
        diagnose(root / "a", root / "b", specialist="c")


def test_copies_are_near_duplicates(root: Path) -> None:
    """A copy under another name is no error: there is nothing to gain."""
    shutil.copytree(root / "a", root / "copy")
    found = diagnose(root / "a", root / "copy")
    assert found.pairs[0].score.omega_bar == 0
    assert found.decision.mode == "near_duplicate"


def test_specialist_by_distance(root: Path) -> None:
    """Who moved much farther from the base is a specialist."""
    base = tiny.read(root / "base")
    shapes = {n: tuple(t.shape) for n, t in base.items()}
    tiny.save(root / "far", tiny.random_tensors(shapes, 9, like=base, step=0.3), tiny.LLAMA)
    found = diagnose(root / "a", root / "far", base=root / "base")
    assert any("far is a specialist" in w for w in found.decision.warnings)
    assert found.base_angles[1] > 3 * found.base_angles[0]
    assert not any("specialist" in w for w in diagnose(root / "a", root / "b", base=root / "base").decision.warnings)
