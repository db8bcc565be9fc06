"""Merges of which the output's dtype does not hold all, and configurations that the weights contradict."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import geomerge as gm
import tiny
from geomerge.engine.loss import RESIDUE, RoundingLoss
from geomerge.methods import native

TA = """\
merge_method: task_arithmetic
base_model: {0}/base
dtype: {1}
models:
  - {{model: {0}/a, parameters: {{weight: {2}}}}}
"""
SWITCHES = (native.turned_off, contextlib.nullcontext)


@pytest.mark.parametrize(("dtype", "weight"), [("float16", 1e8), ("bfloat16", 1e300), ("float32", 1e300)])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_merge_beyond_the_dtype_is_refused(dtype: str, weight: float, switch: Any, tmp_path: Path) -> None:
    """Instead of a model of infinities; nothing is left of it."""
    tiny.family(tmp_path, "base a")
    text = TA.format(tmp_path, dtype, weight)
    with switch(), pytest.raises(gm.OutOfRange, match=f"beyond what {dtype} holds"):
        gm.merge(text, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


def test_one_element_beyond_float16(tmp_path: Path) -> None:
    """Anywhere, not only where the rounding's loss is sampled."""
    for name, value in (("base", 1.0), ("a", 1.0)):
        wide = torch.full((64, 4096), value, dtype=torch.float32)
        wide[40, 4000] = 1.0 if name == "base" else 60000.0
        (tmp_path / name).mkdir()
        save_file({"x": wide}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    gm.merge(TA.format(tmp_path, "float16", 1), tmp_path / "out")
    for switch in SWITCHES:
        with switch(), pytest.raises(gm.OutOfRange, match="float16"):
            gm.merge(TA.format(tmp_path, "float16", 2), tmp_path / "other")


def test_no_change_has_no_rounding_loss() -> None:
    """What float64 leaves of the mean of equal numbers is no change that rounding could take."""
    loss = RoundingLoss()
    before = np.linspace(0.1, 1, 100)
    loss.add_differences(before * (1 + 1e-16), before * 1e-16, -before * 1e-16)
    assert loss.share is None
    loss.add_differences(before + 1e-6, np.full(100, 1e-6), np.full(100, -1e-6))
    assert loss.share == pytest.approx(1)


@pytest.mark.skipif(not native.available(), reason="the compiled loops were not built")
@pytest.mark.parametrize("n", [1, 7, 8, 255, 256, 1000, 1024])
@pytest.mark.parametrize("step", [1e-3, 1e-17])
def test_the_loop_adds_up_the_same_rounding_loss(n: int, step: float) -> None:
    """To the last bit, with and without changes that are none but for float64's rounding."""
    random = np.random.default_rng(n)
    before = torch.from_numpy(random.standard_normal(n)).bfloat16()
    merged = before.double() * (1 + step * torch.from_numpy(random.random(n)))
    loss = RoundingLoss()
    loss.add(merged, merged.bfloat16(), before)
    found = native.change(native.in_memory(before), native.call.doubles(merged.tolist()), native.CODES["BF16"], RESIDUE)
    assert found == (loss.change, loss.error)


def test_configurations_that_contradict_are_told(tmp_path: Path) -> None:
    """Each other, or the weights beside them."""
    tiny.family(tmp_path, "base a b")
    assert not gm.plan(TA.format(tmp_path, "float32", 1)).notes

    def edit(name: str, **values: object) -> None:
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    config = json.loads((tmp_path / "a" / "config.json").read_text())
    edit("a", num_attention_heads=2 * config["num_attention_heads"], transformers_version="9.9")
    (note,) = gm.plan(TA.format(tmp_path, "float32", 1)).notes
    assert "numbers of attention heads differ" in note
    edit("base", num_hidden_layers=7, vocab_size=99_999)
    notes = gm.plan(TA.format(tmp_path, "float32", 1)).notes
    assert any("num_hidden_layers = 7, but 3 are stored" in n for n in notes), notes
    assert any("vocab_size = 99999" in n for n in notes)
