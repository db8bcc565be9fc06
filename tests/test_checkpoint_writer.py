"""The output directory: one run at a time, nothing half-finished under the final name, nothing of the user's lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_samples import model, write
from geomerge.checkpoint import JOURNAL, OutputDirectory, disk_error, plan_layout
from geomerge.checkpoint.output_place import MARKS
from geomerge.errors import DamagedCheckpoint, RunError, UsageError

LAYOUT = plan_layout([("a", "F32", (2,)), ("b", "F32", (3,))])
SHARDS = plan_layout([("a", "F32", (2,)), ("b", "F32", (3,))], shard_size=8)


def write_data(output: OutputDirectory) -> None:
    """Write ones into every tensor of `LAYOUT`, as the engine does."""
    for place in LAYOUT.place.values():
        data = torch.ones(place.nbytes // 4).numpy().tobytes()
        assert os.pwritev(output.descriptors[place.file], [data], place.offset) == place.nbytes


def interrupted(out: Path, *, journal: bool = True) -> Path:
    """What a killed run leaves."""
    output = OutputDirectory(out)
    output.create(LAYOUT)
    write_data(output)
    if journal:
        output.journal.write_text('{"tensor": "a"}\n')
    output.close()
    return output.partial


def test_from_nothing_to_a_model(tmp_path: Path) -> None:
    """The model appears under its name at the end, without lock and journal; until then only OUT.partial is there."""
    out = tmp_path / "deep" / "er" / "out"
    with OutputDirectory(out) as output:
        output.create(LAYOUT)
        output.journal.write_text("{}\n")
        write_data(output)
        output.write_json("config.json", {"ä": 1})
        output.copy(write(tmp_path / "source", b"text"), "1_Pooling/config.json")
        output.write_text("README.md", "# ä\n")
        assert not out.exists()
        assert output.partial == tmp_path / "deep" / "er" / "out.partial"
        assert output.finish() == out
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (out / "config.json").read_text("utf-8") == '{\n  "ä": 1\n}\n'
    assert {n: t.tolist() for n, t in load_file(out / "model.safetensors").items()} == {"a": [1.0] * 2, "b": [1.0] * 3}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_shards_are_allocated_and_indexed(tmp_path: Path) -> None:
    """Every shard has its full size on the disk before anything is written, and the index is there."""
    with OutputDirectory(tmp_path / "out", durable=True) as output:
        output.create(SHARDS)
        assert len(output.descriptors) == 2
        for file, descriptor in zip(SHARDS.files, output.descriptors, strict=True):
            status = os.fstat(descriptor)
            assert status.st_size == file.size
            assert status.st_blocks * 512 >= file.size
        output.finish()
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_lone_surrogates_in_json_survive(tmp_path: Path) -> None:
    """A parent's config may hold one as an escape; it is written as that escape."""
    with OutputDirectory(tmp_path / "out") as output:
        output.write_json("config.json", {"a": "\ud800"})
        assert (output.partial / "config.json").read_bytes() == b'{\n  "a": "\\ud800"\n}\n'


def test_existing_output_is_refused(tmp_path: Path) -> None:
    """A model that is there is not overwritten, a file neither; an empty directory is no obstacle."""
    with pytest.raises(UsageError, match="the output exists") as caught:
        OutputDirectory(model(tmp_path / "m"))
    assert "--force" in str(caught.value)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="not a directory"):
        OutputDirectory(write(tmp_path / "file", b""))
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "empty").mkdir()
    with OutputDirectory(tmp_path / "empty") as output:
        output.create(LAYOUT)
        output.finish()
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_force_replaces_a_model_at_the_end(tmp_path: Path) -> None:
    """The old model stays until the new one is complete, then nothing of it is left."""
    out = model(tmp_path / "out")
    write(out / "merges.txt", b"")
    with OutputDirectory(out, force=True) as output:
        output.create(LAYOUT)
        assert (out / "merges.txt").exists()
        output.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]


