"""What people read of a merge of adapters of one base: each by its own name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapter_samples import factors, write_adapter

import geomerge
from cli_samples import Program
from geomerge.report import build, read_inputs
from geomerge.report.coefficients import read_coefficients
from geomerge.report.runs import read_run

Q = "model.layers.0.self_attn.q_proj"
NAMES = ["llama", "llama+lora-0", "llama+lora-1", "llama+lora-2"]


@pytest.fixture
def adapters(base: Path, tmp_path: Path) -> list[Path]:
    """Three adapters that name their base."""
    return [write_adapter(tmp_path / f"lora-{i}", factors(Q, 16, 16, 2, i), str(base)) for i in range(3)]


def merged(method: str, base: Path, adapters: list[Path], out: Path) -> Path:
    """A merge with the weights 0.4, 0.3, 0.3."""
    models = [
        {"model": str(path), "parameters": {"weight": w}} for path, w in zip(adapters, (0.4, 0.3, 0.3), strict=True)
    ]
    geomerge.merge(json.dumps({"merge_method": method, "base_model": str(base), "models": models}) + "\n", out)
    return out


def test_continued_merge(run: Program, base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """The state's experts, its card and what the program says."""
    code, out, _ = run("continue", tmp_path / "state", *adapters, "--base", base)
    assert code == 0
    assert "3, the last is llama+lora-2" in " ".join(out.split())
    state = json.loads((tmp_path / "state" / "continual" / "state.json").read_text())
    assert [state["base"]["model"], *(each["model"] for each in state["experts"])] == NAMES
    card = (tmp_path / "state" / "README.md").read_text()
    assert card.index("1. `llama+lora-0`") < card.index("2. `llama+lora-1`") < card.index("3. `llama+lora-2`")
    code, _, err = run("continue", tmp_path / "state", adapters[1])
    assert code == 2
    assert "is in this state already, as llama+lora-1" in " ".join(err.split())


def test_report(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """The parents, the headline and whose the coefficients are."""
    place = merged("task_arithmetic", base, adapters, tmp_path / "out")
    run = read_run(place)
    assert sorted(run.parents) == NAMES
    page = build(read_inputs([place])).html()
    assert all(name in page for name in NAMES)
    (found,) = read_coefficients(run)
    titles = {g.title: {round(v, 12) for v in g.values.values()} for g in found.grids if g.title != "llama"}
    assert titles == {"llama+lora-0": {0.4}, "llama+lora-1": {0.3}, "llama+lora-2": {0.3}}


def test_coefficients_of_some_tensors(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """KnOTS has coefficients where there is no matrix, and the report says of how many tensors they are told."""
    place = merged("knots", base, adapters, tmp_path / "out")
    run = read_run(place)
    entries = run.manifest["tensors"].values()
    told, all_of_them = sum("coefficients" in e for e in entries), sum("method" in e for e in entries)
    assert 0 < told < all_of_them
    page = build(read_inputs([place])).html()
    assert f"0.1 llama+lora-2 in {told} of {all_of_them} tensors" in page
    assert "in every tensor" not in page
