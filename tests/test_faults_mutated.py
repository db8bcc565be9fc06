"""Thousands of damaged and hostile headers, indexes, configs and recipes: merged, or refused with a clear error; never more.

`make fault` tries 10,000, differently each time; the ordinary tests 300, always the same.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import geomerge as gm
import tiny

MANY = os.environ.get("GEOMERGE_FAULTS") == "many"
COUNT = int(os.environ.get("GEOMERGE_MUTATIONS", "10000" if MANY else "300")) // 4
bounded = settings(
    max_examples=COUNT, deadline=None, derandomize=not MANY, suppress_health_check=list(HealthCheck), database=None
)
RECIPE = """\
merge_method: ties
base_model: base
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: 0.5}}
  - {model: b, layer_range: [0, 2], parameters: {weight: [0.1, 1]}}
parameters:
  density:
  - {filter: self_attn, value: 0.5}
  - {block: 1, value: 0.3}
  - {value: 1}
  weight: 1
steps: [{scale: 1.0}]
dtype: bfloat16
out_dtype: float32
rounding: nearest
seed: 7
unmatched: refuse
"""

# What breaks readers of JSON and of YAML: numbers at the edges, other types, names that lead elsewhere.
NASTY: list[Any] = [
    None, True, 0, -1, 1, 2, 3, 8, 255, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 200, 0.5, -0.0, 1e308, 1e-320,
    float("inf"), float("nan"), "", "a", "b", "../b", "/etc/passwd", "b/../../x", "\0", "\ud800", "é" * 99, "model.safetensors",
    "F32", "BF16", "F8_E4M3", "I64", "BOOL", "C64", "llama", "gptq", [], {}, [[]], [0], [-1], [1 << 62, 0], [0, 1 << 62],
    [1 << 32, 1 << 32], [1] * 65, {"a": {}}, [{}], "${x}", "!!python/name:os.system", "~", "[0, 1]", "*", "(a+)+$",
]  # fmt: skip


@st.composite
def mutated_json(draw: st.DrawFn, good: Any) -> Any:
    """A JSON value with one to three of its places changed, removed, doubled or moved."""
    found = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(found))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        act = draw(st.sampled_from(["change", "change", "change", "remove", "double", "swap", "nest"]))
        if act == "change":
            holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif act == "remove":
            del holder[key]
        elif act == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif act == "double":
            holder[f"{key}x"] = copy.deepcopy(holder[key])
        elif act == "swap":
            other, at = draw(st.sampled_from(places))
            holder[key], other[at] = json.loads(json.dumps([other[at], holder[key]]))
        else:
            for _ in range(draw(st.sampled_from([1, 5, 300]))):
                holder[key] = [holder[key]]
    return found


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder with a key or index of it."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
            yield value, key
            yield from _places(inner)


@st.composite
def mutated_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes with one to four places flipped, cut out, doubled, or given other bytes."""
    found = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(found) - 1, 0)))
        length = draw(st.sampled_from([1, 1, 2, 7, 40]))
        act = draw(st.integers(0, 3))
        if act == 0 and found:
            found[at] = draw(st.integers(0, 255))
        elif act == 1:
            del found[at : at + length]
        elif act == 2:
            found[at:at] = found[at : at + length]
        else:
            token = draw(
                st.sampled_from(
                    [b"9" * 30, b"-1", b"null", b"{", b"]", b'"', b": ", b"\n", b"- ", b"&a ", b"*a ", b"\xff"]
                )
            )
            found[at : at + length] = token
    return bytes(found)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that are all right: base, a, and b in two files."""
    root = tmp_path_factory.mktemp("mutated")
    made = tiny.family(root, "base a", num_hidden_layers=2)
    tiny.llama(root / "b", 3, like=made["base"], shards=2, num_hidden_layers=2)
    tiny.llama(root / "c", 3, like=made["base"], num_hidden_layers=2)
    (root / "recipe.yml").write_text(RECIPE)
    return root


class Sandbox:
    """A working directory with the models, of which one file at a time is spoilt."""

    def __init__(self, good: Path) -> None:
        self.root = good
        self.before = self.look()
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def look(self) -> dict[str, tuple[int, int]]:
        """Everything that is there, with sizes and times."""
        return {
            str(p.relative_to(self.root)): (p.stat().st_size, p.stat().st_mtime_ns)
            for p in self.root.rglob("*")
            if p.is_file()
        }

    def attempt(self, file: str, content: bytes, recipe: str = "recipe.yml") -> None:
        """Merge with one file spoilt.

        The merge works, or raises a GeomergeError that says something; nothing but its output is made or changed, and what is
        refused leaves nothing; a gigabyte is never needed.
        """
        path = self.root / file
        kept = path.read_bytes()
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(content)
        try:
            refused = self._refusal(recipe)
            if refused is not None:
                assert len(refused.what) > 10
                assert "Traceback" not in str(refused)
                assert not (self.root / "out").exists()
            shutil.rmtree(self.root / "out", ignore_errors=True)
            shutil.rmtree(self.root / "out.partial", ignore_errors=True)
        finally:
            path.write_bytes(kept)
            os.utime(path, ns=times)
        assert self.look() == self.before
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory < 1_000_000

    @staticmethod
    def _refusal(recipe: str) -> gm.GeomergeError | None:
        try:
            gm.merge(recipe, "out", threads=1)
        except gm.GeomergeError as error:
            return error
        return None


@pytest.fixture(autouse=True)
def _there(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(good)


@pytest.fixture
def sandbox(good: Path) -> Sandbox:
    """One for each test."""
    return Sandbox(good)


def test_nothing_spoilt_merges(sandbox: Sandbox, good: Path) -> None:
    """The case that all others are damaged from is a merge that works."""
    gm.merge("recipe.yml", "out")
    assert len(tiny.read(good / "out")) == 21
    shutil.rmtree(good / "out")


@bounded
@given(data=st.data())
def test_headers(data: st.DataObject, sandbox: Sandbox) -> None:
    """Of a safetensors file: bytes, or the JSON with its length put right."""
    whole = (sandbox.root / "a" / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        header = json.dumps(data.draw(mutated_json(json.loads(whole[8 : 8 + length])))).encode()
        content = len(header).to_bytes(8, "little") + header + whole[8 + length :]
    else:
        content = data.draw(mutated_bytes(whole[: 8 + length])) + whole[8 + length :]
    sandbox.attempt("a/model.safetensors", content)


@bounded
@given(data=st.data())
def test_indexes(data: st.DataObject, sandbox: Sandbox) -> None:
    """Of a model in two files: names, places, paths that lead out."""
    _json_or_bytes(data, sandbox, "b/model.safetensors.index.json")


@bounded
@given(data=st.data(), model=st.sampled_from(["base", "a", "b"]))
def test_configs(data: st.DataObject, model: str, sandbox: Sandbox) -> None:
    """Depths, sizes, families and dtypes that are not what the tensors are."""
    _json_or_bytes(data, sandbox, f"{model}/config.json")


@bounded
@given(data=st.data())
def test_recipes(data: st.DataObject, sandbox: Sandbox) -> None:
    """As text, or as the JSON of its values, which is YAML too."""
    from ruamel.yaml import YAML

    if data.draw(st.booleans()):
        content = json.dumps(data.draw(mutated_json(YAML(typ="safe").load(RECIPE)))).encode()
    else:
        content = data.draw(mutated_bytes(RECIPE.encode()))
    sandbox.attempt("recipe.yml", content)


def _json_or_bytes(data: st.DataObject, sandbox: Sandbox, file: str) -> None:
    good = (sandbox.root / file).read_bytes()
    if data.draw(st.booleans()):
        content = json.dumps(data.draw(mutated_json(json.loads(good)))).encode()
    else:
        content = data.draw(mutated_bytes(good))
    sandbox.attempt(file, content)
