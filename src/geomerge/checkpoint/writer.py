"""The output directory, from its first byte to its name.

Everything is written into ``OUT.partial/``, which an exclusive lock keeps for one run, and gets its real name in one
rename when it is complete: nobody ever sees a half-written model under ``OUT``. Shards are allocated in full before the
work starts, so a full disk is known at once (and writing into allocated space is several times faster than growing a
file). The engine writes tensor bytes itself, with ``os.pwritev`` on `OutputDirectory.descriptors`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from geomerge.checkpoint.folder import check_name
from geomerge.checkpoint.layout import Layout, LayoutFile, Place, parse_size, plan_layout
from geomerge.checkpoint.output_lock import LOCK, sign_lock, take_lock
from geomerge.checkpoint.output_place import MODEL, check_place, replaceable
from geomerge.errors import MAKE_ROOM, NO_ROOM, GeomergeError, RunError, UsageError

__all__ = [
    "JOURNAL",
    "SHARDS",
    "WORK",
    "Layout",
    "LayoutFile",
    "OutputDirectory",
    "Place",
    "disk_error",
    "fits",
    "parse_size",
    "plan_layout",
    "prepare_file",
]

JOURNAL = "journal.jsonl"
"""The engine's journal of finished tensors in ``OUT.partial/``; removed when the output is complete."""

WORK = ".geomerge"
"""A directory in ``OUT.partial/`` for what several machines or processes share; removed when the output is complete."""

SHARDS = "shards.json"
"""In `WORK`: what is being made in shards. While it is there, the output is theirs."""

_OWN = (LOCK, JOURNAL, WORK)


