"""What the verbs print with: results on stdout, everything else on stderr, and no byte that a terminal would obey.

Strings that come from a model (tensor names, paths, licences) may hold anything, escape sequences included. All text goes
through `clean`, which shows what is not printable instead of sending it, and rich never reads markup in it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_UNLIMITED = 100_000
"""The width of a table that goes into a pipe: there a line is a record and must not be broken."""


_GAP = 2
_LAST = 24
"""To what width a table's last column is broken before any other is."""
_LEAST = 14
"""To what width a column that is no number can be broken at all."""


class Stopped(Exception):
    """The user interrupted the verb.

    Args:
        what: What that leaves.
        hint: How to go on.
    """

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


def clean(text: object) -> str:
    r"""A text in one line with everything unprintable shown as its escape: ``\x1b``, ``\u202e``, ``\n``."""
    said = str(text)
    if said.isprintable():
        return said
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in said)


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream takes colours: a terminal does, unless ``NO_COLOR`` says no; ``FORCE_COLOR`` says yes."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


# -- results -----------------------------------------------------------------------------------------------------------


_owed = False
"""Whether a program waits for a JSON document."""


def owe_json(owed: bool) -> None:
    """Say that stdout is to get one JSON document, whatever happens."""
    global _owed  # noqa: PLW0603 - one process, one stdout
    _owed = owed


def write_json(data: Any) -> None:
    """One JSON document on stdout. ASCII only: a name from a model cannot reach the terminal as it is."""
    owe_json(False)
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_error(what: str, *, where: str | None, hint: str | None, exit_code: int) -> None:
    """What went wrong, for a program that still waits for its JSON document."""
    if _owed:
        write_json({"error": {"what": what, "where": where or None, "hint": hint, "exit_code": exit_code}})


def write_lines(lines: Iterable[str]) -> None:
    """Lines on stdout as they are (already `clean`)."""
    sys.stdout.writelines(line + "\n" for line in lines)


def show(*parts: RenderableType) -> None:
    """Texts and tables on stdout, fitted to the terminal; in a pipe tables keep every record in one line.

    Strings are printed as they are: pass what comes from a model through `clean`.
    """
    from rich.console import Console

    colour = wants_colour(sys.stdout)
    console = Console(
        file=sys.stdout,
        width=_width() or _UNLIMITED,
        force_terminal=colour,
        color_system="standard" if colour else None,
        markup=False,
        highlight=False,
        emoji=False,
    )
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    write_lines(line.rstrip() for line in captured.get().splitlines())


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> RenderableType:
    """A table without lines. On a narrow terminal first the last column is broken, then the others; where the numbers alone
    are too wide, they are shown in several tables below each other, each with the columns that are no numbers.

    Args:
        columns: The headings.
        rows: The cells.
        right: The headings of columns of numbers, which are never broken.
    """
    from rich.cells import cell_len
    from rich.console import Group

    cells = [list(row) for row in rows]
    room = _width() or _UNLIMITED
    widths = [max(cell_len(row[i]) for row in [columns, *cells]) + _GAP for i in range(len(columns))]
    numbers = [i for i, column in enumerate(columns) if column in right]
    leading = sum(min(width, _LEAST) for i, width in enumerate(widths) if i not in numbers)
    if len(numbers) < 2 or leading + sum(widths[i] for i in numbers) <= room + _GAP:
        return _table(columns, cells, widths, numbers, room)
    pieces: list[list[int]] = [[]]
    for i in numbers:
        if pieces[-1] and leading + sum(widths[n] for n in [*pieces[-1], i]) > room + _GAP:
            pieces.append([])
        pieces[-1].append(i)
    made: list[RenderableType] = []
    for piece in pieces:
        kept = [i for i in range(len(columns)) if i in piece or i not in numbers]
        own = [kept.index(i) for i in piece]
        part = _table(
            [columns[i] for i in kept], [[r[i] for i in kept] for r in cells], [widths[i] for i in kept], own, room
        )
        made += ["", part] if made else [part]
    return Group(*made)


