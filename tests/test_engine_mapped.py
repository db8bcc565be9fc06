"""Inputs mapped into memory: what loops see there, what becomes of files that are cut short, and how long mappings last."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import geomerge as gm
import tiny
from geomerge.checkpoint import Checkpoint, open_checkpoint
from geomerge.engine import memory, sources
from geomerge.engine.sources import FileSource
from geomerge.methods import native
from geomerge.methods.native import mapped

pytestmark = pytest.mark.skipif(not native.available(), reason="there are no compiled loops")
SHAPE = (300, 1000)  # more than are held


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(str(tiny.save(tmp_path / "m", tensors(1))))


def tensors(seed: int) -> dict[str, Tensor]:
    return tiny.random_tensors({"model.a": SHAPE, "model.b": SHAPE, "model.norm": (7,)}, seed, dtype=torch.bfloat16)


def source(model: Checkpoint, name: str) -> FileSource:
    return FileSource(model, model.tensors[name], name).mapped()


def loaded(found: FileSource, start: int = 0, count: int = 300_000) -> np.ndarray:
    stored = found.stored()
    assert stored is not None
    assert stored.memory
    return native.load(stored.at(start), count)


def test_the_same_elements(model: Checkpoint) -> None:
    """Of every tensor, wherever it begins in the file; as they are read."""
    for name, values in tensors(1).items():
        assert np.array_equal(loaded(source(model, name), 0, values.numel()), values.flatten().double().numpy())
        assert np.array_equal(loaded(source(model, name), 3, 2), values.flatten()[3:5].double().numpy())


@pytest.mark.parametrize("left", [4096 * 100, 4096 * 100 + 1000, 610_000])
def test_a_file_that_is_cut_short(left: int, model: Checkpoint) -> None:
    """At the end of a page, and within one, behind which there are zeros: an error; what other files hold is as it was."""
    found = source(model, "model.b")
    path = model.files[0].path
    loaded(found)
    os.truncate(path, path.stat().st_size - left)
    for _ in range(2):  # the pages are zeros then
        with pytest.raises(gm.RunError, match=r"model\.b.*the file ended early"):
            loaded(found)
    with open_checkpoint(str(tiny.save(path.parent.parent / "n", tensors(2)))) as other:
        loaded(source(other, "model.b"))


def test_a_page_that_cannot_be_read(model: Checkpoint) -> None:
    """The size is as it was, as where the drive is gone for a moment."""
    found = source(model, "model.b")
    path = model.files[0].path
    size = path.stat().st_size
    os.truncate(path, 1000)
    with pytest.raises(gm.RunError, match=r"model\.b.*the file ended early"):
        loaded(found)
    os.truncate(path, size)
    with pytest.raises(gm.RunError, match=r"model\.b.*reading failed: Input/output error"):
        loaded(found)


def test_a_merge_whose_input_is_cut_short(tmp_path: Path) -> None:
    """While it is measured: the model is named, the process lives, and nothing has the output's name."""
    for k, name in enumerate(("base", "a", "b")):
        tiny.save(tmp_path / name, tensors(k))
    models = f"base_model: {tmp_path}/base\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\n"
    recipe = f"merge_method: ties\n{models}parameters: {{density: 0.5, weight: 1}}\n"
    code = f"""
import os, geomerge as gm
from geomerge.methods import native
survey = native.survey
def cut(*arguments, **options):
    os.truncate({str(tmp_path / "b" / "model.safetensors")!r}, 2000)
    return survey(*arguments, **options)
native.survey = cut
try:
    gm.merge({recipe!r}, {str(tmp_path / "out")!r}, executor="threads")
except gm.RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the file ended early" in done.stdout
    assert str(tmp_path / "b") in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize("before", ["default", "ignored", "handled"])
def test_bus_errors_of_others(before: str, sent: bool, model: Checkpoint, tmp_path: Path) -> None:
    """What is done about them is what it was, whether a page is missing or somebody sends the signal. Ours are seen then."""
    other = tmp_path / "other"
    other.write_bytes(b"1" * 8192)
    path = str(model.files[0].path)
    set_up = {
        "default": "",
        "ignored": "signal.signal(signal.SIGBUS, signal.SIG_IGN)",
        "handled": "faulthandler.enable()",
    }
    code = f"""
