"""Opening models: directories, files, indices, pickles, tensors in memory; and every way in which they can be wrong."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_samples import floats, model, raw, sharded, write
from geomerge.checkpoint import from_state_dict, open_checkpoint
from geomerge.checkpoint.fingerprint import BLOCK, BLOCKS, block_offsets
from geomerge.errors import DamagedCheckpoint, ModelError, RunError, UsageError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_shards(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    """Tensors a and b in the first shard, c in the second."""
    return sharded(folder, {ONE: {"a": [1.0], "b": [2.0, 3.0]}, TWO: {"c": [4.0]}}, weight_map)


def test_directory_with_one_file(tmp_path: Path) -> None:
    """Tensors, config, path and bytes of the plainest model."""
    folder = model(tmp_path / "m")
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.ref == str(folder)
        assert checkpoint.path == folder
        assert checkpoint.config == {"model_type": "toy", "num_hidden_layers": 2}
        assert checkpoint.shapes == {"a": (2,), "b": (1,)}
        assert checkpoint.read_bytes(checkpoint.tensors["b"]) == struct.pack("<f", 3.0)
        assert [file.path.name for file in checkpoint.files] == ["model.safetensors"]
        assert checkpoint.quantization is None
        assert checkpoint.nbytes == 12


def test_sharded_directory(tmp_path: Path) -> None:
    """Shards come in the order of their names, whatever the index's order."""
    folder = two_shards(tmp_path / "m", {"c": TWO, "b": ONE, "a": ONE})
    with open_checkpoint(str(folder)) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert [file.path.name for file in checkpoint.files] == [ONE, TWO]
        assert checkpoint.read_bytes(checkpoint.tensors["c"]) == struct.pack("<f", 4.0)


def test_single_file_and_index_as_the_model(tmp_path: Path) -> None:
    """A file may be named itself; only one called model.safetensors brings its directory's config."""
    folder = model(tmp_path / "m")
    assert open_checkpoint(str(folder / "model.safetensors")).config is not None
    other = write(folder / "other.safetensors", floats(z=[1.0]))
    named = open_checkpoint(str(other))
    assert (list(named.tensors), named.config, named.side_files()) == (["z"], None, [])
    index = two_shards(tmp_path / "s") / "model.safetensors.index.json"
    assert list(open_checkpoint(str(index)).tensors) == ["a", "b", "c"]


