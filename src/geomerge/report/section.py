"""What a report is made of: sections of prose, tables, code and figures. They are values; `geomerge.report.page` draws them.

A verb that has something to show builds a few sections and calls `geomerge.report.render`:

    Section("Angles", ("How far apart the parents are.", Figure("angles", draw, alt="…")))

All text in them is plain text: the page escapes it, so a model's name can be passed as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Tone = Literal["", "accent", "muted", "strong"]
"""How a cell or row stands out: of the merge, of something that matters less, of something that matters most."""


@dataclass(frozen=True)
class Figure:
    """A figure, drawn twice: once for a page's whole width, once for a phone.

    Attributes:
        name: Its file's name under ``--figures`` (letters, digits, hyphens).
        draw: Gives the drawing for a width in inches. It is called within `geomerge.report.drawing.style`, must take its
            colours from `geomerge.report.drawing.Colour` and must not use pyplot.
        alt: What the figure shows, in a sentence, for those who cannot see it.
        caption: Below the figure.
        width: The widest that it should be, in inches.
    """

    name: str
    draw: Callable[[float], Drawing]
    alt: str
    caption: str = ""
    width: float = 7.6
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Cell:
    """A table's cell: a text, a smaller note behind it (an interval), and how it stands out."""

    text: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Row:
    """A table's row. The first cell is its heading."""

    cells: Sequence[str | Cell]
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """A table. On a narrow screen it scrolls within itself.

    Attributes:
        columns: The headings.
        rows: The rows, each with as many cells.
        words: Indices of columns of words; all other columns are numbers and stand right-aligned.
        caption: Above the table.
        note: Below the table.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    words: frozenset[int] = frozenset({0})
    caption: str = ""
    note: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Code:
    """Text to be shown exactly: a recipe, a command."""

    text: str
    caption: str = ""
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Facts:
    """Named facts, one a line."""

    rows: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Folded:
    """Parts behind a line that opens them. In print they are open."""

    title: str
    parts: Sequence[Part]
    kind: ClassVar[str] = "folded"


Part = str | Figure | Table | Code | Heading | Facts | Folded
"""A string is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A titled run of parts.

    Attributes:
        title: The heading.
        parts: In order.
        name: The anchor; by default made from the title.
    """

    title: str
    parts: Sequence[Part] = field(default_factory=tuple)
    name: str = ""

    @property
    def anchor(self) -> str:
        """The section's ``id``: ASCII letters, digits and hyphens only."""
        text = (self.name or self.title).lower()
        words = "".join(c if c.isascii() and c.isalnum() else " " for c in text).split()
        return "-".join(words) or "section"


def figures_in(parts: Sequence[Part]) -> list[Figure]:
    """All figures, folded ones too, in order."""
    found: list[Figure] = []
    for part in parts:
        if isinstance(part, Figure):
            found.append(part)
        elif isinstance(part, Folded):
            found += figures_in(part.parts)
    return found