import faulthandler, mmap, os, signal
{set_up[before]}
from geomerge.methods.native import mapped
import ctypes
with open({path!r}, "rb") as file, open({str(other)!r}, "rb") as second:
    kept = mapped.mapped(file.fileno(), 8192)
    assert kept is not None
    found = mmap.mmap(second.fileno(), 8192, prot=mmap.PROT_READ)
    os.truncate({str(other)!r}, 0)
    {"os.kill(os.getpid(), signal.SIGBUS)" if sent else "found[5000]"}
    os.truncate({path!r}, 0)
    assert ctypes.string_at(kept.address + 5000, 1) == bytes(1)
    assert kept.error == 0
    print("lives")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    if sent and before == "ignored":
        assert done.stdout == "lives\n", done.stderr
    else:
        assert done.returncode == -signal.SIGBUS
        assert ("Fatal Python error" in done.stderr) == (before == "handled")


def test_mappings_last_as_long_as_the_files_are_open(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the collector, which is paused during a merge; all of a file's tensors are in the same one."""
    known: list[weakref.ref[mapped.Mapping]] = []

    def kept(file: int, size: int) -> mapped.Mapping | None:
        found = mapped.mapped(file, size)
        assert found is not None
        known.append(weakref.ref(found))
        return found

    monkeypatch.setattr(sources, "mapped", kept)
    gc.disable()
    try:
        first, second = source(model, "model.a"), source(model, "model.b")
        loaded(first), loaded(second)
        assert len(known) == 1
        stored = first.stored()
        model.close()
        assert known[0]() is not None
        del stored
        assert known[0]() is None
    finally:
        gc.enable()
    loaded(source(model, "model.a"))
    assert len(known) == 2


def test_what_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at more than once and takes no more than a quarter of the memory; the output is the same."""
    for k, name in enumerate(("base", "a", "b")):
        tiny.save(tmp_path / name, tensors(k))
    files: set[str] = set()

    def kept(file: int, size: int) -> mapped.Mapping | None:
        files.add(Path(f"/proc/self/fd/{file}").resolve().parent.name)
        return mapped.mapped(file, size)

    def merge(method: str, out: str, **parameters: float) -> set[str]:
        files.clear()
        models = [{"model": str(tmp_path / name), "parameters": parameters} for name in ("a", "b")]
        recipe: dict[str, object] = {"merge_method": method, "models": models}
        if method != "linear":
            recipe["base_model"] = str(tmp_path / "base")
        gm.merge(json.dumps(recipe, indent=1), tmp_path / out, executor="threads")
        return files

    monkeypatch.setattr(sources, "mapped", kept)
    assert merge("ties", "mapped", density=0.5, weight=1) == {"base", "a", "b"}
    for method in ("linear", "task_arithmetic", "dare_ties", "della"):  # read once
        assert not merge(method, method, weight=1, **{"density": 0.5} if method.startswith("d") else {})
    assert merge("sce", "sce") == merge("pcb", "pcb") == {"base", "a", "b"}
    size = sum((tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "a", "b"))
    for limit, wanted in ((4 * size, {"base", "a", "b"}), (4 * size - 1, set())):
        monkeypatch.setattr(sources, "memory", lambda found=limit: found)
        assert merge("ties", f"of {limit}", density=0.5, weight=1) == wanted
        made = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mapped", f"of {limit}")]
        assert made[0] == made[1]
    monkeypatch.setattr(sources, "memory", lambda: 4 * size)
    monkeypatch.setenv("GEOMERGE_MAPPED", "0")
    assert not merge("ties", "off", density=0.5, weight=1)


def test_how_much_memory_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's, or less where a container has a limit."""
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGESIZE": 4096}.__getitem__)
    monkeypatch.setattr(memory, "_LIMIT", tmp_path / "memory.max")
    assert memory.memory() == 4_096_000
    for text, wanted in (("max\n", 4_096_000), ("123456\n", 123_456), ("9999999999\n", 4_096_000)):
        (tmp_path / "memory.max").write_text(text)
        assert memory.memory() == wanted


def test_what_cannot_be_mapped(model: Checkpoint) -> None:
    """Pipes, as some file systems' files; elements that lie across words; more files than there is room for: they are read."""
    reading, writing = os.pipe()
    assert mapped.mapped(reading, 10) is None
    os.close(reading), os.close(writing)
    info = model.tensors["model.a"]
    assert info.file is not None
    odd = FileSource(model, dataclasses.replace(info, offset=info.offset + 1), "a", mapped=True).stored()
    assert odd is not None
    assert not odd.memory
    kept = []
    while (one := mapped.mapped(model.descriptor(info.file), 10)) is not None:
        kept.append(one)
    assert 1000 < len(kept) <= 1024  # with what other tests have left open
    found = source(model, "model.b").stored()
    assert found is not None
    assert not found.memory
    kept.clear()
    model.close()
    loaded(source(model, "model.b"))
