"""``geomerge inspect``: anatomy, checksums, and the search for NaN and Inf."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path

import pytest
import torch

from cli_samples import Program, weights, write_model
from geomerge.checkpoint import from_state_dict, open_checkpoint
from geomerge.engine.finite import NotFinite, find_not_finite, floating_bytes
from geomerge.methods.tile import SEGMENT


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program in this process, into a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return Program(capsys)


def test_the_page(run: Program, tmp_path: Path) -> None:
    """Family, size, vocabulary, tied weights, modules with roles, shapes by pattern, fingerprint."""
    write_model(tmp_path / "m", weights(0))
    code, out, err = run("inspect", tmp_path / "m")
    assert (code, err) == (0, "")
    flat = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert ["family", "llama"] in flat
    assert ["vocabulary", "32 rows (model.embed_tokens.weight)"] in flat
    assert ["tied", "lm_head.weight = model.embed_tokens.weight"] in flat
    assert ["numbers", "all finite"] in flat
    assert ["model.layers.{0-5}.mlp.up_proj.weight", "6", "16 × 8", "mlp"] in flat
    assert ["(the only one)", "6", "embedding", "1", "256"] in flat
    assert len(next(row for row in flat if row[0] == "fingerprint")[1]) == 64
    assert not any(row[0] == "sha256" for row in flat)
    assert "\x1b" not in out


def test_json(run: Program, tmp_path: Path) -> None:
    """The stable keys; the checksum is what sha256sum prints; without a scan nothing is said about NaN."""
    folder = write_model(tmp_path / "m", weights(0))
    code, out, err = run("inspect", folder, "--json", "--checksum", "--no-scan")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert set(said) == {
        "model", "path", "hub_id", "revision", "architectures", "model_type", "files", "bytes", "family", "guessed",
        "tensors", "parameters", "modules", "components", "dtypes", "tied", "stored_twice", "vocabulary", "buffers", "shapes",
        "quantization", "adapter", "undecodable", "fingerprint", "sha256", "not_finite",
    }  # fmt: skip
    assert said["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert said["not_finite"] is None
    assert said["dtypes"] == {"bfloat16": {"tensors": 32, "parameters": said["parameters"]}}


def test_nan_and_inf_are_code_3(run: Program, tmp_path: Path) -> None:
    """The page is printed all the same, each bad tensor with its counts; the error names the first."""
    tensors = weights(0)
    tensors["model.layers.2.mlp.up_proj.weight"][0, :3] = float("nan")
    tensors["model.layers.2.mlp.up_proj.weight"][1, 0] = float("-inf")
    tensors["model.norm.weight"][1] = float("inf")
    folder = write_model(tmp_path / "m", tensors)
    code, out, err = run("inspect", folder)
    assert code == 3
    assert re.search(r"^model\.layers\.2\.mlp\.up_proj\.weight +3 +1$", out, re.MULTILINE)
    assert re.search(r"^model\.norm\.weight +0 +1$", out, re.MULTILINE)
    assert "2 of 32 tensors hold NaN or Inf" in err
    code, out, _ = run("inspect", folder, "--json")
    assert code == 3
    assert json.loads(out)["not_finite"]["model.norm.weight"] == {"nan": 0, "inf": 1}
    assert run("inspect", folder, "--no-scan").code == 0


def test_a_model_that_is_not_there_is_code_3(run: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory without weights is refused with its path."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    code, out, err = run("inspect", tmp_path / "empty")
    assert (code, out) == (3, "")
    assert str(tmp_path / "empty") in err


def test_quantised_and_guessed_models_say_so(run: Program, tmp_path: Path) -> None:
    """Codes are named as such, and so is an architecture that no table knows."""
    config = {"model_type": "toy", "quantization_config": {"quant_method": "gptq"}}
    write_model(tmp_path / "m", {"layers.0.w": torch.ones(2), "layers.1.w": torch.ones(2)}, config)
    _, out, _ = run("inspect", tmp_path / "m")
    assert "quantised" in out
    assert "gptq: it cannot be merged: no codes of a known format are in it" in " ".join(out.split())
    assert "guessed from the tensors' names" in out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2])
def test_every_float_type_is_scanned(tmp_path: Path, dtype: torch.dtype) -> None:
    """One NaN at the end of a tensor is found in each type; integers are not read."""
    values = torch.ones(100_001)
    values[-1] = float("nan")
    folder = write_model(
        tmp_path / "m", {"good": torch.ones(3).to(dtype), "bad": values.to(dtype), "n": torch.arange(3)}
    )
    with open_checkpoint(str(folder)) as checkpoint:
        assert find_not_finite(checkpoint) == {"bad": NotFinite(nan=1)}
        assert floating_bytes(checkpoint) == 100_004 * dtype.itemsize


def test_memory_and_complex_numbers_are_scanned() -> None:
    """A state dict is scanned in place; a complex number is bad when one of its halves is."""
    tensors = {
        "c": torch.tensor([1 + 2j, complex(0, float("inf"))]),
        "f": torch.zeros(0),
        "g": torch.tensor(float("nan")),
    }
    assert find_not_finite(from_state_dict(tensors)) == {"c": NotFinite(inf=1), "g": NotFinite(nan=1)}


def test_large_values_are_not_taken_for_infinite_ones() -> None:
    """A sum that overflows float64 does not make its finite elements bad."""
    assert find_not_finite(from_state_dict({"x": torch.full((100,), 1e308, dtype=torch.float64)})) == {}


def test_the_scan_counts_every_byte_once() -> None:
    """Progress adds up to what was announced, also over several pieces of one tensor, and is never told twice at once."""
    tensors = {"large": torch.zeros(SEGMENT + 5, dtype=torch.bfloat16), **{f"s{i}": torch.zeros(7) for i in range(50)}}
    checkpoint = from_state_dict(tensors)
    seen: list[int] = []
    lock = threading.Lock()

    def advance(nbytes: int) -> None:
        assert lock.acquire(blocking=False)
        seen.append(nbytes)
        lock.release()

    before = torch.get_num_threads()
    assert find_not_finite(checkpoint, threads=4, advance=advance) == {}
    assert sum(seen) == floating_bytes(checkpoint) == checkpoint.nbytes
    assert torch.get_num_threads() == before
