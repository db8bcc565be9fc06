"""Putting off an import until something of the module is used.

Importing torch takes a second or two: longer than a merge of small models by compiled loops, which do not need it; NumPy a
twentieth of that, which is a tenth of such a merge. The program (not the library: see `geomerge.__main__`) puts both off.
Everything else is written as if they had been imported: whoever touches `torch.anything` has it loaded at that moment.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_lock = threading.RLock()
_then: dict[str, list[Callable[[], None]]] = {}
"""What is to be done as soon as a module is loaded."""
_loading: set[str] = set()
"""What a thread is loading: `sys.modules` has it, but not all of it."""


class _Later(ModuleType):
    """Stands in for a module until one of its attributes is asked for, and passes on what it has from then on."""

    def __getattr__(self, attribute: str) -> Any:
        with _lock:
            name = self.__name__
            if sys.modules.get(name) is self:
                _loading.add(name)
                del sys.modules[name]
                try:
                    importlib.import_module(name)
                except BaseException:
                    sys.modules[name] = self
                    raise
                finally:
                    _loading.discard(name)
                for act in _then.pop(name, []):
                    act()
            module = sys.modules[name]
            value = getattr(module, attribute)
            # The next time it is found without asking here; what the module computes for itself each time is not kept.
            if attribute in vars(module):
                vars(self)[attribute] = value
            return value


def put_off(name: str) -> None:
    """Load a module when something of it is used; nothing happens where it is loaded already, or is not installed."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    later = _Later(name)
    later.__spec__ = spec
    sys.modules[name] = later


def load(name: str) -> None:
    """Load a module now if it was put off: before a process forks, or starts a clock."""
    module = sys.modules.get(name)
    if isinstance(module, _Later):
        _ = module.__path__


@contextlib.contextmanager
def torch_alone() -> Iterator[None]:
    """Within, torch works with one thread: the caller's threads are the parallelism, and torch's number shows in no bit.

    Where torch is put off, that holds from the moment it is loaded. Threads that are started within have to take it over
    (`also_alone`).
    """
    before: list[int] = []

    def alone() -> None:
        import torch

        before.append(torch.get_num_threads())
        torch.set_num_threads(1)

    with _lock:
        if loaded("torch"):
            alone()
        else:
            _then.setdefault("torch", []).append(alone)
    try:
        yield
    finally:
        with _lock:
            if alone in _then.get("torch", []):
                _then["torch"].remove(alone)
        for number in before:
            sys.modules["torch"].set_num_threads(number)


def also_alone() -> None:
    """In a thread that is started within `torch_alone`: what to begin it with.

    Such a thread gets torch's number when torch first splits work there. Until then MKL, by which it decomposes matrices,
    has its own.
    """
    if loaded("torch"):
        sys.modules["torch"].get_num_threads()


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """`torch.inference_mode`, also as a decorator; nothing where torch is put off."""
    if not loaded("torch"):
        yield
        return
    import torch

    with torch.inference_mode():
        yield


def loaded(name: str) -> bool:
    """Whether a module is there already: neither missing nor put off, nor being loaded by another thread."""
    module = sys.modules.get(name)
    return module is not None and not isinstance(module, _Later) and name not in _loading
