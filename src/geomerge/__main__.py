"""``geomerge`` and ``python -m geomerge``: the program as a process."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import NoReturn

from geomerge.late import put_off


def run() -> NoReturn:
    """The program as a process: what has to be settled before anything is loaded, `main`, and then the shortest way out.

    Taking down an interpreter that has torch loaded takes a quarter of a second, and there is nothing left to save. What is
    made while modules are loaded mostly stays, so that looking rarely for what does not saves a thirtieth of a short run.
    NumPy's linear algebra library starts threads that look for work in vain, for a while on a core that a merge needs:
    they are told to sleep at once.
    """
    gc.set_threshold(100_000)
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    put_off("torch")
    put_off("numpy")
    from geomerge.cli.app import main

    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