class OutputDirectory:
    """An output being written. As a context manager it keeps ``OUT.partial`` for ``--resume`` when left by an error.

    Args:
        out: The output's path. Missing parents are made; an existing empty directory is fine.
        force: Replace an existing output of the same kind at the end, and start anew instead of resuming.
        resume: Continue in an existing ``OUT.partial``, keeping its files. Without a journal in it there is nothing to
            continue and the run starts anew.
        inputs: The models' directories and files; the output must not lie in one of them, nor they in it.
        durable: Flush the files and the directory to the disk before `finish` returns.
        kind: What the output will be: see `geomerge.checkpoint.output_place`.

    Raises:
        UsageError: The output exists, or its place is not a good one, or another run is writing it (its pid is named).
        RunError: The directory cannot be made.

    Attributes:
        out: Where the output will be.
        partial: Where it is until then.
        resumed: Whether this run continues an earlier one: its journal says what is finished.
        descriptors: One open descriptor for each file of the layout, after `create`.
    """

    readable = True

    def __init__(
        self,
        out: Path | str,
        force: bool = False,
        resume: bool = False,
        *,
        inputs: Iterable[Path] = (),
        durable: bool = False,
        kind: str = MODEL,
    ) -> None:
        try:
            self.out = Path(out).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
            raise UsageError(f"not a usable path: {error}", where=repr(str(out))) from None
        self.partial = self.out.with_name(self.out.name + ".partial") if self.out.name else self.out
        self.force = force
        self.durable = durable
        self._kind = kind
        self.descriptors: list[int] = []
        inputs = tuple(inputs)
        check_place(self.out, self.partial, inputs, force=force, kind=kind)
        self._lock, self._before = take_lock(self.partial, self.out)
        try:
            # Another run may have finished between the first look and the lock.
            check_place(self.out, self.partial, inputs, force=force, kind=kind)
            self.resumed = self._settle(resume=resume)
        except BaseException:
            if [p.name for p in self.partial.glob("*")] == [LOCK]:  # nothing of anybody's is in it
                shutil.rmtree(self.partial, ignore_errors=True)
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def journal(self) -> Path:
        """Where the engine's journal lies."""
        return self.partial / JOURNAL

    def _settle(self, *, resume: bool) -> bool:
        """Decide what becomes of what an earlier run left, and sign the lock."""
        left = [p for p in self.partial.iterdir() if p.name != LOCK]
        if (self.partial / WORK / SHARDS).exists() and not self.force:
            raise UsageError(
                f"{self.partial.name} is being made in shards",
                where=str(self.out),
                hint="make the missing ones with `merge --shard i/n`, then `geomerge finalize`; or start anew with --force",
            )
        resumed = resume and (self.partial / JOURNAL).is_file()
        if left and not (resume or self.force):
            raise UsageError(
                f"an interrupted run{f' (process {self._before})' if self._before else ''} left {self.partial.name}",
                where=str(self.out),
                hint="continue it with --resume, or start anew with --force",
            )
        if not resumed:
            for path in left:
                _remove(path)
        sign_lock(self._lock)
        return resumed

    def create(self, layout: Layout) -> None:
        """Allocate the layout's files, write their headers and the index, and open `descriptors`.

        A resumed run's files are kept as they are when they fit the layout.

        Raises:
            UsageError: The files of the run to resume do not fit: it was another merge.
            RunError: The disk has not enough room: the path and the bytes needed are named.
        """
        paths = [self.partial / file.name for file in layout.files]
        if self.resumed:
            for file, path in zip(layout.files, paths, strict=True):
                if not fits(file, path):
                    raise UsageError(
                        f"{file.name} of the interrupted run does not fit this merge",
                        where=str(self.partial),
                        hint="resume with the same recipe and options, or start anew with --force",
                    )
        else:
            free = shutil.disk_usage(self.partial).free
            if layout.size > free:
                raise full_error(self.partial, layout.size, f"{free:,} are free")
        for file, path in zip(layout.files, paths, strict=True):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                self.descriptors.append(descriptor)
                if not self.resumed:
                    prepare_file(descriptor, file)
            except OSError as error:
                self._close_files()
                if not self.resumed:
                    for made in paths:
                        made.unlink(missing_ok=True)  # give the room back at once
                raise disk_error(error, path, layout.size) from None
        index = layout.index()
        if index is not None:
            self.write_json(layout.index_name, index)

    def flush(self) -> None:
        """Wait until the tensor bytes that were written are on the disk.

        Raises:
            RunError: Something could not be written after all.
        """
        for descriptor in self.descriptors:
            try:
                os.fdatasync(descriptor)
            except OSError as error:
                raise disk_error(error, self.partial, os.fstat(descriptor).st_size) from None

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, indented by two as the ecosystem does."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Write a UTF-8 text file; `name` may have subfolders."""
        # A lone surrogate, which JSON can hold only as an escape, becomes that escape again.
        self.write_bytes(name, content.encode("utf-8", "backslashreplace"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file; `name` may have subfolders.

        Raises:
            UsageError: `name` is the journal's or the lock's.
            DamagedCheckpoint: `name` leads out of the directory.
            RunError: The disk is full or the file cannot be written.
        """
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise disk_error(error, path, len(content)) from None

    def copy(self, source: Path, name: str | None = None) -> None:
        """Copy a side file's content, not its permissions. `name` is its path in the output, by default its own name.

        Raises:
            UsageError, DamagedCheckpoint, RunError: As `write_bytes`; also when the source cannot be read.
        """
        try:
            content = source.read_bytes()
        except OSError as error:
            raise RunError(f"cannot be copied: {error.strerror}", where=str(source)) from None
        self.write_bytes(source.name if name is None else name, content)

    def _path(self, name: str) -> Path:
        check_name(name, str(self.partial), what="the output")
        if PurePosixPath(name).parts[0] in _OWN:
            raise UsageError(f"{name} is a name that the run needs for itself", where=str(self.partial))
        return self.partial / name

    def finish(self) -> Path:
        """Give the output its name.

        With `force` an existing model directory is moved aside first and removed after.

        Returns:
            `out`.

        Raises:
            RunError: Something else appeared there meanwhile; ``OUT.partial`` is kept, complete.
        """
        if self.durable:
            self.flush()
        self._close_files()
        aside = self.out.with_name(f".{self.out.name}.replaced-{os.getpid()}")
        moved = False
        try:
            self.journal.unlink(missing_ok=True)
            if self.force and replaceable(self.out, self._kind):
                self.out.rename(aside)
                moved = True
            # A rename onto an empty directory replaces it; onto anything else it fails.
            self.partial.rename(self.out)
        except OSError as error:
            if moved:
                aside.rename(self.out)
            raise RunError(
                f"the finished output cannot get its name: {error.strerror}",
                where=str(self.out),
                hint=f"it is complete in {self.partial}: rename it yourself",
            ) from None
        shutil.rmtree(self.out / WORK, ignore_errors=True)
        # The lock goes last: before the rename, a second run could have taken a fresh one in the same directory.
        (self.out / LOCK).unlink(missing_ok=True)
        self._release()
        if self.durable:
            _sync_directory(self.out)
            _sync_directory(self.out.parent)
        if moved:
            shutil.rmtree(aside, ignore_errors=True)
        return self.out

    def close(self) -> None:
        """Close everything and give the lock back; what was written stays in ``OUT.partial`` for ``--resume``."""
        self._close_files()
        self._release()

    def abandon(self) -> None:
        """Remove ``OUT.partial`` and give the lock back."""
        self._close_files()
        if self._lock >= 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._release()

    def _close_files(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def disk_error(error: OSError, path: Path, needed: int) -> GeomergeError:
    """The error for a failed allocation or write.

    Args:
        error: What the system said.
        path: The file.
        needed: The bytes that the output needs.
    """
    if error.errno in NO_ROOM:
        return full_error(path, needed, os.strerror(error.errno))
    return RunError(f"cannot be written: {error.strerror}", where=str(path))


def full_error(path: Path, needed: int, why: str) -> RunError:
    """The error for a disk that cannot hold the output."""
    return RunError(
        f"the disk has not enough room: {needed:,} bytes are needed ({why})",
        where=str(path),
        hint=MAKE_ROOM,
    )


def prepare_file(descriptor: int, file: LayoutFile) -> None:
    """Give a file all of its room, and its header. What is in it stays, up to the file's size."""
    if os.fstat(descriptor).st_size > file.size:
        os.ftruncate(descriptor, file.size)
    try:
        os.posix_fallocate(descriptor, 0, file.size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(descriptor, file.size)  # no allocation on this file system: at least the size is right
    written = 0
    while written < len(file.header):
        written += os.pwrite(descriptor, file.header[written:], written)


def fits(file: LayoutFile, path: Path) -> bool:
    """Whether a file has the size and the header that the layout gives it."""
    try:
        if path.is_symlink() or path.stat().st_size != file.size:
            return False
        with path.open("rb") as found:
            return found.read(len(file.header)) == file.header
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
