"""Files mapped into memory, for compiled loops that walk over them more than once: nothing is copied then.

A file that is cut short while it is read gives an error all the same: see `mapped.h`.
"""

from __future__ import annotations

import ctypes
import threading
import weakref

from geomerge.methods.native import call

_lock = threading.RLock()  # one may be collected while another is made


class Mapping:
    """A file's bytes, as long as this lives.

    Attributes:
        address: Of the first.
    """

    def __init__(self, number: int) -> None:
        function = call.loaded().geomerge_mapped
        function.restype = ctypes.c_void_p
        self.address: int = function(number)
        self._number = number
        weakref.finalize(self, _unmap, number).atexit = False

    @property
    def error(self) -> int | None:
        """What has kept some of them from being read: `errno`, 0 when the file ended early; `None`: nothing."""
        found: int = call.loaded().geomerge_unread(self._number)
        return None if found < 0 else found


def mapped(file: int, size: int) -> Mapping | None:
    """A file of `size` bytes, if it can be mapped; its descriptor must be open as long as it is."""
    with _lock:
        number: int = call.loaded().geomerge_map(file, ctypes.c_int64(size))
        return None if number < 0 else Mapping(number)


def _unmap(number: int) -> None:
    call.loaded().geomerge_let_go(number)
    with _lock:
        call.loaded().geomerge_unmap(number)