def test_no_other_file_name_is_guessed_when_several_fit(tmp_path: Path) -> None:
    """One oddly named file is the model; two are a question."""
    folder = tmp_path / "m"
    write(folder / "weights.fp16.safetensors", floats(a=[1.0]))
    assert list(open_checkpoint(str(folder)).tensors) == ["a"]
    write(folder / "weights.safetensors", floats(a=[1.0]))
    with pytest.raises(ModelError, match="several models") as caught:
        open_checkpoint(str(folder))
    assert "give one of these files" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..\\outside", "C:x", "a\0b", ""]
)
def test_index_that_leads_out_of_the_directory(tmp_path: Path, name: str) -> None:
    """`..`, absolute paths and the like are refused before any file is opened."""
    write(tmp_path / "outside.safetensors", floats(a=[1.0]))
    folder = sharded(tmp_path / "m", {}, {"a": name})
    with pytest.raises(DamagedCheckpoint, match="leads out of the model's directory"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("place", ["single", "shard", "config", "tokenizer"])
def test_symbolic_link_out_of_the_directory(tmp_path: Path, place: str) -> None:
    """A link to a file elsewhere is refused, for weights, config and side files alike."""
    folder = two_shards(tmp_path / "m") if place == "shard" else model(tmp_path / "m")
    name = {"single": "model.safetensors", "shard": TWO, "config": "config.json", "tokenizer": "tokenizer.json"}[place]
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        write(outside, b"secret")
    (folder / name).symlink_to(outside)
    with pytest.raises(DamagedCheckpoint, match="symbolic link"):
        open_checkpoint(str(folder)).side_files()


def test_links_of_the_hub_cache_are_fine(tmp_path: Path) -> None:
    """In the cache every file is a link into the repository's blobs; to another repository's it must not lead."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write(repository / "blobs" / "1", floats(a=[1.0]))
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    assert list(open_checkpoint(str(snapshot)).tensors) == ["a"]
    write(tmp_path / "hub" / "models--other--name" / "blobs" / "1", floats(a=[1.0]))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "hub" / "models--other--name" / "blobs" / "1")
    with pytest.raises(DamagedCheckpoint, match="symbolic link"):
        open_checkpoint(str(snapshot))


def test_link_to_a_whole_directory_is_fine(tmp_path: Path) -> None:
    """Where the user's own path leads is the user's affair."""
    (tmp_path / "link").symlink_to(model(tmp_path / "m"))
    assert list(open_checkpoint(str(tmp_path / "link")).tensors) == ["a", "b"]


WRONG_INDEX = {
    "tensor in another shard": ({"a": ONE, "b": TWO, "c": TWO}, r"'b' in .*00002.*, but it is in .*00001"),
    "tensor in no shard": ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, "'d' in .*, but it is in no shard"),
    "tensor that the index does not know": ({"a": ONE, "c": TWO}, "1 tensors of the shards are not in the index.*'b'"),
    "shard that is missing": (
        {"a": ONE, "b": ONE, "c": TWO, "d": "model-00003-of-00003.safetensors"},
        "00003.*is not there",
    ),
    "no tensors": ({}, "no weight_map"),
}


@pytest.mark.parametrize("name", list(WRONG_INDEX))
def test_wrong_index(tmp_path: Path, name: str) -> None:
    """Index and shards must tell the same story."""
    weight_map, message = WRONG_INDEX[name]
    folder = two_shards(tmp_path / "m", weight_map)
    with pytest.raises(DamagedCheckpoint, match=message):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {"a": 1}}', "must map"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "given twice"),
    ],
)
def test_damaged_index(tmp_path: Path, content: bytes, message: str) -> None:
    """An index that is no index."""
    write(tmp_path / "m" / "model.safetensors.index.json", content)
    with pytest.raises(DamagedCheckpoint, match=message):
        open_checkpoint(str(tmp_path / "m"))


def test_same_tensor_in_two_shards(tmp_path: Path) -> None:
    """Which one is meant cannot be known."""
    folder = sharded(tmp_path / "m", {ONE: {"a": [1.0], "b": [1.0]}, TWO: {"a": [2.0]}})
    with pytest.raises(DamagedCheckpoint, match=r"'a' is in .* too"):
        open_checkpoint(str(folder))


def test_shard_that_the_index_does_not_name(tmp_path: Path) -> None:
    """Left over from another sharding, or part of the model that a wrong index would drop: either way not ignored."""
    folder = two_shards(tmp_path / "m", {"a": ONE, "b": ONE})
    with pytest.raises(DamagedCheckpoint, match=r"00002.* does not name"):
        open_checkpoint(str(folder))
    write(folder / "consolidated.safetensors", floats(a=[1.0]))
    (folder / TWO).unlink()
    assert list(open_checkpoint(str(folder)).tensors) == ["a", "b"]


def test_stale_file_beside_an_index(tmp_path: Path) -> None:
    """Two models in one directory, as a re-run with another shard size leaves them, are not chosen from silently."""
    folder = model(two_shards(tmp_path / "m"))
    with pytest.raises(ModelError, match="which of them is the model"):
        open_checkpoint(str(folder))


def test_shards_without_index(tmp_path: Path) -> None:
    """An interrupted download."""
    folder = two_shards(tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="no index"):
        open_checkpoint(str(folder))


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing path, a misspelt one, an empty directory, a file without tensors: each says so."""
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "experts" / "maths")
    with pytest.raises(ModelError, match="no such file or directory") as caught:
        open_checkpoint("./experts/math")
    assert "did you mean 'experts/maths'" in str(caught.value)
    with pytest.raises(ModelError, match="owner/name"):
        open_checkpoint("gpt2")
    with pytest.raises(ModelError, match="not a path"):
        open_checkpoint("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no \*.safetensors"):
        open_checkpoint("empty")
    write(tmp_path / "none.safetensors", raw("{}"))
    with pytest.raises(DamagedCheckpoint, match="no tensors"):
        open_checkpoint("none.safetensors")
    with pytest.raises(UsageError, match="revision"):
        open_checkpoint("./experts/maths", "main")


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    """A circle, a missing target: of the weights and of the model itself."""
    for name, target in (("circle", "model.safetensors"), ("missing", "gone.safetensors")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").symlink_to(target)
    model(tmp_path / "config")
    (tmp_path / "config" / "config.json").unlink(missing_ok=True)
    (tmp_path / "config" / "config.json").symlink_to("gone.json")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "itself").symlink_to("itself")
    for ref, error, said in (
        ("circle", DamagedCheckpoint, "leads in a circle"),
        ("missing", DamagedCheckpoint, "a symbolic link to gone.safetensors, which does not exist"),
        ("config", DamagedCheckpoint, r"config\.json: is a symbolic link to gone\.json, which does not exist"),
        ("dangling", ModelError, "a symbolic link to gone, which does not exist"),
        ("itself", ModelError, "leads in a circle"),
    ):
        with pytest.raises(error, match=said) as caught:
            open_checkpoint(str(tmp_path / ref))
        assert "did you mean" not in str(caught.value)


