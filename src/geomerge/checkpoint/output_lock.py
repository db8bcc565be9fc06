"""One run for one output: the lock in ``OUT.partial/``.

The lock is the kernel's (``flock``), so it vanishes with its process however that ends; the file's text is the process
id, for the message to whoever comes second. Shards of one merge hold it together (shared), and each a lock of its own.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from geomerge.errors import RunError, UsageError

LOCK = ".lock"
"""The lock's name in ``OUT.partial/``."""

logger = logging.getLogger(__name__)


def take_lock(partial: Path, out: Path, *, shared: bool = False) -> tuple[int, str]:
    """Make the directory if it is not there and lock it.

    Args:
        partial: ``OUT.partial``.
        out: The output, for the error.
        shared: Together with others that ask for the same.

    Returns:
        The lock's descriptor, to be kept open as long as the lock is wanted, and what the run before left in it: its
        process id, or nothing.

    Raises:
        UsageError: Another run holds the lock, or the directory is somebody else's.
        RunError: The directory or the lock cannot be made.
    """
    path = partial / LOCK
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # in /proc, "no such file", and not for a moment
            raise _cannot_be_made(partial, error) from None
        try:
            if any(partial.iterdir()) and not os.path.lexists(path):  # looked for last: others make it first
                raise UsageError("exists and was not made by geomerge", where=str(partial), hint="move it away first")
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # the other run finished between mkdir and open
        except OSError as error:
            raise _cannot_be_made(partial, error) from None
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _read(lock)
            os.close(lock)
            raise UsageError(
                f"another run ({f'process {pid}' if pid else 'perhaps on another machine'}) is writing this output",
                where=str(out),
                hint="wait for it, or choose another output",
            ) from None
        except OSError as error:
            # Some network file systems have no locks at all; the run is still worth doing.
            logger.warning("%s cannot be locked (%s): do not start a second run", partial, error.strerror)
        # The lock counts only if the file is still the one at this path: the run before may have renamed it away.
        try:
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock, _read(lock)
        except FileNotFoundError:
            pass
        os.close(lock)


def own_lock(path: Path, *, wait: bool = False) -> int | None:
    """A lock for this process alone, in a file of its own.

    Args:
        path: The file; made when it is not there.
        wait: Until it is free.

    Returns:
        The descriptor to keep open, or `None` when another process has the lock.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): do not run a shard twice at the same time", path, error.strerror)
    return lock


def alone(lock: int) -> bool:
    """Turn a shared lock into one for this process alone, if nobody else holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sign_lock(lock: int) -> None:
    """Write this process's id into the lock."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def _read(lock: int) -> str:
    return os.pread(lock, 32, 0).decode("ascii", "replace").strip()


def _cannot_be_made(partial: Path, error: OSError) -> RunError:
    return RunError(
        f"the output cannot be made: {error.strerror}", where=str(partial), hint="choose a place that can be written to"
    )
