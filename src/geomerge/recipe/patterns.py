"""How a filter's text is meant: a piece of the tensor's name (mergekit's way), a glob, or a /regular expression/.

Regular expressions come from recipes that people pass around, and Python's engine backtracks: a pattern that can take
exponential time is refused by its shape before it is ever run.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

Kind = Literal["substring", "glob", "regex"]

MAX_PATTERN = 200
"""Longest glob or regular expression, in characters."""

MAX_WAYS = 64**3 * 16
"""Most ways in which a regular expression may try to match: an unbounded repeat (``*``, ``+``, ``{n,}``) counts 64, an
optional atom 2, a group as many as it has alternatives; the product may not exceed this."""

_GLOB = frozenset("*?[")
_BOUNDS = re.compile(r"\{(\d{0,9})(?:(,)(\d{0,9}))?\}")
# Plain, unnamed, named, atomic and looking groups, and the flag for "ignore case". Not comments and not the verbose
# flag, which would let a repeat stand apart from what it repeats.
_OPENING = re.compile(r"\((?:\?(?::|=|!|<=|<!|>|P<\w+>|i\))|(?!\?))")


def classify(text: str) -> tuple[str, Kind]:
    """The pattern in a filter's text and its kind.

    Raises:
        ValueError: The pattern is too long, is not a regular expression, or could take exponential time.
    """
    if len(text) > 2 and text[0] == text[-1] == "/":
        pattern = text[1:-1]
        _check_length(pattern)
        _check_backtracking(pattern)
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{text!r} is not a regular expression: {error}") from None
        return pattern, "regex"
    if text != "*" and _GLOB.intersection(text):
        _check_length(text)
        return text, "glob"
    return text, "substring"


@lru_cache(maxsize=4096)
def searcher(kind: Kind, pattern: str) -> Callable[[str], re.Match[str] | None]:
    """The compiled test of a glob (over the whole name) or a regular expression (anywhere in the name)."""
    if kind == "glob":
        return re.compile(fnmatch.translate(pattern)).match
    return re.compile(pattern).search


def _check_length(pattern: str) -> None:
    if len(pattern) > MAX_PATTERN:
        raise ValueError(
            f"the pattern {pattern[:40]!r}… has {len(pattern)} characters; at most {MAX_PATTERN} are allowed"
        )


def _check_backtracking(pattern: str) -> None:
    """Refuse repeats of a group that itself repeats or branches, back-references, and too many ways to match.

    A group is *ambiguous* once something inside it can match in more than one way. Repeating it multiplies the ways at
    each round, which is what makes backtracking exponential. Without such a repeat the ways are a product over the
    pattern's atoms, which is bounded here.
    """
    ambiguous = [False]  # for each open group
    alternatives = [1]
    repeated = False  # whether the atom just read is an ambiguous group
    ways = 1
    position = 0
    while position < len(pattern):
        sign = pattern[position]
        bounds = _BOUNDS.match(pattern, position) if sign == "{" else None
        if sign in "*+?" or bounds:
            least, most = _limits(sign, bounds)
            if repeated and (most is None or most > 1):
                raise ValueError(f"/{pattern}/ repeats a group that itself repeats or branches, which can take forever")
            ways *= 64 if most is None else max(most - least + 1, 1)
            ambiguous[-1] |= most != least
            position = bounds.end() if bounds else position + 1
            if pattern[position : position + 1] in ("?", "+"):  # a lazy or possessive repeat
                position += 1
            repeated = False
            continue
        if sign == "\\":
            if pattern[position + 1 : position + 2].isdigit():
                raise ValueError(f"/{pattern}/ refers back to a group, which filters do not support")
            position, repeated = position + 2, False
            continue
        if sign == "[":
            position, repeated = _end_of_class(pattern, position), False
            continue
        if sign == "(":
            opening = _OPENING.match(pattern, position)
            if opening is None:
                raise ValueError(f"/{pattern}/ has a kind of group that filters do not support")
            position, repeated = opening.end(), False
            if not opening.group().endswith(")"):
                ambiguous.append(False)
                alternatives.append(1)
            continue
        repeated = False
        if sign == ")" and len(ambiguous) > 1:
            ways *= alternatives.pop()
            repeated = ambiguous.pop()
            ambiguous[-1] |= repeated
        elif sign == "|":
            alternatives[-1] += 1
            ambiguous[-1] = True
        position += 1
    if ways > MAX_WAYS:
        raise ValueError(f"/{pattern}/ has too many repeats and alternatives")


def _limits(sign: str, bounds: re.Match[str] | None) -> tuple[int, int | None]:
    """The smallest and largest number of rounds of a repeat; ``None`` when there is no largest."""
    if bounds is None:
        return (0, 1) if sign == "?" else (0, None)
    least, comma, most = bounds.groups()
    low = int(least or 0)
    return low, (int(most) if most else None) if comma else low


def _end_of_class(pattern: str, start: int) -> int:
    """The position after a character class such as ``[^]a-z]``."""
    position = start + 1
    if pattern[position : position + 1] == "^":
        position += 1
    if pattern[position : position + 1] == "]":
        position += 1
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position + 1
