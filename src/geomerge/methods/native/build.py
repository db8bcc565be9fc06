"""Compiles `kernels.c`, which takes in the headers beside it: run by the wheel's build (hatch_build.py), or by hand with
``python -m geomerge.methods.native.build``.

Needs nothing but the standard library and a C compiler (``$CC``, or else ``cc``). Without one there is no library, and torch
does all.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
HEADERS = SOURCE.parent
LIBRARY = Path(__file__).with_name("kernels.so")

_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
"""No contraction and no reassociation: the bits must be those of the torch code that the loops stand for."""

_LEVEL = {"x86_64": ("-march=x86-64-v3",), "AMD64": ("-march=x86-64-v3",)}
"""What the binding asks of the processor before it loads the library: AVX2 and fused multiply-add."""


def fingerprint() -> str:
    """Of the sources: what a library must say of itself to be loaded."""
    sources = [SOURCE, *sorted(HEADERS.glob("*.h"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def build(target: Path = LIBRARY) -> str | None:
    """Compile the library.

    Returns:
        Why there is none now, or `None`.
    """
    if sys.platform not in ("linux", "darwin"):
        return f"nobody has tried to compile it on {sys.platform}"
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return "there is no C compiler"
    # Made beside it and renamed: processes that have loaded the old one keep it.
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    level = _LEVEL.get(platform.machine(), ())
    source = f'-DGEOMERGE_SOURCE="{fingerprint()}"'
    command = [compiler, *_FLAGS, *level, source, f"-I{HEADERS}", "-o", str(fresh), str(SOURCE), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fresh.unlink(missing_ok=True)
        return f"{compiler} failed: {done.stderr.strip()[:500]}"
    fresh.replace(target)
    return None


if __name__ == "__main__":
    sys.exit(build())
