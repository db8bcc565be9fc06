"""Files mapped into memory, for compiled loops that walk over them more than once: nothing is copied then.

A file that is cut short while it is read gives an error all the same: see `mapped.h`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import weakref

from geomerge.methods.native import call

_lock = threading.RLock()  # one may be collected while another is made


class Mapping:
    """A file's bytes, as long as this lives.

    Attributes:
        address: Of the first.
    """

    def __init__(self, number: int, file: int, size: int) -> None:
        function = call.loaded().geomerge_mapped
        function.restype = ctypes.c_void_p
        self.address: int = function(number)
        self._number, self._file, self._size = number, file, size
        weakref.finalize(self, _unmap, number).atexit = False

    @property
    def error(self) -> int | None:
        """What has kept some of them from being read: `errno`, 0 when the file ended early; `None`: nothing."""
        try:
            if os.fstat(self._file).st_size < self._size:
                return 0  # on the last page there are zeros then
        except OSError as error:
            return error.errno or errno.EIO
        return errno.EIO if call.loaded().geomerge_lost(self._number) else None


def mapped(file: int, size: int) -> Mapping | None:
    """A file of `size` bytes, if it can be mapped; its descriptor must be open as long as it is."""
    with _lock:
        number: int = call.loaded().geomerge_map(file, ctypes.c_int64(size))
        return None if number < 0 else Mapping(number, file, size)


def _unmap(number: int) -> None:
    with _lock:
        call.loaded().geomerge_unmap(number)
