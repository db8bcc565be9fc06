"""Experts one after the other: accuracy on all tasks seen so far, and memory, after each step; table and figure of
docs/continual.md. What is measured is kept in docs/continual.json.

    python benchmarks/continual.py                     # everything
    python benchmarks/continual.py --only average      # one row; the others stay as they were measured
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import peak_anonymous

import geomerge as gm
from geomerge.lab.suite import Suite, load_suite

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "opcm": "OPCM",
    "average": "average",
    "task_arithmetic": "task arithmetic, λ = 0.3",
    "ties": "TIES, λ = 0.5",
}
COLOURS = {"opcm": "#1f7a8c", "average": "#9aa4af", "task_arithmetic": "#d1495b", "ties": "#b98b2f", "own": "#57606a"}
ORDERS = 3
SAMPLES = 400
"""Of each task's test split, the first ones."""

RESULTS = ROOT / "docs" / "continual.json"


def orders(names: list[str]) -> list[list[str]]:
    """The experts as listed, the other way round, and shuffled."""
    shuffled = list(names)
    random.Random(0).shuffle(shuffled)
    return [names, names[::-1], shuffled][:ORDERS]


class Scores:
    """Accuracy of a model of the suite on its tasks' test splits."""

    def __init__(self, suite: Suite) -> None:
        self.suite, self.tasks = suite, suite.tasks()

    def mean(self, model: str | Path, names: list[str]) -> float:
        """Over tasks, in per cent."""
        module = self.suite.load(model)
        return 100 * float(np.mean([self.tasks[n].correct(module, "test", SAMPLES).mean() for n in names]))


def curve(suite: Suite, scores: Scores, method: str, order: list[str], folder: Path) -> list[float]:
    """Mean accuracy on the tasks seen so far after each expert."""
    found = []
    for k, name in enumerate(order, 1):
        first: dict[str, Any] = {"base": suite.base, "method": method} if k == 1 else {}
        gm.continue_merge(folder, [suite.experts[name]], **first)
        found.append(scores.mean(folder, order[:k]))
    shutil.rmtree(folder)
    return found


def memory(suite: Suite, order: list[str], folder: Path) -> list[float]:
    """Peak anonymous memory of each step of OPCM as a process, in MB above that of `import torch`."""
    torch_only = peak_anonymous([sys.executable, "-c", "import torch, time; torch.zeros(8) + 1; time.sleep(0.3)"])
    found = []
    for name in order:
        base = ["--base", str(suite.base)] if not found else []
        command = [
            sys.executable,
            "-m",
            "geomerge",
            "continue",
            str(folder),
            str(suite.experts[name]),
            *base,
            "--quiet",
        ]
        found.append(peak_anonymous(command) - torch_only)
    return found


def table(curves: dict[str, np.ndarray], own: np.ndarray, peaks: list[float]) -> str:
    """Means over the orders, with the least and the largest after the last expert."""
    steps = range(1, len(peaks) + 1)
    lines = [
        f"| accuracy on all tasks so far, %, after | {' | '.join(map(str, steps))} | last, over the orders |",
        "|---" * (len(peaks) + 2) + "|",
    ]
    for method, each in curves.items():
        last = each[:, -1]
        cells = " | ".join(f"{x:.1f}" for x in each.mean(0))
        lines.append(f"| {METHODS[method]} | {cells} | {last.min():.1f} to {last.max():.1f} |")
    lines.append(f"| each expert on its own task | {' | '.join(f'{x:.1f}' for x in own.mean(0))} | |")
    lines.append(f"| memory of an OPCM step, MB above `import torch` | {' | '.join(f'{x:.0f}' for x in peaks)} | |")
    return "\n".join(lines) + "\n"


def picture(curves: dict[str, np.ndarray], own: np.ndarray) -> None:
    """docs/continual.svg, on white."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    grey = "#57606a"
    mpl.rcParams.update(
        {
            "svg.hashsalt": "geomerge",
            "font.size": 11,
            "text.color": grey,
            "axes.labelcolor": grey,
            "axes.edgecolor": grey,
        }
    )
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    steps = np.arange(1, own.shape[1] + 1)
    axes.plot(steps, own.mean(0), color=COLOURS["own"], linestyle=":", label="each expert on its own task")
    for method, each in curves.items():
        axes.fill_between(steps, each.min(0), each.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)
        axes.plot(steps, each.mean(0), color=COLOURS[method], marker="o", markersize=4, label=METHODS[method])
    axes.set_xlabel("experts so far")
    axes.set_ylabel("accuracy on their tasks, %")
    axes.tick_params(colors=grey)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, labelcolor=grey)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "continual.svg", metadata={"Date": None})
    plt.close(figure)


def measure(suite: Suite, what: str) -> Any:
    """One row: a method's curves in each order, the experts' own accuracy, or the memory of OPCM's steps."""
    scores = Scores(suite)
    names = sorted(n for n in suite.experts if n in scores.tasks)
    with tempfile.TemporaryDirectory() as scratch:
        if what == "memory":
            return memory(suite, names, Path(scratch) / "merged")
        if what == "own":
            alone = {n: scores.mean(n, [n]) for n in names}
            return [[float(np.mean([alone[n] for n in o[:k]])) for k in range(1, len(o) + 1)] for o in orders(names)]
        return [curve(suite, scores, what, order, Path(scratch) / "merged") for order in orders(names)]


def write(rows: dict[str, Any]) -> None:
    """The table and the figure, once every row is there."""
    if set(rows) != {*METHODS, "own", "memory"}:
        return
    curves, own = {m: np.array(rows[m]) for m in METHODS}, np.array(rows["own"])
    path = ROOT / "docs" / "continual.md"
    text, made = path.read_text(), table(curves, own, rows["memory"])
    pattern = re.compile(r"(<!-- table:start -->\n).*?(<!-- table:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{path} has no <!-- table:start --> … <!-- table:end -->")
    path.write_text(pattern.sub(lambda m: m[1] + made + m[2], text))
    picture(curves, own)
    print(made)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*METHODS, "own", "memory"], default=[*METHODS, "own", "memory"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite("glyphs:tiny")
    for what in args.only:
        found = measure(suite, what)
        # Read again each time: another row may have been measured meanwhile.
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        rows[what] = found
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(what, np.round(found, 1).tolist(), flush=True)
        write(rows)


if __name__ == "__main__":
    main()
