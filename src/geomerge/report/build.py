"""From files to a report: what each input is, the sections in order, and the writing of it all at once or not at all."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomerge.errors import GeomergeError, RunError, UsageError
from geomerge.evaluate.scores import Scores
from geomerge.report.drawing import to_png
from geomerge.report.headline import headline, title
from geomerge.report.page import MARK, render
from geomerge.report.run_sections import cost_section, provenance_section, run_sections
from geomerge.report.runs import Run, Timing, is_timing, parse, read_run, read_timing
from geomerge.report.score_sections import score_sections
from geomerge.report.section import Section, figures_in
from geomerge.report.sheet import Sheet, checked, combine

_LARGEST = 256_000_000


@dataclass(frozen=True)
class Inputs:
    """What a report is made from.

    Attributes:
        runs: Merged models.
        sheets: Scores, those of the same tasks put together.
        files: The inputs as they were given.
    """

    runs: tuple[Run, ...]
    sheets: tuple[Sheet, ...]
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """A report, not written yet.

    Attributes:
        title, headline, lead, sections: See `geomerge.report.render`.
    """

    title: str
    headline: str
    lead: tuple[str, ...]
    sections: tuple[Section, ...]

    def html(self) -> str:
        """The page."""
        return render(self.title, self.sections, headline=self.headline, lead=self.lead)

    def pngs(self) -> dict[str, bytes]:
        """Every figure by its file's name."""
        found = [figure for section in self.sections for figure in figures_in(section.parts)]
        return {f"{figure.name}.png": to_png(figure) for figure in found}


def read_inputs(references: Sequence[str | Path]) -> Inputs:
    """Read merged model directories, scores files, and files with what ``geomerge merge --json`` printed.

    Raises:
        UsageError: One of them is missing or something else, or there is none.
        ModelError: A merged model's record is damaged.
    """
    runs: list[Run] = []
    scores: list[tuple[str, Scores]] = []
    timings: list[Timing] = []
    if not references:
        raise UsageError("there is nothing to report on", hint="give a merged model's directory or a scores file")
    for reference in dict.fromkeys(map(str, references)):
        path = Path(reference)
        try:
            if path.is_dir():
                runs.append(read_run(path))
                continue
            if not path.exists():
                raise UsageError("there is no such file or directory", where=reference)
        except GeomergeError:
            raise
        except (OSError, ValueError) as error:
            raise UsageError(f"it cannot be read: {error}", where=reference) from None
        data = _load(path)
        if is_timing(data):
            timings.append(read_timing(data, reference))
        else:
            scores.append((reference, checked(Scores.from_json(data, reference), reference)))
    if not runs and not scores:
        raise UsageError("there is nothing to report on", hint="give a merged model's directory or a scores file")
    took = {timing.plan: timing for timing in timings}
    timed = tuple(dataclasses.replace(run, timing=took.get(run.manifest["plan"])) for run in runs)
    return Inputs(timed, tuple(combine(scores)), tuple(map(str, references)))


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UsageError("it is not a regular file", where=str(path))
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError("it is too large to hold scores", where=str(path))
        data = parse(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UsageError(f"it cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        data = None
    if data is None:
        raise UsageError("it is not JSON", where=str(path), hint="give the scores.json that `geomerge evaluate` wrote")
    return data


def build(inputs: Inputs, *, command: str = "") -> Report:
    """The report on merges and scores.

    Args:
        inputs: What `read_inputs` found; or values made in Python.
        command: The command line, for the record.
    """
    sections: list[Section] = []
    several = len(inputs.sheets) > 1
    for i, sheet in enumerate(inputs.sheets, 1):
        heading = Path(sheet.labels[0]).name if several else ""
        sections += score_sections(sheet, prefix=f"{i}-" if several else "", heading=heading)
    place = {m.name: i for sheet in reversed(inputs.sheets) for i, m in enumerate(sheet.merges)}
    runs = sorted(inputs.runs, key=lambda run: place.get(run.name, len(place)))  # the best first
    sections += run_sections(runs)
    cost = cost_section(inputs.sheets, runs)
    if cost is not None:
        sections.append(cost)
    sections.append(provenance_section(inputs.sheets, runs, command, inputs.files))
    said, lead = headline(inputs.sheets, runs)
    return Report(title(inputs.sheets, runs), said, tuple(lead), tuple(sections))


def write(report: Report, out: Path, figures: Path | None = None) -> list[Path]:
    """Write the page and its figures. Everything is drawn before the first byte is written.

    Returns:
        The files.

    Raises:
        UsageError: The place is taken by something that is not a report.
        RunError: A file cannot be written.
    """
    check_place(out, figures)
    contents = {out: report.html().encode()}
    if figures is not None:
        contents |= {figures / name: data for name, data in report.pngs().items()}
    path = out if figures is None else figures
    try:
        if figures is not None:
            figures.mkdir(parents=True, exist_ok=True)
        for path, data in contents.items():
            replace_file(path, data)
    except OSError as error:
        raise RunError(f"the report cannot be written: {error.strerror}", where=str(path)) from None
    return list(contents)


def check_place(out: Path, figures: Path | None) -> None:
    """Refuse to write over what is not a report.

    Raises:
        UsageError: Naming what is in the way.
    """
    check_file(out, "report", MARK.encode(), "the HTML file to write")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise UsageError("it is not a directory", where=str(figures))


def check_file(out: Path, what: str, mark: bytes, example: str) -> None:
    """Refuse to write over what is not of the kind that is to be written, before any work is done.

    Args:
        out: The file.
        what: The kind in a word or two.
        mark: What the first two thousand bytes of such a file hold.
        example: What to give instead of a directory.

    Raises:
        UsageError: It is no file, is another kind of file, or its directory does not exist.
    """
    try:
        if out.is_dir() or (out.exists() and not out.is_file()):
            raise UsageError(
                f"it is {'a directory' if out.is_dir() else 'not a file'}", where=str(out), hint=f"give {example}"
            )
        if not out.absolute().parent.is_dir():
            raise UsageError("its directory does not exist", where=str(out))
        if out.is_file():
            with out.open("rb") as file:
                start = file.read(2000)
            if start.strip() and mark not in start:
                raise UsageError(
                    f"exists and is not a {what} of geomerge's", where=str(out), hint="choose another file"
                )
    except GeomergeError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"it cannot be used: {error}", where=str(out)) from None


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in its place whole, keeping the permissions that it had."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
