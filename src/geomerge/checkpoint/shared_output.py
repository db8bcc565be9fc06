"""An output that several machines write together, each its own tensors in place, over a shared folder.

    OUT.partial/
      .lock                   held together by all shards; alone by whoever finalizes, or by a run without shards
      .geomerge/prepare.lock  held by the one machine that makes the files
      .geomerge/shards.json   what is being made: written last, so where it is, the files are ready
      .geomerge/plan.json     the plan, for whoever finalizes
      .geomerge/3.lock, 3.jsonl   the third shard's lock and journal
      *.safetensors           at their full size from the beginning

Nothing here deletes or empties a file: a step that is repeated, or made by two machines at once where the file system
knows no locks, writes the same bytes again.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from geomerge.checkpoint.layout import Layout
from geomerge.checkpoint.output_lock import LOCK, alone, own_lock, take_lock
from geomerge.checkpoint.output_place import check_place
from geomerge.checkpoint.writer import SHARDS, WORK, OutputDirectory, disk_error, fits, full_error, prepare_file
from geomerge.errors import RunError, UsageError

PLAN = "plan.json"
"""In `WORK`: the plan of what is being made."""


class OpenFiles:
    """The files of an output, open for writing alone.

    Not for reading, because a network file system's client would then read the page around a small write and send all of it
    back: at the border of two machines' tensors, with old bytes of the other.

    Args:
        partial: The directory.
        layout: Its files, which exist already.

    Raises:
        RunError: A file cannot be opened.
    """

    readable = False

    def __init__(self, partial: Path, layout: Layout) -> None:
        self.partial = partial
        self.descriptors: list[int] = []
        for file in layout.files:
            try:
                flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                self.descriptors.append(os.open(partial / file.name, flags))
            except OSError as error:
                self.close()
                raise disk_error(error, partial / file.name, layout.size) from None

    def flush(self) -> None:
        """Wait until everything that was written is on the disk, or with the server.

        Raises:
            RunError: Something could not be written after all.
        """
        for descriptor in self.descriptors:
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise disk_error(error, self.partial, os.fstat(descriptor).st_size) from None

    def close(self) -> None:
        """Close the files."""
        while self.descriptors:
            os.close(self.descriptors.pop())


class ShardedOutput:
    """One shard's hold on the output; a context manager.

    Args:
        out: The output's path.
        shard, shards: This shard's number, from 1, and how many there are.
        force: The output may exist: whoever finalizes will replace it.
        inputs: The models' directories and files.

    Raises:
        UsageError: The place is taken: by a run without shards, by another process with the same shard, by another merge.
        RunError: The directory cannot be made.

    Attributes:
        out, partial: Where the output will be, and where it is until then.
        journal: The shard's own.
    """

    def __init__(
        self, out: Path | str, shard: int, shards: int, *, force: bool = False, inputs: Iterable[Path] = ()
    ) -> None:
        self.out, self.partial = places(out)
        self.shards = shards
        self.work = self.partial / WORK
        self.journal = journal(self.work, shard)
        inputs = tuple(inputs)
        check_place(self.out, self.partial, inputs, force=force)
        self._lock, _ = take_lock(self.partial, self.out, shared=True)
        self._own: int | None = None
        try:
            # Whoever finalizes may have finished between the first look and the lock.
            check_place(self.out, self.partial, inputs, force=force)
            others = [p.name for p in self.partial.iterdir() if p.name not in (LOCK, WORK)]
            if others and not self.work.is_dir():  # looked for last: another shard makes it before any file
                raise UsageError(
                    f"an interrupted run without shards left {self.partial.name}",
                    where=str(self.out),
                    hint="continue it with --resume and without --shard, or remove it",
                )
            self._own = self._take(shard)
        except BaseException:
            if alone(self._lock) and [p.name for p in self.partial.glob("*")] == [LOCK]:
                shutil.rmtree(self.partial, ignore_errors=True)  # nothing of anybody's is in it
            self.close()
            raise

    def _take(self, shard: int) -> int:
        try:
            self.work.mkdir(exist_ok=True)
            own = own_lock(self.work / f"{shard}.lock")
        except OSError as error:
            raise disk_error(error, self.work, 0) from None
        if own is None:
            raise UsageError(
                f"shard {shard}/{self.shards} is being made by another process",
                where=str(self.out),
                hint="wait for it; if its machine died, its file server gives the lock back after a while",
            )
        return own

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def prepare(self, layout: Layout, identity: Mapping[str, Any], save_plan: Callable[[Path], None]) -> OpenFiles:
        """Make the output's files unless another machine has; either way they are ready when this returns.

        Args:
            layout: The files.
            identity: What is being made; all shards must agree on it.
            save_plan: Writes the plan to the path that it is given.

        Raises:
            UsageError: The other shards make something else.
            RunError: The disk has not enough room.
        """
        try:
            guard = own_lock(self.work / "prepare.lock", wait=True)
            try:
                found = read_identity(self.work)
                if found is None:
                    self._make(layout, identity, save_plan)
                elif found != dict(identity):
                    raise _other(found, identity, self.partial)
            finally:
                if guard is not None:
                    os.close(guard)
        except OSError as error:
            raise disk_error(error, self.work, layout.size) from None
        check_files(self.partial, layout)
        return OpenFiles(self.partial, layout)

    def _make(self, layout: Layout, identity: Mapping[str, Any], save_plan: Callable[[Path], None]) -> None:
        present = sum(path.stat().st_size for file in layout.files if (path := self.partial / file.name).is_file())
        free = shutil.disk_usage(self.partial).free
        if layout.size - present > free:
            raise full_error(self.partial, layout.size, f"{free:,} are free")
        for file in layout.files:
            path = self.partial / file.name
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    prepare_file(descriptor, file)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise disk_error(error, path, layout.size) from None
        index = layout.index()
        if index is not None:
            text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
            self._place(
                self.partial / layout.index_name,
                lambda path: path.write_bytes(text.encode("utf-8", "backslashreplace")),
            )
        self._place(self.work / PLAN, save_plan)
        self._place(self.work / SHARDS, lambda path: path.write_text(json.dumps(identity)))

    def _place(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file so that nobody sees half of it, under a name that no process on any machine uses meanwhile."""
        beside = self.work / f"{path.name}.{secrets.token_hex(8)}"
        write(beside)
        beside.rename(path)

    def close(self) -> None:
        """Give the locks back; what was written stays."""
        for lock in (self._own, self._lock):
            if lock is not None and lock >= 0:
                os.close(lock)
        self._own, self._lock = None, -1


