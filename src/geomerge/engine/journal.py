"""What a run has finished, so that another can go on after it was killed.

One line for each finished tensor, written after the tensor's bytes; before these lines what surveys have found, tensor by
tensor where that is little, and in all. The first line names the plan, the machine's boot and the identity of the input files.
Bytes that a process wrote outlive it, but a power cut may lose those that had not reached the disk, so after a reboot the
journal is not believed (unless the run flushed its files). Nor is it when an input was touched since: a plan's fingerprint
samples the files, and tensors of the old and of the new content must not be mixed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomerge.checkpoint.writer import disk_error
from geomerge.errors import UsageError

COMPLETE = "complete"
"""The key of a concluded journal's last line."""

LOOK = "look"
"""The key of a line with what a survey, or LiNeS, found in one tensor."""

SURVEY = "survey"
"""The key of a line with what the survey of a method found."""

_dense = json.JSONEncoder(separators=(",", ":")).encode
_BOOT = Path("/proc/sys/kernel/random/boot_id")

logger = logging.getLogger(__name__)


def boot_id() -> str:
    """Changes with every start of the machine; empty where the system does not tell."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


class Journal:
    """The journal of one output.

    Args:
        path: Its file.
        plan_hash: The plan that is carried out.
        inputs: Size, modification time in ns and inode of every input file.
        resume: Read what an earlier run finished; otherwise begin anew.
        durable: Flush each line (the tensor's bytes were flushed before).

    Raises:
        UsageError: The journal belongs to another plan.
        RunError: It cannot be written.

    Attributes:
        finished: For each finished tensor what the manifest shall say of it.
        surveys: What surveys have found (`geomerge.engine.findings`), by the first tensor of each.
        looks: What they have found in single tensors, likewise, by the look that it was and the tensor.
        complete: The journal was concluded.
        durable: Each line is flushed.
    """

    def __init__(
        self,
        path: Path,
        plan_hash: str,
        *,
        inputs: Sequence[Sequence[int]] = (),
        resume: bool,
        durable: bool = False,
    ) -> None:
        self.finished: dict[int, dict[str, Any]] = {}
        self.surveys: dict[int, Any] = {}
        self.looks: dict[str, dict[int, Any]] = {}
        self.complete = False
        self.durable = durable
        self._path = path
        self._lock = threading.Lock()
        head = {"plan": plan_hash, "boot": boot_id(), "durable": durable, "inputs": [list(i) for i in inputs]}
        lines = _lines(path) if resume else []
        if lines and lines[0].get("plan") != plan_hash:
            raise UsageError(
                "the interrupted run carried out another plan: the recipe, an option or an input has changed",
                where=str(path.parent),
                hint="start anew with --force",
            )
        believed = (
            bool(lines)
            and lines[0].get("inputs") == head["inputs"]
            and (lines[0].get("durable") or lines[0].get("boot") == head["boot"] or COMPLETE in lines[-1])
        )
        if believed:
            self.finished, self.complete = _sorted(lines)
            self.surveys = {line[SURVEY]: line["found"] for line in lines if SURVEY in line}
            for line in lines:
                if LOOK in line:
                    self.looks.setdefault(line[LOOK], {})[line["at"]] = line["found"]
        elif lost := len(_sorted(lines)[0]):
            same = lines[0].get("inputs") == head["inputs"]
            why = "the machine has been restarted" if same else "a parent's file has been changed, or touched,"
            logger.warning("%s since the interrupted run: its %d finished tensors are made again", why, lost)
        # What this run does not flush, a journal that promises flushed files must not record.
        weaker = believed and bool(lines[0].get("durable")) and not durable and not self.complete
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND
        self._file = os.open(path, flags if believed and not weaker else flags | os.O_TRUNC, 0o666)
        if not believed:
            self._write([head])
        elif weaker:
            self._write([head])
            self.record(self.finished.items())
            for index, found in self.surveys.items():
                self.remember_survey(index, found)
            for look, by_index in self.looks.items():
                for index, found in by_index.items():
                    self.remember_look(look, index, found)
        else:
            # A line that was cut off by the kill must not swallow the next one.
            os.write(self._file, b"\n")

    def record(self, entries: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Tensors are finished: their indices and what the manifest shall say of them."""
        self._write([{"tensor": index, **facts} for index, facts in entries])

    def remember_survey(self, index: int, found: Any) -> None:
        """What a survey found, of which this is the first tensor of the plan."""
        self._write([{SURVEY: index, "found": found}])

    def remember_look(self, look: str, index: int, found: Any) -> None:
        """What a survey, or LiNeS, found in a tensor of the plan."""
        self._write([{LOOK: look, "at": index, "found": found}])

    def conclude(self) -> None:
        """All that this journal is for is finished, and has reached the disk: it is believed after any power cut."""
        self._write([{COMPLETE: True}])
        try:
            os.fsync(self._file)
        except OSError as error:
            raise disk_error(error, self._path, 0) from None
        self.complete = True

    def _write(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(_dense(line) + "\n" for line in lines).encode()
        with self._lock:
            try:
                while text:
                    text = text[os.write(self._file, text) :]
                if self.durable:
                    os.fdatasync(self._file)
            except OSError as error:
                raise disk_error(error, self._path, len(text)) from None

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self._file)


@dataclass(frozen=True)
class Reading:
    """What a journal says.

    Attributes:
        head: Its first line.
        finished: For each finished tensor what the manifest shall say of it.
        complete: It was concluded.
    """

    head: dict[str, Any]
    finished: dict[int, dict[str, Any]]
    complete: bool


def read_journal(path: Path) -> Reading | None:
    """Read a journal that others wrote; `None` when there is none."""
    lines = _lines(path)
    return Reading(lines[0], *_sorted(lines)) if lines else None


def _sorted(lines: list[dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], bool]:
    """The finished tensors, and whether the journal was concluded."""
    finished = {line["tensor"]: {k: v for k, v in line.items() if k != "tensor"} for line in lines if "tensor" in line}
    return finished, any(COMPLETE in line for line in lines)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a last one that was cut off is left out."""
    found: list[dict[str, Any]] = []
    try:
        text = path.read_bytes()
    except OSError:
        return []
    for raw in text.split(b"\n"):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and (not found or line.keys() & {"tensor", LOOK, SURVEY, COMPLETE}):
            found.append(line)
    return found
