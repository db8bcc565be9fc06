"""What all tests share: quiet libraries, and single-threaded torch so that parallel workers do not fight over two cores."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Set by the parallel runner: the program would break its lines for a terminal that is not there.
os.environ.pop("COLUMNS", None)
