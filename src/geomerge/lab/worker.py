"""The process that trains one model of a suite: ``python -m geomerge.lab.worker ORDER``.

It writes a line ``steps N`` for every N finished steps, and ends at once when its standard input is closed, that is when
the build that started it has ended, however it ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

from geomerge.errors import GeomergeError
from geomerge.lab.build import train_one
from geomerge.lab.kinds import get_kind

_EVERY = 0.25
"""Seconds between lines."""


class _Lines:
    """Steps, gathered into a few lines a second."""

    def __init__(self) -> None:
        self._steps = 0
        self._next = 0.0

    def tick(self, steps: int) -> None:
        self._steps += steps
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        self._next = time.monotonic() + _EVERY
        sys.stdout.write(f"steps {self._steps}\n")
        sys.stdout.flush()
        self._steps = 0


def _end_with_the_build() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main(order: str) -> int:
    """Train what the order (JSON, see `geomerge.lab.build`) describes.

    Returns:
        The exit code.
    """
    import torch

    threading.Thread(target=_end_with_the_build, daemon=True).start()
    torch.set_num_threads(1)
    given = json.loads(order)
    lines = _Lines()
    try:
        train_one(get_kind(given["suite"]), given, lines.tick)
    except GeomergeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    lines.flush()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # The thread that waits for the end of standard input must not be waited for.
    os._exit(code)
