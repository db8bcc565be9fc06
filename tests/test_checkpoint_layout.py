"""Where the output's tensors lie: known beforehand, readable by the safetensors library, aligned, deterministic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint_samples import write
from geomerge.checkpoint.dtypes import DTYPES, to_torch
from geomerge.checkpoint.header import read_header
from geomerge.checkpoint.layout import Layout, parse_size, plan_layout
from geomerge.errors import UsageError


def fill(layout: Layout, folder: Path) -> None:
    """Write the layout's files with zeros as data."""
    for file in layout.files:
        write(folder / file.name, file.header + b"\0" * (file.size - len(file.header)))


def test_one_file(tmp_path: Path) -> None:
    """Names, shapes, dtypes and order are those given; the metadata always says pt."""
    layout = plan_layout([("b", "BF16", (2, 3)), ("a", "F32", ()), ("e", "F32", (0, 4))], metadata={"by": "geomerge"})
    [file] = layout.files
    assert (file.name, layout.nbytes, layout.index()) == ("model.safetensors", 16, None)
    assert len(file.header) % 4096 == 0
    assert layout.place["b"] == (0, len(file.header), 12)
    assert layout.place["a"] == (0, len(file.header) + 12, 4)
    assert layout.place["e"] == (0, len(file.header) + 16, 0)
    assert layout.size == file.size == len(file.header) + 16
    fill(layout, tmp_path)
    _, tensors, metadata = read_header(tmp_path / file.name)
    assert [t.name for t in tensors] == ["b", "a", "e"]
    assert metadata == {"format": "pt", "by": "geomerge"}


def test_shards_and_index() -> None:
    """A shard is closed when the next tensor would not fit; a tensor larger than a shard has its own file."""
    tensors = [("a", "F32", (2,)), ("b", "F32", (1,)), ("c", "F32", (9,)), ("d", "F32", (1,)), ("e", "F32", (2,))]
    layout = plan_layout(tensors, shard_size=12)
    assert [file.name for file in layout.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert {name: place.file for name, place in layout.place.items()} == {"a": 0, "b": 0, "c": 1, "d": 2, "e": 2}
    index = layout.index()
    assert index is not None
    assert index["metadata"] == {"total_size": 60}
    assert index["weight_map"]["c"] == "model-00002-of-00003.safetensors"
    assert list(index["weight_map"]) == ["a", "b", "c", "d", "e"]


def test_order_gives_way_only_to_alignment() -> None:
    """A float32 after three bytes would lie unaligned: then, and only then, wide elements come first."""
    kept = plan_layout([("flag", "BOOL", (4,)), ("w", "F32", (1,))])
    assert list(kept.place) == ["flag", "w"]
    moved = plan_layout([("flag", "BOOL", (3,)), ("h", "BF16", (1,)), ("w", "F32", (1,)), ("v", "F32", (1,))])
    assert list(moved.place) == ["w", "v", "h", "flag"]


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
cases = st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(case=cases, shard_size=st.integers(1, 300))
def test_any_layout_is_a_model_that_safetensors_loads(
    tmp_path_factory: pytest.TempPathFactory, case: list[tuple[str, tuple[int, ...]]], shard_size: int
) -> None:
    """Random tensors in random shards: the library reads each file, every element is aligned, nothing is lost."""
    tensors = [(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(case)]
    layout = plan_layout(tensors, shard_size)
    assert layout == plan_layout(tensors, shard_size)
    folder = tmp_path_factory.mktemp("layout")
    fill(layout, folder)
    loaded = {name: t for file in layout.files for name, t in load_file(folder / file.name).items()}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in loaded.items()} == {n: (to_torch(d), s) for n, d, s in tensors}
    for name, dtype, _ in tensors:
        assert layout.place[name].offset % DTYPES[dtype].itemsize == 0


def test_names_beyond_ascii_and_quotes(tmp_path: Path) -> None:
    """Whatever a parent called a tensor is written so that it is read back the same."""
    layout = plan_layout([('a"\\ä\n🙂', "F32", (1,))])
    fill(layout, tmp_path)
    assert list(load_file(tmp_path / "model.safetensors")) == ['a"\\ä\n🙂']


def test_header_stays_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Very many tensors open a new shard before the header becomes too long to be read."""
    monkeypatch.setattr("geomerge.checkpoint.layout.HEADER_LIMIT", 10_000)
    layout = plan_layout([(f"t{i}", "F32", (1,)) for i in range(300)])
    assert len(layout.files) > 1
    assert all(len(file.header) < 10_000 for file in layout.files)


def test_layout_refuses_nonsense() -> None:
    """No tensors, a name twice, a shard of nothing."""
    with pytest.raises(UsageError, match="no tensors"):
        plan_layout([])
    with pytest.raises(UsageError, match="'a' would be written twice"):
        plan_layout([("a", "F32", (1,)), ("b", "F32", (1,)), ("a", "F32", (1,))])
    with pytest.raises(UsageError, match="shard size"):
        plan_layout([("a", "F32", (1,))], shard_size=0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("200MB", 2 * 10**8),
        ("2GiB", 2 << 30),
        ("1.5G", 1_500_000_000),
        ("64k", 64_000),
        ("1TiB", 1 << 40),
        ("12345", 12345),
        (5_000_000_000, 5_000_000_000),
        ("5_000", 5000),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    """Decimal and binary units, plain numbers."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5B", "GB", "-1GB", "0", "0GB", "5XB", "five", "1e9", "5GB extra"])
def test_sizes_that_are_none(text: str) -> None:
    """5B is refused: five bytes, or the five billion that another tool means by it?"""
    with pytest.raises(UsageError, match=r"size|could mean") as caught:
        parse_size(text)
    assert caught.value.exit_code == 2


def test_index_is_json() -> None:
    """The index goes through json unchanged."""
    index = plan_layout([("a", "F32", (2,)), ("b", "F32", (2,))], shard_size=8).index()
    assert json.loads(json.dumps(index)) == index