def test_force_replaces_models_only(tmp_path: Path) -> None:
    """A directory of something else is protected from a mistyped path."""
    write(tmp_path / "thesis" / "chapter1.tex", b"years")
    with pytest.raises(UsageError, match="not a model directory"):
        OutputDirectory(tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


@pytest.mark.parametrize("kind", MARKS)
def test_force_replaces_its_own_kind_only(tmp_path: Path, kind: str) -> None:
    """A merge does not take an adapter's place, nor that of months of a continual merge; nor these a model's."""
    for name in ("out", "again"):
        write(model(tmp_path / name) / MARKS[kind], b"{}")
    with pytest.raises(UsageError, match=f"holds {kind}, so it is not replaced by a model"):
        OutputDirectory(tmp_path / "out", force=True)
    with pytest.raises(UsageError, match=f"holds a model, so it is not replaced by {kind}"):
        OutputDirectory(model(tmp_path / "m"), force=True, kind=kind)
    with OutputDirectory(tmp_path / "again", force=True, kind=kind) as output:
        output.create(LAYOUT)
        output.finish()
    assert not (tmp_path / "again" / MARKS[kind]).exists()
    assert (tmp_path / "out" / MARKS[kind]).exists()


@pytest.mark.parametrize(
    "stranger",
    [
        *(".git/HEAD", "main.py", "src/thesis.txt", "optimizer.pt", "part/notes.docx", "part/notes.md"),
        *("notes.md", "recipe.yml", "scores.json", "report.html", "data.jsonl", "activations.safetensors", "out.gguf"),
    ],
)
def test_force_replaces_a_model_and_nothing_beside_it(tmp_path: Path, stranger: str) -> None:
    """What only happens to have a config.json is not deleted; a model's own parts, tokenizer, card and code are its own."""
    out = tmp_path / "out"
    for name in (
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "README.md",
        ".gitattributes",
        "part/config.json",
        "LICENSE-MIT",
        "tokenizer.model.v3",
        "chat_templates/tools.jinja",
    ):
        write(out / name, b"{}")
    write(out / stranger, b"years")
    with pytest.raises(UsageError, match="no part of a model") as caught:
        OutputDirectory(out, force=True)
    assert stranger.split("/")[0] in str(caught.value)
    assert (out / stranger).exists()
    (out / stranger).unlink()
    if stranger.count("/") and not stranger.startswith("part"):
        (out / stranger).parent.rmdir()
    OutputDirectory(out, force=True).abandon()


def test_output_in_an_input_is_refused(tmp_path: Path) -> None:
    """Equal to it, inside it, around it, or its future .partial, also through links."""
    parent = model(tmp_path / "m")
    (tmp_path / "link").symlink_to(parent)
    for out in (parent, parent / "merged", tmp_path / "link", tmp_path / "link" / "x" / "y"):
        with pytest.raises(UsageError, match=r"the output (is|lies inside) the input"):
            OutputDirectory(out, force=True, inputs=[parent])
    with pytest.raises(UsageError, match="lies inside the output"):
        OutputDirectory(tmp_path, force=True, inputs=[parent])
    with pytest.raises(UsageError, match="is the input"):
        OutputDirectory(tmp_path / "n", inputs=[model(tmp_path / "n.partial")])
    assert sorted(p.name for p in parent.iterdir()) == ["config.json", "model.safetensors"]


def test_output_beside_an_input_file_is_fine(tmp_path: Path) -> None:
    """A file given as a model does not claim its whole directory."""
    path = model(tmp_path / "models") / "model.safetensors"
    OutputDirectory(tmp_path / "models" / "merged", inputs=[path]).abandon()
    with pytest.raises(UsageError, match="lies inside the output"):
        OutputDirectory(tmp_path / "models", force=True, inputs=[path])


@pytest.mark.parametrize("out", ["/", "loop/x", "a\0b"])
def test_places_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """The root, a loop of links, a NUL."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises((UsageError, RunError)):
        OutputDirectory(out)


def test_place_that_cannot_be_made(tmp_path: Path) -> None:
    """A file where a directory is needed."""
    write(tmp_path / "file", b"")
    with pytest.raises(RunError, match="output cannot be made"):
        OutputDirectory(tmp_path / "file" / "out")


def test_second_run_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    """Also with --force and --resume; when the first is done with it, the place is free."""
    first = OutputDirectory(tmp_path / "out")
    first.create(LAYOUT)
    for options in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(UsageError, match=f"process {os.getpid()}"):
            OutputDirectory(tmp_path / "out", **options)
    assert (first.partial / "model.safetensors").exists()
    first.abandon()
    assert list(tmp_path.iterdir()) == []
    OutputDirectory(tmp_path / "out").abandon()


def test_second_process_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    """The lock is the process's: kill -9 frees it, and what is left is offered for --resume."""
    code = (
        "import sys, time\nfrom geomerge.checkpoint import OutputDirectory, plan_layout\n"
        "o = OutputDirectory(sys.argv[1]); o.create(plan_layout([('a', 'F32', (2,)), ('b', 'F32', (3,))]))\n"
        "o.journal.write_text('{}'); sys.stdout.write('ready\\n'); sys.stdout.flush(); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(UsageError, match=f"process {process.pid}"):
            OutputDirectory(tmp_path / "out")
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UsageError, match=rf"interrupted run \(process {process.pid}\)") as caught:
        OutputDirectory(tmp_path / "out")
    assert "--resume" in str(caught.value)
    output = OutputDirectory(tmp_path / "out", resume=True)
    assert output.resumed
    output.abandon()


def test_resume_keeps_what_is_written(tmp_path: Path) -> None:
    """The journal and the data of the run before are there; create leaves them alone."""
    interrupted(tmp_path / "out")
    with OutputDirectory(tmp_path / "out", resume=True) as output:
        assert output.resumed
        assert output.journal.read_text() == '{"tensor": "a"}\n'
        output.create(LAYOUT)
        output.finish()
    assert load_file(tmp_path / "out" / "model.safetensors")["b"].tolist() == [1.0] * 3
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_resume_with_force_replaces_the_old_output_in_the_end(tmp_path: Path) -> None:
    """Both are wanted when a run with --force was interrupted: the work is continued, not thrown away."""
    out = model(tmp_path / "out")
    first = OutputDirectory(out, force=True)
    first.create(LAYOUT)
    first.journal.write_text("{}")
    first.close()
    with OutputDirectory(out, force=True, resume=True) as output:
        assert output.resumed
        output.create(LAYOUT)
        output.finish()
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]