class FinalOutput(OutputDirectory):
    """An output whose shards are to be finished: locked for this process, nothing in it touched.

    Raises:
        UsageError: Nothing was made in shards there, a shard is still running, or the output exists.
    """

    def _settle(self, *, resume: bool) -> bool:
        if read_identity(self.partial / WORK) is None:
            raise UsageError(
                "there is nothing to finalize: no shard has begun",
                where=str(self.partial),
                hint="make the shards with `geomerge merge RECIPE OUT --shard i/n`",
            )
        return True


def places(out: Path | str) -> tuple[Path, Path]:
    """Where an output will be, and where it is until then.

    Raises:
        UsageError: It is no usable path.
    """
    try:
        found = Path(out).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"not a usable path: {error}", where=repr(str(out))) from None
    return found, found.with_name(found.name + ".partial") if found.name else found


def journal(work: Path, shard: int) -> Path:
    """Where a shard's journal lies."""
    return work / f"{shard}.jsonl"


def read_identity(work: Path) -> dict[str, Any] | None:
    """What is being made in shards; `None` when nothing is, or its files are not ready.

    Raises:
        RunError: It is damaged.
    """
    try:
        found = json.loads((work / SHARDS).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot be read: {error}", where=str(work / SHARDS)) from None
    if not isinstance(found, dict):
        raise RunError("is damaged", where=str(work / SHARDS), hint="remove OUT.partial and make all shards again")
    return found


def check_files(partial: Path, layout: Layout) -> None:
    """Check that the output's files have their sizes and headers.

    Raises:
        RunError: Naming the one that has not.
    """
    for file in layout.files:
        if not fits(file, partial / file.name):
            raise RunError(
                "is missing or was changed since it was made",
                where=str(partial / file.name),
                hint=f"remove {partial.name} and make all shards again",
            )


def _other(found: Mapping[str, Any], wanted: Mapping[str, Any], partial: Path) -> UsageError:
    different = ", ".join(
        f"another {key}" if key == "plan" else f"{key} ({found.get(key)} there, {wanted.get(key)} here)"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    )
    return UsageError(
        f"the other shards of this output were begun otherwise: {different}",
        where=str(partial),
        hint="all shards need the same recipe, inputs, options and versions; or remove it and start anew",
    )