def test_adapter_and_pipeline_are_named_as_what_they_are(tmp_path: Path) -> None:
    """A LoRA directory and a diffusers pipeline are no models to merge."""
    write(tmp_path / "lora" / "adapter_model.safetensors", floats(a=[1.0]))
    write(tmp_path / "lora" / "adapter_config.json", b"{}")
    with pytest.raises(ModelError, match="LoRA adapter"):
        open_checkpoint(str(tmp_path / "lora"))
    write(tmp_path / "pipe" / "model_index.json", b"{}")
    with pytest.raises(ModelError, match="diffusers pipeline"):
        open_checkpoint(str(tmp_path / "pipe"))


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_damaged_config(tmp_path: Path, content: bytes) -> None:
    """A config that cannot be read stops the run before it starts."""
    folder = model(tmp_path / "m")
    write(folder / "config.json", content)
    with pytest.raises(DamagedCheckpoint, match=r"config\.json"):
        open_checkpoint(str(folder))


def test_config_with_infinity_and_byte_order_mark(tmp_path: Path) -> None:
    """Published Mamba configs hold Infinity, and editors leave marks; both are harmless."""
    folder = model(tmp_path / "m")
    write(folder / "config.json", b'\xef\xbb\xbf{"time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(str(folder)).config == {"time_step_limit": [0.0, float("inf")]}


class Exploit:
    """Pickles to a call that makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_pickle_is_refused_without_permission(tmp_path: Path) -> None:
    """By directory and by file; the hint says what to do."""
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    for ref in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(ModelError, match="pickle") as caught:
            open_checkpoint(str(ref))
        assert "convert it to safetensors" in str(caught.value)


def test_pickle_with_permission_is_a_model_in_memory(tmp_path: Path) -> None:
    """Two shards of a pickled model; training leftovers are no weights."""
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"state_dict": {"b": torch.zeros(1, dtype=torch.bfloat16)}}, folder / "pytorch_model-00002-of-00002.bin")
    torch.save({"lr": 1}, folder / "optimizer.pt")
    checkpoint = open_checkpoint(str(folder), allow_pickle=True)
    assert {n: (t.dtype, t.shape, t.file) for n, t in checkpoint.tensors.items()} == {
        "a": ("F32", (2,), None),
        "b": ("BF16", (1,), None),
    }
    assert torch.equal(checkpoint.memory["a"], torch.ones(2))
    checkpoint.verify_unchanged()
    torch.save({"a": torch.zeros(3)}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(RunError, match="changed"):
        checkpoint.verify_unchanged()


def test_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    """Even with permission, no code from a checkpoint is run."""
    target = tmp_path / "owned"
    write(tmp_path / "m" / "pytorch_model.bin", pickle.dumps({"a": Exploit(target)}))
    with pytest.raises(DamagedCheckpoint, match="weights only: ") as caught:
        open_checkpoint(str(tmp_path / "m"), allow_pickle=True)
    assert not target.exists()
    assert "torch.load" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_a_refused_pickle_says_what_it_asks_for(tmp_path: Path) -> None:
    """The call that it wants, without advice to allow it."""
    torch.save({"a": Exploit(tmp_path / "owned")}, tmp_path / "m.bin")
    with pytest.raises(DamagedCheckpoint, match=r"weights only: .*mkdir") as caught:
        open_checkpoint(str(tmp_path / "m.bin"), allow_pickle=True)
    assert "torch.load" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {1: torch.ones(1)}])
def test_pickle_of_something_else(tmp_path: Path, content: object) -> None:
    """A pickle must hold tensors by name."""
    torch.save(content, tmp_path / "m.bin")
    with pytest.raises(DamagedCheckpoint, match="not a"):
        open_checkpoint(str(tmp_path / "m.bin"), allow_pickle=True)


def test_state_dict(tmp_path: Path) -> None:
    """Tensors in memory are not copied; shape, dtype and bytes are theirs, also when they are views."""
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).T
    checkpoint = from_state_dict({"w": tensor, "s": torch.tensor(1, dtype=torch.int64)}, {"x": 1}, "mine")
    assert checkpoint.memory["w"] is tensor
    assert (checkpoint.tensors["w"].shape, checkpoint.tensors["w"].nbytes, checkpoint.tensors["w"].file) == (
        (3, 2),
        24,
        None,
    )
    assert checkpoint.read_bytes(checkpoint.tensors["w"]) == struct.pack("<6f", 0, 3, 1, 4, 2, 5)
    assert (checkpoint.ref, checkpoint.config, checkpoint.files, checkpoint.side_files()) == ("mine", {"x": 1}, (), [])
    same = from_state_dict({"w": tensor.clone(), "s": torch.tensor(1)})
    assert checkpoint.fingerprint() == same.fingerprint()
    assert checkpoint.content_hash() == same.content_hash()
    same.memory["w"][2, 1] = 7
    assert checkpoint.fingerprint() != same.fingerprint()


@pytest.mark.parametrize("tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse()], ids=["meta", "sparse"])
def test_state_dict_without_ordinary_data(tensor: torch.Tensor) -> None:
    """Tensors that have no plain bytes are refused by name."""
    with pytest.raises(ModelError, match="memory: w: is not an ordinary"):
        from_state_dict({"w": tensor})
    with pytest.raises(ModelError, match="no tensors"):
        from_state_dict({})


def test_descriptor_is_opened_once_and_reopened_after_close(tmp_path: Path) -> None:
    """Many tiles share one descriptor."""
    checkpoint = open_checkpoint(str(model(tmp_path / "m")))
    path = checkpoint.files[0].path
    first = checkpoint.descriptor(path)
    assert checkpoint.descriptor(path) == first
    checkpoint.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)
    assert os.fstat(checkpoint.descriptor(path)).st_size == checkpoint.files[0].size
    checkpoint.close()


def _rewrite(path: Path) -> None:
    path.write_bytes(floats(a=[9.0, 9.0], b=[9.0]))
    os.utime(path, ns=(1, 1))


def _replace(path: Path) -> None:
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


def _truncate(path: Path) -> None:
    status = path.stat()
    os.truncate(path, status.st_size - 1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [_rewrite, _replace, _truncate, Path.unlink])
def test_input_that_changes_while_in_use(tmp_path: Path, change: object) -> None:
    """A new time, a new inode, a new size, a file that is gone: named at the check and at a late opening."""
    checkpoint = open_checkpoint(str(model(tmp_path / "m")))
    checkpoint.verify_unchanged()
    path = checkpoint.files[0].path
    change(path)  # type: ignore[operator]
    with pytest.raises(RunError, match=r"model\.safetensors") as caught:
        checkpoint.verify_unchanged()
    assert caught.value.exit_code == 1
    with pytest.raises(RunError, match=r"model\.safetensors"):
        checkpoint.descriptor(path)


def test_truncation_under_an_open_descriptor_is_an_error_not_a_crash(tmp_path: Path) -> None:
    """What SIGBUS would be with a mapped file."""
    checkpoint = open_checkpoint(str(model(tmp_path / "m")))
    path = checkpoint.files[0].path
    checkpoint.descriptor(path)
    os.truncate(path, 20)
    with pytest.raises(RunError, match="became shorter"):
        checkpoint.read_bytes(checkpoint.tensors["b"])
    checkpoint.close()


def test_fingerprint_and_hash(tmp_path: Path) -> None:
    """The place does not matter, the content does; the full hash is sha256sum's."""
    one, two = open_checkpoint(str(model(tmp_path / "m"))), open_checkpoint(str(model(tmp_path / "n")))
    assert one.fingerprint() == two.fingerprint()
    steps: list[int] = []
    content = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert one.content_hash(steps.append) == hashlib.sha256(content).hexdigest()
    assert sum(steps) == len(content)
    three = open_checkpoint(str(model(tmp_path / "o", a=[1.0, 2.0], b=[3.5])))
    assert three.fingerprint() != one.fingerprint()
    lines = "".join(
        f"{hashlib.sha256((two_shards(tmp_path / 's') / n).read_bytes()).hexdigest()}  {n}\n" for n in (ONE, TWO)
    )
    assert open_checkpoint(str(tmp_path / "s")).content_hash() == hashlib.sha256(lines.encode()).hexdigest()


def test_sampled_blocks_reach_from_the_first_byte_to_the_last() -> None:
    """Small files are read whole, large ones at 256 places of which the last ends at the end."""
    assert block_offsets(0) == []
    assert block_offsets(BLOCK + 1) == [0, BLOCK]
    size = 10**9 + 7
    offsets = block_offsets(size)
    assert (len(offsets), offsets[0], offsets[-1]) == (BLOCKS, 0, size - BLOCK)
    steps = {b - a for a, b in itertools.pairwise(offsets)}
    assert max(steps) - min(steps) <= 1


def test_quantised_models_are_recognised(tmp_path: Path) -> None:
    """By their config, by float8 codes with scales, by packed layouts; scales alone or float8 alone prove nothing."""
    folder = model(tmp_path / "m")
    write(folder / "config.json", b'{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    assert open_checkpoint(str(folder)).quantization == {"quant_method": "gptq", "bits": 4}
    write(folder / "config.json", b'{"text_config": {"quantization_config": {"bits": 4}}}')
    assert open_checkpoint(str(folder)).quantization == {"quant_method": "unknown", "bits": 4}
    codes = torch.ones(2, 2).to(torch.float8_e4m3fn)
    scale = torch.ones(())
    path = tmp_path / "q.safetensors"
    for names in (["l.weight", "l.weight_scale_inv"], ["l.weight", "l.weight_scale"], ["l.weight", "l.scale_weight"]):
        save_file({names[0]: codes, names[1]: scale}, path)
        found = open_checkpoint(str(path)).quantization
        assert found == {"quant_method": "float8_e4m3fn", "evidence": names[1]}
    save_file({"l.qweight": torch.ones(2, 2, dtype=torch.int32), "l.scales": scale}, path)
    found = open_checkpoint(str(path)).quantization
    assert found is not None
    assert found["evidence"] == "l.qweight"
    for plain in ({"l.weight": codes}, {"logit_scale": scale, "l.weight": torch.ones(2, 2)}):
        save_file(plain, path)
        assert open_checkpoint(str(path)).quantization is None
    save_file({"a": torch.ones(1)}, path, metadata={"format": "pt", "note": json.dumps([1])})
    assert open_checkpoint(str(path)).metadata == {"format": "pt", "note": "[1]"}
