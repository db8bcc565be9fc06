"""Every error that geomerge raises on purpose.

    GeomergeError
    ├── RecipeError          (ValueError)         exit 2   the recipe is wrong: file and line are given
    ├── UsageError           (ValueError)         exit 2   the call is wrong: an argument, an option, the output's place
    ├── ModelError           (ValueError)         exit 3   a model cannot be used
    │   ├── DamagedCheckpoint                     exit 3   its files are broken or hostile
    │   ├── IncompatibleModels                    exit 3   it does not fit the others
    │   └── NotFiniteError                        exit 3   it holds NaN or Inf
    ├── DataError            (ValueError)         exit 3   a task's data cannot be had
    ├── RunError             (RuntimeError)       exit 1   the machine or the files failed while running
    │   └── OutOfRange                            exit 1   the output's dtype does not hold the merged weights
    └── GateFailed           (AssertionError)     exit 4   a quality gate said no

An error says what happened, where, why, and what to do. The command line prints `str(error)` and exits with
`error.exit_code`; a traceback appears only with `--debug`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import TypeVar

E = TypeVar("E", bound="GeomergeError")

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says when a disk is full, or as good as full."""

MAKE_ROOM = "make room, or choose an output on another disk"
"""What to do then."""


class GeomergeError(Exception):
    """The root of the tree.

    Args:
        what: One sentence: what is wrong, with the names, shapes and values that matter.
        where: A recipe's ``file:line``, or a model and a tensor. Printed before the sentence.
        hint: What to do about it. Printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what)

    def __reduce__(self) -> tuple[object, ...]:
        return (_remake, (type(self), self.what, self.where, self.hint))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  {self.hint}" if self.hint else text


def _remake(kind: type[GeomergeError], what: str, where: str | None, hint: str | None) -> GeomergeError:
    """An error as it was before it was pickled."""
    return kind(what, where=where, hint=hint)


class RecipeError(GeomergeError, ValueError):
    """The recipe is wrong; `where` is its ``file:line``."""

    exit_code = 2


class UsageError(GeomergeError, ValueError):
    """An argument or an option is wrong, or the output's place is taken."""

    exit_code = 2


class ModelError(GeomergeError, ValueError):
    """A model cannot be used as it is."""

    exit_code = 3


class DamagedCheckpoint(ModelError):
    """A model's files are truncated, inconsistent, unreadable or unsafe."""


class IncompatibleModels(ModelError):
    """The models do not fit each other: shapes, tensors, vocabularies, layer counts."""


class NotFiniteError(ModelError):
    """A parent holds NaN or Inf; `where` names model and tensor."""


class DataError(GeomergeError, ValueError):
    """What a task is scored on cannot be had, or is damaged."""

    exit_code = 3


class RunError(GeomergeError, RuntimeError):
    """The run failed: the disk is full, an input changed, a file vanished."""


class OutOfRange(RunError):
    """Merged weights are beyond what the output's dtype holds; `where` names the tensor."""


class GateFailed(GeomergeError, AssertionError):
    """A quality gate that the user asked for was not passed."""

    exit_code = 4


def together(problems: Sequence[E]) -> E:
    """One error of several: the first, and the others in its hint."""
    first, *more = problems
    if not more:
        return first
    shown = [f"also {problem.where}: {problem.what}{_meaning(problem.hint)}" for problem in more[:_SHOWN_PROBLEMS]]
    if len(more) > len(shown):
        shown.append(f"and {len(more) - len(shown)} more")
    hint = "\n  ".join([*([first.hint] if first.hint else []), *shown])
    return type(first)(first.what, where=first.where, hint=hint)


_SHOWN_PROBLEMS = 9


def _meaning(hint: str | None) -> str:
    """A misspelt word's correction, in parentheses."""
    said = (hint or "").partition("\n")[0]
    return f" ({said})" if said.startswith("did you mean") else ""


def first_line(error: BaseException) -> str:
    """What a library's error says first: some say pages."""
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint that names the closest of the `known` words, or lists them when they are few."""
    import difflib  # only where something went wrong

    words = sorted(set(known))
    same = [each for each in words if each.casefold() == word.casefold()]
    close = same or difflib.get_close_matches(word, words, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"known: {', '.join(words)}" if 0 < len(words) <= 30 else None
