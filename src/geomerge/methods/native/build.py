"""Compiles `kernels.c`, which takes in the headers beside it, and the loops that are made of `groups.txt`: run by the wheel's
build (hatch_build.py), or by hand with ``python -m geomerge.methods.native.build``.

Needs nothing but the standard library and a C compiler (``$CC``, or else ``cc``). Without one there is no library, and torch
does all.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
HEADERS = SOURCE.parent
GROUPS = Path(__file__).with_name("groups.txt")
"""Steps of recorded arithmetic that are compiled into one loop: see `geomerge.methods.steps.groups`."""

LIBRARY = Path(__file__).with_name("kernels.so")

_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
"""No contraction and no reassociation: the bits must be those of the torch code that the loops stand for."""

_LEVEL = {"x86_64": ("-march=x86-64-v3",), "AMD64": ("-march=x86-64-v3",)}
"""What the binding asks of the processor before it loads the library: AVX2 and fused multiply-add."""


def fingerprint() -> str:
    """Of the sources: what a library must say of itself to be loaded."""
    sources = [SOURCE, *sorted(HEADERS.glob("*.h")), GROUPS, Path(__file__)]
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
    with tempfile.TemporaryDirectory() as made:
        Path(made, "groups.h").write_text(groups())
        command = [compiler, *_FLAGS, *level, source, f"-I{HEADERS}", f"-I{made}", "-o", str(fresh), str(SOURCE), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fresh.unlink(missing_ok=True)
        return f"{compiler} failed: {done.stderr.strip()[:500]}"
    fresh.replace(target)
    return None


def groups() -> str:
    """The source of the loops: of each group a function, and tables of the functions and of their numbers of steps."""
    texts = GROUPS.read_text().splitlines()
    names = ", ".join(f"group_{number}" for number in range(1, len(texts) + 1))
    lengths = ", ".join(str(text.count("(")) for text in texts)
    tables = f"static group *const groups[] = {{0, {names}}};\nstatic const int lengths[] = {{0, {lengths}}};\n"
    return "\n".join(_group(f"group_{number}", text) for number, text in enumerate(texts, 1)) + tables


def _group(name: str, text: str) -> str:
    steps, kept = text.split(" > ")
    registers: dict[str, str] = {}
    lines = []
    for number, (operation, operands) in enumerate(re.findall(r"(\w+)\(([\w,]*)\)", steps)):
        read = []
        for place, operand in enumerate(operands.split(",")):
            if operand.startswith("r"):
                registers.setdefault(operand, f"steps[{number}].{'abc'[place]}")
            read.append(f"{operand}[i]" if operand.startswith("r") else f"v{operand}")
        values = [*read, "0", "0"][:3]
        lines.append(
            f"        const double v{number} = {operation.upper()}_OF({', '.join(values)}, x{number}, y{number});"
        )
    count = len(lines)
    numbers = [f"    const double x{n} = steps[{n}].x, y{n} = steps[{n}].y;" for n in range(count)]
    reads = [f"    const double *{register} = registers[{place}];" for register, place in registers.items()]
    writes = [f"    double *o{n} = registers[steps[{n}].to];" for n in kept.split()]
    ends = [f"        o{n}[i] = v{n};" for n in kept.split()]
    loop = "    ALIKE for (int i = 0; i < CHUNK; i++) {"
    head = f"static void {name}(double (*registers)[CHUNK], const struct step *steps) {{"
    return "\n".join([head, *numbers, *reads, *writes, loop, *lines, *ends, "    }", "}", ""])


if __name__ == "__main__":
    sys.exit(build())
