"""Compiles `kernels.c`, which takes in the headers beside it, and the loops that are made of `groups.txt`: run by the wheel's
build (hatch_build.py), or by hand with ``python -m geomerge.methods.native``.

Needs nothing but the standard library and a C compiler (``$CC``, or else ``cc``). Without one there is no library, and torch
does all.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
HEADERS = SOURCE.parent
GROUPS = Path(__file__).with_name("groups.txt")
"""Steps of recorded arithmetic that are compiled into one loop: see `geomerge.methods.steps.groups`."""

LIBRARY = Path(__file__).with_name("kernels.so")
WIDE = Path(__file__).with_name("kernels_wide.so")
"""The same for x86 processors with registers of 64 bytes, where the compiler knows of these. Both give the same bits."""

_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
"""No contraction and no reassociation: the bits must be those of the torch code that the loops stand for."""

_LEVELS = {
    LIBRARY.name: ("-march=x86-64-v3",),
    WIDE.name: ("-march=x86-64-v4", "-mavx512vbmi2", "-mprefer-vector-width=512"),
}
"""What the binding asks of an x86 processor before it loads the library: AVX2 and fused multiply-add, or AVX-512."""

X86 = platform.machine() in ("x86_64", "AMD64")


def fingerprint() -> str:
    """Of the sources: what a library must say of itself to be loaded."""
    sources = [SOURCE, *sorted(HEADERS.glob("*.h")), GROUPS, Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def build_all() -> str | None:
    """Compile the libraries, at the same time.

    Returns:
        Why there is none now, or `None`.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        wide = pool.submit(build, WIDE) if X86 else None
        reason = build()
    if reason or (wide and wide.result()):  # compilers that do not know of it, mostly
        WIDE.unlink(missing_ok=True)
    return reason


def build(target: Path = LIBRARY) -> str | None:
    """Compile one library, for the processors that its name says, or else for as many as can be.

    Returns:
        Why there is none now, or `None`.
    """
    import subprocess
    import tempfile  # whoever uses the libraries has no need of it

    if sys.platform not in ("linux", "darwin"):
        return f"nobody has tried to compile it on {sys.platform}"
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return "there is no C compiler"
    # Made beside it and renamed: processes that have loaded the old one keep it.
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    level = _LEVELS.get(target.name, _LEVELS[LIBRARY.name]) if X86 else ()
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
    """The source of the loops: of each group a function, and tables of the functions and of their numbers of steps.

    Each comes twice: from registers to registers, and for whole chunks of bfloat16 inputs, which are read where they lie. The
    latter sums up what is summed up.
    """
    texts = GROUPS.read_text().splitlines()
    numbers = range(1, len(texts) + 1)
    lengths = ", ".join(str(text.count("(")) for text in texts)
    tables = [f"static const int lengths[] = {{0, {lengths}}};\n"]
    for name in ("group", "quick"):
        names = ", ".join(f"{name}_{number}" for number in numbers)
        tables.append(f"static group *const {name}s[] = {{0, {names}}};\n")
    return "\n".join(_group(number, text) for number, text in enumerate(texts, 1)) + "".join(tables)


def _group(number: int, text: str) -> str:
    steps, ends = text.split(" > ")
    kept = [int(end) for end in ends.removesuffix(" summed").split()]
    operands: dict[str, str] = {}
    lines = []
    for n, (operation, listed) in enumerate(re.findall(r"(\w+)\(([\w,]*)\)", steps)):
        for place, operand in enumerate(listed.split(",")):
            if not operand.isdigit():
                operands.setdefault(operand, f"steps[{n}].{'abc'[place]}")
        values = [*(f"v{operand}" for operand in listed.split(",")), "0", "0"][:3]
        lines.append(f"const double v{n} = {operation.upper()}_OF({', '.join(values)}, x{n}, y{n});")
    numbers = [f"const double x{n} = steps[{n}].x, y{n} = steps[{n}].y;" for n in range(len(lines))]
    sums = [f"steps[{n}].data" for n in range(len(lines), len(lines) + len(kept))]
    stored = [f"registers[steps[{n}].to]" for n in kept]

    def function(name: str, inputs: set[str], targets: list[str], assignment: str) -> str:
        before, within = list(numbers), []
        for operand, place in operands.items():
            if operand in inputs:
                before.append(f"const uint16_t *{operand} = raw[{place}];")
                within.append(f"const double v{operand} = from_bf16({operand}[i]);")
            else:
                before.append(f"const double *{operand} = registers[{place}];")
                within.append(f"const double v{operand} = {operand}[i];")
        before += [f"double *o{n} = {target};" for n, target in zip(kept, targets, strict=True)]
        after = [f"o{n}[i] {assignment} v{n};" for n in kept]
        loop = ["ALIKE for (int i = 0; i < CHUNK; i++) {", *within, *lines, *after, "}"]
        return "\n    ".join([f"static GROUP({name}_{number}) {{", "(void)raw;", *before, *loop]) + "\n}\n"

    inputs = {operand for operand in operands if operand.startswith("i")}
    summed = ends.endswith("summed")
    quick = function("quick", inputs, *((sums, "+=") if summed else (stored, "=")))
    return function("group", set(), stored, "=") + quick


if __name__ == "__main__":
    sys.exit(build_all())
