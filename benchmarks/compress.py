"""How much of each expert survives compression, and in what size: the table of docs/compress.md.

python benchmarks/compress.py
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np

from geomerge.compress import compress, extract
from geomerge.lab.suite import load_suite

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compress.md"


def main() -> None:
    """Measure and write the table."""
    lines = ["| suite | method | size, of the experts' | accuracy kept, mean | least |", "|---|---|---|---|---|"]
    for name in ("skills", "glyphs"):
        suite = load_suite(name)
        tasks = suite.tasks()
        own = {t: tasks[t].correct(suite.load(t), "test").mean() for t in suite.experts}
        for method, threshold in (("tall", 0.2), ("tall", 0.4), ("tall", 0.6), ("emr", 0.0)):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                experts = {n: str(p) for n, p in suite.experts.items()}
                packed = compress(suite.base, experts, folder / "packed", method=method, threshold=threshold)
                kept = []
                for task in suite.experts:
                    extract(folder / "packed", task, folder / "out", base=suite.base, force=True)
                    kept.append(tasks[task].correct(suite.load(folder / "out"), "test").mean() / own[task])
            said = f"tall, λ {threshold}" if method == "tall" else "emr"
            share = packed.nbytes / packed.experts
            lines.append(
                f"| {name}, {len(own)} experts | {said} | {share:.0%} | {np.mean(kept):.1%} | {min(kept):.1%} |"
            )
            print(lines[-1], flush=True)
    text = re.sub(
        r"(<!-- compress:start -->\n).*?(<!-- compress:end -->)",
        lambda m: m[1] + "\n".join(lines) + "\n" + m[2],
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
