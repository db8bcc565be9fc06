"""JSON from strangers: size limits, no duplicate keys, no runaway nesting, one clear error for whatever is wrong.

Python's parser keeps the last of two equal keys, so a header could show one tensor to one reader and another to the
next; such files are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from geomerge.errors import DamagedCheckpoint

CONFIG_LIMIT = 64 << 20
"""Bytes a ``config.json`` or the like may have."""


def parse_json(data: bytes, where: str, *, what: str, constants: bool = False) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level must be an object.

    Args:
        data: The text.
        where: The file, for errors.
        what: What the text is, for errors: ``"the header"``.
        constants: Allow ``NaN`` and ``Infinity``, which some models' configs hold (Mamba's ``time_step_limit``).

    Raises:
        DamagedCheckpoint: Not UTF-8, not JSON, not an object, or a key given twice.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=None if constants else _no_constant
        )
    except RecursionError:
        raise DamagedCheckpoint(f"{what} is nested too deeply", where=where) from None
    except ValueError as error:  # not UTF-8, not JSON, an absurdly long number, or one of the two hooks
        raise DamagedCheckpoint(f"{what} is not valid JSON: {error}", where=where) from None
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{what} must be a JSON object, not {type(value).__name__}", where=where)
    return value


def read_json(path: Path, *, what: str, limit: int = CONFIG_LIMIT, constants: bool = False) -> dict[str, Any]:
    """Read and parse a JSON file of at most `limit` bytes; errors as `parse_json`, and for what cannot be read."""
    try:
        if not path.is_file():
            raise DamagedCheckpoint(f"{what} is not a regular file", where=str(path))
        size = path.stat().st_size
        if size > limit:
            raise DamagedCheckpoint(f"{what} has {size:,} bytes; at most {limit:,} are accepted", where=str(path))
        data = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{what} cannot be read: {error.strerror}", where=str(path)) from None
    return parse_json(data.removeprefix(b"\xef\xbb\xbf"), str(path), what=what, constants=constants)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