def test_resume_of_another_merge_is_refused(tmp_path: Path) -> None:
    """Files that do not fit the layout are not mixed with new ones."""
    interrupted(tmp_path / "out")
    with OutputDirectory(tmp_path / "out", resume=True) as output:
        with pytest.raises(UsageError, match="does not fit this merge"):
            output.create(SHARDS)
        with pytest.raises(UsageError, match="does not fit this merge"):
            output.create(plan_layout([("x", "F32", (2,)), ("b", "F32", (3,))]))
    assert (tmp_path / "out.partial" / JOURNAL).exists()


def test_resume_without_anything_to_resume_starts_anew(tmp_path: Path) -> None:
    """No partial output, or one without a journal: its files are not trusted."""
    OutputDirectory(tmp_path / "new", resume=True).abandon()
    partial = interrupted(tmp_path / "out", journal=False)
    write(partial / "model-00001-of-00009.safetensors", b"left over")
    with OutputDirectory(tmp_path / "out", resume=True) as output:
        assert not output.resumed
        output.create(LAYOUT)
        output.finish()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "out" / "model.safetensors")["b"].tolist() == [0.0] * 3


def test_force_starts_anew(tmp_path: Path) -> None:
    """What an interrupted run left is thrown away."""
    interrupted(tmp_path / "out")
    with OutputDirectory(tmp_path / "out", force=True) as output:
        assert not output.resumed
        assert [p.name for p in output.partial.iterdir()] == [".lock"]
        output.abandon()


def test_partial_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    """A directory, a file or a link that merely has the name stays, even with --force."""
    write(tmp_path / "out.partial" / "notes.txt", b"mine")
    with pytest.raises(UsageError, match="not made by geomerge"):
        OutputDirectory(tmp_path / "out", force=True)
    assert (tmp_path / "out.partial" / "notes.txt").exists()
    write(tmp_path / "two.partial", b"")
    with pytest.raises(UsageError, match="in the way"):
        OutputDirectory(tmp_path / "two", force=True)
    (tmp_path / "three.partial").symlink_to(tmp_path / "out.partial")
    with pytest.raises(UsageError, match="in the way"):
        OutputDirectory(tmp_path / "three", force=True)


