"""What a survey found, as a line of the journal has it: no pickle, only numbers, words, tuples and dictionaries."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any


def plain(found: Any, kinds: tuple[type, ...]) -> Any:
    """A finding as JSON has it.

    Args:
        found: Numbers, strings, `None`, sequences and dictionaries by strings of such, and instances of `kinds`.
        kinds: Named tuples and dataclasses (`Method.findings`).

    Raises:
        TypeError: There is something else in it.
    """
    if found is None or isinstance(found, str | bool):
        return found
    if isinstance(found, numbers.Integral):
        return int(found)
    if isinstance(found, numbers.Real):
        return float(found)
    if isinstance(found, dict):
        return {"": {_word(key): plain(value, kinds) for key, value in found.items()}}
    if type(found) in kinds:
        fields = found if isinstance(found, tuple) else [getattr(found, f.name) for f in dataclasses.fields(found)]
        return {type(found).__name__: [plain(value, kinds) for value in fields]}
    if type(found) in (tuple, list):
        return [plain(value, kinds) for value in found]
    raise TypeError(f"{type(found).__name__} in what a survey found")


def _word(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a survey's finding is by {type(key).__name__}")
    return key


def restored(found: Any, kinds: tuple[type, ...]) -> Any:
    """The finding that `plain` wrote; sequences are tuples.

    Raises:
        ValueError: It did not write this.
    """
    if isinstance(found, list):
        return tuple(restored(value, kinds) for value in found)
    if not isinstance(found, dict):
        return found
    by_name = {kind.__name__: kind for kind in kinds}
    if len(found) == 1:
        ((name, inner),) = found.items()
        if name == "" and isinstance(inner, dict):
            return {key: restored(value, kinds) for key, value in inner.items()}
        if name in by_name and isinstance(inner, list):
            try:
                return by_name[name](*(restored(value, kinds) for value in inner))
            except TypeError as error:
                raise ValueError(str(error)) from None
    raise ValueError(f"no finding of a survey: {str(found)[:80]}")
