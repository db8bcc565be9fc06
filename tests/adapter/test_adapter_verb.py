"""``geomerge adapter`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_samples import factors, merged, write_adapter
from safetensors.torch import load_file, save_file

from cli_samples import Program

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two adapters of rank 2."""
    return [write_adapter(tmp_path / n, factors(Q, 16, 16, 2, i), "org/base") for i, n in enumerate("ab")]


def test_combine(run: Program, two: list[Path], tmp_path: Path) -> None:
    """The page, and a model card that names the hub's base."""
    code, out, err = run("adapter", "combine", *two, "--weights", "0.3,0.7", "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert "2 adapters combined by linear" in said
    assert f"{Q} 16 × 16 4" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/base\nlibrary_name: peft\n")


def test_combine_one(run: Program, two: list[Path], tmp_path: Path) -> None:
    """One adapter is not several."""
    code, out, _ = run("adapter", "combine", two[0], "--out", tmp_path / "out")
    assert code == 0
    assert "1 adapter combined by linear" in " ".join(out.split())


def test_combine_as_json(run: Program, two: list[Path], tmp_path: Path) -> None:
    """One object; parameters of the method reach it; geomerge.json tells the same and has no path in it."""
    words = ("--method", "ties", "--set", "density=0.5,0.4", "--set", "normalize=false", "--rank", 3, "--json")
    code, out, err = run("adapter", "combine", *two, *words, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert [(each["module"], each["rank"]) for each in said["layers"]] == [(Q, 3)]
    assert said["relative_error"] > 0
    record = (tmp_path / "out" / "geomerge.json").read_text()
    kept = json.loads(record)
    assert kept["method"]["parameters"]["density"] == [0.5, 0.4]
    assert kept["method"]["parameters"]["normalize"] is False
    assert [each["name"] for each in kept["adapters"]] == ["a", "b"]
    assert {k: kept[k] for k in said if k != "out"} == {k: v for k, v in said.items() if k != "out"}
    assert str(tmp_path) not in record


def test_extract(run: Program, base: Path, tmp_path: Path) -> None:
    """From a fine-tune to an adapter and back, and --force replaces it."""
    tensors = load_file(base / "model.safetensors")
    tensors[f"{Q}.weight"] += torch.outer(torch.arange(16.0), torch.ones(16)).double()
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    save_file(tensors, tuned / "model.safetensors")
    (tuned / "config.json").write_text((base / "config.json").read_text())
    code, out, err = run("adapter", "extract", base, tuned, "--energy", 0.999, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "1 layer, rank 1 to 1" in " ".join(out.split())
    found = merged(f"{base}+{tmp_path / 'out'}")[f"{Q}.weight"]
    torch.testing.assert_close(found, tensors[f"{Q}.weight"], rtol=1e-5, atol=1e-5)
    words = ("adapter", "extract", base, tuned, "--rank", 1, "--out", tmp_path / "out")
    code, _, err = run(*words)
    assert (code, "the output exists" in err) == (2, True)
    assert run(*words, "--force").code == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("combine", "{0}/a", "{0}/b", "--set", "density", "-o", "{0}/o"), 2, "not of the form NAME=VALUE"),
        (("combine", "{0}/a", "{0}/b", "--weights", "1,,2", "-o", "{0}/o"), 2, "empty value"),
        (("combine", "{0}/a", "{0}/b", "--weights", "1,2,3", "-o", "{0}/o"), 2, "3 values for 2 models"),
        (("combine", "{0}/a", "{0}/b", "--method", "tise", "-o", "{0}/o"), 2, "ties"),
        (("combine", "{0}/a", "{0}/none", "-o", "{0}/o"), 3, "no such file"),
        (("combine", "{0}/a", "{0}/b", "--dtype", "int8", "-o", "{0}/o"), 2, "int8"),
        (("combine", "{0}/a", "{0}/b", "-o", "{0}/a"), 2, "is the input"),
        (("extract", "{0}/a", "{0}/b", "-o", "{0}/o"), 2, "neither a rank nor an energy"),
    ],
)
def test_mistakes(run: Program, two: list[Path], tmp_path: Path, words: tuple[str, ...], code: int, says: str) -> None:
    """Each gets a sentence and its exit code, and leaves nothing behind."""
    found = run("adapter", *(w.format(tmp_path) for w in words))
    assert found.code == code
    assert says in found.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_interrupted(run: Program, two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while layers are made leaves nothing."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("geomerge.adapter.combine._Work.make", interrupt)
    code, _, err = run("adapter", "combine", *two, "--out", tmp_path / "out")
    assert (code, "interrupted" in err) == (130, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
