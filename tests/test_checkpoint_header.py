"""Hostile and broken safetensors files: each is refused with one clear error, none is believed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint_samples import ENTRY, floats, raw, write
from geomerge.checkpoint.header import HEADER_LIMIT, TensorInfo, read_header
from geomerge.errors import DamagedCheckpoint, ModelError


def entry(**changes: Any) -> dict[str, Any]:
    """The entry of two float32 numbers at the data's beginning, with changes."""
    return {**ENTRY, **changes}


EIGHT = b"\0" * 8
TWO = json.dumps(ENTRY)
BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "header of gigabytes": (raw("{}", length=1 << 40), "at most 100,000,000"),
    "header length of all ones": (b"\xff" * 16, "at most"),
    "header beyond the end": (raw("{}", length=3), "claims 3 bytes, but the file ends after 2"),
    "no header": (raw(""), "does not begin with '{'"),
    "a list": (raw("[]"), "does not begin with '{'"),
    "white space first": (raw(" {}"), "does not begin with '{'"),
    "not JSON": (raw("{nonsense}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "text after the object": (raw("{} {}"), "not valid JSON"),
    "nested without end": (raw('{"a":' + "[" * 200_000), "nested too deeply"),
    "a number of 5000 digits": (raw('{"a":' + "9" * 5000 + "}"), "not valid JSON"),
    "NaN": (raw('{"a": NaN}'), "NaN is not JSON"),
    "a tensor twice": (raw(f'{{"a": {TWO}, "a": {TWO}}}', EIGHT), "'a' is given twice"),
    "a shape twice": (
        raw('{"a": {"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,8]}}', EIGHT),
        "'shape' is given twice",
    ),
    "a name of half a character": (raw('{"\\ud800": ' + TWO + "}", EIGHT), "not valid Unicode"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata as a list": (raw({"__metadata__": []}), "__metadata__"),
    "an entry that is a number": (raw({"a": 7}, EIGHT), "described by int"),
    "an entry that is null": (raw({"a": None}, EIGHT), "described by NoneType"),
    "no dtype": (raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "has no dtype"),
    "no shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), "has no shape"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "has no data_offsets"),
    "unknown dtype": (raw({"a": entry(dtype="F33")}, EIGHT), "unknown dtype 'F33'"),
    "dtype of half a byte": (raw({"a": entry(dtype="F4", shape=[16])}, EIGHT), "unknown dtype 'F4'"),
    "dtype as a list": (raw({"a": entry(dtype=[])}, EIGHT), "unknown dtype"),
    "negative shape": (raw({"a": entry(shape=[-2])}, EIGHT), "impossible shape"),
    "two negatives with the right product": (raw({"a": entry(shape=[-1, -2])}, EIGHT), "impossible shape"),
    "fractional shape": (raw({"a": entry(shape=[2.0])}, EIGHT), "impossible shape"),
    "boolean shape": (raw({"a": entry(shape=[2, True])}, EIGHT), "impossible shape"),
    "shape beyond 63 bits": (raw({"a": entry(shape=[1 << 63, 0])}, EIGHT), "impossible shape"),
    "shape as a string": (raw({"a": entry(shape="2")}, EIGHT), "has the shape '2'"),
    "shape as an empty object": (raw({"a": entry(shape={})}, EIGHT), "has the shape {}"),
    "a hundred dimensions": (raw({"a": entry(shape=[1] * 99 + [2])}, EIGHT), "100 dimensions"),
    "negative offset": (raw({"a": entry(data_offsets=[-8, 0])}, EIGHT), "has the offsets -8, 0"),
    "offsets in reverse": (raw({"a": entry(data_offsets=[8, 0])}, EIGHT), "has the offsets 8, 0"),
    "three offsets": (raw({"a": entry(data_offsets=[0, 4, 8])}, EIGHT), "has the data_offsets"),
    "offsets as text": (raw({"a": entry(data_offsets=["0", "8"])}, EIGHT), "has the offsets"),
    "fractional offset": (raw({"a": entry(data_offsets=[0, 8.0])}, EIGHT), "has the offsets"),
    "offsets beyond the end": (raw({"a": entry()}, b"\0" * 7), "ends at byte 8 of the data, but the file has only 7"),
    "shape too large for its bytes": (raw({"a": entry(shape=[3])}, EIGHT), r"\[3\] of F32 needs 12 bytes"),
    "overlap": (
        raw({"a": entry(), "b": entry(data_offsets=[4, 12])}, b"\0" * 12),
        "'a' and 'b' overlap: bytes 4 to 8",
    ),
    "the same bytes twice": (raw({"a": entry(), "b": entry()}, EIGHT), "overlap"),
    "a hole": (raw({"a": entry(), "b": entry(data_offsets=[12, 20])}, b"\0" * 20), "bytes 8 to 12 .* belong to no"),
    "a hole at the beginning": (raw({"a": entry(data_offsets=[4, 12])}, b"\0" * 12), "bytes 0 to 4"),
    "bytes beyond the last tensor": (raw({"a": entry()}, b"\0" * 9), "but the file has 9"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_file_is_refused(tmp_path: Path, name: str) -> None:
    """A file with one defect gives a DamagedCheckpoint that names the file and the defect."""
    content, message = BAD[name]
    path = write(tmp_path / "model.safetensors", content)
    with pytest.raises(DamagedCheckpoint, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """A good file cut at any byte is never accepted."""
    whole = floats(a=[1.0, 2.0], b=[3.0])
    for length in range(len(whole)):
        path = write(tmp_path / "cut.safetensors", whole[:length])
        with pytest.raises(DamagedCheckpoint):
            read_header(path)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 199), value=st.integers(0, 255))
def test_a_changed_byte_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    """Whatever one byte becomes, the file is read within its bounds or refused; nothing else is raised."""
    content = bytearray(floats(a=[1.0, 2.0], b=[3.0]))
    content[position % len(content)] = value
    path = write(tmp_path_factory.getbasetemp() / "flipped.safetensors", bytes(content))
    try:
        _, tensors, _ = read_header(path)
    except DamagedCheckpoint:
        return
    assert sum(t.nbytes for t in tensors) == 12
    assert all(t.offset + t.nbytes <= len(content) for t in tensors)


def test_good_file_is_read_as_written(tmp_path: Path) -> None:
    """Offsets are absolute, tensors come in the order of their bytes, the hash covers length and header."""
    header = {
        "__metadata__": {"format": "pt"},
        "second": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [8, 20]},
        "first": ENTRY,
        "empty": {"dtype": "F32", "shape": [0, 5], "data_offsets": [20, 20]},
        "scalar": {"dtype": "I64", "shape": [], "data_offsets": [20, 28]},
    }
    path = write(tmp_path / "m.safetensors", raw(header, b"\0" * 28))
    info, tensors, metadata = read_header(path)
    start = len(raw(header))
    assert tensors == [
        TensorInfo("first", "F32", (2,), path, start, 8),
        TensorInfo("second", "BF16", (2, 3), path, start + 8, 12),
        TensorInfo("empty", "F32", (0, 5), path, start + 20, 0),
        TensorInfo("scalar", "I64", (), path, start + 20, 8),
    ]
    assert metadata == {"format": "pt"}
    assert info.size == start + 28
    assert info.header_sha256 == hashlib.sha256(raw(header)).hexdigest()


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    """A file of the library itself, padding and all."""
    path = tmp_path / "m.safetensors"
    save_file({"ä": torch.ones(3, dtype=torch.bool), "w": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
    _, tensors, _ = read_header(path)
    assert {t.name: (t.dtype, t.shape) for t in tensors} == {"ä": ("BOOL", (3,)), "w": ("BF16", (2, 2))}


def test_header_at_the_limit_is_not_refused_for_its_size(tmp_path: Path) -> None:
    """The limit is the library's own; a claim of one byte more is refused before anything is read."""
    path = write(tmp_path / "m.safetensors", raw("{}", length=HEADER_LIMIT))
    with pytest.raises(DamagedCheckpoint, match="but the file ends"):
        read_header(path)
    path = write(tmp_path / "m.safetensors", raw("{}", length=HEADER_LIMIT + 1))
    with pytest.raises(DamagedCheckpoint, match="at most"):
        read_header(path)


def test_pipe_and_directory_are_refused_without_waiting(tmp_path: Path) -> None:
    """A named pipe under a weight file's name would block an ordinary open for ever."""
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(DamagedCheckpoint, match="not a regular file"):
            read_header(path)


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(ModelError, match="No such file"):
        read_header(tmp_path / "gone.safetensors")


def test_hundred_thousand_tensors_are_quick(tmp_path: Path) -> None:
    """Reading and checking scales to unfused mixtures of experts. (Half a second when written; the bound is loose.)"""
    header = {
        f"model.layers.{i // 400}.mlp.experts.{i % 400}.w.weight": {
            "dtype": "BF16",
            "shape": [2, 2],
            "data_offsets": [8 * i, 8 * i + 8],
        }
        for i in range(100_000)
    }
    path = write(tmp_path / "m.safetensors", raw(header, b"\0" * 800_000))
    begin = time.process_time()
    _, tensors, _ = read_header(path)
    assert len(tensors) == 100_000
    assert time.process_time() - begin < 3