def _table(
    columns: Sequence[str], cells: list[list[str]], widths: Sequence[int], numbers: Sequence[int], room: int
) -> Table:
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i in numbers else "left", no_wrap=i in numbers, overflow="fold")
    limits = [width - _GAP for width in widths]
    texts = [i for i in range(len(columns)) if i not in numbers]
    last, others = texts[-1:], texts[:-1]
    for narrowed, least in ((last, _LAST), (others, _LEAST), (last, _LEAST), (texts, 1)):
        while narrowed and sum(limits) + _GAP * (len(limits) - 1) > room:
            widest = max(narrowed, key=limits.__getitem__)
            if limits[widest] <= least:
                break
            limits[widest] -= 1
    for shape, limit in zip(made.columns, limits, strict=True):
        shape.min_width = shape.max_width = limit
    for row in cells:
        made.add_row(*(_broken(cell, limit) for cell, limit in zip(row, limits, strict=True)))
    return made


def _broken(text: str, width: int) -> str:
    """With line breaks where words that are too long are best broken: behind a dot or an underscore, before a bracket, and not
    in a number."""
    from rich.cells import cell_len

    def folded(word: str) -> str:
        lines = [""]
        for piece in _BREAKS.split(word):
            if lines[-1] and cell_len(lines[-1] + piece) > width:
                lines.append("")
            lines[-1] += piece
        return "\n".join(lines)

    return " ".join(word if cell_len(word) <= width else folded(word) for word in text.split(" "))


_BREAKS = re.compile(r"(?<=[._/,])(?!\d)|(?=\()")


def facts(rows: Iterable[tuple[str, RenderableType]]) -> Table:
    """A list of named facts: the names bold, their texts wrapped beside them."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, content in rows:
        made.add_row(name, content)
    return made


def show_facts(rows: Sequence[tuple[str, str]]) -> None:
    """`facts` of plain texts on stdout. In a pipe, where nothing is fitted or coloured, the same lines come without the library
    that lays out tables, which takes longer to import than these to write."""
    if _width() is not None or wants_colour(sys.stdout):
        show(facts(rows))
        return
    width = max(len(name) for name, _ in rows) + _GAP
    write_lines(
        line.rstrip()
        for name, text in rows
        for line in f"{name:<{width}}{text}".replace("\n", "\n" + " " * width).split("\n")
    )


def bullets(lines: Iterable[str]) -> Table:
    """A list, each point wrapped beside its dash."""
    return facts(("-", line) for line in lines)


def heading(text: str) -> Text:
    """A section's title, with an empty line before it."""
    from rich.text import Text

    return Text.assemble("\n", (text, "bold"))


def _width() -> int | None:
    """Columns of the terminal, or of what ``COLUMNS`` says; `None` in a pipe."""
    if os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty():
        return max(shutil.get_terminal_size((100, 24)).columns, 20)
    return None


# -- messages ----------------------------------------------------------------------------------------------------------


def complain(kind: str, what: str, *, where: str | None = None, hint: str | None = None) -> None:
    """An error or a note on stderr: ``error: where: what``, the hint indented below."""
    colour = {"error": "31;1", "warning": "33;1"}.get(kind, "1")
    label = f"\x1b[{colour}m{kind}:\x1b[0m" if wants_colour(sys.stderr) else f"{kind}:"
    first = f"{clean(where)}: {clean(what)}" if where else clean(what)
    rest = [f"  {clean(line.strip())}" for line in (hint or "").splitlines()]
    sys.stderr.write("\n".join([f"{label} {first}", *rest]) + "\n")


class _Handler(logging.Handler):
    """The library's warnings on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.levelname.lower(), record.getMessage())


def show_warnings() -> None:
    """Send the library's log to stderr, from warnings on."""
    logger = logging.getLogger("geomerge")
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler(logging.WARNING))
        logger.propagate = False


# -- words -------------------------------------------------------------------------------------------------------------


def amount(nbytes: float) -> str:
    """Bytes in three digits: ``988 MB``, ``1.98 GB``."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while nbytes >= 999.5 and len(units) > 1:
        nbytes /= 1000
        units.pop()
    digits = f"{nbytes:.0f}" if units[-1] == "B" or nbytes >= 99.95 else f"{nbytes:.3g}"
    return f"{digits} {units[-1]}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "under 0.1 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int, what: str) -> str:
    """``1 tensor``, ``1,204 tensors``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
