"""All methods by name. A method is registered by its class; third parties use `register` as a decorator."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import logging
from typing import TypeVar

from geomerge.errors import UsageError, did_you_mean
from geomerge.methods.base import Method

M = TypeVar("M", bound=type[Method])

_FAMILIES = ("span", "elementwise", "matrix")

GROUP = "geomerge.methods"
"""The entry points of other packages: modules that register methods."""

_log = logging.getLogger("geomerge")

_registered: dict[str, type[Method]] = {}


def register(method: M) -> M:
    """Class decorator: make a method known under its name and aliases."""
    for name in (method.name, *method.aliases):
        if _registered.get(name, method).__qualname__ != method.__qualname__:
            raise ValueError(
                f"two methods are called {name!r}: {_registered[name].__qualname__}, {method.__qualname__}"
            )
        _registered[name] = method
    return method


@functools.cache
def _load() -> None:
    import pkgutil
    from importlib.metadata import entry_points  # a tenth of a start's time, and most recipes name one of these methods

    for family in _FAMILIES:
        package = importlib.import_module(f"geomerge.methods.{family}")
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # noqa: BLE001 - another package's mistake must not take away the methods that are here
            _log.warning("the methods of %s cannot be loaded: %s: %s", point.value, type(error).__name__, error)


@functools.cache
def _load_one(name: str) -> None:
    """Load the file of that name, or of how the name begins, if there is one: most recipes need no other."""
    words = name.split("_")
    stems = ["_".join(words[:n]) for n in range(len(words), 0, -1)]
    for family, stem in itertools.product(_FAMILIES, stems):
        module = f"geomerge.methods.{family}.{stem}"
        if stem.isidentifier() and importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
            return


def strangers() -> set[str]:
    """The modules of the loaded methods that are not geomerge's own."""
    return {m.__module__ for m in _registered.values() if not m.__module__.startswith("geomerge.")}


def all_methods() -> dict[str, type[Method]]:
    """Name → class, without aliases, in alphabetic order."""
    _load()
    return {name: method for name, method in sorted(_registered.items()) if name == method.name}


def get(name: str) -> type[Method]:
    """The method of that name or alias.

    Raises:
        UsageError: There is none.
    """
    _load_one(name)
    # Another package's method must not hide one of these: whoever has the name twice is told when all are there.
    if name not in _registered or not _registered[name].__module__.startswith(f"{__package__}."):
        _load()
    try:
        return _registered[name]
    except KeyError:
        raise UsageError(f"there is no method {name!r}", hint=did_you_mean(name, _registered)) from None
