"""Numbers and names as a reader wants them. A missing number is a dash, a minus sign is a minus sign."""

from __future__ import annotations

import math

MISSING = "–"
_LONGEST = 160


def visible(text: object, longest: int = _LONGEST) -> str:
    """A name in one line: whatever is not printable as its escape, what is too long cut in its middle."""
    said = str(text)
    if len(said) > longest:
        half = (longest - 1) // 2
        said = f"{said[:half]}…{said[-half:]}"
    if said.isprintable():
        return said
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in said)


def lines(text: str, longest: int = 64_000) -> str:
    """A text of many lines with its line breaks, and whatever else is not printable as its escape."""
    whole = "\n".join(visible(line.replace("\t", "    "), len(line) * 4 + 1) for line in text[:longest].splitlines())
    return whole if len(text) <= longest else f"{whole}\n… ({len(text) - longest:,} characters more)"


def number(value: float | None, digits: int = 3) -> str:
    """``0.93``, ``12.4``, ``1.2e-05``: so many significant digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    said = f"{value:.{digits}g}"
    return said.replace("-", "−", 1) if said.startswith("-") else said


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent, without the sign: ``93.1``."""
    if value is None or not math.isfinite(value):
        return MISSING
    said = f"{100 * value:.{digits}f}"
    if float(said) == 0:
        return said.lstrip("-")
    return said.replace("-", "−", 1)


def signed(value: float | None, digits: int = 1) -> str:
    """A difference of shares in points: ``+12.3``, ``−4.0``, ``0.0``."""
    said = percent(value, digits)
    return f"+{said}" if said != MISSING and said[0] != "−" and float(said) != 0 else said


def count(many: int, what: str) -> str:
    """``1 tensor``, ``1,204 tensors``."""
    return f"{many:,} {what}{'' if many == 1 else 's'}"


def amount(nbytes: float) -> str:
    """Bytes in three digits: ``988 MB``, ``1.98 GB``."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while nbytes >= 999.5 and len(units) > 1:
        nbytes /= 1000
        units.pop()
    return f"{nbytes:.0f} {units[-1]}" if units[-1] == "B" or nbytes >= 99.95 else f"{nbytes:.3g} {units[-1]}"


def seconds(value: float | None) -> str:
    """``0.03 s``, ``4.2 s``, ``73 s``, ``12 min``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value >= 600:
        return f"{value / 60:.0f} min"
    if value >= 10:
        return f"{value:.0f} s"
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def short_hash(text: str | None) -> str:
    """The first characters of a hash."""
    return visible(text)[:12] if text else MISSING
