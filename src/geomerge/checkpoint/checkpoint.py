"""A model that is open for reading: its tensors' places, its config, its files' identity.

The engine reads tensor bytes itself, with ``os.preadv`` on `Checkpoint.descriptor` at `TensorInfo.offset`. Files are
not memory-mapped on purpose: when a mapped file is truncated by someone else during a run, touching its lost pages
kills the process with SIGBUS, whereas ``preadv`` returns fewer bytes and the run ends with an error naming the file.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from geomerge.checkpoint import fingerprint
from geomerge.checkpoint.change import Change
from geomerge.checkpoint.coded import Coded, Decoding, find_coded, quantisation
from geomerge.checkpoint.header import FileInfo, TensorInfo, open_regular
from geomerge.checkpoint.hub import Located
from geomerge.checkpoint.side_files import Kind, side_files
from geomerge.errors import ModelError, RunError

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint:
    """One model, opened for reading. A context manager; `close` closes its descriptors.

    Attributes:
        ref: The model as the user wrote it.
        path: The directory or file, ``None`` for a model in memory.
        folder: The directory whose config and side files belong to the model, if any.
        hub_id: ``owner/name`` when it came from the hub.
        revision: The hub's commit.
        config: ``config.json`` as a dict, or ``None``.
        tensors: The stored tensors by name, in the order of the files and of the bytes in them.
        files: The weight files.
        metadata: The ``__metadata__`` strings of the first file.
        memory: The tensors themselves for a model in memory, empty otherwise.
        quantization: What says that the model is quantised, or ``None``: see `quantisation`.
        decoding: Which tensors are stored as codes, and how they are decoded.
        changes: The tensors that an adapter changes, and how; `factors` are the adapter's tensors that this takes.
        adapter: The path of that adapter.
        tokenizer_folder: The directory whose tokenizer and chat template belong to the model, if any.
        notes: What could not be taken over from the files, or how the model was put together, for whoever uses it.
        mappings: What the engine keeps of open files; `close` forgets it.
    """

    def __init__(
        self,
        ref: str,
        located: Located | None,
        *,
        folder: Path | None,
        config: dict[str, Any] | None,
        tensors: dict[str, TensorInfo],
        files: tuple[FileInfo, ...] = (),
        metadata: dict[str, str] | None = None,
        memory: dict[str, Tensor] | None = None,
        quantization: dict[str, Any] | None = None,
        decoding: Decoding | None = None,
        changes: Mapping[str, Change] | None = None,
        factors: Mapping[str, TensorInfo] | None = None,
        adapter: Path | None = None,
        tokenizer_folder: Path | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.ref = ref
        self.path = located.path if located else None
        self.folder = folder
        self.hub_id = located.hub_id if located else None
        self.revision = located.commit if located else None
        self.config = config
        self.tensors = tensors
        self.files = files
        self.metadata = metadata or {}
        self.memory = memory or {}
        self.changes = changes or {}
        self.factors = factors or {}
        self.adapter = adapter
        self.tokenizer_folder = tokenizer_folder or folder
        self.notes = notes
        self._known = {file.path: file for file in files}
        self._descriptors: dict[Path, int] = {}
        self.mappings: dict[Path, Any] = {}
        self._lock = threading.Lock()
        self.quantization = quantisation(config, tensors) if quantization is None else quantization
        self.decoding = decoding or find_coded(self.quantization, tensors, config, self.read_bytes)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.ref}: {len(self.tensors)} tensors, {self.nbytes:,} bytes>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def coded(self) -> Mapping[str, Coded]:
        """The tensors that are stored as codes."""
        return self.decoding.coded

    @functools.cached_property
    def logical(self) -> dict[str, Coded | TensorInfo]:
        """The decoded model's tensors: what each is decoded from, or where it lies as it is."""
        found: dict[str, Coded | TensorInfo] = {}
        owners = {part: name for name, coded in self.coded.items() for part in coded.stored}
        for name, info in self.tensors.items():
            owner = owners.get(name, name)
            if owner in self.coded:
                found[owner] = self.coded[owner]
            elif name not in self.decoding.hidden:
                found[name] = info
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, decoded where it is stored as codes."""
        return {name: each.shape for name, each in self.logical.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Every tensor's dtype (safetensors name), for codes the one that their decoded numbers are said to have."""
        return {name: self.dtype(name) for name in self.logical}

    @property
    def nbytes(self) -> int:
        """The bytes of all stored tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def computed(self, name: str) -> bool:
        """Whether a tensor is not its stored bytes: decoded from codes, or changed by an adapter."""
        return name in self.changes or name in self.coded

    def dtype(self, name: str) -> str:
        """The dtype that a tensor is said to have, by its safetensors name: of codes that of what they stand for."""
        return self.changes[name].dtype if name in self.changes else self.logical[name].dtype

    def stored_bytes(self, name: str) -> int:
        """The bytes that one tensor of the decoded model is read from."""
        stored = self.coded[name].stored if name in self.coded else (name,)
        return sum(self.tensors[part].nbytes for part in stored)

    def descriptor(self, path: Path) -> int:
        """A read-only descriptor of one of `files`, opened at the first call and shared from then on (thread-safe).

        Raises:
            RunError: The file is no longer the one whose header was read, or too many files are open.
        """
        found = self._descriptors.get(path)
        if found is not None:
            return found
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = self._open(self._known[path])
            return self._descriptors[path]

    def _open(self, known: FileInfo) -> int:
        try:
            descriptor = open_regular(known.path)
        except ModelError as error:
            raise RunError(
                f"the file could be read before and now {error.what}",
                where=str(known.path),
                hint="did it vanish, or are too many files open (ulimit -n)?",
            ) from None
        if _identity(os.fstat(descriptor)) != (known.size, known.mtime_ns, known.inode):
            os.close(descriptor)
            raise _changed(known)
        return descriptor

    def close(self) -> None:
        """Close the descriptors. They are opened again when asked for."""
        with self._lock:
            self.mappings.clear()
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def read_bytes(self, info: TensorInfo) -> bytes:
        """One whole tensor's bytes, little-endian and contiguous: for small tensors and for tests.

        Raises:
            RunError: The file has become shorter.
        """
        if info.file is None:
            return fingerprint.tensor_bytes(self.memory[info.name])
        return fingerprint.read_exactly(self.descriptor(info.file), info.nbytes, info.offset, info.file)

    def verify_unchanged(self) -> None:
        """Check that every weight file is still the one that was opened.

        Raises:
            RunError: Naming the file whose size, modification time or inode differs, or that vanished.
        """
        for known in self.files:
            try:
                status = known.path.stat()
            except OSError as error:
                raise RunError(
                    f"the input vanished while it was in use: {error.strerror}", where=str(known.path)
                ) from None
            if _identity(status) != (known.size, known.mtime_ns, known.inode):
                raise _changed(known)

    def fingerprint(self) -> str:
        """A quick identity: sha256 over the headers, the sizes and 256 evenly spaced 4 KiB blocks of each file
        (fewer, but 16 or more, of each file of a model in more than 32 files).

        It does not depend on where the files lie. A change between the blocks is not seen: see `content_hash`.
        """
        found = fingerprint.quick(self.files, self.descriptor, {**self.tensors, **self.factors}, self.memory)
        return found if not self.changes else fingerprint.joined(found, self.changes)

    def content_hash(self, progress: Callable[[int], None] | None = None) -> str:
        """The sha256 of everything: of the file itself when there is one, as ``sha256sum`` prints it.

        For several files it is the sha256 of ``sha256sum``'s lines in the order of the files' names.

        Args:
            progress: Called with the number of bytes read since the last call.
        """
        tensors = {**self.tensors, **self.factors}
        return fingerprint.full(self.files, self.descriptor, tensors, self.memory, progress)

    def side_files(self, kind: Kind | None = None) -> list[Path]:
        """The tokenizer, processor, generation config, templates, licence and custom code: see `side_files.side_files`.

        All lie below `folder`; `Path.relative_to` gives the name that a copy needs.
        """
        return [] if self.folder is None else side_files(self.folder, self.config, kind)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _changed(known: FileInfo) -> RunError:
    return RunError(
        "the input changed while it was in use",
        where=str(known.path),
        hint="run again when nothing writes to it",
    )