def test_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A petabyte is refused before the work starts, by the free space and, where that lies, by the allocation itself."""
    huge = plan_layout([("a", "F32", (25 * 10**13 - 1024,))])
    with OutputDirectory(tmp_path / "out") as output:
        with pytest.raises(RunError, match="1,000,000,000,000,000 bytes are needed") as caught:
            output.create(huge)
        assert str(output.partial) in str(caught.value)
        assert caught.value.exit_code == 1
        free = shutil.disk_usage(tmp_path)._replace(free=1 << 60)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(RunError, match="the disk has not enough room") as caught:
            output.create(huge)
        assert "model.safetensors" in str(caught.value)
        assert output.descriptors == []
        assert [p.name for p in output.partial.iterdir()] == [".lock"]
        output.abandon()
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_at_the_second_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room that the first shard took is given back at once."""
    allocate = os.posix_fallocate

    def full(descriptor: int, offset: int, size: int) -> None:
        if size == SHARDS.files[1].size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with OutputDirectory(tmp_path / "out") as output:
        with pytest.raises(RunError, match="No space left") as caught:
            output.create(SHARDS)
        assert f"{SHARDS.size:,} bytes are needed" in str(caught.value)
        assert not list(output.partial.glob("*.safetensors"))


def test_file_system_without_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is set all the same."""

    def unsupported(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with OutputDirectory(tmp_path / "out") as output:
        output.create(LAYOUT)
        assert os.fstat(output.descriptors[0]).st_size == LAYOUT.files[0].size


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_side_file_on_a_full_disk(tmp_path: Path) -> None:
    """A real ENOSPC while a small file is written names the file and its bytes."""
    with OutputDirectory(tmp_path / "out") as output:
        (output.partial / "config.json").symlink_to("/dev/full")
        with pytest.raises(RunError, match="not enough room: 15 bytes") as caught:
            output.write_json("config.json", {"a": 1.5})
        assert "config.json" in str(caught.value)


def test_write_errors_of_the_engine(tmp_path: Path) -> None:
    """A full disk names the bytes needed, any other failure the reason."""
    full = disk_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "x", 1234)
    assert str(tmp_path / "x") in str(full)
    assert "1,234 bytes are needed" in str(full)
    other = disk_error(OSError(errno.EIO, "Input/output error"), tmp_path / "x", 1234)
    assert str(other) == f"{tmp_path / 'x'}: cannot be written: Input/output error"
    assert isinstance(other, RunError)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ""])
def test_side_files_stay_inside(tmp_path: Path, name: str) -> None:
    """A name that a model's file gave cannot write elsewhere."""
    with OutputDirectory(tmp_path / "out") as output:
        with pytest.raises(DamagedCheckpoint, match="leads out"):
            output.write_text(name, "")
        for own in (JOURNAL, ".lock"):
            with pytest.raises(UsageError, match="needs for itself"):
                output.write_text(own, "")


def test_source_that_vanished(tmp_path: Path) -> None:
    """A side file that is gone when its turn comes is named."""
    with (
        OutputDirectory(tmp_path / "out") as output,
        pytest.raises(RunError, match=r"tokenizer\.json: cannot be copied"),
    ):
        output.copy(tmp_path / "tokenizer.json")


def test_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """The finished model stays in OUT.partial, and the error says so."""
    with OutputDirectory(tmp_path / "out") as output:
        output.create(LAYOUT)
        write(tmp_path / "out" / "precious.txt", b"mine")
        with pytest.raises(RunError, match="cannot get its name") as caught:
            output.finish()
        assert str(output.partial) in str(caught.value)
    assert (tmp_path / "out" / "precious.txt").exists()
    assert (tmp_path / "out.partial" / "model.safetensors").exists()


def test_error_inside_the_run_keeps_the_work(tmp_path: Path) -> None:
    """Leaving the context by an exception closes and unlocks, and removes nothing."""
    output = OutputDirectory(tmp_path / "out")
    output.create(LAYOUT)
    output.journal.write_text("{}")
    with pytest.raises(UsageError, match="needs for itself"), output:
        output.write_text(JOURNAL, "")
    assert output.descriptors == []
    resumed = OutputDirectory(tmp_path / "out", resume=True)
    assert resumed.resumed
    resumed.abandon()
    resumed.abandon()
    assert list(tmp_path.iterdir()) == []
